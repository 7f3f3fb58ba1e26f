"""How a private containerd is run: the options, and the configuration, environment and binary that follow from them."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import tomli_w

from libcontainerd.errors import InvalidParameterError

_SOCKET_PATH_BYTES: Final = 107  # sun_path is 108 with its final NUL
_MESSAGE_BYTES: Final = 16 << 20
_LOG_LEVELS: Final = ("trace", "debug", "info", "warn", "error", "fatal", "panic")
TTRPC_SUFFIX: Final = ".ttrpc"
"""What the shims' socket has more than the clients'."""

# CRI and NRI serve Kubernetes, not us, and opt is for `ctr install`; they write or listen in /opt/containerd and /var/run,
# outside our directories. A version ignores the names that it does not know.
_DISABLED_PLUGINS: Final = (
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime",
    "io.containerd.internal.v1.opt",
    "io.containerd.nri.v1.nri",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a private containerd is run. Immutable; its mappings are read once, when a `Supervisor` is made.

    Attributes:
        address: The path of its socket (``unix:///path`` is taken too); empty: ``containerd.sock`` in the state
            directory. It may have 101 bytes, because containerd makes a second one with ``.ttrpc`` at its end.
        uid: Who owns the sockets, by user id; None: this process's effective user.
        gid: Who owns the sockets, by group id; None: this process's effective group.
        log_level: trace, debug, info, warn, error, fatal or panic.
        debug_address: The path of a socket for pprof; empty: none.
        metrics_address: ``host:port`` for Prometheus; empty: none.
        snapshotter: The snapshotter that must work, such as ``overlayfs``: where it does not, containerd refuses to
            start and says why. Empty: whichever work. containerd has no default of its own; its clients name one.
        plugins: Configuration by plugin, under the full name (``io.containerd.gc.v1.scheduler``); values are what TOML
            knows. A plugin that is configured here is not disabled, even where it otherwise would be (CRI, NRI, opt).
        binary: A path, or a name that is looked up in the child's PATH.
        path_prefix: A directory put first in the child's PATH, for the runc and the shims that belong to it.
        environment: Variables added to the child's environment, which is this process's without ``NOTIFY_SOCKET``.
        start_timeout: Seconds until it must serve. 70 to 315 ms are usual, 2 s where a dead shim is found.
        stop_timeout: Seconds between SIGTERM and SIGKILL.
        health_timeout: Seconds that it may take to answer a health check. They come 0.5 s apart, and after three in a
            row without an answer it is killed and started again. A machine that is merely slow must not look dead.
        restart_attempts: How many starts in a row may fail, or not last for 10 s, before it is given up. The pauses
            between them double, up to 30 s; by default that is a minute and a half in all.

    Raises:
        InvalidParameterError: A value cannot be used.
    """

    address: str = ""
    uid: int | None = None
    gid: int | None = None
    log_level: str = "info"
    debug_address: str = ""
    metrics_address: str = ""
    snapshotter: str = ""
    plugins: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    binary: str = "containerd"
    path_prefix: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    start_timeout: float = 30.0
    stop_timeout: float = 15.0
    health_timeout: float = 5.0
    restart_attempts: int = 10

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.log_level not in _LOG_LEVELS:
            raise invalid(f"log_level {self.log_level!r} is none of {', '.join(_LOG_LEVELS)}")
        if not self.binary:
            raise invalid("binary is empty")
        if self.metrics_address and not re.fullmatch(r".*:\d{1,5}", self.metrics_address):
            raise invalid(f"metrics_address {self.metrics_address!r} is not host:port")
        if self.snapshotter and not re.fullmatch(r"[A-Za-z0-9_-]+", self.snapshotter):
            raise invalid(f"snapshotter {self.snapshotter!r} is no plugin's name")
        for plugin in self.plugins:
            # What containerd itself asks of a name, and would refuse to start without.
            if not re.fullmatch(r"[\w-]+(\.[\w-]+){3,}", plugin):
                raise invalid(f"plugins: {plugin!r} is no full name such as 'io.containerd.gc.v1.scheduler'")
        for name, value in self.environment.items():
            if not name or "=" in name or "\0" in name + value:
                raise invalid(f"environment: {name!r} cannot be set to {value!r}")

    def _check_numbers(self) -> None:
        for name, number in (("uid", self.uid), ("gid", self.gid)):
            # The largest one means "no change" to chown(2).
            if number is not None and not 0 <= number < 2**32 - 1:
                raise invalid(f"{name} {number} is no user or group id")
        for name in ("start_timeout", "stop_timeout", "health_timeout"):
            seconds = getattr(self, name)
            if not (seconds > 0 and math.isfinite(seconds)):
                raise invalid(f"{name} must be a number of seconds above 0, not {seconds}")
        if self.restart_attempts < 0:
            raise invalid(f"restart_attempts {self.restart_attempts} is no count")


def invalid(reason: str) -> InvalidParameterError:
    """Make the error for a value that cannot be used."""
    return InvalidParameterError(f"cannot run containerd: {reason}")


def absolute(name: str, path: str | os.PathLike[str]) -> str:
    """Return a path as absolute text that TOML, gRPC and the kernel can all take.

    Raises:
        InvalidParameterError: It is empty, holds a NUL, or is not UTF-8.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise invalid(f"{name} {text!r} is no path")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise invalid(f"{name} {text!r} is not UTF-8, which containerd's configuration has to be") from error
    return os.path.abspath(text)


def socket_path(name: str, address: str, *, longest_suffix: str = "") -> str:
    """Return a socket's absolute path.

    Args:
        name: The option's name, for the error's message.
        address: A path, or ``unix:///path``.
        longest_suffix: What will be put behind it.

    Raises:
        InvalidParameterError: It is relative, or longer than the kernel takes.
    """
    path = address.removeprefix("unix://")
    if not path.startswith("/"):
        raise invalid(f"{name} {address!r} is not the absolute path of a socket")
    path = absolute(name, path)
    size = len(os.fsencode(path + longest_suffix))
    if size > _SOCKET_PATH_BYTES:
        raise invalid(
            f"{name} {path + longest_suffix!r} has {size} bytes and the kernel takes {_SOCKET_PATH_BYTES} for a"
            f" socket; use a shorter state_dir, or give a shorter {name}"
        )
    return path


def configuration(options: Options, *, root: str, state: str, address: str, debug_address: str) -> bytes:
    """Return containerd's configuration file, in the version that 1.6, 1.7 and 2.x all read.

    Raises:
        InvalidParameterError: A plugin's configuration holds what TOML cannot say.
    """
    owner = {
        "uid": os.geteuid() if options.uid is None else options.uid,
        "gid": os.getegid() if options.gid is None else options.gid,
    }
    limits = {"max_recv_message_size": _MESSAGE_BYTES, "max_send_message_size": _MESSAGE_BYTES}
    document: dict[str, object] = {
        "version": 2,
        "root": root,
        "state": state,
        "disabled_plugins": [name for name in _DISABLED_PLUGINS if name not in options.plugins],
        "grpc": {"address": address, **owner, **limits},
        "ttrpc": {"address": address + TTRPC_SUFFIX, **owner},
        "debug": {"address": debug_address, **owner, "level": options.log_level},
    }
    if options.snapshotter:
        document["required_plugins"] = [f"io.containerd.snapshotter.v1.{options.snapshotter}"]
    if options.metrics_address:
        document["metrics"] = {"address": options.metrics_address}
    if options.plugins:
        document["plugins"] = _plain(options.plugins, "plugins")
    try:
        return tomli_w.dumps(document).encode()
    except UnicodeEncodeError as error:
        raise invalid(f"the configuration is not UTF-8: {error}") from error


def _plain(value: object, where: str) -> object:
    """Copy a value as tomli_w takes it, which knows no mapping but dict and no None."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise invalid(f"{where} has a key that is not text")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, str | bool | float) or (isinstance(value, int) and -(2**63) <= value < 2**63):
        return value
    raise invalid(f"{where} is {value!r}, which TOML cannot say")


def environment(options: Options) -> dict[str, str]:
    """Return the environment that containerd is given, and its shims after it."""
    variables = {**os.environ, **options.environment}
    # containerd would tell our service manager that *we* are ready, or stopping.
    variables.pop("NOTIFY_SOCKET", None)
    directories = variables.get("PATH", os.defpath).split(":")
    # runc lives in sbin, which the PATH of a cron job or of a shell opened with plain su lacks.
    directories += [name for name in ("/usr/local/sbin", "/usr/sbin", "/sbin") if name not in directories]
    if options.path_prefix:
        directories.insert(0, absolute("path_prefix", options.path_prefix))
    variables["PATH"] = ":".join(directories)
    return variables


def find_binary(binary: str, search: str) -> str:
    """Return the absolute path of containerd.

    Args:
        binary: A path, or a name to look for.
        search: Where to look for a name, as PATH has it.

    Raises:
        InvalidParameterError: It is not there, or not executable.
    """
    if "/" not in binary:
        if found := shutil.which(binary, path=search):
            return os.path.abspath(found)
        raise invalid(
            f"no program {binary!r} in PATH ({search}); install containerd (on Debian: apt-get install containerd"
            " runc), or give its path as binary"
        )
    path = absolute("binary", binary)
    if not os.path.isfile(path):
        raise invalid(
            f"binary {path!r} is not there, or no file; install containerd, or give the path of one"
        )
    if not os.access(path, os.X_OK):
        raise invalid(f"binary {path!r} is not executable by this user (chmod +x?)")
    return path
