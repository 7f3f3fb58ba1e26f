"""Documents as they come: text, mappings and models, hostile and careless ones among them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import OrderedDict
from types import MappingProxyType

import pydantic
import pytest

from libcontainerd import oci
from libcontainerd.errors import InvalidParameterError
from libcontainerd.oci._base import MAX_DEPTH
from libcontainerd.oci._document import checked_process, checked_spec

_PARSERS = {
    "spec": oci.parse_spec,
    "process": oci.parse_process,
    "resources": oci.parse_resources,
    "state": oci.parse_state,
    "features": oci.parse_features,
}


def refusal(document: object) -> str:
    """Give the message that a spec is refused with."""
    with pytest.raises(InvalidParameterError) as caught:
        oci.parse_spec(document)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"hostname": ""}',
        '{"hostname": null}',
        '{"process": {"terminal": false, "user": {"uid": 0, "gid": null}, "args": [], "env": null, "cwd": ""}}',
        '{"process": null, "linux": {}, "mounts": [], "annotations": {}}',
        '{"process": {"args": ["sh", null, ""]}, "annotations": {"a": null}, "mounts": [null, {}]}',
        '{"linux": {"resources": {"memory": {"limit": 0, "swap": -1}, "rdma": {"mlx5": null}}}}',
        '{"linux": {"resources": {"cpu": {"shares": 18446744073709551615, "quota": -9223372036854775808}}}}',
        '{"linux": {"resources": {"oomScoreAdj": 100}, "timeOffset": {"monotonicSecs": 1.5}}}',
        '{"org.example": {"deep": [1, 2.5, null, true, {"a": []}]}, "oci_version": "mine", "model_fields": 1}',
        '{"windows": {"layerFolders": ["C:\\\\x"], "unknown": [null]}, "vm": {"kernel": {"path": "/k"}}}',
        '{"windows": null, "zos": {}, "solaris": {"milestone": ""}, "freebsd": {"jail": {"allow": {}}}}',
        '{"hostname": "\\u00e9\\ud83d\\ude00", "\\u00e9": "\\u0000"}',
        '{"x": 123456789012345678901234567890, "y": -0.0, "z": 1e300}',
    ],
)
def test_what_comes_in_goes_out(text: str) -> None:
    spec = oci.parse_spec(text)

    assert json.loads(oci.dump(spec)) == json.loads(text)
    assert oci.to_mapping(spec) == json.loads(text)
    assert json.loads(oci.dump(oci.parse_spec(spec))) == json.loads(text)


@pytest.mark.parametrize("what", _PARSERS)
def test_each_parser_takes_text_bytes_mappings_and_its_model(what: str) -> None:
    parse = _PARSERS[what]
    from_text = parse('{"unknown": [1]}')

    assert parse(b'{"unknown": [1]}') == parse({"unknown": [1]}) == parse(from_text) == from_text  # type: ignore[arg-type]
    with pytest.raises(
        InvalidParameterError, match=f"^invalid {what}: must be a mapping, JSON text or oci\\.[A-Z]"
    ):
        parse(5)  # type: ignore[arg-type]


def test_every_kind_of_mapping_is_taken() -> None:
    document = MappingProxyType(
        {"process": OrderedDict(args=["sh"]), "annotations": MappingProxyType({"a": "b"})}
    )

    assert json.loads(oci.dump(oci.parse_spec(document))) == {
        "process": {"args": ["sh"]},
        "annotations": {"a": "b"},
    }


def test_models_inside_a_mapping_are_taken_and_checked() -> None:
    process = oci.Process(args=["sh"], no_new_privileges=True)

    spec = oci.parse_spec({"process": process, "linux": {"namespaces": [oci.LinuxNamespace(type="pid")]}})

    assert json.loads(oci.dump(spec)) == {
        "process": {"args": ["sh"], "noNewPrivileges": True},
        "linux": {"namespaces": [{"type": "pid"}]},
    }
    assert process.args is not None
    process.args.append(5)  # type: ignore[arg-type]
    assert refusal({"process": process}) == "invalid spec: process.args[1] must be a string, not the number 5"


def test_the_result_shares_nothing_with_what_it_was_made_from() -> None:
    lists: dict[str, list[object]] = {"args": ["sh"], "list": [1], "layerFolders": ["a"]}
    document = {
        "process": {"args": lists["args"]},
        "unknown": {"list": lists["list"]},
        "windows": {"layerFolders": lists["layerFolders"]},
    }
    spec = oci.parse_spec(document)
    again = oci.parse_spec(spec)
    before = oci.dump(again)

    for values in lists.values():
        values.append("x")
    assert oci.dump(spec) == before
    assert spec.process is not None
    assert spec.process.args is not None
    assert spec.model_extra is not None
    assert spec.windows is not None
    spec.process.args.append("y")
    spec.model_extra["unknown"]["list"].append("y")
    spec.windows.clear()
    assert oci.dump(again) == before
    mapping = oci.to_mapping(again)
    for section in mapping.values():
        assert isinstance(section, dict)
        section.clear()
    assert oci.dump(again) == before


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ('{"hostname": "a", "hostname": "a"}', "hostname"),
        ('{"process": {"user": {"uid": 1, "gid": 1, "uid": 1}}}', "process.user.uid"),
        ('{"mounts": [{}, {"type": "a", "type": "b"}]}', "mounts[1].type"),
        ('{"annotations": {"a.b": "1", "a.b": "2"}}', 'annotations["a.b"]'),
        ('{"unknown": {"x": [{"y": 1, "y": 2}]}}', "unknown.x[0].y"),
        ('{"a": {"b": 1, "b": 2}, "a": 3}', "a"),
    ],
)
def test_a_member_that_occurs_twice_is_refused(text: str, path: str) -> None:
    assert refusal(text) == f"invalid spec: {path} occurs twice in one object"
    assert refusal(text.encode()) == f"invalid spec: {path} occurs twice in one object"


@pytest.mark.parametrize(
    ("text", "path", "known"),
    [
        ('{"Process": {}}', "Process", "process"),
        ('{"windows": {"Devices": 3}}', "windows.Devices", "devices"),
        ('{"vm": {"hwConfig": {"irqs": [], "IRQs": []}}}', "vm.hwConfig.IRQs", "irqs"),
        ('{"OCIVERSION": "1.0.2"}', "OCIVERSION", "ociVersion"),
        ('{"process": {"ARGS": []}}', "process.ARGS", "args"),
        ('{"linux": {"resources": {"rdma": {"mlx5": {"hcahandles": 1}}}}}', "linux.resources.rdma.mlx5.hcahandles", "hcaHandles"),
        ('{"mounts": [{}, {"De\\u017ftination": "/"}]}', "mounts[1].De\u017ftination", "destination"),
        ('{"hoo\\u212as": {}}', '["hoo\u212as"]', "hooks"),
    ],
)  # fmt: skip
def test_a_name_that_only_go_would_take_for_another_is_refused(text: str, path: str, known: str) -> None:
    message = refusal(text)

    assert f"the member's name is {known!r}" in message
    assert path.replace('["hoo\u212as"]', "hoo\u212as") in message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("place", ["unknown.x[0]", "linux.resources.memory.limit", "hostname"])
def test_numbers_that_json_has_not_are_refused_where_they_stand(number: str, place: str) -> None:
    text = {
        "unknown.x[0]": f'{{"unknown": {{"x": [{number}]}}}}',
        "linux.resources.memory.limit": f'{{"linux": {{"resources": {{"memory": {{"limit": {number}}}}}}}}}',
        "hostname": f'{{"hostname": {number}}}',
    }[place]

    assert refusal(text).startswith(f"invalid spec: {place} must be")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_has_not_are_refused_in_mappings(value: float) -> None:
    assert (
        refusal({"x": {"y.z": [0, value]}})
        == f'invalid spec: x["y.z"][1] must be a finite number, not {value}'
    )
    assert refusal({"windows": {"credentialSpec": value}}).startswith(
        "invalid spec: windows.credentialSpec must be"
    )


@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 5_000, 200_000])
def test_nesting_bombs_are_refused(opening: str, depth: int) -> None:
    closing = {"[": "]", '{"a":': "}"}[opening]
    inner = "1" if opening != "[" else ""

    assert "nested deeper than 100 levels" in refusal(
        '{"x":' + opening * depth + inner + closing * depth + "}"
    )


def test_deep_nesting_within_the_limit_is_taken() -> None:
    text = '{"x":' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}"

    assert json.loads(oci.dump(oci.parse_spec(text))) == json.loads(text)
    assert json.loads(oci.dump(oci.parse_spec(json.loads(text)))) == json.loads(text)


def test_cycles_are_refused() -> None:
    cycle: dict[str, object] = {}
    cycle["x"] = [cycle]

    for document in (cycle, {"process": cycle}, {"mounts": [cycle]}, {"annotations": cycle}):
        assert "nested deeper than 100 levels" in refusal(document)


def test_lists_that_hold_each_other_over_and_over_are_refused() -> None:
    # 60 lists in memory; written out, more than there are atoms in a person.
    value: list[object] = []
    for _ in range(60):
        value = [value, value]

    assert "beyond 100000 arrays and objects" in refusal({"x": value})


def test_an_object_with_very_many_members_takes_linear_time() -> None:
    text = "{" + ",".join(f'"member{index}": 0' for index in range(100_000)) + ', "member99999": 1}'

    assert refusal(text) == "invalid spec: member99999 occurs twice in one object"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("{}}", "not JSON"),
        ("{} {}", "not JSON"),
        ("{'a': 1}", "not JSON"),
        ('{"a": 1,}', "not JSON"),
        ('{"a": 01}', "not JSON"),
        ('{"a": "\n"}', "not JSON"),
        ("\ufeff{}", "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        ('{"a": "\xff"}'.encode("latin-1"), "not UTF-8"),
        ("{}".encode("utf-16"), "not UTF-8"),
        ('{"a": ' + "1" * 5000 + "}", "not JSON"),
    ],
)
def test_what_is_no_json_is_refused(text: str | bytes, problem: str) -> None:
    assert refusal(text).startswith(f"invalid spec: {problem}")


@pytest.mark.parametrize(
    ("document", "path"),
    [
        ('{"hostname": "\\ud800"}', "hostname"),
        ('{"x": ["\\udfff"]}', "x[0]"),
        ('{"x": "\ud800"}', "x"),
        ({"process": {"args": ["a", "\udcff"]}}, "process.args[1]"),
        ({"annotations": {"\ud800": ""}}, "annotations"),
        ({"x": {"\ud800": ""}}, "x"),
    ],
)
def test_text_that_cannot_be_written_is_refused(document: object, path: str) -> None:
    message = refusal(document)

    assert message.startswith(f"invalid spec: {path}")
    assert message.endswith("must be Unicode text, and holds a lone surrogate")


@pytest.mark.parametrize("value", [(1,), {1}, b"a", object(), 1j, range(3)])
def test_values_that_json_has_not_are_refused(value: object) -> None:
    assert refusal({"x": [value]}).startswith("invalid spec: x[0] must be a JSON value, not ")
    assert refusal({"process": {"args": value}}).startswith(
        "invalid spec: process.args must be an array, not "
    )


def test_names_that_json_has_not_are_refused() -> None:
    assert "keys should be strings" in refusal({1: 2})
    assert "x has a member name that is not Unicode text: 1" in refusal({"x": {1: 2}})
    assert "annotations" in refusal({"annotations": {1: "a"}})


def test_a_spec_that_was_spoilt_since_is_refused() -> None:
    spec = oci.default_spec()
    assert spec.process is not None
    assert spec.process.args is not None
    spec.process.args.append(5)  # type: ignore[arg-type]

    assert refusal(spec) == "invalid spec: process.args[1] must be a string, not the number 5"
    with pytest.raises(InvalidParameterError, match="this Spec cannot be written"):
        oci.dump(spec)


def test_a_spec_that_was_made_to_hold_itself_is_refused() -> None:
    spec = oci.parse_spec({"x": []})
    assert spec.model_extra is not None
    spec.model_extra["x"].append(spec.model_extra["x"])

    for function in (oci.parse_spec, oci.dump, oci.to_mapping):
        with pytest.raises(InvalidParameterError):
            function(spec)


def test_assignments_and_constructors_are_checked() -> None:
    spec = oci.default_spec()

    for change in (
        lambda: setattr(spec, "hostname", 5),
        lambda: setattr(spec, "root", {"path": 5}),
        lambda: oci.LinuxMemory(limit="512m"),  # type: ignore[arg-type]
        lambda: oci.LinuxMemory(limit=2**63),
        lambda: oci.Process(terminal=1),  # type: ignore[arg-type]
        lambda: oci.Spec(**{"x-y": math.nan}),  # type: ignore[arg-type]
    ):
        with pytest.raises(pydantic.ValidationError):
            change()
    assert oci.dump(spec) == oci.dump(oci.default_spec())


def test_text_that_cannot_be_written_is_refused_when_it_is_written() -> None:
    with pytest.raises(InvalidParameterError, match="this Process cannot be written"):
        oci.dump(oci.Process(args=["\ud800"]))


def test_assigning_none_writes_null() -> None:
    spec = oci.parse_spec({"hostname": "a"})
    spec.hostname = None

    assert oci.dump(spec) == b'{"hostname":null}'


def test_a_model_shows_only_what_is_set() -> None:
    assert repr(oci.Mount(destination="/a", type=None)) == "Mount(destination='/a', type=None)"


_CROWD = """
import sys, threading
sys.setswitchinterval(1e-5)
from libcontainerd import oci
from libcontainerd.oci._document import checked_process, checked_spec
uses = [
    oci.default_spec,
    lambda: oci.parse_spec("{}"),
    lambda: oci.parse_resources({"memory": {"limit": 1}}),
    lambda: oci.parse_spec({"linux": {"x": 1}, "windows": {"layerFolders": []}}),
    lambda: oci.dump(oci.LinuxMemory(limit=3)),
    lambda: oci.validate(oci.Features()),
]
failed, together = [], threading.Barrier(4 * len(uses))
def use(number):
    together.wait()
    try:
        uses[number % len(uses)]()
    except BaseException as error:
        failed.append(error)
threads = [threading.Thread(target=use, args=(number,)) for number in range(4 * len(uses))]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
sys.exit(repr(failed) if failed else 0)
"""


def test_the_first_use_may_be_by_many_threads_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CROWD], capture_output=True, text=True, timeout=30, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_other_platforms_cost_nothing_until_they_are_met() -> None:
    program = (
        "import sys; from libcontainerd import oci; oci.validate(oci.parse_spec(oci.dump(oci.default_spec())));"
        "assert 'libcontainerd.oci._platforms' not in sys.modules;"
        "oci.parse_spec({'windows': {}}); assert 'libcontainerd.oci._platforms' in sys.modules"
    )

    assert subprocess.run([sys.executable, "-c", program], timeout=30, check=False).returncode == 0


# ------------------------------------------------------------------------------------------- a spec that is used again


def test_a_spec_that_was_accepted_is_given_back_itself() -> None:
    spec = oci.build(oci.default_spec(), oci.with_hostname("used-again"))
    first = checked_spec(spec)
    assert first == spec
    assert first is not spec
    assert checked_spec(spec) is spec
    assert checked_spec(oci.to_mapping(spec)) == spec


def test_a_spec_that_was_changed_since_is_checked_again() -> None:
    spec = oci.build(oci.default_spec(), oci.with_args("true", "once"))
    checked_spec(spec)
    assert checked_spec(spec) is spec
    assert spec.process is not None
    assert spec.process.args is not None
    spec.process.args.append("more")
    assert checked_spec(spec) is not spec
    spec.process.args.append(5)  # type: ignore[arg-type] # what is checked for
    with pytest.raises(InvalidParameterError, match=r"process.args\[3\] must be a string"):
        checked_spec(spec)


def test_a_width_that_only_a_check_finds_is_found_although_the_spec_can_be_written() -> None:
    process = oci.Process(
        args=["true"], cwd="/", rlimits=[oci.POSIXRlimit(type="RLIMIT_CPU", soft=1, hard=1)]
    )
    checked_process(process)
    assert checked_process(process) is process
    assert process.rlimits is not None
    process.rlimits.append(oci.POSIXRlimit.model_construct(type="RLIMIT_CPU", soft=-1, hard=1))
    with pytest.raises(InvalidParameterError, match="at least 0"):
        checked_process(process)


def test_a_process_and_a_spec_of_one_text_are_not_taken_for_each_other() -> None:
    spec, process = oci.Spec(), oci.Process()
    checked_spec(spec)
    assert checked_spec(spec) is spec
    first = checked_process(process)
    assert first is not process
