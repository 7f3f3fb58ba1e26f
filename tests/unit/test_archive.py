"""The archive of a checkpoint: equal after a round trip, and nothing in a hostile one leads out of the directory."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libcontainerd import _archive as archive
from libcontainerd._archive import CHUNK_BYTES, ArchiveError, Entry, pack, survey, unpack


def packed(directory: Path) -> bytes:
    return b"".join(pack(survey(str(directory))))


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    return written.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, *, size: int = 0, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.size, made.linkname = kind, size, target
    return made


def file(name: str, data: bytes = b"data") -> tuple[tarfile.TarInfo, bytes]:
    return member(name, size=len(data)), data


def unpacked(data: bytes, directory: Path) -> None:
    unpack(io.BytesIO(data), str(directory), len(data))


def tree(directory: Path) -> dict[str, bytes | None]:
    return {
        str(each.relative_to(directory)): each.read_bytes() if each.is_file() else None
        for each in directory.rglob("*")
    }


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """An empty directory to unpack into; nothing beside it may appear or change."""
    beside = tmp_path / "beside"
    beside.write_bytes(b"as it was")
    inside = tmp_path / "place"
    inside.mkdir()
    yield inside
    assert beside.read_bytes() == b"as it was"
    assert sorted(os.listdir(tmp_path)) == ["beside", "place"]


# ------------------------------------------------------------------------------------------------------- round trips

_NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=40).filter(
    lambda name: name not in {".", ".."} and len(name.encode()) < 200
)
_FILES = st.dictionaries(
    st.lists(_NAMES, min_size=1, max_size=3).map(tuple), st.binary(max_size=2000), max_size=6
)


@given(files=_FILES)
def test_what_is_packed_is_unpacked(files: Mapping[tuple[str, ...], bytes]) -> None:
    root = Path(tempfile.mkdtemp())
    try:
        before, after = root / "before", root / "after"
        before.mkdir()
        after.mkdir()
        for parts, data in files.items():
            path = before.joinpath(*parts)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                continue  # a name that is a directory already
        data = packed(before)

        unpacked(data, after)

        assert tree(after) == tree(before)
        assert packed(after) == data
        assert len(data) % tarfile.RECORDSIZE == 0
    finally:
        shutil.rmtree(root)


def test_other_programs_can_read_it(tmp_path: Path) -> None:
    long = "n" * 150
    (tmp_path / "below" / long).mkdir(parents=True)
    (tmp_path / "below" / long / "größe").write_bytes(b"x" * 513)
    (tmp_path / "empty").touch()

    with tarfile.open(fileobj=io.BytesIO(packed(tmp_path))) as tar:
        found = {each.name: (each.isdir(), each.size, each.mode) for each in tar}

    assert found == {
        "below": (True, 0, 0o700),
        f"below/{long}": (True, 0, 0o700),
        f"below/{long}/größe": (False, 513, 0o600),
        "empty": (False, 0, 0o600),
    }


def test_a_large_file_comes_in_pieces(tmp_path: Path, place: Path) -> None:
    data = os.urandom(archive.CHUNK_BYTES * 2 + 1)
    source = place / "big"
    source.write_bytes(data)
    pieces = list(pack(survey(str(place))))
    source.unlink()

    assert max(map(len, pieces)) <= archive.CHUNK_BYTES
    unpacked(b"".join(pieces), place)
    assert source.read_bytes() == data


def test_the_files_are_their_owners_alone(place: Path) -> None:
    entry, data = file("dir/file")
    entry.mode = 0o6777
    entry.uid = entry.gid = 12345
    before = os.umask(0)
    try:
        unpacked(tar_of((entry, data)), place)
    finally:
        os.umask(before)

    for path, mode in ((place / "dir", 0o40700), (place / "dir/file", 0o100600)):
        status = path.stat()
        assert (status.st_mode, status.st_uid) == (mode, os.geteuid())


def test_names_that_say_here_are_taken(place: Path) -> None:
    members = [(member(".", tarfile.DIRTYPE), b""), (member("./", tarfile.DIRTYPE), b""), file("./a//b/./c")]

    unpacked(tar_of(*members), place)

    assert tree(place) == {"a": None, "a/b": None, "a/b/c": b"data"}


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "//x", "..", "../beside", "a/../../beside", "a/..", "./../x", "", ".", "./"],
)
def test_a_name_that_leads_out_is_refused(place: Path, name: str) -> None:
    with pytest.raises(ArchiveError, match="would leave its directory"):
        unpacked(tar_of(file(name)), place)
    assert tree(place) == {}


@pytest.mark.parametrize("name", ["/etc", "../x", "a/../.."])
def test_a_directory_that_leads_out_is_refused(place: Path, name: str) -> None:
    made = member(name, tarfile.DIRTYPE)

    with pytest.raises(ArchiveError, match="would leave its directory"):
        unpacked(tar_of((made, b"")), place)


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        b"Z",
    ],
)
@pytest.mark.parametrize("target", ["../beside", "/etc/passwd", "file"])
def test_links_and_devices_are_refused_wherever_they_point(place: Path, kind: bytes, target: str) -> None:
    data = tar_of(file("file"), (member("link", kind, target=target), b""), file("link/../escaped"))

    with pytest.raises(ArchiveError, match="'link' of the archive is neither a plain file nor a directory"):
        unpacked(data, place)
    assert tree(place) == {"file": b"data"}


def test_a_file_is_not_written_through_a_link_that_somebody_put_there(place: Path) -> None:
    (place / "file").symlink_to("../beside")

    with pytest.raises(ArchiveError, match="comes twice"):
        unpacked(tar_of(file("file")), place)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([file("a"), file("a", b"other")], "comes twice"),
        ([file("a"), file("./a", b"other")], "comes twice"),
        ([file("a"), file("a/b")], "both a file and a directory"),
        ([file("a"), (member("a", tarfile.DIRTYPE), b"")], "both a file and a directory"),
    ],
)
def test_a_name_comes_once(place: Path, members: list[tuple[tarfile.TarInfo, bytes]], said: str) -> None:
    with pytest.raises(ArchiveError, match=said):
        unpacked(tar_of(*members), place)
    assert (place / "a").read_bytes() == b"data"


def test_a_file_over_a_directory_is_refused(place: Path) -> None:
    with pytest.raises((ArchiveError, OSError)):
        unpacked(tar_of((member("a", tarfile.DIRTYPE), b""), file("a")), place)
    assert tree(place) == {"a": None}


def absurd(name: str, size: str) -> bytes:
    """An archive whose extended header says that a file is of an absurd size."""
    entry = member(name)
    entry.pax_headers = {"size": size}
    return tar_of((entry, b""))


@pytest.mark.parametrize("size", [str(1 << 62), str((1 << 64) - 1), "1" * 100])
def test_an_absurd_size_is_refused_before_anything_is_written(place: Path, size: str) -> None:
    with pytest.raises(ArchiveError, match="larger than the archive"):
        unpacked(absurd("big", size), place)
    assert tree(place) == {}


def test_many_sizes_together_cannot_be_more_than_the_archive(place: Path) -> None:
    data = tar_of(file("a", b"x" * 6000), file("b", b"y" * 6000))

    with pytest.raises(ArchiveError, match="'b' of the archive is larger"):
        unpack(io.BytesIO(data), str(place), 10_000)


def test_holes_are_refused(place: Path) -> None:
    """A few bytes of an archive can say that a file is mostly a hole, of any size."""
    entry = member("holes", size=512)
    entry.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 40)}

    with pytest.raises(ArchiveError):
        unpacked(tar_of((entry, b"x" * 512)), place)
    assert tree(place) == {}


@pytest.mark.parametrize("end", [100, 512, 700, 512 + 1024])
def test_an_archive_that_is_cut_off_is_refused(place: Path, end: int) -> None:
    data = tar_of(file("a", b"x" * 3000))

    with pytest.raises(ArchiveError):
        unpack(io.BytesIO(data[:end]), str(place), len(data))


def test_what_is_no_archive_is_refused(place: Path) -> None:
    for data in (b"", b"no archive at all", b"\xff" * 4096):
        with pytest.raises(ArchiveError, match="malformed"):
            unpacked(data, place)


def test_a_tower_of_long_names_is_refused(place: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2
    one = header.tobuf(tarfile.GNU_FORMAT) + b"x\0" + bytes(510)

    with pytest.raises(ArchiveError, match="malformed"):
        unpacked(one * 5000, place)


class Endless:
    """An archive that begins with something, and goes on with one block for ever; it counts what is read."""

    def __init__(self, begin: bytes, block: bytes) -> None:
        self._begin = begin
        self._block = block
        self.read_bytes = 0

    def read(self, count: int, /) -> bytes:
        data = (self._begin + self._block * (count // len(self._block) + 1))[:count]
        self._begin = b""
        self.read_bytes += len(data)
        assert self.read_bytes < 50_000_000, "it would be read for ever"
        return data


def test_a_header_is_not_read_before_its_size_is_looked_at(place: Path) -> None:
    """It would fill the memory; and of digits alone, `tarfile` would ponder over it for hours."""
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
        header = member("header", kind, size=1 << 30).tobuf(tarfile.GNU_FORMAT)
        source = Endless(header, b"1" * 512)
        with pytest.raises(ArchiveError, match="says that 1073741824 bytes belong to it"):
            unpack(source, str(place), 1 << 40)
        assert source.read_bytes <= 2 * CHUNK_BYTES


def test_a_map_of_holes_without_end_is_refused(place: Path) -> None:
    """In the old format it is in the header and the blocks that follow, each of which says that there is one more."""
    for size in (0, 512):
        header = bytearray(member("holes", tarfile.GNUTYPE_SPARSE, size=size).tobuf(tarfile.GNU_FORMAT))
        header[482] = 1
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        with pytest.raises(ArchiveError, match="'holes' of the archive is a file with holes"):
            unpack(Endless(bytes(header), b"\1" * 512), str(place), 1 << 40)
        with pytest.raises(ArchiveError):
            unpacked(bytes(header), place)


def test_headers_without_end_are_refused(place: Path) -> None:
    """A list of numbers that a header announces, and that goes on in the data."""
    entry = member("holes", size=512)
    entry.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "x"}
    begin = entry.tobuf(tarfile.PAX_FORMAT) + b"9999999999\n"
    with pytest.raises(ArchiveError, match="headers without end"):
        unpack(Endless(begin, b"1\n"), str(place), 1 << 40)
    assert tree(place) == {}


def test_a_few_bytes_do_not_make_a_tower_of_directories(place: Path) -> None:
    for kind in (tarfile.DIRTYPE, tarfile.REGTYPE):
        with pytest.raises(ArchiveError, match="is too deep"):
            unpacked(tar_of((member("a/" * 33 + "b", kind), b"")), place)
    assert tree(place) == {}
    unpacked(tar_of((member("a/" * 31 + "b", tarfile.DIRTYPE), b"")), place)


def test_entries_are_not_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive of a million empty entries would be many times as large in memory."""
    alive: weakref.WeakSet[tarfile.TarInfo] = weakref.WeakSet()
    kept: list[int] = []
    check = archive._check

    def count(entry: tarfile.TarInfo, room: int) -> None:
        alive.add(entry)
        kept.append(len(alive))
        check(entry, room)

    monkeypatch.setattr(archive, "_check", count)
    unpacked(tar_of(*[file(f"f{number}", b"") for number in range(50)]), place)
    assert len(kept) == 50
    assert max(kept) <= 3


@given(data=st.data())
def test_no_spoiled_archive_writes_outside_or_raises_anything_else(data: st.DataObject) -> None:
    whole = bytearray(tar_of(file("dir/a", b"x" * 700), (member("d", tarfile.DIRTYPE), b""), file("b")))
    for _ in range(data.draw(st.integers(1, 12))):
        # Mostly in a header's fields, with the checksum made good again half the time.
        at = data.draw(st.integers(0, 511)) + 512 * data.draw(st.sampled_from([0, 3, 4]))
        whole[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        for start in (0, 1536, 2048):
            whole[start + 148 : start + 156] = b" " * 8
            whole[start + 148 : start + 156] = b"%06o\0 " % sum(whole[start : start + 512])
    root = Path(tempfile.mkdtemp())
    try:
        (root / "place").mkdir()
        with suppress(ArchiveError, OSError):
            unpacked(bytes(whole), root / "place")
        assert os.listdir(root) == ["place"]
        assert not any(each.is_symlink() for each in root.rglob("*"))
        assert sum(each.stat().st_size for each in root.rglob("*") if each.is_file()) <= len(whole)
    finally:
        shutil.rmtree(root)


# --------------------------------------------------------------------------------------------------------- packing


def _link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


@pytest.mark.parametrize("make", [_link, os.mkfifo], ids=["link", "fifo"])
def test_nothing_but_files_and_directories_is_packed(tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / "below").mkdir()
    make(tmp_path / "below/special")

    with pytest.raises(ArchiveError, match="special is neither a file nor a directory"):
        survey(str(tmp_path))


def test_a_file_that_changes_its_size_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 600)
    entries = survey(str(tmp_path))

    path.write_bytes(b"y" * 5000)
    with tarfile.open(fileobj=io.BytesIO(b"".join(pack(entries)))) as tar:
        assert [(each.name, each.size) for each in tar] == [("file", 600)]
    path.write_bytes(b"z")
    with pytest.raises(ArchiveError, match="has become shorter"):
        list(pack(entries))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        list(pack(entries))


def test_an_entry_is_told_by_its_size(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/c").write_bytes(b"123")
    (tmp_path / "a").touch()

    assert survey(str(tmp_path)) == [
        Entry("a", str(tmp_path / "a"), 0),
        Entry("b", str(tmp_path / "b"), None),
        Entry("b/c", str(tmp_path / "b/c"), 3),
    ]
