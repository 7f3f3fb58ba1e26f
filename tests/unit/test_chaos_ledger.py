"""The chaos suite's reckoning finds what is wrong: a judge that lets everything pass would be worth nothing."""

from __future__ import annotations

import pytest

from tests.chaos.ledger import Ledger, Program

PROGRAM = Program(["sh"], "one\ntwo\n", 3)


def started(step: str | None = None, pid: int = 7) -> dict[str, object]:
    return {"event": "started", "job": "a", "step": step, "pid": pid}


def ended(code: int, step: str | None = None, pid: int = 7) -> dict[str, object]:
    return {"event": "exit", "job": "a", "step": step, "pid": pid, "code": code, "at": None}


def wrote(text: str, step: str | None = None) -> dict[str, object]:
    return {"event": "output", "job": "a", "step": step, "text": text}


@pytest.fixture
def ledger() -> Ledger:
    made = Ledger()
    made.ask("a", None, PROGRAM)
    return made


def tell(ledger: Ledger, *lines: dict[str, object], life: int = 0) -> None:
    for line in lines:
        ledger.told(life, line)


def test_what_went_as_it_should_is_no_problem(ledger: Ledger) -> None:
    tell(ledger, started(), wrote("one\n"), wrote("two\n"), ended(3))
    assert ledger.problems() == []
    assert ledger.present() == ["a"]
    tell(ledger, {"event": "ready"}, {"event": "removed", "job": "a"})
    assert (ledger.present(), ledger.gone()) == ([], ["a"])


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([started()], "no exit"),
        ([started(), wrote(PROGRAM.text), ended(3), ended(3)], "2 exits in life 0"),
        ([started(), ended(4)], "ended with [4]"),
        ([started(), ended(137)], "ended with [137]"),
        ([started(), ended(255)], "ended with [255]"),
        ([started(), wrote("one\n"), ended(3)], "output: 4 of 8"),
        ([started(), wrote("two\n"), ended(3)], "output: "),
        ([started(), wrote("one\ntwo\ntwo\n"), ended(3)], "output: 12 of 8"),
        ([started(), wrote(PROGRAM.text), ended(3), ended(3, pid=8)], "not told to have begun: [8]"),
        ([started(), started(pid=8), ended(3), ended(3, pid=8)], "more than one run"),
        ([{"event": "dance"}], "dance"),
    ],
)
def test_what_is_wrong_is_found(ledger: Ledger, lines: list[dict[str, object]], said: str) -> None:
    tell(ledger, *lines)
    assert said in "\n".join(ledger.problems())


def test_what_was_killed_may_say_so_and_have_written_less(ledger: Ledger) -> None:
    tell(ledger, started())
    ledger.killed("a", None)
    tell(ledger, wrote("one\n"), ended(137))
    assert ledger.problems() == []


def test_a_killed_shim_takes_the_codes_of_execs_but_not_of_init_with_it(ledger: Ledger) -> None:
    tell(ledger, started())
    ledger.ask("a", "s", PROGRAM)
    tell(ledger, started("s", 8))
    ledger.shim_killed("a")
    tell(ledger, ended(255, "s", 8))
    assert "a: run 7: no exit" in ledger.problems()
    tell(ledger, ended(255))
    assert ledger.problems() == ["a: run 7: ended with [255], which is none of [3, 137]"]


def test_an_exit_that_falls_into_an_outage_may_be_unknown(ledger: Ledger) -> None:
    tell(ledger, started())
    ledger.shim_killed("a")
    ledger.fault("connection")
    tell(ledger, ended(255))
    assert ledger.problems() == []


def test_a_start_that_was_cut_off_may_have_run_or_not(ledger: Ledger) -> None:
    ledger.fault("containerd")
    assert ledger.problems() == []
    tell(ledger, ended(3), started(pid=8), ended(3, pid=8))
    assert ledger.problems() == []
    assert ledger.cut_off() == {"a"}


def test_the_end_of_a_start_that_was_cut_off_is_lost_only_with_a_runner(ledger: Ledger) -> None:
    ledger.fault("connection")
    tell(ledger, started())
    assert ledger.problems() == ["a: run 7: no exit"]
    ledger.runner_killed()
    assert ledger.problems() == []


def test_an_exit_may_be_told_again_by_a_later_runner_but_not_otherwise(ledger: Ledger) -> None:
    tell(ledger, started(), wrote(PROGRAM.text), ended(3))
    ledger.runner_killed()
    tell(ledger, ended(3), life=1)
    assert ledger.problems() == []
    tell(ledger, ended(4), life=1)
    assert len(ledger.problems()) == 3


def test_output_may_have_a_gap_only_where_a_runner_was_killed(ledger: Ledger) -> None:
    tell(ledger, started(), wrote("on"))
    ledger.runner_killed()
    tell(ledger, {"event": "restored", "job": "a", "pid": 7, "alive": True, "steps": {}}, life=1)
    tell(ledger, wrote("o\n"), ended(3), life=1)
    assert ledger.problems() == []
    tell(ledger, wrote("one"), life=1)
    assert "has gaps" in ledger.problems()[0]
