"""From an OCI image's configuration to a process."""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ConfigDict
from pydantic.alias_generators import to_pascal

from libcontainerd.errors import InvalidParameterError
from libcontainerd.oci._base import Array, Model
from libcontainerd.oci._build import Option, SpecOption, process_of, set_env, texts
from libcontainerd.oci._defaults import DEFAULT_PATH
from libcontainerd.oci._document import parse
from libcontainerd.oci._model import Spec
from libcontainerd.oci._model_process import Process, User

# The kernel's own limit for symbolic links in one path.
_MOST_LINKS = 40
# Real ones have some kilobytes; an image that brings a huge one would only cost memory.
_MOST_BYTES = 4 << 20
_MOST_ID = 2**32 - 1


class _ImageConfig(Model):
    """What an image says of the process, in the image-spec's names."""

    model_config = ConfigDict(alias_generator=to_pascal, validate_by_name=True)

    user: str | None = None
    env: Array[str] | None = None
    entrypoint: Array[str] | None = None
    cmd: Array[str] | None = None
    working_dir: str | None = None


class _Image(Model):
    config: _ImageConfig | None = None


def process_from_image(
    image: Mapping[str, object] | str | bytes,
    args: Sequence[str] = (),
    *,
    entrypoint: Sequence[str] | None = None,
    user: str | None = None,
    rootfs: str | os.PathLike[str] | None = None,
) -> Process:
    """Make a process as an image's configuration asks for: program, environment, directory and user.

    >>> from libcontainerd import oci
    >>> config = {"Entrypoint": ["nginx"], "Cmd": ["-g", "daemon off;"], "User": "101:101"}
    >>> process = oci.process_from_image({"config": config})
    >>> process.args, process.cwd, process.user
    (['nginx', '-g', 'daemon off;'], '/', User(uid=101, gid=101, additional_gids=[101]))

    Args:
        image: The image's configuration: JSON text or a mapping, the whole document or its `config` alone.
        args: Takes the place of the image's `Cmd`.
        entrypoint: Takes the place of the image's `Entrypoint`; its `Cmd` is then not used either.
        user: Takes the place of the image's `User`: `uid`, `uid:gid`, or names, `user:group`.
        rootfs: The unpacked image on the host. Names are looked up in its `etc/passwd` and `etc/group`, and
            so is the group of a user that is named without one. It is read as if it were the root: no link in
            it leads out.

    Returns:
        A new process, with these four members set and no other. Without a `PATH` in the image it gets the
        usual one.

    Raises:
        InvalidParameterError: if the configuration is malformed, names no program, or names a user or group
            that is not in `rootfs`, or if there is no `rootfs` to look it up in.
    """
    config = _config(image)
    command = [*(texts(config.entrypoint) if entrypoint is None else entrypoint)]
    command += args or (texts(config.cmd) if entrypoint is None else ())
    if not command:
        raise InvalidParameterError("the image names no program to run: give args")
    process = Process(
        user=_user(config.user or "" if user is None else user, rootfs),
        args=command,
        cwd=posixpath.join("/", config.working_dir or ""),
    )
    set_env(process, [DEFAULT_PATH, *texts(config.env)])
    return process


def with_image_config(
    image: Mapping[str, object] | str | bytes,
    args: Sequence[str] = (),
    *,
    entrypoint: Sequence[str] | None = None,
    user: str | None = None,
    rootfs: str | os.PathLike[str] | None = None,
) -> SpecOption:
    """Run what an image's configuration asks for: `process_from_image`, as an option for a spec.

    Variables of the spec's environment stay unless the image sets them; put `with_env` after this to override
    it.

    >>> from libcontainerd import oci
    >>> image = {"config": {"Cmd": ["sh"], "Env": ["LANG=C"]}}
    >>> spec = oci.build(oci.default_spec(), oci.with_image_config(image, ["id", "-u"]))
    >>> spec.process.args, spec.process.env[-1]
    (['id', '-u'], 'LANG=C')

    Args and Raises: as `process_from_image`.
    """
    wanted = process_from_image(image, args, entrypoint=entrypoint, user=user, rootfs=rootfs)

    def edit(spec: Spec) -> None:
        process = process_of(spec)
        process.args, process.cwd = texts(wanted.args), wanted.cwd
        process.user = wanted.user.model_copy(deep=True) if wanted.user is not None else None
        set_env(process, texts(wanted.env))

    return Option("with_image_config", edit)


def _config(image: Mapping[str, object] | str | bytes) -> _ImageConfig:
    document = parse(image, _Image, "image")
    if document.config is not None or "config" in document.model_fields_set:
        return document.config or _ImageConfig()
    return parse(dict(document.model_extra or {}), _ImageConfig, "image config")


def _user(name: str, rootfs: str | os.PathLike[str] | None) -> User:
    """Resolve `user`, `uid`, `user:group` and so on, as Docker and containerd do."""
    user, _, group = name.partition(":")
    uid, gid, groups = 0, 0, list[int]()
    entry = _passwd_entry(user, rootfs) if rootfs is not None else None
    if entry is not None:
        login, uid, gid = entry
        if not group and rootfs is not None:
            groups = _memberships(login, gid, rootfs)
    elif user:
        uid = _number(user, "user", rootfs)
    if group:
        found = _group_id(group, rootfs) if rootfs is not None else None
        gid = _number(group, "group", rootfs) if found is None else found
    # The group of the user itself is among them: see with_user.
    return User(uid=uid, gid=gid, additional_gids=[gid, *groups])


def _number(value: str, what: str, rootfs: str | os.PathLike[str] | None) -> int:
    number = _id(value)
    if number is not None:
        return number
    if rootfs is None:
        raise InvalidParameterError(f"the {what} {value!r} is a name: give rootfs to look it up in")
    raise InvalidParameterError(f"the image has no {what} {value!r}")


def _id(value: str) -> int | None:
    if value.isascii() and value.isdigit() and len(value) <= len(str(_MOST_ID)) and int(value) <= _MOST_ID:
        return int(value)
    return None


def _passwd_entry(user: str, rootfs: str | os.PathLike[str]) -> tuple[str, int, int] | None:
    wanted = user or "0"
    by_number: tuple[str, int, int] | None = None
    for login, _, uid_text, gid_text, *_ in _entries(rootfs, "etc/passwd", 4):
        uid, gid = _id(uid_text), _id(gid_text)
        if uid is None or gid is None:
            continue
        if login == wanted:
            return login, uid, gid
        if uid == _id(wanted) and by_number is None:
            by_number = login, uid, gid
    return by_number


def _group_id(group: str, rootfs: str | os.PathLike[str]) -> int | None:
    for name, _, gid_text, *_ in _entries(rootfs, "etc/group", 3):
        if name == group and _id(gid_text) is not None:
            return _id(gid_text)
    return None


def _memberships(login: str, gid: int, rootfs: str | os.PathLike[str]) -> list[int]:
    found = set[int]()
    for _, _, gid_text, members, *_ in _entries(rootfs, "etc/group", 4):
        number = _id(gid_text)
        if number is not None and number != gid and login in members.split(","):
            found.add(number)
    return sorted(found)


def _entries(rootfs: str | os.PathLike[str], path: str, least: int) -> list[list[str]]:
    lines = _read_inside(Path(rootfs), path).decode(errors="replace").splitlines()
    entries = (line.split(":") for line in lines if not line.startswith("#"))
    return [fields for fields in entries if len(fields) >= least]


def _read_inside(rootfs: Path, path: str) -> bytes:
    """Read a file of an image that nobody has vetted.

    Links are followed as in the container, where `/` is `rootfs`.

    A file that is not there, or is not a regular file, reads as empty, as the same image would behave in
    Docker.
    """
    pending = path.split("/")[::-1]
    reached: list[str] = []
    links = 0
    while pending:
        step = pending.pop()
        if step in ("", "."):
            continue
        if step == "..":
            del reached[-1:]
            continue
        place = rootfs.joinpath(*reached, step)
        try:
            target = os.readlink(place)
        except OSError:
            # No link, or nothing at all: the opening below tells.
            reached.append(step)
            continue
        links += 1
        if links > _MOST_LINKS:
            return b""
        if target.startswith("/"):
            reached.clear()
        pending.extend(target.split("/")[::-1])
    place = rootfs.joinpath(*reached)
    try:
        # Looked at before it is opened: opening a FIFO would wait for its writer.
        if not stat.S_ISREG(place.lstat().st_mode):
            return b""
        with place.open("rb") as file:
            return file.read(_MOST_BYTES)
    except OSError:
        return b""
