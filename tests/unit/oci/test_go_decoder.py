"""What Go's decoder takes and what it refuses: the parsers agree, and say where.

`go_verdicts.json` holds what Go itself said: `encoding/json` of Go 1.19 decoding each document into structures with the
types of `properties.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libcontainerd import oci
from libcontainerd.errors import InvalidParameterError
from tests.unit.oci.specification import CONFIG, DOCUMENTS, RANGES, Node, accepted, at, message_path

# Go takes any JSON for the one; for the other, Go's type and the schema's differ.
_ANY = ("windows.credentialSpec", "windows.resources.cpu.affinity")

_VERDICTS: list[tuple[str, str, bool]] = json.loads((Path(__file__).parent / "go_verdicts.json").read_text())

# Literals by the shapes that take them; null is taken everywhere.
_LITERALS = {
    "object": "{}",
    "array": "[]",
    "map": "{}",
    "any-object": "{}",
    "string": '"512"',
    "boolean": "true",
    "float": "1.0",
}


def takes(document: str, text: str) -> bool:
    try:
        DOCUMENTS[document][1](text)
    except InvalidParameterError:
        return False
    return True


def test_the_parsers_decide_as_go_does() -> None:
    assert len(_VERDICTS) > 1_000
    assert [row for row in _VERDICTS if takes(row[0], row[1]) is not row[2]] == []


def test_what_is_taken_is_given_back() -> None:
    taken = [(document, text) for document, text, ok in _VERDICTS if ok]

    assert len(taken) > 200
    for document, text in taken:
        assert json.loads(oci.dump(DOCUMENTS[document][1](text))) == json.loads(text)


def refusals() -> list[tuple[str, str, str]]:
    """Give for every property of every document each literal of another type: document, path, literal."""
    found: list[tuple[str, str, str]] = []
    for document, (root, _, _) in DOCUMENTS.items():
        for node in root.walk():
            if node.path and not node.path.startswith(_ANY):
                found += [(document, node.path, literal) for literal in wrong_literals(node)]
    return found


def wrong_literals(node: Node) -> list[str]:
    literals = {literal for shape, literal in _LITERALS.items() if shape != node.shape}
    literals.discard(_LITERALS.get(node.shape, ""))
    if node.shape in RANGES:
        least, most = RANGES[node.shape]
        literals |= {str(least - 1), str(most + 1), "1e2"}
    else:
        literals.add("1")
    return sorted(literals)


def test_every_property_refuses_other_types_and_names_its_path() -> None:
    cases = refusals()
    wrong: list[str] = []
    for document, path, literal in cases:
        try:
            DOCUMENTS[document][1](at(path, literal))
        except InvalidParameterError as error:
            if message_path(path) not in str(error):
                wrong.append(f"{path}: {literal}: {error}")
        else:
            wrong.append(f"{path}: {literal} is taken")

    assert len(cases) > 2_500
    assert wrong == []


@pytest.mark.parametrize("name", sorted({node.shape for node in CONFIG.walk()} & RANGES.keys()))
def test_integers_take_their_whole_width_and_no_more(name: str) -> None:
    node = next(node for node in CONFIG.walk() if node.shape == name)
    least, most = RANGES[name]

    for value in (least, most):
        assert takes("config", at(node.path, str(value)))
    for value in (least - 1, most + 1, -(10**40), 10**40):
        assert not takes("config", at(node.path, str(value)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"linux": {"resources": {"memory": {"limit": "512m"}}}}',
            "linux.resources.memory.limit must be an integer, not the string '512m'",
        ),
        (
            '{"linux": {"resources": {"memory": {"limit": 1.5}}}}',
            "linux.resources.memory.limit must be an integer, not the number 1.5",
        ),
        (
            '{"linux": {"resources": {"memory": {"limit": true}}}}',
            "linux.resources.memory.limit must be an integer, not true",
        ),
        ('{"process": {"terminal": 1}}', "process.terminal must be true or false, not the number 1"),
        ('{"process": {"args": "sh"}}', "process.args must be an array, not the string 'sh'"),
        ('{"process": {"user": {"uid": -1}}}', "process.user.uid must be at least 0, not the number -1"),
        (
            '{"process": {"user": {"uid": 4294967296}}}',
            "process.user.uid must be at most 4294967295, not the number 4294967296",
        ),
        ('{"mounts": [{}, {"options": [1]}]}', "mounts[1].options[0] must be a string, not the number 1"),
        ('{"annotations": {"a.b": []}}', 'annotations["a.b"] must be a string, not an array'),
        ('{"linux": []}', "linux must be an object, not an array"),
        ("[]", "the document must be an object, not an array"),
        ("null", "the document must be an object, not null"),
        (
            '{"windows": {"resources": {"cpu": {"count": -1}}}}',
            "windows.resources.cpu.count must be at least 0",
        ),
    ],
)
def test_messages_say_where_and_what(text: str, message: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        oci.parse_spec(text)

    assert str(caught.value).startswith(f"invalid spec: {message}")


def test_several_problems_are_all_named_up_to_five() -> None:
    text = json.dumps({"process": {"args": [1, 2, 3, 4, 5, 6, 7]}})

    with pytest.raises(InvalidParameterError) as caught:
        oci.parse_spec(text)

    assert str(caught.value).count("must be a string") == 5
    assert str(caught.value).endswith("; and 2 more")


@given(accepted(CONFIG).filter(lambda document: document is not None))
def test_a_spec_comes_back_equal(document: dict[str, object]) -> None:
    spec = oci.parse_spec(json.dumps(document))

    assert same(json.loads(oci.dump(spec)), document)
    assert same(oci.to_mapping(spec), document)
    assert oci.parse_spec(document) == oci.parse_spec(spec) == spec


@given(
    st.sampled_from(["state", "features"]).flatmap(
        lambda name: st.tuples(st.just(name), accepted(DOCUMENTS[name][0]))
    )
)
def test_other_documents_come_back_equal(case: tuple[str, dict[str, object] | None]) -> None:
    name, document = case
    if document is not None:
        assert same(json.loads(oci.dump(DOCUMENTS[name][1](json.dumps(document)))), document)


def same(one: object, other: object) -> bool:
    """Compare as JSON: unlike Python's `==`, true is not 1 and 1 is not 1.0."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other
