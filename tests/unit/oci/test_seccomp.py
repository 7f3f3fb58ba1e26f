"""The default seccomp profile: what it allows, by capability and by machine."""

from __future__ import annotations

import json

import pytest

from libcontainerd import oci
from libcontainerd.oci._seccomp import _BY_CAPABILITY, _BY_MACHINE

# Ways out of a container, or into the kernel, that no ordinary program needs.
_NEVER_BY_DEFAULT = {
    "add_key",
    "bpf",
    "clone3",
    "delete_module",
    "finit_module",
    "init_module",
    "io_uring_setup",
    "kexec_load",
    "keyctl",
    "mount",
    "open_by_handle_at",
    "perf_event_open",
    "pivot_root",
    "reboot",
    "request_key",
    "setns",
    "swapon",
    "umount2",
    "unshare",
    "userfaultfd",
}


def allowed(profile: oci.LinuxSeccomp) -> set[str]:
    """Give the calls that are allowed whatever their arguments."""
    return {
        name
        for rule in profile.syscalls or ()
        for name in rule.names or ()
        if rule.action == "SCMP_ACT_ALLOW" and not rule.args
    }


def test_it_allows_the_ordinary_and_refuses_the_rest_with_eperm() -> None:
    profile = oci.default_seccomp_profile(machine="x86_64")

    assert (profile.default_action, profile.default_errno_ret) == ("SCMP_ACT_ERRNO", 1)
    assert {"read", "write", "openat", "execve", "fork", "mmap", "futex", "arch_prctl"} <= allowed(profile)
    assert allowed(profile) & _NEVER_BY_DEFAULT == set()
    assert len(allowed(profile)) > 350


def test_it_is_valid_for_every_machine() -> None:
    for machine in _BY_MACHINE:
        profile = oci.default_seccomp_profile(_BY_CAPABILITY, machine=machine)
        assert oci.validate(profile) == []


@pytest.mark.parametrize("capability", _BY_CAPABILITY)
def test_a_capability_allows_its_calls(capability: str) -> None:
    without = allowed(oci.default_seccomp_profile(machine="x86_64"))
    with_it = allowed(oci.default_seccomp_profile([capability], machine="x86_64"))

    assert with_it - without == set(_BY_CAPABILITY[capability].split()) - without
    # Those that are for tracing are ordinary calls since Linux 4.8, all but a few.
    assert with_it > without


def test_clone_may_not_make_namespaces_without_the_capability() -> None:
    def clone(profile: oci.LinuxSeccomp) -> list[oci.LinuxSyscall]:
        return [rule for rule in profile.syscalls or () if {"clone", "clone3"} & set(rule.names or ())]

    intel, ibm = (oci.default_seccomp_profile(machine=machine) for machine in ("x86_64", "s390x"))

    assert [json.loads(oci.dump(rule)) for rule in clone(intel)] == [
        {
            "names": ["clone"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": 0x7E020000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}],
        },
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
    ]
    assert [flags.index for flags in clone(ibm)[0].args or ()] == [1]
    admin = oci.default_seccomp_profile(["CAP_SYS_ADMIN"], machine="x86_64")
    assert {"clone", "clone3"} <= allowed(admin)
    assert len(clone(admin)) == 1


def test_socket_families_are_named_one_by_one() -> None:
    profile = oci.default_seccomp_profile(machine="aarch64")
    rules = [rule.args or [] for rule in profile.syscalls or () if rule.names == ["socket"]]

    def takes(family: int) -> bool:
        return any(
            family < (rule[0].value or 0) if rule[0].op == "SCMP_CMP_LT" else family == rule[0].value
            for rule in rules
        )

    assert [family for family in range(46) if not takes(family)] == [12, 19, 20, 23, 25, 34, 37, 38, 40]


def test_it_is_for_this_machine_unless_told() -> None:
    assert oci.default_seccomp_profile().architectures


def test_it_follows_the_specs_bounding_capabilities() -> None:
    def profile(*options: oci.SpecOption) -> set[str]:
        linux = oci.build(oci.default_spec(), *options).linux
        assert linux is not None
        assert linux.seccomp is not None
        return allowed(linux.seccomp)

    assert "chroot" in profile(oci.with_seccomp())
    assert "chroot" not in profile(oci.with_capabilities(drop=["SYS_CHROOT"]), oci.with_seccomp())
    assert "unshare" in profile(oci.with_capabilities(add=["SYS_ADMIN"]), oci.with_seccomp())
