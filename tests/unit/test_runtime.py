"""What shim and runtime are told: runc's options of a container and a task, and whose its stdio is."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libcontainerd import oci
from libcontainerd._bundle import BUNDLE_LABEL
from libcontainerd._records import SpecFacts
from libcontainerd._runtime import (
    check_labels,
    container_options,
    mapped_root,
    options_for,
    read_facts,
    read_runtime_options,
    task_options,
    with_own_cgroup,
)
from libcontainerd._wire import typeurl
from libcontainerd._wire.pb import wellknown_pb2
from libcontainerd._wire.pb.runc.linux_pb2 import CreateOptions, RuncOptions
from libcontainerd._wire.pb.runc.options_pb2 import CheckpointOptions, Options
from libcontainerd._wire.pb.services import containers_pb2
from libcontainerd.errors import InvalidParameterError, SystemFailureError

BOOLS = ("no_pivot_root", "no_new_keyring", "systemd_cgroup")
TEXTS = ("shim_cgroup", "binary_name", "root", "criu_image_path", "criu_work_path")
NUMBERS = ("io_uid", "io_gid")

FIELDS = st.fixed_dictionaries(
    {},
    optional={
        **{name: st.booleans() for name in BOOLS},
        **{name: st.text(st.characters(codec="utf-8")) for name in TEXTS},
        **{name: st.integers(0, 2**32 - 1) for name in NUMBERS},
    },
)


@pytest.fixture(autouse=True)
def _no_ramdisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOCKER_RAMDISK", raising=False)


# --------------------------------------------------------------------------------------------------- a container's options


def test_none_is_none() -> None:
    assert read_runtime_options(None) is None


@given(fields=FIELDS)
def test_a_mapping_and_a_message_say_the_same(fields: dict[str, object]) -> None:
    from_mapping = read_runtime_options(fields)
    assert from_mapping is not None
    for name in (*BOOLS, *TEXTS, *NUMBERS):
        assert getattr(from_mapping, name) == fields.get(name, type(getattr(Options(), name))())
    from_message = read_runtime_options(from_mapping)
    assert from_message == from_mapping
    assert from_message is not from_mapping, "the caller keeps his own"


def test_an_empty_mapping_is_empty_options() -> None:
    assert read_runtime_options({}) == Options()


def test_another_message_is_refused() -> None:
    with pytest.raises(
        InvalidParameterError, match=r"want a containerd\.runc\.v1\.Options, not a containerd\.runc"
    ):
        read_runtime_options(CheckpointOptions())
    with pytest.raises(InvalidParameterError, match=r"not a google\.protobuf\.Any"):
        read_runtime_options(wellknown_pb2.Any())


def test_a_copy_of_the_message_from_another_pool_is_taken() -> None:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto()
    Options.DESCRIPTOR.file.CopyToProto(file)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    descriptor = pool.FindMessageTypeByName(Options.DESCRIPTOR.full_name)
    if hasattr(message_factory, "GetMessageClass"):
        theirs = message_factory.GetMessageClass(descriptor)
    else:  # protobuf 4.21
        theirs = message_factory.MessageFactory(pool).GetPrototype(descriptor)  # type: ignore[attr-defined] # gone since
    assert theirs is not Options
    assert read_runtime_options(theirs(binary_name="crun", io_uid=5)) == Options(binary_name="crun", io_uid=5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"binaryname": "crun"}, "no field 'binaryname'; there are binary_name, "),
        ({"binary_name": 5}, "binary_name: "),
        ({"systemd_cgroup": "yes"}, "systemd_cgroup: "),
        ({"io_uid": -1}, "io_uid: "),
        ({"io_uid": 2**32}, "io_uid: "),
        ({"io_gid": None}, "io_gid: "),
        ({5: "x"}, "no field 5"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidParameterError, match="runtime_options: " + said):
        read_runtime_options(fields)


# -------------------------------------------------------------------------------------------------------- a task's options


def told(options: Options | None, owner: tuple[int, int]) -> Options | None:
    packed = task_options(options, owner)
    return None if packed is None else typeurl.unpack(packed, Options)


def test_where_the_containers_options_say_it_all_a_task_has_none() -> None:
    assert told(None, (0, 0)) is None
    assert told(Options(binary_name="crun"), (0, 0)) is None


@given(fields=FIELDS, uid=st.integers(1, 2**32 - 1), gid=st.integers(0, 2**32 - 1))
def test_a_mapped_root_owns_the_stdio(fields: dict[str, object], uid: int, gid: int) -> None:
    options = read_runtime_options(fields)
    assert options is not None
    kept = Options.FromString(options.SerializeToString())
    answer = told(options, (uid, gid))
    assert answer is not None
    assert (answer.io_uid, answer.io_gid) == (uid, gid)
    assert options == kept, "the container's own stay as they are"
    answer.io_uid, answer.io_gid = options.io_uid, options.io_gid
    assert answer == options, "containerd takes a task's options instead of the container's, so they say all"


def test_a_ramdisk_cannot_be_pivoted_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_RAMDISK", "")
    assert told(None, (0, 0)) is None
    monkeypatch.setenv("DOCKER_RAMDISK", "1")
    assert told(None, (0, 0)) == Options(no_pivot_root=True)
    assert told(Options(root="/r"), (5, 6)) == Options(root="/r", io_uid=5, io_gid=6, no_pivot_root=True)


def test_a_containers_no_pivot_root_stays() -> None:
    assert told(Options(no_pivot_root=True), (5, 6)) == Options(no_pivot_root=True, io_uid=5, io_gid=6)


# --------------------------------------------------------------------------------------------------------- the old runtime

V1 = "io.containerd.runtime.v1.linux"


def test_a_shim_gets_a_containers_options_as_its_own_message() -> None:
    options = Options(binary_name="crun", root="/r", systemd_cgroup=True, no_new_keyring=True)
    packed = container_options("io.containerd.runc.v2", options)
    assert packed is not None
    assert typeurl.unpack(packed, Options) == options
    packed = container_options(V1, options)
    assert packed is not None
    assert typeurl.unpack(packed, RuncOptions) == RuncOptions(
        runtime="crun", runtime_root="/r", systemd_cgroup=True
    )
    for runtime in (V1, "io.containerd.runc.v2"):
        assert container_options(runtime, None) is None


def test_its_options_are_read_again() -> None:
    for runtime, name in (
        (V1, "containerd.linux.runc.RuncOptions"),
        ("io.containerd.runc.v2", "containerd.runc.v1.Options"),
    ):
        options = Options(binary_name="crun", root="/r", systemd_cgroup=True)
        packed = container_options(runtime, options)
        assert packed is not None
        assert packed.type_url == name
        container = containers_pb2.Container(
            id="c",
            runtime=containers_pb2.Container.Runtime(name=runtime, options=packed),
            spec=typeurl.pack_json(typeurl.SPEC_URL, b"{}"),
        )
        facts = read_facts(container)
        assert (facts.runtime, facts.options) == (runtime, options)


def test_the_old_shim_takes_the_rest_with_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(no_new_keyring=True, shim_cgroup="/s", criu_image_path="/i", criu_work_path="/w")
    packed = task_options(options, (5, 6), V1)
    assert packed is not None
    assert typeurl.unpack(packed, CreateOptions) == CreateOptions(
        no_new_keyring=True, shim_cgroup="/s", criu_image_path="/i", criu_work_path="/w", io_uid=5, io_gid=6
    )
    assert task_options(Options(root="/r"), (0, 0), V1) is None
    monkeypatch.setenv("DOCKER_RAMDISK", "1")
    packed = task_options(None, (0, 0), V1)
    assert packed is not None
    assert typeurl.unpack(packed, CreateOptions) == CreateOptions(no_pivot_root=True)


# ----------------------------------------------------------------------------------------------------------------- labels


@given(key=st.text(max_size=3), value=st.text(max_size=3), pad=st.integers(4080, 4100))
def test_a_labels_size_is_counted_in_bytes(key: str, value: str, pad: int) -> None:
    label = {key + "k" * pad: value}
    try:
        size = len((key + value).encode()) + pad
    except UnicodeEncodeError:
        size = 9999
    if size <= 4096:
        check_labels(label)
    else:
        with pytest.raises(InvalidParameterError, match="label "):
            check_labels(label)


@pytest.mark.parametrize(
    "labels", [{"": "x"}, {BUNDLE_LABEL: "/x"}, {"a": 5}, {5: "a"}, {"a": None}, {"\ud800": "x"}]
)
def test_labels_that_containerd_would_refuse_are_refused(labels: dict[str, str]) -> None:
    with pytest.raises(InvalidParameterError, match="label"):
        check_labels(labels)


# ---------------------------------------------------------------------------------------------------------- a mapped root


def spec(document: dict[str, object] | None) -> oci.Spec:
    return oci.parse_spec({"ociVersion": "1.0.2", **({} if document is None else {"linux": document})})


def mapping(container: int, host: int, size: int) -> dict[str, int]:
    return {"containerID": container, "hostID": host, "size": size}


USER = {"namespaces": [{"type": "pid"}, {"type": "user"}]}


@pytest.mark.parametrize(
    ("linux", "owner"),
    [
        (None, (0, 0)),
        ({}, (0, 0)),
        (USER, (0, 0)),
        ({"uidMappings": [mapping(0, 1000, 1)]}, (0, 0)),
        ({**USER, "uidMappings": [mapping(0, 1000, 1)], "gidMappings": [mapping(0, 1001, 1)]}, (1000, 1001)),
        ({**USER, "uidMappings": [mapping(1, 5, 10), mapping(0, 7, 1)]}, (7, 0)),
        ({**USER, "uidMappings": [mapping(0, 5, 0), mapping(0, 7, 1)]}, (7, 0)),
        ({**USER, "uidMappings": [mapping(1, 5, 10)]}, (0, 0)),
    ],
)
def test_the_host_ids_of_a_containers_root(linux: dict[str, object] | None, owner: tuple[int, int]) -> None:
    assert mapped_root(spec(linux)) == owner


def spec_with(**linux: object) -> oci.Spec:
    return oci.parse_spec({"ociVersion": "1.0.2", "linux": linux})


@pytest.mark.parametrize(
    ("spec", "options", "uid", "path"),
    [
        (spec_with(), None, 0, "/web@ns"),
        (spec_with(), Options(systemd_cgroup=True), 0, None),
        (spec_with(), None, 1000, None),
        (spec_with(cgroupsPath=""), None, 0, ""),
        (spec_with(cgroupsPath="/mine"), None, 0, "/mine"),
    ],
    ids=["unset", "systemd", "not root", "left to runc", "set"],
)
def test_a_cgroup_of_its_own(
    monkeypatch: pytest.MonkeyPatch, spec: oci.Spec, options: Options | None, uid: int, path: str | None
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    changed = with_own_cgroup(spec, "ns", "web", options)
    assert changed.linux is not None
    assert changed.linux.cgroups_path == path


def test_a_clients_options_are_under_those_of_a_container() -> None:
    defaults = Options(root="/run/mine", no_pivot_root=True)
    assert options_for("io.containerd.runc.v2", None, defaults) == defaults
    own = {"root": "/run/other", "binary_name": "crun"}
    both = Options(root="/run/other", binary_name="crun", no_pivot_root=True)
    assert options_for("io.containerd.runc.v2", own, defaults) == both
    assert options_for(V1, own, defaults) == both
    alone = Options(root="/run/other", binary_name="crun")
    assert options_for("io.containerd.kata.v2", own, defaults) == alone
    assert options_for("io.containerd.kata.v2", None, defaults) is None


# ------------------------------------------------------------------------------------------ what is read of a container


def container_of(spec: object, options: Options | None = None) -> containers_pb2.Container:
    return containers_pb2.Container(
        id="web",
        spec=typeurl.pack_json(typeurl.SPEC_URL, json.dumps(spec).encode()),
        runtime=containers_pb2.Container.Runtime(
            options=None if options is None else typeurl.pack(options),
        ),
    )


MAPPING = {"containerID": 0, "hostID": 100_000, "size": 65_536}
USER = {"namespaces": [{"type": "user"}]}


@pytest.mark.parametrize(
    ("spec", "terminal", "owner"),
    [
        ({}, False, (0, 0)),
        ({"process": {"terminal": True}}, True, (0, 0)),
        ({"process": {"terminal": "yes"}, "linux": []}, False, (0, 0)),
        ({"process": None, "linux": None}, False, (0, 0)),
        ({"linux": {"uidMappings": [MAPPING], "gidMappings": [MAPPING]}}, False, (0, 0)),
        ({"linux": {**USER, "uidMappings": [MAPPING]}}, False, (100_000, 0)),
        (
            {"linux": {**USER, "uidMappings": [3, MAPPING], "gidMappings": [MAPPING]}},
            False,
            (100_000, 100_000),
        ),
        ({"linux": {**USER, "uidMappings": [{**MAPPING, "containerID": 1}]}}, False, (0, 0)),
        ({"linux": {**USER, "uidMappings": [{**MAPPING, "size": 0}]}}, False, (0, 0)),
    ],
)
def test_the_facts_of_a_container(spec: object, terminal: bool, owner: tuple[int, int]) -> None:
    assert read_facts(container_of(spec)) == SpecFacts(terminal=terminal, owner=owner, options=None)


def test_the_facts_are_those_that_the_models_give() -> None:
    mapping = oci.LinuxIDMapping(container_id=0, host_id=1234, size=10)
    spec = oci.build(oci.default_spec(), oci.with_user_namespace([mapping]), oci.with_terminal())
    options = Options(root="/r")
    facts = read_facts(container_of(json.loads(oci.dump(spec)), options))
    assert facts == SpecFacts(terminal=True, owner=mapped_root(spec), options=options)


@pytest.mark.parametrize("host", [-1, 1 << 32, (1 << 32) - 1, "0", 1.5, None])
def test_a_user_that_cannot_be_is_refused(host: object) -> None:
    spec = {"linux": {**USER, "uidMappings": [{**MAPPING, "hostID": host}]}}
    with pytest.raises(SystemFailureError, match="cannot read the spec of container 'web': there is no user"):
        read_facts(container_of(spec))


@pytest.mark.parametrize(
    "container",
    [
        containers_pb2.Container(id="web"),
        containers_pb2.Container(id="web", spec=typeurl.pack_json(typeurl.SPEC_URL, b"[]")),
        containers_pb2.Container(id="web", spec=typeurl.pack_json(typeurl.SPEC_URL, b"{")),
        containers_pb2.Container(id="web", spec=typeurl.pack_json(typeurl.SPEC_URL, b"[" * 100_000)),
        containers_pb2.Container(id="web", spec=typeurl.pack_json(typeurl.PROCESS_URL, b"{}")),
        containers_pb2.Container(
            id="web",
            spec=typeurl.pack_json(typeurl.SPEC_URL, b"{}"),
            runtime=containers_pb2.Container.Runtime(
                options=wellknown_pb2.Any(type_url="containerd.runc.v1.Options", value=b"\xff")
            ),
        ),
    ],
)
def test_what_cannot_be_read_is_told(container: containers_pb2.Container) -> None:
    with pytest.raises(SystemFailureError, match="cannot read the spec of container 'web'"):
        read_facts(container)
