"""The journal of the example runner: what is in it stays, and no exit gets in twice."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from journal import Journal

AT = "2026-11-28T12:00:00+00:00"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@contextmanager
def opened(path: Path) -> Iterator[Journal]:
    journal = Journal(str(path))
    try:
        yield journal
    finally:
        journal.close()


def started(job: str = "a", step: str | None = None, pid: int = 7) -> dict[str, object]:
    return {"event": "started", "job": job, "step": step, "pid": pid}


def exited(job: str = "a", step: str | None = None, pid: int = 7, code: int = 3) -> dict[str, object]:
    return {"event": "exit", "job": job, "step": step, "pid": pid, "code": code, "at": AT}


def removed(job: str = "a") -> dict[str, object]:
    return {"event": "removed", "job": job}


def lines(path: Path) -> list[object]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_what_has_begun_is_known_until_it_has_ended(path: Path) -> None:
    with opened(path) as journal:
        assert journal.jobs() == []
        assert journal.tell(started())
        assert journal.tell(started(step="s", pid=8))
        assert journal.unended("a") == {(None, 7), ("s", 8)}
        assert journal.tell(exited(step="s", pid=8))
        assert journal.unended("a") == {(None, 7)}
        assert journal.tell(exited())
        assert (journal.jobs(), journal.unended("a")) == (["a"], set())
        assert journal.tell(removed())
        assert (journal.jobs(), journal.unended("a")) == ([], set())
    assert lines(path) == [started(), started(step="s", pid=8), exited(step="s", pid=8), exited(), removed()]


def test_the_next_one_knows_it(path: Path) -> None:
    with opened(path) as journal:
        journal.tell(started())
        journal.tell(started(step="s", pid=8))
        journal.tell(exited(step="s", pid=8))
    with opened(path) as journal:
        assert (journal.jobs(), journal.unended("a")) == (["a"], {(None, 7)})
        assert not journal.tell(exited(step="s", pid=8))
        assert journal.tell(exited())
    with opened(path) as journal:
        assert not journal.tell(exited(code=255))
        assert journal.unended("a") == set()
    assert lines(path) == [started(), started(step="s", pid=8), exited(step="s", pid=8), exited()]


def test_what_was_restored_has_begun(path: Path) -> None:
    with opened(path) as journal:
        journal.tell({"event": "restored", "job": "a", "pid": 7, "alive": True, "steps": {"s": 8}})
        journal.tell({"event": "restored", "job": "b", "pid": 0, "alive": False, "steps": {}})
        assert (journal.unended("a"), journal.unended("b")) == ({(None, 7), ("s", 8)}, set())
        assert journal.jobs() == ["a", "b"]


def test_an_exit_is_told_once_by_many_threads(path: Path) -> None:
    told = []
    with opened(path) as journal:
        journal.tell(started())
        threads = [
            threading.Thread(target=lambda code=code: told.append(journal.tell(exited(code=code))))
            for code in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(told) == [False] * 7 + [True]
    assert len(lines(path)) == 2


def test_an_exit_of_a_job_that_is_not_there_is_not_told(path: Path) -> None:
    with opened(path) as journal:
        assert not journal.tell(exited())
        journal.tell(started())
        journal.tell(exited())
        journal.tell(removed())
        assert not journal.tell(exited(step="s", pid=8))
    with opened(path) as journal:
        assert journal.jobs() == []


def test_a_pid_that_comes_again_is_another_run(path: Path) -> None:
    with opened(path) as journal:
        for _ in range(2):
            journal.tell(started(step="s"))
            assert journal.unended("a") == {("s", 7)}
            assert journal.tell(exited(step="s"))


def test_what_is_removed_is_left_out_by_the_next_one(path: Path) -> None:
    with opened(path) as journal:
        for event in (
            started(),
            started("b"),
            exited(),
            removed(),
            started(pid=9),
            started("c"),
            removed("c"),
        ):
            journal.tell(event)
    with opened(path) as journal:
        assert lines(path) == [started("b"), started(pid=9)]
        assert (journal.unended("a"), journal.unended("b")) == ({(None, 9)}, {(None, 7)})
        assert journal.tell(exited(pid=9))
    assert lines(path) == [started("b"), started(pid=9), exited(pid=9)]
    assert os.listdir(path.parent) == ["journal"]


def test_what_is_told_to_a_closed_one_is_refused(path: Path) -> None:
    with opened(path) as journal:
        pass
    with pytest.raises(OSError, match="Bad file descriptor"):
        journal.tell(started())
    assert lines(path) == []


@pytest.mark.parametrize("torn", [b"{", b'{"event": "exit", "job": "a", "step": null, "pid": 7', b"\xc3"])
def test_a_torn_last_line_was_not_told(path: Path, torn: bytes) -> None:
    with opened(path) as journal:
        journal.tell(started())
    with path.open("ab") as file:
        file.write(torn)
    with opened(path) as journal:
        assert lines(path) == [started()]
        assert journal.tell(exited())
    assert lines(path) == [started(), exited()]


def test_each_line_is_a_single_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    write = os.write

    def record(descriptor: int, data: bytes) -> int:
        written.append(data)
        return write(descriptor, data)

    with opened(path) as journal:
        monkeypatch.setattr(os, "write", record)
        journal.tell(started())
        journal.tell(exited())
    assert b"".join(written) == path.read_bytes()
    assert [json.loads(each) for each in written] == [started(), exited()]


def test_a_line_that_is_not_written_whole_is_taken_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with opened(path) as journal:
        journal.tell(started())
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
            with pytest.raises(OSError, match="5 of "):
                journal.tell(exited())
        assert journal.unended("a") == {(None, 7)}
        assert journal.tell(exited())
    assert lines(path) == [started(), exited()]
