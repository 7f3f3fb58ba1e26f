"""Identifiers against containerd's rule, told once more by a hand-written automaton."""

from __future__ import annotations

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from libcontainerd._wire.identifiers import check_identifier
from libcontainerd.errors import InvalidParameterError

ALPHANUMERIC = frozenset(string.ascii_letters + string.digits)
JOINTS = frozenset("._-")


def fits(value: str) -> bool:
    """The rule, letter by letter: it begins and ends with a letter or digit, and no two joints meet."""
    if not 1 <= len(value) <= 76:
        return False
    before_was_joint = True
    for letter in value:
        if letter in JOINTS:
            if before_was_joint:
                return False
            before_was_joint = True
        elif letter in ALPHANUMERIC:
            before_was_joint = False
        else:
            return False
    return not before_was_joint


def taken(value: str) -> bool:
    try:
        check_identifier("container id", value)
    except InvalidParameterError:
        return False
    return True


NEARLY = st.text(st.sampled_from("aZ09._-"), max_size=80)
WILD = st.text(st.sampled_from("aZ09._-/ \n\0éßⅧ٣²K"), max_size=12)


@given(value=NEARLY | WILD | st.text(max_size=80))
@example(value="")
@example(value="a" * 76)
@example(value="a" * 77)
@example(value="a\n")
@example(value="a..b")
@example(value="..")
@example(value="a/../b")
@example(value="٣")
@example(value="K")
def test_exactly_what_containerd_takes_is_taken(value: str) -> None:
    assert taken(value) is fits(value)


@given(
    groups=st.lists(
        st.text(st.sampled_from(sorted(ALPHANUMERIC)), min_size=1, max_size=5), min_size=1, max_size=8
    )
)
def test_groups_joined_by_one_joint_are_taken(groups: list[str]) -> None:
    for joint in JOINTS:
        value = joint.join(groups)
        assert taken(value), value
        assert not taken(joint + value)
        assert not taken(value + joint)


@pytest.mark.parametrize("value", [None, 5, b"web", ["web"]])
def test_what_is_no_string_is_refused(value: object) -> None:
    with pytest.raises(InvalidParameterError, match=f"a exec id is a string, not {type(value).__name__}"):
        check_identifier("exec id", value)  # type: ignore[arg-type] # that is the mistake


def test_the_message_names_what_is_wrong() -> None:
    with pytest.raises(InvalidParameterError, match=r"^container id 'a b' is not valid: "):
        check_identifier("container id", "a b")
    with pytest.raises(InvalidParameterError, match=r"^namespace '' has 0 characters: it needs 1 to 76"):
        check_identifier("namespace", "")
    with pytest.raises(InvalidParameterError, match=r"has 1000000 characters") as caught:
        check_identifier("namespace", "x" * 1_000_000)
    assert len(str(caught.value)) < 200
