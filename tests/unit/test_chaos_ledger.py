"""The chaos suite's reckoning finds what is wrong: a judge that lets everything pass would be worth nothing.

Time here is the test's own: seconds that `after` moves on.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from tests.chaos.ledger import Ledger, Program

PROGRAM = Program(["sh"], "one\ntwo\n", 3)
STEP = Program(["sh"], "step\n", 5)
INIT, EXEC = 7, 8

Line = dict[str, object]


class Case:
    """A ledger, with a runner that says everything and writes it into its journal."""

    def __init__(self, release: tuple[int, int] = (1, 6)) -> None:
        self.now = 1000.0
        self.ledger = Ledger(release, lambda: self.now)
        self.lines: list[Line] = []
        self.ready()
        self.ledger.ask("a", None, PROGRAM)

    def after(self, seconds: float) -> None:
        self.now += seconds

    def say(self, *lines: Line) -> None:
        """On stdout alone."""
        for line in lines:
            self.ledger.told(self.ledger.life, line)

    def tell(self, *lines: Line) -> None:
        self.lines += lines
        self.say(*lines)

    def started(self, step: str | None = None, pid: int = INIT, attempt: int = 1) -> None:
        self.tell({"event": "started", "job": "a", "step": step, "pid": pid, "attempt": attempt})

    def restored(self, pid: int = INIT, *, alive: bool = True, **steps: int) -> None:
        self.tell({"event": "restored", "job": "a", "pid": pid, "alive": alive, "steps": steps})

    def exit(self, code: int, step: str | None = None, pid: int = INIT) -> None:
        at = datetime.fromtimestamp(self.now, UTC).isoformat()
        self.tell({"event": "exit", "job": "a", "step": step, "pid": pid, "code": code, "at": at})

    def wrote(self, text: str, step: str | None = None, attempt: int = 1) -> None:
        self.say({"event": "output", "job": "a", "step": step, "attempt": attempt, "text": text})

    def failed(self, step: str | None = None) -> None:
        command = {"do": "run", "job": "a"} if step is None else {"do": "exec", "job": "a", "step": step}
        self.say({"event": "failed", "command": command, "error": "no"})

    def removed(self) -> None:
        self.tell({"event": "removed", "job": "a"})

    def back(self) -> None:
        """Have containerd answer the runner: a job of before is gone."""
        self.after(2)
        self.tell({"event": "removed", "job": "before"})

    def ready(self) -> None:
        self.say({"event": "ready"})

    def step(self) -> None:
        """A step that has been started."""
        self.ledger.ask("a", "s", STEP)
        self.started("s", EXEC)

    def next_life(self, *, ready: bool = True) -> None:
        """Kill the runner; the next one leaves out of the journal what is removed, and is ready."""
        self.ledger.runner_dies()
        self.write()
        self.ledger.runner_killed()
        gone = [line["job"] for line in self.lines if line["event"] == "removed"]
        if gone:
            self.lines = []
        if ready:
            self.ready()

    def write(self) -> None:
        self.ledger.journal(
            self.ledger.life, b"".join(json.dumps(line).encode() + b"\n" for line in self.lines)
        )

    def problems(self, *, removed: bool = True) -> list[str]:
        """What is wrong at the end."""
        if removed:
            self.removed()
        self.write()
        return self.ledger.problems()


@pytest.fixture
def case() -> Case:
    return Case()


@pytest.fixture
def later() -> Case:
    """On a containerd that forgets an init which has ended when it is started again."""
    return Case((1, 7))


def test_what_went_as_it_should_is_no_problem(case: Case) -> None:
    case.started()
    case.step()
    case.wrote("step\n", "s")
    case.exit(5, "s", EXEC)
    case.wrote("one\n")
    case.wrote("two\n")
    case.exit(3)
    assert case.ledger.present() == ["a"]
    assert case.problems() == []
    assert (case.ledger.present(), case.ledger.gone()) == ([], ["a"])
    assert "2 processes asked for, 0 starts cut off, 2 runs, 2 exits" in case.ledger.summary()


# ----------------------------------------------------------------------------------------------- exactly one exit each


def test_a_command_without_an_answer_is_a_problem(case: Case) -> None:
    assert case.problems() == ["a: the command was never answered"]


def test_a_run_without_an_exit_is_a_problem(case: Case) -> None:
    case.started()
    assert case.problems() == ["a: run 7: no exit"]


def test_a_run_without_an_exit_is_a_problem_whatever_was_killed(case: Case) -> None:
    case.ledger.fault("connection")
    case.started()
    case.ledger.shim_killed("a")
    case.next_life()
    assert case.problems() == ["a: run 7: no exit"]


def test_a_step_without_an_exit_is_a_problem_though_its_job_has_one(case: Case) -> None:
    case.started()
    case.step()
    case.ledger.shim_killed("a")
    case.exit(137)
    assert case.problems() == ["step s of a: run 8: no exit"]


def test_two_exits_are_a_problem(case: Case) -> None:
    case.started()
    case.wrote(PROGRAM.text)
    case.exit(3)
    case.exit(3)
    assert case.problems() == ["a: run 7: 2 exits: 3 in life 0, 3 in life 0"]


def test_two_exits_are_a_problem_in_different_lives_too(case: Case) -> None:
    case.started()
    case.wrote(PROGRAM.text)
    case.exit(3)
    case.next_life()
    case.restored(alive=False)
    case.exit(3)
    assert case.problems() == ["a: run 7: 2 exits: 3 in life 0, 3 in life 1"]


def test_more_than_one_run_is_a_problem(case: Case) -> None:
    case.ledger.fault("containerd")
    case.started()
    case.started(pid=9)
    case.wrote(PROGRAM.text)
    case.exit(3)
    case.exit(3, pid=9)
    assert case.problems() == ["a: more than one run: [7, 9]"]


def test_the_exit_of_a_run_that_was_not_told_to_have_begun_is_a_problem(case: Case) -> None:
    case.started()
    case.ledger.ask("a", "s", STEP)
    case.failed("s")
    case.exit(5, "s", EXEC)
    case.wrote("step\n", "s")
    case.wrote(PROGRAM.text)
    case.exit(3)
    assert case.problems() == [
        "step s of a: exits of runs that were not told to have begun: [8]",
    ]


def test_it_is_none_where_the_runner_was_killed_before_it_could_tell(case: Case) -> None:
    case.started()
    case.ledger.ask("a", "s", STEP)
    case.next_life()
    case.restored()
    case.exit(5, "s", EXEC)
    case.wrote("step\n", "s")
    case.wrote(PROGRAM.text)
    case.exit(3)
    assert case.problems() == []


def test_it_is_none_where_a_start_that_failed_in_a_fault_could_not_be_taken_back(case: Case) -> None:
    case.started()
    case.ledger.ask("a", "s", STEP)
    case.ledger.fault("connection")
    case.failed("s")
    case.next_life()
    case.restored()
    case.exit(137, "s", EXEC)
    case.after(60)
    case.wrote(PROGRAM.text)
    case.exit(3)
    assert case.problems() == []


# -------------------------------------------------------------------------------------------------------- the journal


def test_what_is_told_and_not_in_the_journal_is_a_problem(case: Case) -> None:
    case.started()
    case.wrote(PROGRAM.text)
    case.exit(3)
    case.say({"event": "removed", "job": "a"})
    assert "life 0 has told what is not in its journal" in case.problems(removed=False)[0]


def test_what_is_in_the_journal_and_was_not_told_counts(case: Case) -> None:
    case.started()
    case.wrote(PROGRAM.text)
    case.lines.append(
        {"event": "exit", "job": "a", "step": None, "pid": 7, "code": 3, "at": "2026-11-28T12:00:00+00:00"}
    )
    case.next_life()
    assert case.problems() == []


def test_a_journal_that_loses_lines_is_a_problem(case: Case) -> None:
    case.started()
    case.next_life()
    case.lines.clear()
    case.exit(3)
    assert "the journal of life 1 does not begin as the last one ended" in case.problems()


def test_a_journal_that_keeps_a_job_for_ever_is_a_problem(case: Case) -> None:
    case.started()
    case.wrote(PROGRAM.text)
    case.exit(3)
    problems = case.problems(removed=False)
    assert [each.partition(" {")[0] for each in problems] == ["the journal still has"] * 2


def test_a_torn_last_line_was_not_told(case: Case) -> None:
    case.started()
    case.ledger.journal(0, json.dumps(case.lines[0]).encode() + b'\n{"event": "ex')
    assert "a: run 7: no exit" in case.ledger.problems()


def test_what_a_runner_says_that_nobody_knows_is_a_problem(case: Case) -> None:
    case.say({"event": "dance"})
    assert "the runner said {'event': 'dance'}" in case.problems()


# ---------------------------------------------------------------------------------------------------- the right code


@pytest.mark.parametrize("code", [4, 137, 255])
def test_another_code_is_a_problem(case: Case, code: int) -> None:
    case.started()
    case.exit(code)
    assert case.problems() == [f"a: run 7: ended with {code}, which is none of [3]"]


@pytest.mark.parametrize("code", [4, 137, 255])
def test_another_code_is_a_problem_also_after_a_start_that_a_fault_met(case: Case, code: int) -> None:
    case.ledger.fault("containerd")
    case.started()
    case.exit(code)
    assert f"a: run 7: ended with {code}, which is none of [3]" in case.problems()


def test_what_was_killed_may_say_so_and_have_written_less(case: Case) -> None:
    case.started()
    case.ledger.killed("a", None)
    case.wrote("one\n")
    case.exit(137)
    assert case.problems() == []


def test_what_is_killed_after_its_exit_was_told_has_its_own_code(case: Case) -> None:
    case.started()
    case.exit(137)
    case.ledger.killed("a", None)
    assert case.problems() == ["a: run 7: ended with 137, which is none of [3]"]


def test_a_step_is_killed_with_its_init(case: Case) -> None:
    case.started()
    case.step()
    case.exit(137, "s", EXEC)
    case.wrote(PROGRAM.text)
    case.exit(3)
    assert case.problems() == []


def test_a_step_is_not_killed_long_before_its_init(case: Case) -> None:
    case.started()
    case.step()
    case.exit(137, "s", EXEC)
    case.after(5)
    case.wrote(PROGRAM.text)
    case.exit(3)
    assert case.problems() == ["step s of a: run 8: ended with 137, which is none of [5]"]


def test_a_step_is_killed_with_an_init_whose_end_its_shim_did_not_live_to_tell(case: Case) -> None:
    case.started()
    case.step()
    case.exit(137, "s", EXEC)
    case.ledger.shim_killed("a")
    case.after(5)
    case.exit(137)
    assert case.problems() == []


def test_a_shim_that_is_killed_after_an_exit_was_told_changes_nothing_of_it(case: Case) -> None:
    case.started()
    case.exit(137)
    case.ledger.shim_killed("a")
    assert "a: run 7: ended with 137, which is none of [3]" in case.problems()


def test_a_killed_shim_takes_the_codes_of_execs_but_not_of_init_with_it(case: Case) -> None:
    case.started()
    case.step()
    case.ledger.shim_killed("a")
    case.exit(255, "s", EXEC)
    case.exit(255)
    assert case.problems() == ["a: run 7: ended with 255, which is none of [3, 137]"]


@pytest.mark.parametrize("kind", ["connection", "containerd"])
def test_the_end_of_a_killed_shim_is_unknown_where_it_falls_into_an_outage(case: Case, kind: str) -> None:
    case.started()
    case.ledger.shim_killed("a")
    case.after(2)
    case.ledger.fault(kind)
    case.after(2)
    case.exit(255)
    assert case.problems() == []


def test_the_end_of_a_killed_shim_is_known_where_an_outage_is_long_over_or_comes_late(case: Case) -> None:
    case.started()
    case.ledger.fault("connection")
    case.back()
    case.after(20)
    case.ledger.shim_killed("a")
    case.after(40)
    case.ledger.fault("connection")
    case.exit(255)
    assert case.problems() == ["a: run 7: ended with 255, which is none of [3, 137]"]


def test_the_end_of_a_killed_shim_is_known_where_the_outage_comes_after_it_was_told(case: Case) -> None:
    case.started()
    case.ledger.shim_killed("a")
    case.after(2)
    case.exit(255)
    case.after(1)
    case.ledger.fault("connection")
    assert case.problems() == ["a: run 7: ended with 255, which is none of [3, 137]"]


def test_an_outage_lasts_until_containerd_answers(case: Case) -> None:
    case.started()
    case.ledger.fault("containerd")
    case.after(0.5)
    case.tell({"event": "removed", "job": "before"})  # as it had been told when the fault came
    case.after(60)
    case.ledger.shim_killed("a")
    case.exit(255)
    assert case.problems() == []


def test_an_outage_lasts_until_the_next_runner_is_ready(case: Case) -> None:
    case.started()
    case.next_life(ready=False)
    case.after(100)
    case.ledger.shim_killed("a")
    case.after(100)
    case.ready()
    case.restored(0, alive=False)
    case.exit(255)
    assert case.problems() == []


def test_a_start_that_a_dead_runner_left_may_be_found_and_killed(case: Case) -> None:
    case.next_life()
    case.restored()
    case.exit(137)
    assert case.problems() == []


def test_a_start_that_was_answered_in_the_journal_alone_is_not_killed_either(case: Case) -> None:
    case.lines.append({"event": "started", "job": "a", "step": None, "pid": INIT, "attempt": 1})
    case.next_life()
    case.restored()
    case.exit(137)
    assert case.problems() == ["a: run 7: ended with 137, which is none of [3]"]


def test_a_start_that_was_answered_is_not_killed_by_the_next_runner(case: Case) -> None:
    case.started()
    case.next_life()
    case.restored()
    case.exit(137)
    assert case.problems() == ["a: run 7: ended with 137, which is none of [3]"]


def test_an_init_that_ended_around_an_outage_of_a_later_containerd_is_forgotten(later: Case) -> None:
    later.started()
    later.step()
    later.ledger.fault("containerd")
    later.after(3)
    later.exit(255)
    later.exit(255, "s", EXEC)
    assert later.problems() == []


@pytest.mark.parametrize(("kind", "seconds"), [("connection", 3), ("containerd", 30)])
def test_it_is_not_forgotten_otherwise(later: Case, kind: str, seconds: float) -> None:
    later.started()
    later.ledger.fault(kind)
    later.back()
    later.after(seconds)
    later.exit(255)
    assert later.problems() == ["a: run 7: ended with 255, which is none of [3]"]


def test_a_step_is_killed_with_an_init_that_is_forgotten(later: Case) -> None:
    later.started()
    later.step()
    later.exit(137, "s", EXEC)
    later.ledger.fault("containerd")
    later.after(8)
    later.exit(255)
    assert later.problems() == []


def test_a_step_is_not_forgotten_while_its_init_lives(later: Case) -> None:
    later.started()
    later.step()
    later.ledger.fault("containerd")
    later.back()
    later.exit(255, "s", EXEC)
    later.after(60)
    later.wrote(PROGRAM.text)
    later.exit(3)
    assert later.problems() == ["step s of a: run 8: ended with 255, which is none of [5]"]


def test_containerd_1_6_forgets_no_init(case: Case) -> None:
    case.started()
    case.ledger.fault("containerd")
    case.after(3)
    case.exit(255)
    assert case.problems() == ["a: run 7: ended with 255, which is none of [3]"]


# ---------------------------------------------------------------------------------------------------- starts that fail


def test_a_start_that_fails_is_a_problem(case: Case) -> None:
    case.failed()
    assert case.problems() == ["a: it could not be started"]


def test_a_step_that_fails_is_a_problem_while_its_job_runs(case: Case) -> None:
    case.started()
    case.ledger.ask("a", "s", STEP)
    case.failed("s")
    case.after(10)
    case.wrote(PROGRAM.text)
    case.exit(3)
    assert case.problems() == ["step s of a: it could not be started"]


def test_a_step_fails_when_its_job_has_ended(case: Case) -> None:
    case.started()
    case.ledger.ask("a", "s", STEP)
    case.wrote(PROGRAM.text)
    case.exit(3)
    case.failed("s")
    assert case.problems() == []


def test_a_step_fails_when_its_jobs_shim_was_killed(case: Case) -> None:
    case.started()
    case.ledger.shim_killed("a")
    case.ledger.ask("a", "s", STEP)
    case.failed("s")
    case.after(3)
    case.exit(137)
    assert case.problems() == []


def test_a_step_that_is_asked_for_in_an_outage_fails_and_a_job_does_not(case: Case) -> None:
    case.started()
    case.ledger.fault("containerd")
    case.ledger.ask("a", "s", STEP)
    case.ledger.ask("b", None, PROGRAM)
    case.failed("s")
    case.say({"event": "failed", "command": {"do": "run", "job": "b"}, "error": "no"})
    case.after(20)
    case.wrote(PROGRAM.text)
    case.exit(3)
    assert case.problems() == ["b: it could not be started"]


def test_a_start_may_fail_that_a_fault_meets(case: Case) -> None:
    case.ledger.fault("containerd")
    case.failed()
    assert case.problems() == []


# ------------------------------------------------------------------------------------------------------------ output


@pytest.mark.parametrize(
    "text",
    ["one\n", "two\n", "one\ntwo\ntwo\n", "one\none\ntwo\n", ""],
    ids=["short", "gap", "more", "twice", "none"],
)
def test_output_that_is_not_the_programs_is_a_problem(case: Case, text: str) -> None:
    case.started()
    case.wrote(text)
    case.exit(3)
    assert f"a: output of attempt 1: {len(text)} of 8 characters" in case.problems()[0]


def test_output_of_what_was_killed_is_a_beginning(case: Case) -> None:
    case.started()
    case.ledger.killed("a", None)
    case.wrote("two\n")
    case.exit(137)
    assert "a: output of attempt 1: 4 of 8 characters" in case.problems()[0]


def test_output_of_what_was_killed_too_late_is_whole(case: Case) -> None:
    case.started()
    case.ledger.killed("a", None)
    case.wrote("one\n")
    case.exit(3)
    assert "a: output of attempt 1: 4 of 8 characters" in case.problems()[0]


def test_a_start_that_is_begun_anew_writes_all_beside_beginnings(case: Case) -> None:
    case.ledger.fault("containerd")
    case.wrote("one")
    case.started(attempt=3)
    case.wrote("one\n", attempt=3)
    case.wrote("\n")  # the last word of one that was given up can come late
    case.wrote("two\n", attempt=3)
    case.exit(3)
    assert case.problems() == []


@pytest.mark.parametrize(
    ("given_up", "text", "said"),
    [
        ("one\ntwo\n", "", "a: output of attempt 2: 0 of 8"),
        ("one\ntwo\n", "one\n", "a: output of attempt 2: 4 of 8"),
        ("two\n", "one\ntwo\n", "a: output of attempt 1: 4 of 8"),
        ("one\ntwo\none", "one\ntwo\n", "a: output of attempt 1: 11 of 8"),
    ],
)
def test_a_start_that_is_begun_anew_and_writes_otherwise_is_a_problem(
    case: Case, given_up: str, text: str, said: str
) -> None:
    case.ledger.fault("containerd")
    case.wrote(given_up)
    case.started(attempt=2)
    case.wrote(text, attempt=2)
    case.exit(3)
    assert said in case.problems()[0]


NOT_BEGUN = "write exec fifo /proc/self/fd/5: broken pipe\n"


def test_a_start_that_was_given_up_says_that_it_was_not_told_to_begin(case: Case) -> None:
    case.ledger.fault("containerd")
    case.wrote(NOT_BEGUN)
    case.started(attempt=2)
    case.wrote(PROGRAM.text, attempt=2)
    case.exit(3)
    assert case.problems() == []


def test_a_start_that_was_answered_does_not_say_so(case: Case) -> None:
    case.ledger.fault("containerd")
    case.started()
    case.ledger.killed("a", None)
    case.wrote(NOT_BEGUN)
    case.exit(137)
    assert "a: output of attempt 1: 45 of 8" in case.problems()[0]


@pytest.mark.parametrize("answered", [False, True])
def test_a_start_that_a_dead_runner_left_says_so_to_the_next_one(case: Case, answered: bool) -> None:
    if answered:
        case.started()
        case.ledger.killed("a", None)
    case.next_life()
    case.restored()
    case.wrote(NOT_BEGUN)
    case.exit(137)
    assert [each[:26] for each in case.problems()] == (["a: output in life 1 has ga"] if answered else [])


@pytest.mark.parametrize(("text", "right"), [("one\nt", True), ("one\ntw\n", False), ("ne", False)])
def test_a_start_that_failed_has_written_a_beginning(case: Case, text: str, right: bool) -> None:
    case.ledger.fault("containerd")
    case.wrote(text)
    case.failed()
    assert [each.partition(":")[0] for each in case.problems()] == ([] if right else ["a"])


def test_output_may_have_a_gap_only_where_a_runner_was_killed(case: Case) -> None:
    case.started()
    case.wrote("on")
    case.next_life()
    case.after(1)
    case.restored()
    case.wrote("o\n")
    case.exit(3)
    assert case.problems() == []


@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        ("n", "two\n", "a: output of attempt 1: 1 of 8"),
        ("one", "one\ntwo\n", "a: output in life 1 has gaps"),
        ("one", "twoo", "a: output in life 1 has gaps"),
        ("one", "\ntw", "a: output in life 1 has no end"),
    ],
)
def test_output_over_lives_that_does_not_fit_is_a_problem(
    case: Case, first: str, then: str, said: str
) -> None:
    case.started()
    case.wrote(first)
    case.next_life()
    case.after(1)
    case.restored()
    case.wrote(then)
    case.exit(3)
    assert said in case.problems()[0]


def test_output_that_nobody_read_when_it_ended_may_be_lost(case: Case) -> None:
    case.started()
    case.wrote("one\n")
    case.next_life(ready=False)
    case.restored(alive=False)
    case.wrote("tw")
    case.exit(3)
    case.after(1)
    case.ready()
    assert case.problems() == []


# ---------------------------------------------------------------------------------------- lives, names and outages


def test_a_run_that_was_restored_has_begun(case: Case) -> None:
    case.next_life()
    case.restored()
    assert case.ledger.running() == ["a"]
    assert case.problems() == ["a: run 7: no exit"]


def test_a_step_that_was_restored_has_begun(case: Case) -> None:
    case.started()
    case.ledger.ask("a", "s", STEP)
    case.next_life()
    case.restored(s=EXEC)
    assert case.ledger.steps_of("a") == ["s"]
    case.wrote(PROGRAM.text)
    case.exit(3)
    assert case.problems() == ["step s of a: run 8: no exit"]


def test_a_job_that_was_only_made_has_not_begun(case: Case) -> None:
    case.next_life()
    case.restored(0, alive=False)
    assert (case.ledger.running(), case.ledger.present()) == ([], ["a"])
    assert case.problems() == []


def test_each_use_of_a_name_is_judged_by_its_own_program(case: Case) -> None:
    case.started()
    case.wrote(PROGRAM.text)
    case.exit(3)
    case.removed()
    case.ledger.ask("a", None, STEP)
    case.started(pid=9)
    case.wrote(STEP.text)
    case.exit(3, pid=9)
    assert case.problems() == ["a: run 9: ended with 3, which is none of [5]"]


def test_a_runner_that_is_killed_before_it_has_read_its_journal_changes_nothing(case: Case) -> None:
    case.started()
    case.wrote(PROGRAM.text)
    case.exit(3)
    case.removed()
    lines = list(case.lines)
    case.next_life(ready=False)
    case.lines = lines
    case.next_life()
    assert case.problems(removed=False) == []


def test_what_a_journal_has_that_nobody_knows_is_a_problem(case: Case) -> None:
    case.started()
    case.wrote(PROGRAM.text)
    case.exit(3)
    case.lines.append({"event": "dance", "job": "a"})
    assert "the journal has {'event': 'dance', 'job': 'a'}" in case.problems()


def test_the_last_words_of_a_dead_runner_say_nothing_of_the_next_one(case: Case) -> None:
    case.next_life(ready=False)
    case.ledger.told(0, {"event": "ready"})
    case.ledger.told(0, {"event": "restored", "job": "a", "pid": 7, "alive": True, "steps": {}})
    assert (case.ledger.ready, case.ledger.present(), case.ledger.gone()) == (False, [], [])
    case.ready()
    assert case.ledger.gone() == ["a"]
    case.restored()
    case.ledger.told(0, {"event": "removed", "job": "a"})
    case.ledger.told(0, {"event": "failed", "command": {"do": "run", "job": "a"}, "error": "no"})
    assert case.ledger.present() == ["a"]


def test_an_outage_is_over_when_the_next_runner_has_been_ready_for_a_while(case: Case) -> None:
    case.started()
    case.next_life()
    case.restored()
    case.back()
    case.after(30)
    case.ledger.shim_killed("a")
    case.exit(255)
    assert case.problems() == ["a: run 7: ended with 255, which is none of [3, 137]"]


def test_what_a_later_containerd_forgets_is_told_by_the_next_runner(later: Case) -> None:
    later.started()
    later.ledger.fault("containerd")
    later.next_life(ready=False)
    later.after(60)
    later.ready()
    later.restored(0, alive=False)
    later.exit(255)
    assert later.problems() == []


def test_the_history_is_of_the_jobs_that_are_asked_for_and_of_the_faults(case: Case) -> None:
    case.started()
    case.wrote("one\n")
    case.ledger.ask("b", None, PROGRAM)
    case.ledger.fault("containerd")
    said = [line.partition(" ")[2] for line in case.ledger.history({"a"})]
    assert [line.split(" ")[0] for line in said] == ["asked", "life", "FAULT"]
