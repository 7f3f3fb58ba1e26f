"""containerd's filter syntax, apart from any server; tests/contract holds the same against containerd."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libcontainerd.testing.filters import FilterError, Filters, fields

OBJECT = fields({"id": "web", "runtime.name": "runc", "empty": ""}, {"a b": "x y", "none": ""})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "id",
        "id==web",
        "id!=other",
        "missing!=x",
        "id~=^w",
        r"id~=/^w.b$/",
        r"id~=|w\w+|",
        r"id~=/w\/?eb/",
        r'id=="w\eb"',
        'labels."a b"=="x y"',
        "labels.none",
        "runtime.name==runc,id==web",
    ],
)
def test_what_matches(text: str) -> None:
    assert Filters([text]).match(OBJECT)


@pytest.mark.parametrize(
    "text",
    ["empty", "missing", "id==other", "missing==x", "missing~=x", "id~=[", "id==web,missing", "labels.x"],
)
def test_what_does_not(text: str) -> None:
    assert not Filters([text]).match(OBJECT)


def test_of_several_one_must_match() -> None:
    assert Filters([]).match(OBJECT)
    assert Filters(["id==a", "id==web"]).match(OBJECT)
    assert not Filters(["id==a", "id==b"]).match(OBJECT)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("id ", "expected an operator"),
        ("id?x", "expected an operator"),
        ('"id', "quoted literal not terminated"),
        ("id.==x", "expected field or quoted"),
        ("1d==x", "expected field or quoted"),
        ("id=~x", 'unsupported operator "=~"'),
    ],
)
def test_what_does_not_parse(text: str, reason: str) -> None:
    with pytest.raises(FilterError, match=reason):
        Filters([text])


@given(st.text(alphabet='ab.,=!~"/| \\', max_size=20))
def test_any_text_parses_or_is_refused(text: str) -> None:
    with suppress(FilterError):
        Filters([text]).match(OBJECT)


@given(st.text(max_size=20))
def test_a_quoted_value_is_taken_as_it_is(value: str) -> None:
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')

    assert Filters([f'id=="{quoted}"']).match(lambda _: value)
