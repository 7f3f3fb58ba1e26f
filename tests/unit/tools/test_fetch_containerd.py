"""What is read from the machine to fetch containerd, and what is recognised of what is there. Nothing is fetched here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tools import fetch_containerd
from tools.fetch_containerd import RefusedError, Source

DEB822 = """\
Types: deb
# http://elsewhere.example/debian
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""
SIGNED = "signed-by=/usr/share/keyrings/debian-archive-keyring.gpg"


def etc_apt(directory: Path, **files: str) -> Path:
    (directory / "sources.list.d").mkdir()
    for name, text in files.items():
        part, _, kind = name.rpartition("_")
        path = directory / (f"sources.list.d/{part}.{kind}" if part else "sources.list")
        path.write_text(text)
    return directory


def test_a_deb822_stanza_gives_its_address_and_key() -> None:
    assert list(fetch_containerd.deb822_sources(DEB822)) == [Source("http://mirror.example/debian", SIGNED)]


@pytest.mark.parametrize(
    "change",
    [
        ("Types: deb", "Types: deb-src"),
        ("Suites: bookworm bookworm-updates", "Suites: bookworm-security"),
        ("Components: main", "Components: stable"),
        ("Components: main", "Components: main\nEnabled: no"),
    ],
)
def test_a_stanza_that_is_not_debians_archive_is_passed_over(change: tuple[str, str]) -> None:
    assert list(fetch_containerd.deb822_sources(DEB822.replace(*change))) == []


def test_of_several_stanzas_and_addresses_all_are_seen() -> None:
    text = f"{DEB822.replace('bookworm', 'nodistro')}\n{DEB822.replace('URIs: ', 'URIs: file:/srv/debian ')}"

    addresses = [source.uri for source in fetch_containerd.deb822_sources(text)]

    assert addresses == ["file:/srv/debian", "http://mirror.example/debian"]


def test_a_key_inside_the_file_is_left_to_apt() -> None:
    text = DEB822.replace(
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg",
        "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n -----END PGP PUBLIC KEY BLOCK-----",
    )

    assert list(fetch_containerd.deb822_sources(text)) == [Source("http://mirror.example/debian")]


def test_one_line_sources() -> None:
    text = f"""\
# deb http://old.example/debian bookworm main
deb-src http://mirror.example/debian bookworm main
deb [arch=amd64] http://other.example/linux/debian bookworm stable
deb http://cloud.example/apt cloud-sdk-bookworm main
deb [ {SIGNED} ] http://mirror.example/debian bookworm main contrib # ours
deb http://second.example/debian sid main
"""

    assert list(fetch_containerd.one_line_sources(text)) == [
        Source("http://mirror.example/debian", SIGNED),
        Source("http://second.example/debian"),
    ]


def test_a_sources_line_for_another_suite() -> None:
    assert Source("http://mirror.example/debian", SIGNED).line("sid") == (
        f"deb [{SIGNED}] http://mirror.example/debian sid main\n"
    )
    assert Source("file:/srv/debian").line("trixie") == "deb file:/srv/debian trixie main\n"


def test_the_machines_archive_is_the_first_of_its_sources(tmp_path: Path) -> None:
    apt = etc_apt(
        tmp_path,
        cloud_list="deb http://cloud.example/apt cloud main\n",
        debian_sources=DEB822,
    )

    assert fetch_containerd.machine_source(apt).uri == "http://mirror.example/debian"


def test_the_old_sources_file_comes_before_the_parts(tmp_path: Path) -> None:
    apt = etc_apt(tmp_path, _list="deb http://first.example/debian bookworm main\n", debian_sources=DEB822)

    assert fetch_containerd.machine_source(apt).uri == "http://first.example/debian"


def test_a_machine_without_debians_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no archive of Debian's"):
        fetch_containerd.machine_source(etc_apt(tmp_path))


def test_apt_keeps_to_its_own_state(tmp_path: Path) -> None:
    lines = fetch_containerd.apt_configuration(tmp_path).splitlines()

    paths = [line for line in lines if line.startswith("Dir::") and "/dev/null" not in line]
    assert len(paths) == 5
    assert all(f'"{tmp_path}/' in line for line in paths)
    assert 'Dir::Etc::SourceParts "/dev/null";' in lines


def test_versions_are_read_from_the_names_of_archives() -> None:
    names = ["containerd_1.6.20~ds1-1+deb12u3_amd64.deb", "libnl_1%3a3.7-1_arm64.deb"]

    assert fetch_containerd.versions_of(names) == {"containerd": "1.6.20~ds1-1+deb12u3", "libnl": "1:3.7-1"}


@pytest.mark.parametrize(
    ("ldd", "lacks"),
    [
        ("\tlibc.so.6 => /lib/libc.so.6 (0x0000)\n", False),
        ("\tnot a dynamic executable\n", False),
        ("\tlibnet.so.9 => not found\n", True),
        ("runc: /lib/libc.so.6: version `GLIBC_2.38' not found (required by runc)\n", True),
    ],
)
def test_a_program_that_cannot_run_here_is_recognised(ldd: str, lacks: bool) -> None:
    assert fetch_containerd.lacks_libraries(ldd) is lacks


def test_a_stamp_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "fetched.json").write_text(fetch_containerd.stamp("sid", tmp_path, {"containerd": "2.1.9"}))

    assert fetch_containerd.fetched(tmp_path) == {"containerd": "2.1.9"}


@pytest.mark.parametrize("change", [{"recipe": 0}, {"directory": "/moved"}])
def test_what_an_older_script_or_another_place_has_left_counts_for_nothing(
    tmp_path: Path, change: dict[str, object]
) -> None:
    fields = json.loads(fetch_containerd.stamp("sid", tmp_path, {"containerd": "2.1.9"}))
    (tmp_path / "fetched.json").write_text(json.dumps(fields | change))

    assert fetch_containerd.fetched(tmp_path) is None


@pytest.mark.parametrize("text", [None, "", "{"])
def test_without_a_whole_stamp_nothing_is_there(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "fetched.json").write_text(text)

    assert fetch_containerd.fetched(tmp_path) is None


@pytest.mark.parametrize(
    ("environment", "directory"),
    [
        ({"XDG_CACHE_HOME": "/var/cache/x", "HOME": "/people/u"}, "/var/cache/x/libcontainerd"),
        ({"HOME": "/people/u"}, "/people/u/.cache/libcontainerd"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/people/u"}, "/people/u/.cache/libcontainerd"),
    ],
)
def test_the_cache_is_where_xdg_says(environment: dict[str, str], directory: str) -> None:
    assert fetch_containerd.cache_directory(environment) == Path(directory)


def test_what_is_there_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    destination = tmp_path / "libcontainerd/sid"
    destination.mkdir(parents=True)
    text = fetch_containerd.stamp("sid", destination, {"containerd": "2.1.9", "runc": "1.3.6"})
    (destination / "fetched.json").write_text(text)

    assert fetch_containerd.main(["fetch", "sid"]) == 0
    assert fetch_containerd.main(["list"]) == 0

    said = capsys.readouterr().out
    assert f"fetch: sid: containerd 2.1.9, runc 1.3.6 in {destination}\n" in said
    assert said.splitlines()[-1] == f"sid: containerd 2.1.9, runc 1.3.6 in {destination}"


def test_who_is_not_root_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    assert fetch_containerd.main(["fetch", "sid"]) == 1

    assert capsys.readouterr().err.startswith("fetch: needs ")
    assert not (tmp_path / "libcontainerd/sid").exists()


def test_a_suites_name_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fetch_containerd.main(["fetch", "../etc"])

    assert "no name of a Debian suite" in capsys.readouterr().err
