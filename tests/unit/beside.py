"""Calls beside a test's own thread, and waiting for conditions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

DEADLINE = 20.0

_T = TypeVar("_T")


def eventually(condition: Callable[[], object], what: str) -> None:
    """Wait until a condition holds; fail after a deadline that no healthy run comes near."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"never came: {what}"
        time.sleep(0.001)


class Beside(Generic[_T]):
    """One call on a thread of its own, and what came of it."""

    def __init__(self, call: Callable[[], _T]) -> None:
        self._call = call
        self._answers: list[_T] = []
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._answers.append(self._call())
        except BaseException as error:  # noqa: BLE001 - raised again by `answer`
            self._errors.append(error)

    @property
    def running(self) -> bool:
        """Whether the call has not come back."""
        return self._thread.is_alive()

    def answer(self, within: float = DEADLINE) -> _T:
        """What the call returned; raises what it raised, and fails when it hangs."""
        self._thread.join(within)
        assert not self._thread.is_alive(), f"{self._call} hangs"
        if self._errors:
            raise self._errors[0]
        return self._answers[0]


def race(*calls: Callable[[], _T]) -> list[_T | BaseException]:
    """Make the calls at one moment, and give what each returned or raised."""
    barrier = threading.Barrier(len(calls))

    def at_once(call: Callable[[], _T]) -> _T:
        barrier.wait(DEADLINE)
        return call()

    beside = [Beside(lambda call=call: at_once(call)) for call in calls]  # type: ignore[misc] # mypy cannot infer it
    came: list[_T | BaseException] = []
    for each in beside:
        try:
            came.append(each.answer())
        except Exception as error:  # noqa: BLE001 - the caller looks at it
            came.append(error)
    return came
