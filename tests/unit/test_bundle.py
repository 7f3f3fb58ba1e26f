"""Bundle directories: who owns them, who may enter them, what is taken back and what is removed."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from libcontainerd import _bundle
from libcontainerd._bundle import BUNDLE_LABEL, LABEL_BYTES, Bundle
from libcontainerd.errors import (
    ConflictError,
    InvalidParameterError,
    PermissionDeniedError,
    SystemFailureError,
)
from tests.unit.beside import race

ROOT = (0, 0)
# Only root may give files away; everybody may give them to himself.
MAPPED = (100_000, 100_001) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
SUFFIX = f".{MAPPED[0]}.{MAPPED[1]}"


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory that everybody may enter, all the way down; pytest's own are for us alone."""
    directory = Path(tempfile.mkdtemp(prefix="libcontainerd-bundle-", dir="/tmp"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def state(base: Path) -> Path:
    """A state directory that is not there yet."""
    return base / "state"


@pytest.fixture(autouse=True)
def _no_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIBCONTAINERD_NOCLEAN", raising=False)


def mode(path: str | Path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def owner(path: str | Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_uid, found.st_gid


def tree(path: Path) -> list[str]:
    return sorted(str(each.relative_to(path)) for each in path.rglob("*"))


# ------------------------------------------------------------------------------------------------------------------ root


def test_roots_bundle_is_a_plain_directory(state: Path) -> None:
    before = os.umask(0o777)
    try:
        bundle = Bundle.prepare(str(state), "web", ROOT)
    finally:
        os.umask(before)

    assert bundle.path == str(state / "web")
    assert bundle.owner == ROOT
    assert bundle.made == (str(state), str(state / "web"))
    assert mode(state) == mode(bundle.path) == 0o755
    assert owner(bundle.path) == (os.geteuid(), os.getegid())


def test_what_was_there_is_not_ours_to_take_back(state: Path) -> None:
    state.mkdir(mode=0o700)
    bundle = Bundle.prepare(str(state), "web", ROOT)
    assert bundle.made == (str(state / "web"),)
    assert mode(state) == 0o700
    again = Bundle.prepare(str(state), "web", ROOT)
    assert (again.path, again.made) == (bundle.path, ())

    again.undo()
    assert tree(state) == ["web"]
    bundle.undo()
    assert tree(state) == []
    bundle.undo()


def test_undo_takes_back_what_was_made_and_is_empty(state: Path) -> None:
    first = Bundle.prepare(str(state), "one", ROOT)
    second = Bundle.prepare(str(state), "two", ROOT)
    first.undo()
    assert tree(state) == ["two"]
    (state / "two" / "file").write_bytes(b"")
    second.undo()
    assert tree(state) == ["two", "two/file"]


# ----------------------------------------------------------------------------------------------------------- mapped root


def test_a_mapped_roots_bundle_is_its_own_all_the_way(state: Path) -> None:
    before = os.umask(0o777)
    try:
        bundle = Bundle.prepare(str(state / "deep"), "web", MAPPED)
    finally:
        os.umask(before)

    # Each component that was missing, or that others may not enter, carries the suffix.
    made = Path(bundle.path)
    assert made.name == "web" + SUFFIX
    assert made.parent.name == "deep" + SUFFIX
    assert bundle.owner == MAPPED
    assert bundle.made[-1] == bundle.path
    for each in bundle.made:
        assert each.endswith(SUFFIX)
        assert mode(each) == 0o700
        assert owner(each) == MAPPED
    assert not (state / "deep").exists()


def test_a_component_that_others_may_enter_is_taken_as_it_is(state: Path) -> None:
    state.mkdir()
    state.chmod(0o701)
    bundle = Bundle.prepare(str(state), "web", MAPPED)
    assert bundle.path == str(state / "web") + SUFFIX
    assert bundle.made == (bundle.path,)

    state.chmod(0o750)
    other = Bundle.prepare(str(state), "db", MAPPED)
    assert other.path == f"{state}{SUFFIX}/db{SUFFIX}"
    assert owner(f"{state}{SUFFIX}") == MAPPED


def test_a_directory_of_the_mapped_root_is_shared(state: Path) -> None:
    first = Bundle.prepare(str(state), "one", MAPPED)
    second = Bundle.prepare(str(state), "two", MAPPED)
    parent = Path(first.path).parent
    assert Path(second.path).parent == parent
    assert len(second.made) == 1

    first.remove()
    assert not os.path.exists(first.path)
    assert os.path.isdir(second.path)
    second.remove()
    assert not parent.exists(), "the last one takes the shared directories with it"


def test_removal_stops_at_what_is_not_the_mapped_roots(state: Path) -> None:
    bundle = Bundle.prepare(str(state), "web", MAPPED)
    stranger = Path(bundle.path).parent / "stranger"
    stranger.mkdir()
    bundle.remove()
    assert stranger.is_dir()
    assert state.parent.is_dir()


def test_containers_come_and_go_beside_each_other(state: Path) -> None:
    # One's removal takes the shared parent away under another's preparation.
    def live(name: str) -> list[str]:
        paths = []
        for _ in range(60):
            bundle = Bundle.prepare(str(state / "shared"), name, MAPPED)
            assert owner(bundle.path) == MAPPED
            bundle.remove()
            paths.append(bundle.path)
        return paths

    outcomes = race(lambda: live("one"), lambda: live("two"), lambda: live("three"))
    assert [each for each in outcomes if isinstance(each, BaseException)] == []
    assert tree(state.parent) == []


@pytest.mark.parametrize("owned_by", [ROOT, MAPPED])
def test_a_bundle_that_somebody_took_away_is_made_again(state: Path, owned_by: tuple[int, int]) -> None:
    bundle = Bundle.prepare(str(state / "deep"), "web", owned_by)
    modes = [mode(each) for each in bundle.made]
    bundle.ensure()
    for each in reversed(bundle.made):
        os.rmdir(each)
    bundle.ensure()
    assert [mode(each) for each in bundle.made] == modes
    if owned_by == MAPPED:
        assert {owner(each) for each in bundle.made} == {MAPPED}


def test_a_bundle_that_cannot_be_made_again_is_said(state: Path) -> None:
    bundle = Bundle.prepare(str(state), "web", ROOT)
    bundle.undo()
    state.write_bytes(b"somebody's")
    with pytest.raises(SystemFailureError, match="cannot make the bundle directory"):
        bundle.ensure()


# --------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("owned_by", [ROOT, MAPPED])
def test_a_file_in_the_way_is_refused_and_nothing_stays(state: Path, owned_by: tuple[int, int]) -> None:
    state.write_bytes(b"somebody's")
    state.chmod(0o755)
    with pytest.raises(SystemFailureError, match="cannot make the bundle of container 'web'") as caught:
        Bundle.prepare(str(state), "web", owned_by)
    assert isinstance(caught.value.__cause__, OSError)
    assert tree(state.parent) == ["state"]


@pytest.mark.parametrize("owned_by", [ROOT, MAPPED])
def test_a_path_that_fits_no_label_is_refused_and_nothing_stays(
    state: Path, owned_by: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel's limit for one path is below the label's; the label's is lowered to meet it.
    bundle = Bundle.prepare(str(state), "web", owned_by)
    longest = len(BUNDLE_LABEL) + len(bundle.path)
    bundle.remove()
    monkeypatch.setattr(_bundle, "LABEL_BYTES", longest)
    Bundle.prepare(str(state), "web", owned_by).remove()
    before = tree(state.parent)
    monkeypatch.setattr(_bundle, "LABEL_BYTES", longest - 1)
    with pytest.raises(InvalidParameterError, match="choose a shorter state_dir"):
        Bundle.prepare(str(state), "web", owned_by)
    assert tree(state.parent) == before
    assert LABEL_BYTES == 4096


def test_a_name_that_the_kernel_refuses_is_said_in_our_words(state: Path) -> None:
    with pytest.raises(SystemFailureError, match="File name too long"):
        Bundle.prepare(str(state / ("x" * 300)), "web", ROOT)
    assert tree(state.parent) == []


def test_no_permission_is_said_in_our_words(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, mode: int) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(PermissionDeniedError, match=r"run as root, or choose another state_dir") as caught:
        Bundle.prepare(str(state), "web", ROOT)
    assert isinstance(caught.value.__cause__, PermissionError)


def test_an_owner_that_cannot_be_given_leaves_nothing(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, uid: int, gid: int) -> None:
        raise PermissionError(1, "Operation not permitted", path)

    before = tree(state.parent)
    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(PermissionDeniedError, match="Operation not permitted"):
        Bundle.prepare(str(state), "web", MAPPED)
    assert tree(state.parent) == before


def test_parents_that_keep_disappearing_are_given_up(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def vanish(path: str, mode: int) -> None:
        attempts.append(path)
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr(os, "mkdir", vanish)
    with pytest.raises(SystemFailureError, match="its parents keep disappearing"):
        Bundle.prepare(str(state), "web", ROOT)
    assert 2 <= len(attempts) <= 500


# --------------------------------------------------------------------------------------------------------------- removal


def test_removal_takes_everything_in_it(state: Path) -> None:
    bundle = Bundle.prepare(str(state), "web", ROOT)
    os.mkfifo(os.path.join(bundle.path, "init-stdout"))
    os.makedirs(os.path.join(bundle.path, "a/b"))
    bundle.remove()
    assert tree(state) == []
    assert state.is_dir(), "the state directory is the user's"
    bundle.remove()


def test_noclean_keeps_it(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.prepare(str(state), "web", ROOT)
    monkeypatch.setenv("LIBCONTAINERD_NOCLEAN", "1")
    bundle.remove()
    assert tree(state) == ["web"]
    monkeypatch.setenv("LIBCONTAINERD_NOCLEAN", "0")
    bundle.remove()
    assert tree(state) == []


def test_a_removal_that_fails_is_logged(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.prepare(str(state), "web", ROOT)
    Path(bundle.path, "left").touch()

    def refuse(path: str) -> None:
        raise OSError(16, "Device or resource busy", path)

    with monkeypatch.context() as patched, capture_logs() as logs:
        patched.setattr(shutil, "rmtree", refuse)
        bundle.remove()
    (log,) = logs
    assert (log["event"], log["bundle"], log["log_level"]) == ("bundle_not_removed", bundle.path, "error")
    assert "busy" in log["error"]


def test_a_symbolic_link_in_a_bundle_is_not_followed(state: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_bytes(b"")
    bundle = Bundle.prepare(str(state), "web", ROOT)
    os.symlink(precious, os.path.join(bundle.path, "link"))
    bundle.remove()
    assert tree(precious) == ["file"]


# -------------------------------------------------------------------------------------------- two containers, one name


def test_a_plain_container_does_not_get_a_directory_that_is_anothers(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.mkdir(mode=0o755)
    taken = Bundle.prepare(str(state), f"web{SUFFIX}", ROOT)
    assert Bundle.prepare(str(state), f"web{SUFFIX}", ROOT).made == (), "its own it may find there"
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(
        ConflictError, match=rf"cannot create container 'web{SUFFIX}'.*belongs to {user}:{os.getegid()}"
    ):
        Bundle.prepare(str(state), f"web{SUFFIX}", ROOT)
    assert owner(taken.path) == (user, os.getegid())


def test_a_mapped_container_does_not_get_a_directory_that_is_anothers(state: Path) -> None:
    mapped = os.geteuid(), os.getegid() + 1
    plain = Bundle.prepare(str(state), f"web.{mapped[0]}.{mapped[1]}", ROOT)
    with pytest.raises(ConflictError, match=f"belongs to {os.geteuid()}:{os.getegid()}"):
        Bundle.prepare(str(state), "web", mapped)
    assert mode(plain.path) == 0o755
    assert tree(state) == [Path(plain.path).name]


# ------------------------------------------------------------------------------------------- what earlier clients left


def test_what_an_earlier_client_has_made_is_found(state: Path) -> None:
    """Also a mapped root's, whose place depends on what others might enter when it was made."""
    plain = Bundle.prepare(str(state), "plain", (0, 0))
    assert Bundle.find(str(state), "plain", (0, 0), plain.path).path == plain.path == str(state / "plain")
    mapped = Bundle.prepare(str(state), "mapped", MAPPED)
    assert Bundle.find(str(state), "mapped", MAPPED, mapped.path).path == mapped.path
    assert mapped.path.endswith(f"/mapped{SUFFIX}")


@pytest.mark.parametrize("mapped", [ROOT, MAPPED], ids=["root", "mapped"])
def test_what_was_prepared_is_found_by_its_label(state: Path, mapped: tuple[int, int]) -> None:
    made = Bundle.prepare(str(state), "web", mapped)
    found = Bundle.find(str(state), "web", mapped, made.path)
    assert (found.path, found.owner) == (made.path, mapped)
    found.remove()
    assert not os.path.exists(made.path)


def test_without_a_label_it_is_where_root_would_have_it(state: Path) -> None:
    assert Bundle.find(str(state), "web", ROOT, "").path == f"{state}/web"


@pytest.mark.parametrize(
    "label",
    [
        "/",
        "/etc",
        "web",
        "{state}",
        "{state}/other",
        "{state}/web/",
        "{state}/web/..",
        "{state}/../web",
        "{state}/web/../../x",
        "\0",
        "{state}/./web",
        "{state}/web.1.1",
        "{state}.1.1/web",
        "{state}/web/web",
        "{state}/we\0b",
        "{state}/web" + "x" * 10_000,
    ],
)
def test_a_label_that_leads_elsewhere_is_not_followed(state: Path, label: str) -> None:
    with capture_logs() as logs:
        found = Bundle.find(str(state), "web", MAPPED, label.format(state=state))
    assert found.path == f"{state}/web"
    ((event, container, shown),) = [(each["event"], each["container"], each["bundle"]) for each in logs]
    assert (event, container) == ("bundle_label_ignored", "web")
    assert len(shown) <= 200


def test_a_link_in_the_bundles_place_is_not_followed(state: Path, base: Path) -> None:
    state.mkdir()
    (base / "elsewhere").mkdir()
    (state / f"web{SUFFIX}").symlink_to(base / "elsewhere")
    with capture_logs():
        assert Bundle.find(str(state), "web", MAPPED, f"{state}/web{SUFFIX}").path == f"{state}/web"


def test_processes_are_told_by_the_names_of_their_files(state: Path) -> None:
    bundle = Bundle.prepare(str(state), "web", ROOT)
    assert bundle.left_behind() == {}
    names = [
        "init-stdin",
        "init-stdout",
        "a-exec-exec",
        "a-exec",
        "a.b-stdout-stderr",
        "b",
        "-exec",
        "x_-stdout",
    ]
    for name in (*names, "y" * 77 + "-exec", "c\n-exec"):
        Path(bundle.path, name).touch()
    assert bundle.left_behind() == {
        "init": {"stdin", "stdout"},
        "a": {"exec"},
        "a-exec": {"exec"},
        "a.b-stdout": {"stderr"},
    }
    assert bundle.mark_of("a") == f"{bundle.path}/a-exec"
    assert bundle.mark_of("") == ""


def test_what_a_process_left_is_forgotten_alone(state: Path) -> None:
    bundle = Bundle.prepare(str(state), "web", ROOT)
    for name in ("a-stdout", "a-stderr", "b-stdout"):
        Path(bundle.path, name).touch()
    bundle.forget("a", {"stdout", "stderr", "stdin"})
    assert bundle.left_behind() == {"b": {"stdout"}}


def test_a_bundle_that_is_gone_holds_nothing(state: Path) -> None:
    assert Bundle.find(str(state), "web", ROOT, f"{state}/web").left_behind() == {}
