"""The strict check: what the schema forbids is reported, and what it allows is not."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given

from libcontainerd import oci
from tests.unit.oci.specification import CONFIG, DOCUMENTS, RANGES, Node, accepted, at, message_path


def findings(document: str, text: str) -> list[str]:
    return [str(finding) for finding in oci.validate(DOCUMENTS[document][1](text))]


@given(accepted(CONFIG, strict=True))
def test_what_the_schema_takes_has_no_findings(document: object) -> None:
    assert oci.validate(oci.parse_spec(json.dumps(document))) == []


@pytest.mark.parametrize("name", ["state", "features"])
def test_what_the_schema_takes_of_others_has_no_findings(name: str) -> None:
    root, parse, _ = DOCUMENTS[name]

    @given(accepted(root, strict=True))
    def check(document: object) -> None:
        assert oci.validate(parse(json.dumps(document))) == []

    check()


def properties() -> list[tuple[str, Node]]:
    return [(name, node) for name, (root, _, _) in DOCUMENTS.items() for node in root.walk() if node.path]


def test_every_null_is_found() -> None:
    for name, node in properties():
        if node.path.startswith(("windows.credentialSpec", "windows.resources.cpu.affinity")):
            continue
        path = message_path(node.path)
        assert f"{path}: is null, which the schema allows nowhere" in findings(name, at(node.path, "null"))


def test_every_missing_member_is_found() -> None:
    needed = [(name, node) for name, node in properties() if node.facts.required]

    assert len(needed) > 60
    for name, node in needed:
        parent, _, _ = node.path.rpartition(".")
        text = at(parent, "{}") if parent else "{}"
        assert f"{message_path(node.path)}: is required" in findings(name, text)


def test_every_enumeration_and_pattern_is_checked() -> None:
    closed = [(name, node) for name, node in properties() if node.facts.enum or node.facts.pattern]

    assert len(closed) > 30
    for name, node in closed:
        path = message_path(node.path)
        for value in ["\n", "no such value", *(f"{value}\n" for value in node.facts.enum)]:
            if node.facts.pattern and re.fullmatch(node.facts.pattern.strip("^$"), value):
                continue
            found = [
                text
                for text in findings(name, at(node.path, json.dumps(value)))
                if text.startswith(f"{path}: ")
            ]
            assert len(found) == 1, (path, value, found)
            assert found[0].endswith(f"and is {value!r}")


def test_every_bound_that_go_has_not_is_checked() -> None:
    narrowed = 0
    for name, node in properties():
        if node.shape not in RANGES:
            continue
        least, most = RANGES.get(node.facts.type, RANGES[node.shape])
        least = least if node.facts.min is None else node.facts.min
        most = most if node.facts.max is None else node.facts.max
        path = message_path(node.path)
        for value, inside in ((least, True), (most, True), (least - 1, False), (most + 1, False)):
            if not RANGES[node.shape][0] <= value <= RANGES[node.shape][1]:
                continue
            narrowed += not inside
            found = [
                text for text in findings(name, at(node.path, str(value))) if text.startswith(f"{path}: ")
            ]
            assert (found == []) is inside, (path, value, found)
    assert narrowed > 15


@pytest.mark.parametrize("path", ["linux.seccomp.syscalls[].names", "windows.layerFolders"])
def test_arrays_that_need_an_element_are_checked(path: str) -> None:
    assert f"{message_path(path)}: must have 1 element or more, and has 0" in findings(
        "config", at(path, "[]")
    )


def test_unknown_members_are_no_findings() -> None:
    text = '{"ociVersion": "1.3.0", "x": {"y": [null]}, "linux": {"z": null}, "windows": {"layerFolders": ["a"], "q": null}}'

    assert findings("config", text) == []


def test_what_windows_keeps_for_itself_may_hold_anything() -> None:
    text = '{"ociVersion": "1", "windows": {"layerFolders": ["a"], "credentialSpec": {"a": {"b": null}}}}'

    assert findings("config", text) == []


def test_findings_come_in_the_specifications_order_and_can_be_compared() -> None:
    spec = oci.parse_spec(
        {"linux": {"namespaces": [{"type": "net"}]}, "process": {"rlimits": [{"type": "NOFILE"}]}}
    )

    found = oci.validate(spec)

    assert [finding.path for finding in found] == [
        "ociVersion",
        "process.cwd",
        "process.rlimits[0].type",
        "process.rlimits[0].hard",
        "process.rlimits[0].soft",
        "linux.namespaces[0].type",
    ]
    assert found[2] == oci.Finding("process.rlimits[0].type", "must match RLIMIT_[A-Z]+, and is 'NOFILE'")


def test_any_model_can_be_checked() -> None:
    assert [str(finding) for finding in oci.validate(oci.Mount(type="tmpfs"))] == ["destination: is required"]
    assert oci.validate(oci.LinuxResources()) == []
