"""The default spec as data: valid, complete, and new each time."""

from __future__ import annotations

import json

from libcontainerd import oci


def test_it_is_valid_and_comes_back_equal() -> None:
    spec = oci.default_spec()

    assert oci.validate(spec) == []
    assert oci.parse_spec(oci.dump(spec)) == spec


def test_it_is_new_each_time() -> None:
    one, other = oci.default_spec(), oci.default_spec()
    assert one.process is not None
    assert one.process.capabilities is not None
    assert one.process.capabilities.bounding is not None
    one.process.capabilities.bounding.clear()

    assert one.process.capabilities.effective
    assert other.process is not None
    assert other.process.capabilities is not None
    assert other.process.capabilities.bounding


def test_it_is_understood_by_the_oldest_runtimes() -> None:
    assert oci.default_spec().oci_version == "1.0.2"


def test_what_it_holds() -> None:
    document = json.loads(oci.dump(oci.default_spec()))
    process, linux = document["process"], document["linux"]

    assert process["args"] == ["sh"]
    assert process["cwd"] == "/"
    assert process["user"] == {"uid": 0, "gid": 0, "additionalGids": [0]}
    assert process["noNewPrivileges"] is True
    assert process["rlimits"] == [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}]
    assert process["capabilities"].keys() == {"bounding", "effective", "permitted"}
    assert all(len(names) == 14 for names in process["capabilities"].values())
    assert document["root"] == {"path": "rootfs"}
    assert [mount["destination"] for mount in document["mounts"]] == [
        "/proc",
        "/dev",
        "/dev/pts",
        "/dev/shm",
        "/dev/mqueue",
        "/sys",
        "/sys/fs/cgroup",
        "/run",
    ]
    assert {item["type"] for item in linux["namespaces"]} == {
        "pid",
        "ipc",
        "uts",
        "mount",
        "network",
        "cgroup",
    }
    assert linux["resources"]["devices"][0] == {"allow": False, "access": "rwm"}
    assert all(rule["allow"] for rule in linux["resources"]["devices"][1:])
    assert {"/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"} <= set(linux["maskedPaths"])
    assert set(linux["readonlyPaths"]) == {
        "/proc/bus",
        "/proc/fs",
        "/proc/irq",
        "/proc/sys",
        "/proc/sysrq-trigger",
    }
    assert "seccomp" not in linux
    assert "cgroupsPath" not in linux


def test_mounts_come_before_those_below_them() -> None:
    places = [mount.destination or "" for mount in oci.default_spec().mounts or ()]

    for index, place in enumerate(places):
        assert not any(place.startswith(f"{later}/") for later in places[index + 1 :])
