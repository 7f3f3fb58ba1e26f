"""A checkpoint directory as a tar archive, and back again without trusting the archive.

A checkpoint is plain files in plain directories, so nothing else is packed or unpacked. That is stricter than the filters of
`tarfile`, which let links through that stay inside, strip leading slashes instead of refusing them, know nothing of sizes,
and are missing in early releases of Python 3.11. Whoever writes only directories and new files of his own, under names
without ``..``, cannot be led out of the directory.
"""

from __future__ import annotations

import os
import stat
import tarfile
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

CHUNK_BYTES: Final = 1 << 20
_LOGGED_NAME: Final = 200
_HEADER_BYTES: Final = 4096
"""The most of an entry's further header, with its long name. `tarfile` of before September 2024 takes a time that grows with the
square of it (CVE-2024-6232)."""

_READ_AHEAD_BYTES: Final = 128 << 10
_OVERHEAD_BYTES: Final = 4 * _READ_AHEAD_BYTES
"""The most that is read for an entry beside its data, what is read ahead included."""

_MOST_DEEP: Final = 32
_RECORD: Final = bytes(tarfile.RECORDSIZE)
_FURTHER_HEADERS: Final = {
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
}
_TROUBLE: Final = (tarfile.TarError, ValueError, LookupError, OverflowError, RecursionError, EOFError)
"""What `tarfile` raises over a malformed archive, by intent or not."""


class ArchiveError(ValueError):
    """The archive is malformed or not to be trusted, or the directory holds what no checkpoint does."""


class Source(Protocol):
    """Where an archive is read from."""

    def read(self, count: int, /) -> bytes:
        """At most so many bytes; none at the end."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or a directory to be packed.

    Attributes:
        name: Within the archive.
        path: Where it is.
        size: A file's size in bytes; None for a directory.
    """

    name: str
    path: str
    size: int | None


def survey(directory: str) -> list[Entry]:
    """List what is in a directory, in the order of the archive; nothing is opened.

    Raises:
        ArchiveError: something in it is neither a file nor a directory.
        OSError: it cannot be read.
    """
    found: list[Entry] = []
    waiting = [("", directory)]
    while waiting:
        prefix, path = waiting.pop()
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda each: each.name):
                status = entry.stat(follow_symlinks=False)
                name = f"{prefix}{entry.name}"
                if stat.S_ISDIR(status.st_mode):
                    found.append(Entry(name, entry.path, None))
                    waiting.append((f"{name}/", entry.path))
                elif stat.S_ISREG(status.st_mode):
                    found.append(Entry(name, entry.path, status.st_size))
                else:
                    raise ArchiveError(f"{entry.path} is neither a file nor a directory")
    return found


def pack(entries: list[Entry]) -> Iterator[bytes]:
    """Yield the archive of what `survey` has found, in pieces of about `CHUNK_BYTES` at most.

    The same directory gives the same archive.

    Raises:
        ArchiveError: a file has become shorter meanwhile.
        OSError: one cannot be read.
    """
    written = 0
    for entry in entries:
        header = _header(entry)
        written += len(header)
        yield header
        if entry.size is None:
            continue
        left = entry.size
        with open(entry.path, "rb", buffering=0) as file:
            while left:
                data = file.read(min(left, CHUNK_BYTES))
                if not data:
                    raise ArchiveError(f"{entry.path} has become shorter while it was read")
                left -= len(data)
                written += len(data)
                yield data
        if rest := -entry.size % tarfile.BLOCKSIZE:
            written += rest
            yield bytes(rest)
    end = 2 * tarfile.BLOCKSIZE
    yield bytes(end + -(written + end) % len(_RECORD))


def _header(entry: Entry) -> bytes:
    member = tarfile.TarInfo(entry.name)
    member.mode = 0o600
    if entry.size is None:
        member.type, member.mode = tarfile.DIRTYPE, 0o700
    else:
        member.size = entry.size
    return member.tobuf(tarfile.PAX_FORMAT, errors="surrogateescape")


def unpack(source: Source, directory: str, size: int) -> None:
    """Unpack an archive into an empty directory. Files are made anew, for their owner alone.

    Args:
        source: Where the archive is read from.
        directory: Where everything goes.
        size: The archive's size in bytes. What is in it cannot be more.

    Raises:
        ArchiveError: an entry would leave the directory, is neither a file nor a directory, comes twice, or is larger than
            the archive; or the archive is malformed.
        OSError: the file system refuses. What was unpacked until then stays in the directory.
    """
    room = size
    metered = _Metered(source)
    try:
        with tarfile.open(fileobj=metered, mode="r|", bufsize=_READ_AHEAD_BYTES, tarinfo=_Member) as archive:  # type: ignore[call-overload]  # it only reads
            while (member := archive.next()) is not None:
                archive.members.clear()  # which would otherwise hold all there are
                metered.allow(member.size)
                room -= max(0, member.size)
                _check(member, room)
                parts = _parts(member)
                inside = _directory(directory, parts if member.isdir() else parts[:-1])
                if not member.isdir():
                    _write(archive, member, os.path.join(inside, parts[-1]))
    except ArchiveError:
        raise
    except _TROUBLE as error:
        raise ArchiveError(f"the archive is malformed: {error}") from error


class _Member(tarfile.TarInfo):
    """An entry whose further header is looked at before it is read."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Read a header."""
        member = super().frombuf(buf, encoding, errors)
        if member.type in _FURTHER_HEADERS and not 0 <= member.size <= _HEADER_BYTES:
            raise ArchiveError(f"a header of the archive says that {member.size} bytes belong to it")
        if member.type == tarfile.GNUTYPE_SPARSE:
            raise ArchiveError(f"entry {member.name[:_LOGGED_NAME]!r} of the archive is a file with holes")
        return member


class _Metered:
    """A source that ends where an entry takes more than its data and something for its headers."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._left = _OVERHEAD_BYTES

    def allow(self, size: int) -> None:
        """Allow for the data of an entry and the headers of the next."""
        self._left = size + _OVERHEAD_BYTES

    def read(self, count: int, /) -> bytes:
        data = self._source.read(count)
        self._left -= len(data)
        if self._left < 0:
            raise ArchiveError("the archive has headers without end")
        return data


def _check(member: tarfile.TarInfo, room: int) -> None:
    name = member.name[:_LOGGED_NAME]
    if not member.isdir() and (not member.isreg() or member.issparse()):
        raise ArchiveError(f"entry {name!r} of the archive is neither a plain file nor a directory")
    if member.size < 0 or room < 0:
        raise ArchiveError(f"entry {name!r} of the archive is larger than the archive")


def _parts(member: tarfile.TarInfo) -> list[str]:
    parts = [part for part in member.name.split("/") if part not in {"", "."}]
    if member.name.startswith("/") or ".." in parts or (not parts and not member.isdir()):
        raise ArchiveError(f"entry {member.name[:_LOGGED_NAME]!r} of the archive would leave its directory")
    if len(parts) > _MOST_DEEP:
        raise ArchiveError(f"entry {member.name[:_LOGGED_NAME]!r} of the archive is too deep")
    return parts


def _directory(path: str, parts: list[str]) -> str:
    for part in parts:
        path = os.path.join(path, part)
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
        if not os.path.isdir(path):
            raise ArchiveError(f"{path!r} is both a file and a directory in the archive")
    return path


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
    data = archive.extractfile(member)
    if data is None:
        raise ArchiveError(f"entry {member.name[:_LOGGED_NAME]!r} of the archive has no data")
    try:
        file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed right below
    except FileExistsError as error:
        raise ArchiveError(f"entry {member.name[:_LOGGED_NAME]!r} of the archive comes twice") from error
    with data, file:
        os.fchmod(file.fileno(), 0o600)
        left = member.size
        while left:
            piece = data.read(min(left, CHUNK_BYTES))
            if not piece:
                raise ArchiveError(f"entry {member.name[:_LOGGED_NAME]!r} of the archive is cut off")
            left -= len(piece)
            view = memoryview(piece)
            while view:
                view = view[file.write(view) :]
