"""From an image's configuration to a process: what wins over what, and whose files are read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libcontainerd import oci
from libcontainerd.errors import InvalidParameterError

_PASSWD = """\
# a comment:x:1:1
root:x:0:0:root:/root:/bin/sh
app:x:1000:1001:An app:/srv:/bin/sh
other:x:1000:1002::/:/bin/sh
2000:x:3000:3001::/:/bin/sh
broken:x:one:two::/:/bin/sh
huge:x:99999999999:1::/:/bin/sh
short:x
+::::::
"""
_GROUP = """\
root:x:0:root
app:x:1001:
audio:x:29:app,other
video:x:44:other,app
tool:x:1001:app
wheel:x:10:root
broken:x:ten:app
short:x
"""


@pytest.fixture
def image_root(tmp_path: Path) -> Path:
    root = tmp_path / "image"
    (root / "etc").mkdir(parents=True)
    (root / "etc/passwd").write_text(_PASSWD)
    (root / "etc/group").write_text(_GROUP)
    return root


def user(process: oci.Process) -> tuple[int | None, int | None, list[int] | None]:
    assert process.user is not None
    return process.user.uid, process.user.gid, process.user.additional_gids


@pytest.mark.parametrize(
    ("entrypoint", "cmd", "args", "new_entrypoint", "expected"),
    [
        (None, ["sh"], [], None, ["sh"]),
        (["a"], None, [], None, ["a"]),
        (["a"], ["b", "c"], [], None, ["a", "b", "c"]),
        (["a"], ["b", "c"], ["d"], None, ["a", "d"]),
        (None, ["b"], ["d", "e"], None, ["d", "e"]),
        (["a"], ["b"], [], ["x"], ["x"]),
        (["a"], ["b"], ["d"], ["x"], ["x", "d"]),
        (["a"], ["b"], ["d"], [], ["d"]),
        ([], [], ["d"], None, ["d"]),
    ],
)
def test_program(
    entrypoint: list[str] | None,
    cmd: list[str] | None,
    args: list[str],
    new_entrypoint: list[str] | None,
    expected: list[str],
) -> None:
    image = {"config": {"Entrypoint": entrypoint, "Cmd": cmd}}

    assert oci.process_from_image(image, args, entrypoint=new_entrypoint).args == expected


@pytest.mark.parametrize(
    "image", [{}, {"config": {}}, {"config": None}, {"Entrypoint": [], "Cmd": None}, "{}"]
)
def test_an_image_without_a_program_needs_one(image: dict[str, object] | str) -> None:
    with pytest.raises(InvalidParameterError, match="the image names no program to run: give args"):
        oci.process_from_image(image)

    process = oci.process_from_image(image, ["true"])
    assert (process.args, process.cwd, user(process)) == (["true"], "/", (0, 0, [0]))


def test_the_config_alone_is_taken_as_well() -> None:
    config = {"Cmd": ["sh"], "WorkingDir": "/srv", "Labels": {"a": "b"}, "ExposedPorts": {"80/tcp": {}}}

    assert oci.process_from_image(config) == oci.process_from_image({"config": config, "os": "linux"})


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (None, ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]),
        (["PATH=/bin"], ["PATH=/bin"]),
        (["PATH=/bin", "A=b=c", "A=d"], ["PATH=/bin", "A=d"]),
    ],
)
def test_environment(env: list[str] | None, expected: list[str]) -> None:
    assert oci.process_from_image({"config": {"Cmd": ["sh"], "Env": env}}).env == expected


@pytest.mark.parametrize(
    ("working_dir", "expected"), [(None, "/"), ("", "/"), ("/srv", "/srv"), ("srv", "/srv")]
)
def test_working_directory(working_dir: str | None, expected: str) -> None:
    assert oci.process_from_image({"config": {"Cmd": ["sh"], "WorkingDir": working_dir}}).cwd == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", (0, 0, [0, 10])),
        ("root", (0, 0, [0, 10])),
        ("0", (0, 0, [0, 10])),
        ("app", (1000, 1001, [1001, 29, 44])),
        ("1000", (1000, 1001, [1001, 29, 44])),
        ("app:", (1000, 1001, [1001, 29, 44])),
        ("app:audio", (1000, 29, [29])),
        ("app:5", (1000, 5, [5])),
        (":audio", (0, 29, [29])),
        ("7", (7, 0, [0])),
        ("7:8", (7, 8, [8])),
        # A name of digits is a name first.
        ("2000", (3000, 3001, [3001])),
        ("4294967295:4294967295", (2**32 - 1, 2**32 - 1, [2**32 - 1])),
    ],
)
def test_users(image_root: Path, name: str, expected: tuple[int, int, list[int]]) -> None:
    image = {"config": {"Cmd": ["sh"], "User": name}}

    assert user(oci.process_from_image(image, rootfs=image_root)) == expected
    assert (
        user(oci.process_from_image({"Cmd": ["sh"], "User": "nobody"}, user=name, rootfs=image_root))
        == expected
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody", "the image has no user 'nobody'"),
        ("app:nogroup", "the image has no group 'nogroup'"),
        ("broken", "the image has no user 'broken'"),
        ("huge", "the image has no user 'huge'"),
        ("short", "the image has no user 'short'"),
        ("4294967296", "the image has no user '4294967296'"),
        ("-1", "the image has no user '-1'"),
        ("\u0661", "the image has no user '\u0661'"),
        ("app:broken", "the image has no group 'broken'"),
    ],
)
def test_users_that_are_not_there(image_root: Path, name: str, message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        oci.process_from_image({"Cmd": ["sh"], "User": name}, rootfs=image_root)


def test_names_need_the_image() -> None:
    assert user(oci.process_from_image({"Cmd": ["sh"], "User": "5:6"})) == (5, 6, [6])
    with pytest.raises(InvalidParameterError, match="the user 'app' is a name: give rootfs"):
        oci.process_from_image({"Cmd": ["sh"], "User": "app"})
    with pytest.raises(InvalidParameterError, match="the group 'app' is a name: give rootfs"):
        oci.process_from_image({"Cmd": ["sh"], "User": "5:app"})


def test_an_image_without_the_files_knows_no_names(tmp_path: Path) -> None:
    assert user(oci.process_from_image({"Cmd": ["sh"], "User": "5"}, rootfs=tmp_path)) == (5, 0, [0])
    with pytest.raises(InvalidParameterError, match="the image has no user 'root'"):
        oci.process_from_image({"Cmd": ["sh"], "User": "root"}, rootfs=tmp_path)


@pytest.mark.parametrize(
    "target",
    [
        "/lib/passwd",
        "../lib/passwd",
        "../../../../lib/passwd",
        "/etc/../lib/./passwd",
        "//lib//hop",
        "/loop/lib/passwd",
    ],
)
def test_links_stay_inside_the_image(image_root: Path, target: str) -> None:
    (image_root / "lib").mkdir()
    (image_root / "lib/passwd").write_text("app:x:5:6::/:/bin/sh\n")
    (image_root / "lib/hop").symlink_to("passwd")
    (image_root / "loop").symlink_to("/")
    (image_root / "etc/passwd").unlink()
    (image_root / "etc/passwd").symlink_to(target)

    assert user(oci.process_from_image({"Cmd": ["sh"], "User": "app"}, rootfs=image_root))[:2] == (5, 6)


def test_no_link_leads_to_the_hosts_files(image_root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("spy:x:5:6::/:/bin/sh\n")
    for target in (outside, f"../../{outside.name}", os.path.relpath(outside, image_root / "etc")):
        (image_root / "etc/passwd").unlink()
        (image_root / "etc/passwd").symlink_to(target)
        with pytest.raises(InvalidParameterError, match="the image has no user 'spy'"):
            oci.process_from_image({"Cmd": ["sh"], "User": "spy"}, rootfs=image_root)


def test_links_in_a_circle_fifos_and_directories_read_as_empty(image_root: Path) -> None:
    passwd = image_root / "etc/passwd"
    passwd.unlink()
    makers: tuple[Callable[[], None], ...] = (
        lambda: passwd.symlink_to("passwd"),
        lambda: os.mkfifo(passwd),
        passwd.mkdir,
    )
    for make in makers:
        make()
        with pytest.raises(InvalidParameterError, match="the image has no user 'app'"):
            oci.process_from_image({"Cmd": ["sh"], "User": "app"}, rootfs=image_root)
        passwd.rmdir() if passwd.is_dir() else passwd.unlink()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"config": {"Env": "A=b"}}, "invalid image: config.Env must be an array"),
        ({"config": {"Cmd": [1]}}, r"invalid image: config.Cmd\[0\] must be a string"),
        ({"config": []}, "invalid image: config must be an object"),
        ({"User": 5}, "invalid image config: User must be a string"),
        ('{"config": {}, "config": {}}', "invalid image: config occurs twice"),
        ("[", "invalid image: not JSON"),
        (5, "invalid image: must be a mapping"),
    ],
)
def test_what_is_no_image_is_refused(image: object, message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        oci.process_from_image(image, ["sh"])  # type: ignore[arg-type]


@given(st.binary(max_size=200))
def test_no_passwd_makes_it_stumble(content: bytes) -> None:
    from libcontainerd.oci import _image

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_image, "_read_inside", lambda rootfs, path: content)
        for name in ("app", "5", "app:app"):
            try:
                process = oci.process_from_image({"Cmd": ["sh"], "User": name}, rootfs="/")
            except InvalidParameterError:
                continue
            assert oci.validate(process) == []


def test_the_option_keeps_what_the_image_says_nothing_of() -> None:
    image = {"config": {"Cmd": ["sh"], "Env": ["A=image"]}}
    spec = oci.build(
        oci.default_spec(),
        oci.with_env({"A": "before", "B": "before"}),
        oci.with_image_config(image),
        oci.with_terminal(),
    )

    assert spec.process is not None
    assert spec.process.env is not None
    assert spec.process.env[1:] == ["A=image", "B=before", "TERM=xterm"]
    assert spec.process.capabilities is not None
