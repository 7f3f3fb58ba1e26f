"""The options of a private containerd, and the configuration, environment and binary that follow from them."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from libcontainerd.errors import InvalidParameterError
from libcontainerd.supervisor import Options, Supervisor
from libcontainerd.supervisor.options import absolute, configuration, environment, find_binary, socket_path

CRI = "io.containerd.grpc.v1.cri"


def configured(options: Options, *, debug_address: str = "") -> dict[str, object]:
    text = configuration(
        options, root="/r", state="/s", address="/s/c.sock", debug_address=debug_address
    ).decode()
    return tomllib.loads(text)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"log_level": "loud"}, "log_level 'loud'"),
        ({"uid": -1}, "uid -1"),
        ({"gid": 2**32 - 1}, "gid 4294967295"),
        ({"start_timeout": 0.0}, "start_timeout"),
        ({"stop_timeout": float("nan")}, "stop_timeout"),
        ({"start_timeout": float("inf")}, "start_timeout"),
        ({"health_timeout": 0.0}, "health_timeout"),
        ({"restart_attempts": -1}, "restart_attempts -1"),
        ({"binary": ""}, "binary is empty"),
        ({"metrics_address": "localhost"}, "metrics_address 'localhost'"),
        ({"snapshotter": "over layfs"}, "snapshotter"),
        ({"plugins": {"cri": {}}}, "'cri' is no full name"),
        ({"environment": {"A=B": "c"}}, "environment"),
        ({"environment": {"A": "b\0c"}}, "environment"),
        ({"environment": {"": "c"}}, "environment"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidParameterError, match=said):
        Options(**values)  # type: ignore[arg-type]  # wrong on purpose


def test_the_configuration_says_where_everything_is() -> None:
    document = configured(Options(uid=7, gid=8, log_level="debug"), debug_address="/s/debug.sock")

    assert document["version"] == 2
    assert (document["root"], document["state"]) == ("/r", "/s")
    assert document["grpc"] == {
        "address": "/s/c.sock",
        "uid": 7,
        "gid": 8,
        "max_recv_message_size": 16777216,
        "max_send_message_size": 16777216,
    }
    assert document["ttrpc"] == {"address": "/s/c.sock.ttrpc", "uid": 7, "gid": 8}
    assert document["debug"] == {"address": "/s/debug.sock", "uid": 7, "gid": 8, "level": "debug"}
    assert "metrics" not in document
    assert "plugins" not in document
    assert "required_plugins" not in document


def test_the_sockets_are_ours_by_default() -> None:
    grpc = configured(Options())["grpc"]

    assert isinstance(grpc, dict)
    assert (grpc["uid"], grpc["gid"]) == (os.geteuid(), os.getegid())


def test_what_writes_elsewhere_is_disabled_unless_it_is_configured() -> None:
    disabled = configured(Options())["disabled_plugins"]
    assert isinstance(disabled, list)
    assert CRI in disabled
    assert "io.containerd.internal.v1.opt" in disabled

    chosen = configured(Options(plugins={CRI: {"sandbox_image": "pause"}}))
    assert CRI not in str(chosen["disabled_plugins"])
    assert chosen["plugins"] == {CRI: {"sandbox_image": "pause"}}


def test_plugins_metrics_and_snapshotter_are_passed_on() -> None:
    values = MappingProxyType({"n": 1, "x": 0.5, "on": True, "list": ("a", MappingProxyType({"k": "v"}))})
    document = configured(
        Options(plugins={"io.containerd.a.v1.b": values}, metrics_address=":9100", snapshotter="native")
    )

    assert document["plugins"] == {
        "io.containerd.a.v1.b": {"n": 1, "x": 0.5, "on": True, "list": ["a", {"k": "v"}]}
    }
    assert document["metrics"] == {"address": ":9100"}
    assert document["required_plugins"] == ["io.containerd.snapshotter.v1.native"]


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"a": None}, r"plugins.io.containerd.a.v1.b.a is None"),
        ({"a": [1, b"x"]}, r"a\[1\] is b'x'"),
        ({"a": 2**63}, "TOML cannot say"),
        ({"a": {1: 2}}, "key that is not text"),
        ({"a": "\udcff"}, "not UTF-8"),
    ],
)
def test_a_plugin_value_that_toml_cannot_say_is_refused(values: Mapping[str, object], where: str) -> None:
    with pytest.raises(InvalidParameterError, match=where):
        configured(Options(plugins={"io.containerd.a.v1.b": values}))


def test_a_path_that_the_configuration_cannot_say_is_refused() -> None:
    for path in ("", "a\0b", "/a\udcff"):
        with pytest.raises(InvalidParameterError):
            absolute("root_dir", path)


def test_a_socket_path_is_absolute_and_short() -> None:
    assert socket_path("address", "unix:///a/b") == "/a/b"
    fits = "/" + "a" * 106
    assert socket_path("address", fits) == fits
    with pytest.raises(InvalidParameterError, match="108 bytes"):
        socket_path("address", fits + "a")
    with pytest.raises(InvalidParameterError, match="113 bytes"):
        socket_path("address", fits, longest_suffix=".ttrpc")
    # Bytes count, not characters.
    with pytest.raises(InvalidParameterError, match="bytes"):
        socket_path("address", "/" + "é" * 60)
    with pytest.raises(InvalidParameterError, match="absolute"):
        socket_path("address", "c.sock")


def test_a_long_state_dir_is_refused_before_it_is_made(tmp_path: Path) -> None:
    state = tmp_path / ("s" * 110)

    with pytest.raises(InvalidParameterError, match=r"use a shorter state_dir, or give a shorter address"):
        Supervisor(tmp_path / "root", state)

    assert list(tmp_path.iterdir()) == []


def test_directories_and_sockets_that_collide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match="both"):
        Supervisor("/x", "/x/../x")
    with pytest.raises(InvalidParameterError, match="debug_address"):
        Supervisor("/x", "/y", Options(debug_address="/y/containerd.sock"))


def test_the_environment_is_ours_without_the_notify_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    monkeypatch.setenv("PATH", "/usr/bin:/sbin")
    monkeypatch.setenv("KEPT", "1")

    variables = environment(Options(environment={"HOME": "/h"}, path_prefix="/opt/runc/bin"))

    assert "NOTIFY_SOCKET" not in variables
    assert variables["KEPT"] == "1"
    assert variables["HOME"] == "/h"
    assert variables["PATH"] == "/opt/runc/bin:/usr/bin:/sbin:/usr/local/sbin:/usr/sbin"
    assert "NOTIFY_SOCKET" in os.environ


def test_the_binary_is_found_by_name_and_by_path(tmp_path: Path) -> None:
    program = tmp_path / "containerd"
    program.write_text("#!/bin/sh\n")
    with pytest.raises(InvalidParameterError, match="apt-get install containerd"):
        find_binary("containerd", str(tmp_path))
    with pytest.raises(InvalidParameterError, match="not executable"):
        find_binary(str(program), "")
    program.chmod(0o755)

    assert find_binary("containerd", str(tmp_path)) == str(program)
    assert find_binary(str(program), "") == str(program)
    for wrong in (tmp_path / "none", tmp_path):
        with pytest.raises(InvalidParameterError, match="is not there, or no file"):
            find_binary(str(wrong), "")
