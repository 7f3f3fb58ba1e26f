"""The models against the table of runtime-spec 1.3.0's properties: all there, no other, typed as Go types them."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Union, get_args, get_origin, get_type_hints

import annotated_types
import pydantic
import pytest

from libcontainerd import oci
from libcontainerd.oci._base import REQUIRED, Rule, json_name
from libcontainerd.oci._platforms import SECTIONS
from tests.unit.oci.specification import CONFIG, DOCUMENTS, PLATFORMS, RANGES, Node


def core(annotation: object) -> tuple[object, list[object]]:
    """Strip `Annotated` and `| None` off an annotation; give the rest and the metadata that was there."""
    metadata: list[object] = []
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *found = get_args(annotation)
            metadata += found
        elif get_origin(annotation) in (Union, UnionType):
            (annotation,) = [part for part in get_args(annotation) if part is not NoneType]
        else:
            return annotation, metadata


def mismatches(node: Node, annotation: object, rule: Rule | None) -> Iterator[str]:
    """Yield what differs between a property of the table and a model's annotation."""
    kind, metadata = core(annotation)
    yield from rule_mismatches(node, rule)
    if node.shape == "object":
        if not (isinstance(kind, type) and issubclass(kind, oci.Model)):
            yield f"{node.path}: {kind} is no model"
        else:
            yield from model_mismatches(node, kind)
    elif node.shape in ("array", "map"):
        if get_origin(kind) is not {"array": list, "map": dict}[node.shape]:
            yield f"{node.path}: {kind} is no {node.shape}"
            return
        *key, element = get_args(kind)
        if key not in ([], [str]):
            yield f"{node.path}: keys are {key}"
        for part in node.parts.values():
            yield from mismatches(part, element, rule.each if rule is not None else None)
    elif node.shape in ("string", "boolean"):
        if kind is not {"string": str, "boolean": bool}[node.shape]:
            yield f"{node.path}: {kind} is no {node.shape}"
    elif kind is not int or bounds(metadata) != RANGES[node.shape]:
        yield f"{node.path}: {kind} from {bounds(metadata)} is no {node.shape}"


def bounds(metadata: list[object]) -> tuple[object, object]:
    """Give the least and the most that the metadata of an annotation allows."""
    limits = [part for item in metadata for part in getattr(item, "metadata", [])]
    least = next((part.ge for part in limits if isinstance(part, annotated_types.Ge)), None)
    most = next((part.le for part in limits if isinstance(part, annotated_types.Le)), None)
    return least, most


def rule_mismatches(node: Node, rule: Rule | None) -> Iterator[str]:
    """Yield what differs between what the schema demands and what `validate` knows of it."""
    rule = rule or Rule()
    facts = node.facts
    # Where the schema's type is narrower than Go's, the difference is a bound.
    schema, go = RANGES.get(facts.type, (None, None)), RANGES.get(facts.shape, (None, None))
    least = facts.min if facts.min is not None else None if schema[0] == go[0] else schema[0]
    most = facts.max if facts.max is not None else None if schema[1] == go[1] else schema[1]
    expected = Rule(
        required=facts.required,
        one_of=facts.enum,
        pattern=facts.pattern.removeprefix("^").removesuffix("$"),
        minimum=least,
        maximum=most,
        min_items=facts.minItems,
        each=rule.each,
    )
    if rule != expected:
        yield f"{node.path}: {rule} should be {expected}"


def model_mismatches(node: Node, model: type[oci.Model]) -> Iterator[str]:
    """Yield what differs between an object of the table and a model."""
    fields = {field.alias: field for field in model.model_fields.values()}
    for name in fields.keys() ^ node.members.keys():
        yield f"{node.path}: {name} is in only one of {model.__name__} and the table"
    for name, part in node.members.items():
        if name not in fields or part.path in ("windows.resources.cpu.affinity", "windows.credentialSpec"):
            continue
        if not node.path and name in PLATFORMS:
            yield from mismatches(part, SECTIONS[name], None)
            continue
        field = fields[name]
        rule = next((item for item in field.metadata if isinstance(item, Rule)), None)
        yield from mismatches(part, hints(model)[name], rule)


@functools.cache
def hints(model: type[oci.Model]) -> dict[str, object]:
    """Give the annotations of a model by the names of its members in documents."""
    evaluated = get_type_hints(model, include_extras=True)
    return {str(field.alias): evaluated[name] for name, field in model.model_fields.items()}


def test_there_are_223_common_and_linux_properties() -> None:
    properties = [
        node
        for node in CONFIG.walk()
        if node.path and not node.path.endswith(("[]", "{}")) and node.path.split(".")[0] not in PLATFORMS
    ]

    assert len(properties) == 223


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_models_are_the_table(document: str) -> None:
    node, _, model = DOCUMENTS[document]

    assert list(model_mismatches(node, model)) == []


def test_a_mismatch_is_found() -> None:
    class Narrow(oci.Model):
        """Like a mapping of ids, but for a width, a name and a rule."""

        container_id: Annotated[int, pydantic.Field(ge=0, le=2**16 - 1)] | None = None
        host_id: Annotated[str | None, REQUIRED] = None
        length: int | None = None

    node = next(node for node in CONFIG.walk() if node.path == "linux.uidMappings[]")
    found = "\n".join(model_mismatches(node, Narrow))

    assert "linux.uidMappings[].containerID: <class 'int'> from (0, 65535) is no uint32" in found
    assert "linux.uidMappings[].containerID: Rule(required=False" in found
    assert "linux.uidMappings[].hostID: <class 'str'> from (None, None) is no uint32" in found
    assert "linux.uidMappings[]: size is in only one of Narrow and the table" in found
    assert "linux.uidMappings[]: length is in only one of Narrow and the table" in found


def test_platforms_are_kept_as_plain_objects() -> None:
    spec = oci.parse_spec({name: {"key": [1]} for name in PLATFORMS})

    assert {name: getattr(spec, name) for name in PLATFORMS} == {name: {"key": [1]} for name in PLATFORMS}


@pytest.mark.parametrize(
    ("name", "alias"),
    [
        ("oci_version", "ociVersion"),
        ("container_id", "containerID"),
        ("throttle_read_iops_device", "throttleReadIOPSDevice"),
        ("disable_oom_killer", "disableOOMKiller"),
        ("kernel_tcp", "kernelTCP"),
        ("exec_cpu_affinity", "execCPUAffinity"),
        ("l3_cache_schema", "l3CacheSchema"),
        ("class_", "class"),
        ("cgroups_path", "cgroupsPath"),
    ],
)
def test_names(name: str, alias: str) -> None:
    assert json_name(name) == alias


def test_python_names_are_snake_case() -> None:
    for model in (oci.Spec, oci.Process, oci.Linux, oci.LinuxResources, oci.State, oci.Features):
        for name in model.model_fields:
            assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*_?", name)
