"""Bundle directories: what this library keeps on disk per container, which is its FIFOs.

Their owner is the user that is root inside the container, so that a runtime in a user namespace can reach them.
"""

from __future__ import annotations

import os
import random
import re
import stat
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import structlog

from libcontainerd._wire.identifiers import check_identifier, is_text
from libcontainerd.errors import (
    ConflictError,
    InvalidParameterError,
    LibcontainerdError,
    PermissionDeniedError,
    SystemFailureError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

BUNDLE_LABEL: Final = "libcontainerd/bundle.path"
"""The container's label that holds its bundle's path, so that a later client finds it."""

LABEL_BYTES: Final = 4096  # containerd's limit for a label's key and value together

_ATTEMPTS: Final = 200
_MOST_PAUSE_SECONDS: Final = 0.01
_SHOWN: Final = 200
_MARK: Final = "exec"
_FILE: Final = re.compile(rf"(.+)-(stdin|stdout|stderr|{_MARK})")

_log = structlog.get_logger("libcontainerd")


def state_directory(state_dir: str | os.PathLike[str]) -> str:
    """The directory of all bundles, as its paths are told to containerd.

    Raises:
        InvalidParameterError: it is not absolute, or no text that containerd could be told.
    """
    path = os.fspath(state_dir)
    if not is_text(path):
        raise InvalidParameterError(f"state_dir must be a string of valid Unicode, not {path!r}")
    if not os.path.isabs(path):
        raise InvalidParameterError(f"state_dir must be an absolute path, not {path!r}")
    return os.path.normpath(path)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A container's bundle directory.

    Attributes:
        path: Where it is.
        owner: uid and gid on the host of the container's root.
        made: The directories that `prepare` had to make for it, outermost first.
    """

    path: str
    owner: tuple[int, int]
    made: tuple[str, ...] = field(default=())

    @classmethod
    def prepare(cls, state_dir: str, container_id: str, owner: tuple[int, int]) -> Bundle:
        """Make the bundle directory of a container.

        For root it is ``state_dir/container_id``, mode 0755. For a mapped root each component of that path that is
        missing, or that others may not enter, is taken with the suffix ``.uid.gid``, mode 0700, its own: so its
        processes can get there without the state directory being opened to everyone.

        Raises:
            InvalidParameterError: the path is longer than a label holds.
            PermissionDeniedError: this user may not make it.
            SystemFailureError: the file system refuses otherwise. Nothing that was made stays.
        """
        full = os.path.join(state_dir, container_id)
        with _translated(f"make the bundle of container {container_id!r}"):
            for attempt in range(_ATTEMPTS):
                made: list[str] = []
                try:
                    path = _make_mapped(full, owner, made) if owner != (0, 0) else _make_plain(full, made)
                    if len(BUNDLE_LABEL) + len(os.fsencode(path)) > LABEL_BYTES:
                        raise InvalidParameterError(
                            f"the bundle of container {container_id!r} would have a path of {len(path)} characters,"
                            " more than containerd keeps in a label: choose a shorter state_dir"
                        )
                except FileNotFoundError:
                    _remove_empty(made)  # another container's removal took an empty parent away: once more
                    # Uneven pauses, or those that are in each other's way stay so.
                    time.sleep(min(attempt * 1e-4, _MOST_PAUSE_SECONDS) * random.random())  # noqa: S311 - no secret
                except BaseException:
                    _remove_empty(made)
                    raise
                else:
                    _refuse_anothers(path, owner, container_id)
                    return cls(path, owner, tuple(made))
            raise FileNotFoundError(f"{full}: its parents keep disappearing")

    @classmethod
    def find(cls, state_dir: str, container_id: str, owner: tuple[int, int], label: str) -> Bundle:
        """Say where the bundle of a container is that an earlier client has made; it may be gone.

        Args:
            state_dir: This client's.
            container_id: The container.
            owner: uid and gid on the host of the container's root.
            label: The path that the container's label holds, or nothing. Anybody may have written it: one that `prepare`
                would not have chosen in this state directory is not followed, and logged.
        """
        plain = os.path.join(state_dir, container_id)
        if not label:
            return cls(plain, owner)
        suffixes = ("",) if owner == (0, 0) else ("", _suffix(owner))
        wanted, given = plain.split("/"), label.split("/")
        ours = len(wanted) == len(given) and all(
            theirs in [part + suffix for suffix in suffixes]
            for part, theirs in zip(wanted, given, strict=True)
        )
        if ours and not os.path.islink(label):
            return cls(label, owner)
        _log.warning("bundle_label_ignored", container=container_id, bundle=label[:_SHOWN], used=plain)
        return cls(plain, owner)

    def mark_of(self, exec_id: str) -> str:
        """The path of the file that stands for an exec's FIFOs where it has none; nothing for init, which is easily found."""
        return os.path.join(self.path, f"{exec_id}-{_MARK}") if exec_id else ""

    def left_behind(self) -> dict[str, set[str]]:
        """The processes that have files here, and which: ``stdin``, ``stdout``, ``stderr``, or ``exec``, the mark."""
        try:
            names = os.listdir(self.path)
        except OSError:
            return {}
        found: dict[str, set[str]] = {}
        for name in names:
            if match := _FILE.fullmatch(name):
                with suppress(InvalidParameterError):  # somebody else's file
                    check_identifier("process id", match[1])
                    found.setdefault(match[1], set()).add(match[2])
        return found

    def forget(self, process_id: str, files: set[str]) -> None:
        """Remove what a process that is not there any more has left here."""
        for each in files:
            with suppress(OSError):
                os.unlink(os.path.join(self.path, f"{process_id}-{each}"))

    def ensure(self) -> None:
        """Make the directory again if somebody has taken it away: a cleaner of temporary files, or a lost race.

        Raises:
            PermissionDeniedError: this user may not make it.
            SystemFailureError: the file system refuses otherwise.
        """
        if os.path.isdir(self.path):
            return
        with _translated(f"make the bundle directory {self.path}"):
            missing = []
            path = self.path
            while not os.path.isdir(path):
                missing.append(path)
                path = os.path.dirname(path)
            for directory in reversed(missing):
                mapped = self.owner != (0, 0)
                if _make_directory(directory, 0o700 if mapped else 0o755, []) and mapped:
                    os.chown(directory, *self.owner)

    def undo(self) -> None:
        """Take back what `prepare` made, and nothing that was there before."""
        _remove_empty(self.made)

    def remove(self) -> None:
        """Remove the directory with all that is in it; what cannot be removed is logged and left.

        With ``LIBCONTAINERD_NOCLEAN=1`` in the environment everything stays, for a look at it.
        """
        if os.environ.get("LIBCONTAINERD_NOCLEAN") == "1":
            return
        try:
            # It is empty, unless something went wrong or FIFOs were left to their owners; to look costs more than to try.
            try:
                os.rmdir(self.path)
            except OSError:
                import shutil  # noqa: PLC0415 - brings compression along, and is hardly ever needed

                shutil.rmtree(self.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            _log.error("bundle_not_removed", bundle=self.path, error=str(error))
        # Directories of the mapped root's own, shared with other containers of the same mapping.
        suffix = "" if self.owner == (0, 0) else _suffix(self.owner)
        parent = os.path.dirname(self.path)
        while suffix and parent.endswith(suffix):
            try:
                os.rmdir(parent)
            except OSError:
                return
            parent = os.path.dirname(parent)


def remove_orphans(state_dir: str, names: Iterable[str], in_use: Callable[[str], bool]) -> None:
    """Remove the empty bundles that belong to no container.

    A program that is killed leaves one where it has made the bundle and not yet the container, or removed the container and
    not yet the bundle. What is not empty stays: it may be another client's. One that another has just made is missed by
    nobody, since a start makes it again.

    Args:
        state_dir: Where bundles are.
        names: What was there before it was asked which containers there are.
        in_use: Whether there is a container of that name.
    """
    if os.environ.get("LIBCONTAINERD_NOCLEAN") == "1":
        return
    for name in names:
        if not in_use(name):
            with suppress(OSError):
                os.rmdir(os.path.join(state_dir, name))


def names_in(state_dir: str) -> list[str]:
    """The names in a directory; none where it is not there or cannot be read."""
    try:
        return os.listdir(state_dir)
    except OSError:
        return []


def _refuse_anothers(path: str, owner: tuple[int, int], container_id: str) -> None:
    """A mapped container's suffixed directory could have the name of another container's."""
    there = os.stat(path)
    wanted = owner if owner != (0, 0) else (os.geteuid(), there.st_gid)
    if (there.st_uid, there.st_gid) != wanted:
        raise ConflictError(
            f"cannot create container {container_id!r}: its bundle {path} is there and belongs to {there.st_uid}:{there.st_gid}"
        )


def _make_plain(path: str, made: list[str]) -> str:
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    full = missing[0] if missing else path
    for directory in reversed(missing):
        _make_directory(directory, 0o755, made)
    return full


def _make_mapped(full: str, owner: tuple[int, int], made: list[str]) -> str:
    path = "/"
    for component in full.split("/")[1:]:
        path = os.path.join(path, component)
        try:
            enterable = os.stat(path).st_mode & 0o001
        except FileNotFoundError:
            enterable = 0
        if not enterable:
            path += _suffix(owner)
            if _make_directory(path, 0o700, made):
                os.chown(path, *owner)
    return path


def _make_directory(path: str, mode: int, made: list[str]) -> bool:
    with suppress(FileExistsError):
        os.mkdir(path, mode)
        made.append(path)
        os.chmod(path, mode)  # whatever the umask says
        return True
    if not stat.S_ISDIR(os.stat(path).st_mode):  # raises FileNotFoundError where it is gone again
        raise NotADirectoryError(f"{path} is there and is not a directory")
    return False


def _suffix(owner: tuple[int, int]) -> str:
    return f".{owner[0]}.{owner[1]}"


def _remove_empty(directories: tuple[str, ...] | list[str]) -> None:
    for directory in reversed(directories):
        with suppress(OSError):
            os.rmdir(directory)


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    try:
        yield
    except LibcontainerdError:
        raise
    except PermissionError as error:
        raise PermissionDeniedError(
            f"cannot {doing}: {error} (run as root, or choose another state_dir)"
        ) from error
    except OSError as error:
        raise SystemFailureError(f"cannot {doing}: {error}") from error
