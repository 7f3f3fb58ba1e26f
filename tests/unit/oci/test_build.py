"""Options: each changes what it says and nothing else, on a copy, and refuses what makes no sense."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libcontainerd import oci
from libcontainerd.errors import InvalidParameterError

_ID = oci.LinuxIDMapping(container_id=0, host_id=100_000, size=65_536)
_DEVICE = oci.LinuxDevice(path="/dev/fuse", type="c", major=10, minor=229)

OPTIONS: dict[str, oci.SpecOption] = {
    "with_annotations": oci.with_annotations({"a": "b"}),
    "with_args": oci.with_args("true"),
    "with_bind": oci.with_bind("/srv", "/data"),
    "with_capabilities": oci.with_capabilities(add=["NET_ADMIN"], drop=["CHOWN"], ambient=True),
    "with_cgroup_path": oci.with_cgroup_path("/a/b"),
    "with_cpu_limit": oci.with_cpu_limit(0.5),
    "with_cpu_shares": oci.with_cpu_shares(2),
    "with_cpuset": oci.with_cpuset("0", mems="0"),
    "with_cwd": oci.with_cwd("/srv"),
    "with_devices": oci.with_devices(_DEVICE, "/dev/null"),
    "with_env": oci.with_env({"A": "b"}),
    "with_hostname": oci.with_hostname("h"),
    "with_image_config": oci.with_image_config({"config": {"Cmd": ["true"], "User": "7"}}),
    "with_memory_limit": oci.with_memory_limit(1 << 20, swap=-1, reservation=1 << 19),
    "with_mounts": oci.with_mounts(oci.Mount(destination="/run", type="tmpfs", options=["ro"])),
    "with_namespace": oci.with_namespace("time"),
    "with_network_namespace": oci.with_network_namespace("/run/netns/a"),
    "with_no_new_privileges": oci.with_no_new_privileges(False),
    "with_pids_limit": oci.with_pids_limit(3),
    "with_rlimit": oci.with_rlimit("CORE", 0),
    "with_rootfs": oci.with_rootfs("/r", readonly=True),
    "with_rootless": oci.with_rootless(),
    "with_seccomp": oci.with_seccomp(oci.LinuxSeccomp(default_action="SCMP_ACT_ALLOW", flags=[])),
    "with_sysctl": oci.with_sysctl({"a": "b"}),
    "with_terminal": oci.with_terminal(width=1, height=2),
    "with_user": oci.with_user(1, 2, additional_gids=[3], umask=0),
    "with_user_namespace": oci.with_user_namespace([_ID]),
    "without_env": oci.without_env("PATH"),
    "without_mounts": oci.without_mounts("/run"),
    "without_namespace": oci.without_namespace("network"),
}


def mutables(value: object) -> list[object]:
    """Give every list, map and model in a value."""
    found: list[object] = []
    if isinstance(value, oci.Model):
        found.append(value)
        for _, item in value:
            found += mutables(item)
    elif isinstance(value, list | dict):
        found.append(value)
        for item in value.values() if isinstance(value, dict) else value:
            found += mutables(item)
    return found


def shared(one: oci.Spec, other: oci.Spec) -> set[int]:
    return {id(part) for part in mutables(one)} & {id(part) for part in mutables(other)}


def test_every_option_is_here() -> None:
    assert {name for name in oci.__all__ if name.startswith(("with_", "without_"))} == OPTIONS.keys()


def test_every_option_is_looked_at_from_inside_a_container() -> None:
    folder = Path(__file__).parents[2] / "integration"
    text = "".join(path.read_text() for path in folder.rglob("test_*.py"))

    assert [name for name in [*OPTIONS, "exec_process"] if f"oci.{name}(" not in text] == []


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changes_a_copy(name: str) -> None:
    before = oci.default_spec()
    written = oci.dump(before)

    after = OPTIONS[name](before)

    assert oci.dump(before) == written
    assert oci.dump(after) != written
    assert shared(before, after) == set()
    assert oci.validate(after) == []


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_can_be_used_again(name: str) -> None:
    option = OPTIONS[name]
    one, other = option(oci.default_spec()), option(oci.default_spec())

    assert shared(one, other) == set()
    assert oci.dump(one) == oci.dump(other)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_needs_no_section_to_be_there(name: str) -> None:
    spec = OPTIONS[name](oci.Spec())

    assert oci.to_mapping(oci.parse_spec(oci.dump(spec))) == oci.to_mapping(spec)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_twice_is_as_once(name: str) -> None:
    once = OPTIONS[name](oci.default_spec())

    assert oci.to_mapping(OPTIONS[name](once)) == oci.to_mapping(once)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_bears_nulls_where_go_does(name: str) -> None:
    spec = oci.parse_spec(
        {
            "process": {
                "args": [None],
                "env": [None, "A=1"],
                "capabilities": {"bounding": [None, "CAP_KILL"]},
                "rlimits": [None],
                "user": None,
            },
            "mounts": [None, {"destination": None}],
            "annotations": None,
            "linux": {
                "namespaces": [None, {"type": None}],
                "devices": [None],
                "resources": {"devices": [None]},
            },
        }
    )

    oci.dump(OPTIONS[name](spec))


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_leaves_unknown_members_alone(name: str) -> None:
    spec = oci.parse_spec({"x": [1], "process": {"y": {}}, "linux": {"z": None}})
    changed = oci.to_mapping(OPTIONS[name](spec))

    assert changed["x"] == [1]
    assert changed["process"]["y"] == {}  # type: ignore[index]
    assert changed["linux"]["z"] is None  # type: ignore[index]


@given(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=6))
def test_build_is_the_options_one_after_the_other(names: list[str]) -> None:
    step_by_step = oci.default_spec()
    for name in names:
        step_by_step = OPTIONS[name](step_by_step)
    start = oci.default_spec()

    built = oci.build(start, *(OPTIONS[name] for name in names))

    assert oci.to_mapping(built) == oci.to_mapping(step_by_step)
    assert shared(start, built) == set()


def test_build_takes_functions_of_ones_own() -> None:
    def named(spec: oci.Spec) -> oci.Spec:
        return spec.model_copy(update={"domainname": "example.org"})

    built = oci.build(oci.default_spec(), oci.with_args("true"), named, oci.with_hostname("h"))

    assert (built.domainname, built.hostname) == ("example.org", "h")


def test_an_option_says_its_name() -> None:
    assert repr(oci.with_args("true")) == "<with_args>"


_REFUSED: dict[str, Callable[[], object]] = {
    "with_args: name a program": oci.with_args,
    "with_args: args[1] must be a string, not the number 5": lambda: oci.with_args("a", 5)(oci.Spec()),  # type: ignore[arg-type]
    "with_env: '' cannot be the name": lambda: oci.with_env({"": "a"}),
    "with_env: 'a=b' cannot be the name": lambda: oci.with_env({"a=b": "c"}),
    "with_env: a must be text without NUL, not 5": lambda: oci.with_env({"a": 5}),  # type: ignore[dict-item]
    "with_env: a must be text without NUL, not 'b\\x00'": lambda: oci.with_env({"a": "b\0"}),
    "with_cwd: path must be an absolute path, not 'srv'": lambda: oci.with_cwd("srv"),
    "with_user: uid must be at least 0, not the number -1": lambda: oci.with_user(-1)(oci.Spec()),
    "with_user: uid must be an integer, not the string 'root'": lambda: oci.with_user("root")(oci.Spec()),  # type: ignore[arg-type]
    "with_hostname: a host name has 1 to 64 bytes": lambda: oci.with_hostname("a" * 65),
    "with_hostname: a host name has 1 to 64 bytes, and ''": lambda: oci.with_hostname(""),
    "with_mounts: destination must be an absolute path": lambda: oci.with_mounts(oci.Mount(destination="a")),
    "with_mounts: destination must be text": lambda: oci.with_mounts(oci.Mount()),
    "with_bind: source must be an absolute path": lambda: oci.with_bind("a", "/b"),
    "with_bind: destination must be an absolute path": lambda: oci.with_bind("/a", "b"),
    "with_terminal: give width and height": lambda: oci.with_terminal(width=80),
    "with_capabilities: Linux has no capability 'NET_ADMN'": lambda: oci.with_capabilities(add=["NET_ADMN"]),
    "with_capabilities: give a list": lambda: oci.with_capabilities(drop="ALL"),
    "with_rlimit: Linux has no resource limit 'FILES'": lambda: oci.with_rlimit("FILES", 1),
    "with_rlimit: the soft limit 2 is above the hard limit 1": lambda: oci.with_rlimit("NOFILE", 2, 1),
    "with_memory_limit: swap=1": lambda: oci.with_memory_limit(2, swap=1),
    "with_memory_limit: swap=5": lambda: oci.with_memory_limit(-1, swap=5),
    "with_memory_limit: reservation=3 is above limit=2": lambda: oci.with_memory_limit(2, reservation=3),
    "with_memory_limit: limit must be an integer": lambda: oci.with_memory_limit("1g")(oci.Spec()),  # type: ignore[arg-type]
    "with_cpu_limit: cpus=0 must give": lambda: oci.with_cpu_limit(0),
    "with_cpu_limit: cpus=nan must give": lambda: oci.with_cpu_limit(float("nan")),
    "with_cpu_limit: cpus=inf must give": lambda: oci.with_cpu_limit(float("inf")),
    "with_cpu_limit: period=10 must be": lambda: oci.with_cpu_limit(1, period=10),
    "with_pids_limit: 0 is read as no limit": lambda: oci.with_pids_limit(0),
    "with_namespace: a namespace is one of": lambda: oci.with_namespace("net"),
    "with_namespace: path must be an absolute path": lambda: oci.with_namespace("pid", "ns/pid"),
    "with_network_namespace: path must be an absolute path": lambda: oci.with_network_namespace("blue"),
    "without_namespace: a namespace is one of": lambda: oci.without_namespace("net"),
    "with_user_namespace: give at least one": lambda: oci.with_user_namespace([]),
    "with_user_namespace: a mapping needs": lambda: oci.with_user_namespace([oci.LinuxIDMapping(size=1)]),
    "with_devices: access must be some of rwm, not 'rx'": lambda: oci.with_devices(_DEVICE, access="rx"),
    "with_devices: path must be an absolute path": lambda: oci.with_devices("null"),
    "with_devices: /dev/no-such-thing: No such file": lambda: oci.with_devices("/dev/no-such-thing"),
    "with_devices: / is neither": lambda: oci.with_devices("/"),
    "with_devices: /a: type must be c, b, u or p, not None": lambda: oci.with_devices(oci.LinuxDevice(path="/a")),
    "with_devices: /a: give major and minor": lambda: oci.with_devices(oci.LinuxDevice(path="/a", type="c")),
    "with_annotations: an annotation needs a name": lambda: oci.with_annotations({"": "a"}),
    "with_annotations: a must be text": lambda: oci.with_annotations({"a": 1}),  # type: ignore[dict-item]
    "with_sysctl: give a mapping": lambda: oci.with_sysctl(["a=1"]),  # type: ignore[arg-type]
    "with_env: give a mapping": lambda: oci.with_env("A=1"),  # type: ignore[arg-type]
    "with_cgroup_path: '' cannot be": lambda: oci.with_cgroup_path(""),
    "with_cgroup_path: '/a/../../b' cannot be": lambda: oci.with_cgroup_path("/a/../../b"),
    "no default seccomp profile for the machine 'vax'": lambda: oci.default_seccomp_profile(machine="vax"),
}  # fmt: skip


@pytest.mark.parametrize("message", _REFUSED)
def test_what_makes_no_sense_is_refused(message: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        _REFUSED[message]()

    assert str(caught.value).startswith(message)


def test_build_refuses_what_is_no_spec() -> None:
    with pytest.raises(InvalidParameterError, match=r"must be a mapping, JSON text or oci\.Spec, not int"):
        oci.build(5)  # type: ignore[arg-type]


def test_env_keeps_its_order_and_the_last_of_a_name() -> None:
    spec = oci.parse_spec({"process": {"env": ["A=1", "B=2", "A=3", "ODD"]}})

    changed = oci.build(spec, oci.with_env({"B": "x=y", "C": ""}), oci.without_env("ODD"))

    assert changed.process is not None
    assert changed.process.env == ["A=3", "B=x=y", "C="]


def test_mounts_on_one_destination_that_were_there_stay() -> None:
    spec = oci.parse_spec(
        {"mounts": [{"destination": "/a", "type": "1"}, {"destination": "/a/", "type": "2"}]}
    )

    changed = oci.with_mounts(oci.Mount(destination="/b/", type="3"), oci.Mount(destination="/a", type="4"))(
        spec
    )

    assert changed.mounts is not None
    assert [(mount.destination, mount.type) for mount in changed.mounts] == [
        ("/a", "4"),
        ("/a/", "2"),
        ("/b/", "3"),
    ]


def test_a_mount_given_to_an_option_may_be_changed_afterwards() -> None:
    mount = oci.Mount(destination="/a", options=["ro"])
    option = oci.with_mounts(mount)
    assert mount.options is not None
    mount.options.append("noexec")

    spec = option(oci.Spec())

    assert spec.mounts is not None
    assert spec.mounts[0].options == ["ro"]


@pytest.mark.parametrize(
    ("add", "drop", "bounding"),
    [
        (["KILL"], [], ["CAP_CHOWN", "CAP_KILL"]),
        ([], ["chown"], []),
        (["CHOWN"], ["CHOWN"], ["CAP_CHOWN"]),
        (["cap_kill"], ["ALL"], ["CAP_KILL"]),
        ([], ["all"], []),
    ],
)
def test_capabilities(add: list[str], drop: list[str], bounding: list[str]) -> None:
    spec = oci.parse_spec(
        {"process": {"capabilities": {"bounding": ["CAP_CHOWN"], "ambient": ["CAP_CHOWN"]}}}
    )

    changed = oci.with_capabilities(add=add, drop=drop)(spec)

    assert changed.process is not None
    assert changed.process.capabilities is not None
    assert changed.process.capabilities.bounding == bounding
    assert changed.process.capabilities.inheritable is None
    assert set(changed.process.capabilities.ambient or ()) <= {"CAP_CHOWN"}


def test_all_capabilities_but_one() -> None:
    spec = oci.with_capabilities(add=["ALL"], drop=["SYS_ADMIN"])(oci.Spec())

    assert spec.process is not None
    assert spec.process.capabilities is not None
    assert spec.process.capabilities.bounding is not None
    assert len(spec.process.capabilities.bounding) == 40
    assert "CAP_SYS_ADMIN" not in spec.process.capabilities.bounding
    assert spec.process.capabilities.ambient is None


def test_devices_replace_one_at_the_same_path_and_follow_links(tmp_path: Path) -> None:
    link = tmp_path / "zero"
    link.symlink_to("/dev/zero")
    spec = oci.build(
        oci.Spec(),
        oci.with_devices("/dev/null"),
        oci.with_devices(oci.LinuxDevice(path="/dev/null", type="p"), link, access="r"),
    )

    assert spec.linux is not None
    assert spec.linux.devices is not None
    assert [(device.path, device.type, device.minor) for device in spec.linux.devices] == [
        ("/dev/null", "p", None),
        (str(link), "c", 5),
    ]
    assert spec.linux.resources is not None
    assert [(rule.minor, rule.access) for rule in spec.linux.resources.devices or ()] == [
        (3, "rwm"),
        (5, "r"),
    ]


def test_the_process_of_an_exec_has_no_terminal_and_shares_nothing() -> None:
    spec = oci.build(oci.default_spec(), oci.with_terminal(width=1, height=1), oci.with_user(5))
    process = oci.exec_process(spec, "ps")

    assert process.args == ["ps"]
    assert process.terminal is False
    assert b"consoleSize" not in oci.dump(process)
    assert process.user is not None
    assert process.user.uid == 5
    assert spec.process is not None
    assert spec.process.console_size is not None
    assert process.env is not spec.process.env
    with pytest.raises(InvalidParameterError):
        oci.exec_process(spec)


def test_user_namespaces_map_groups_as_users_unless_told() -> None:
    groups = oci.LinuxIDMapping(container_id=0, host_id=7, size=1)

    same, other = (
        oci.with_user_namespace([_ID])(oci.Spec()),
        oci.with_user_namespace([_ID], [groups])(oci.Spec()),
    )

    assert same.linux is not None
    assert same.linux.gid_mappings == [_ID]
    assert other.linux is not None
    assert other.linux.gid_mappings == [groups]


def test_rootless_asks_for_nothing_of_a_cgroup() -> None:
    spec = oci.build(
        oci.default_spec(),
        oci.with_memory_limit(1 << 20),
        oci.with_cgroup_path("/a"),
        oci.with_user(0, additional_gids=[7]),
        oci.with_rootless(),
    )

    document = oci.to_mapping(spec)
    linux, process, mounts = document["linux"], document["process"], document["mounts"]
    assert isinstance(linux, dict)
    assert isinstance(process, dict)
    assert isinstance(mounts, list)
    assert "resources" not in linux
    assert linux["cgroupsPath"] == ""
    assert process["user"] == {"uid": 0, "gid": 0}
    assert "/sys/fs/cgroup" not in [each["destination"] for each in mounts]
    assert not [option for each in mounts for option in each["options"] if option.startswith("gid=")]


def test_an_option_that_was_not_called_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match="called with its values first"):
        oci.build(oci.default_spec(), oci.with_args)  # type: ignore[arg-type] # the mistake itself
