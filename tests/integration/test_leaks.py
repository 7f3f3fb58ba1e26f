"""What many containers, execs, failures and clients leave behind: nothing here, on disk, or in containerd."""

from __future__ import annotations

import gc
import os
import resource
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from libcontainerd import Client, InvalidParameterError, Remote
from libcontainerd._records import Process
from libcontainerd.backends import RecordingBackend
from libcontainerd.cio.attached import Attached
from libcontainerd.cio.direct import DirectIO
from libcontainerd.cio.fifo import End, InputStream, OutputStream
from tests import leaks
from tests.conftest import Count
from tests.integration.containers import Collected, MakeSpec, Raw, bundle_of, process, run, stop, wait_until

KINDS = (Process, Attached, DirectIO, InputStream, OutputStream, End)
"""What there is one of per process or stream, and none when that has been deleted."""

GROWTH = 24 << 20
"""Bytes that the process may grow by: what the allocators keep, and the exits that are remembered."""

WARM = 4
"""Rounds that come before the counting: what is imported and opened once is no leak."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def objects() -> Counter[str]:
    """How many objects of our kinds are alive."""
    gc.collect()
    return Counter(type(each).__name__ for each in gc.get_objects() if type(each) in KINDS)


@contextmanager
def nothing_left() -> Iterator[None]:
    """Fail if the block leaves descriptors, threads, records or streams, or much memory."""
    before = objects()
    size = resident()
    with leaks.no_leaks():
        yield
    wait_until(lambda: not objects() - before, f"as many objects as before: {before}")
    growth = resident() - size
    assert growth < GROWTH, f"{growth >> 10} KiB more"


def crowd(work: Callable[[_Item], _Result], items: Iterable[_Item], threads: int = 8) -> list[_Result]:
    with ThreadPoolExecutor(threads) as executor:
        return list(executor.map(work, items))


@pytest.fixture
def traces(remote: Remote, namespace: str) -> Callable[[], list[str]]:
    """Lists what containerd, its shims and runc keep on disk for the namespace."""
    state = Path(remote.address).parent
    places = (
        state / "daemon/io.containerd.runtime.v2.task" / namespace,
        Path("/run/containerd/runc", namespace),
    )

    def find() -> list[str]:
        return sorted(str(each) for place in places if place.is_dir() for each in place.iterdir())

    return find


@pytest.mark.timeout(240)
def test_containers_leave_nothing(
    client: Client, raw: Raw, spec: MakeSpec, traces: Callable[[], list[str]], count: Count
) -> None:
    number = count(150, 16)

    def live(name: str) -> None:
        result = run(client, name, spec("sh", "-c", "cat; echo error >&2; exit 5"), name.encode())
        assert (result.out, result.err, result.status.code) == (name.encode(), b"error\n", 5)

    client.create("kept", spec("sleep", "1000"))
    bundles = bundle_of(raw, "kept").parent
    crowd(live, [f"warm{each}" for each in range(WARM)])
    with nothing_left():
        crowd(live, [f"c{each}" for each in range(number)])
    assert os.listdir(bundles) == ["kept"]
    assert list((bundles / "kept").iterdir()) == []
    assert raw.container_ids() == {"kept"}
    assert not raw.tasks_by_id()
    wait_until(lambda: not traces(), "shims and runc have cleaned up")
    assert [each.id for each in client._containers.all()] == ["kept"]
    client.delete("kept")


@pytest.mark.timeout(240)
def test_execs_leave_nothing(
    client: Client, backend: RecordingBackend, raw: Raw, spec: MakeSpec, count: Count
) -> None:
    number = count(400, 50)
    client.create("c", spec("sleep", "1000"))
    pid = client.start("c")
    bundle = bundle_of(raw, "c")

    def run_one(name: str) -> None:
        collected = Collected(name.encode())
        client.exec("c", name, process("sh", "-c", "cat; echo error >&2; exit 5"), True, collected)
        assert client.wait("c", name).code == 5
        collected.wait()
        assert (collected.out, collected.err) == (name.encode(), b"error\n")

    (record,) = client._containers.all()
    crowd(run_one, [f"warm{each}" for each in range(WARM)])
    wait_until(lambda: not record.execs, "warmed up")
    with nothing_left():
        crowd(run_one, [f"e{each}" for each in range(number)])
        wait_until(lambda: not record.execs, "the records of execs are dropped")
        backend.clear()
    assert list(bundle.iterdir()) == []
    assert client.list_pids("c") == [pid]
    assert all(raw.process("c", f"e{each}") is None for each in range(number))
    stop(client, "c")


@pytest.mark.timeout(240)
def test_failed_starts_and_execs_leave_nothing(
    client: Client, raw: Raw, spec: MakeSpec, traces: Callable[[], list[str]], count: Count
) -> None:
    number = count(100, 12)
    client.create("c", spec("sleep", "1000"))
    pid = client.start("c")
    bundles = bundle_of(raw, "c").parent

    def fail(name: str) -> None:
        client.create(name, spec("no-such-program"))
        with pytest.raises(InvalidParameterError):
            client.start(name, None, True, Collected(b"input"))
        with pytest.raises(InvalidParameterError):
            client.exec("c", name, process("no-such-program"), True, Collected(b"input"))
        assert list((bundles / name).iterdir()) == []
        client.delete(name)

    crowd(fail, [f"warm{each}" for each in range(WARM)])
    with nothing_left():
        crowd(fail, [f"f{each}" for each in range(number)])
    assert os.listdir(bundles) == ["c"]
    assert list((bundles / "c").iterdir()) == []
    assert client.list_pids("c") == [pid]
    assert set(raw.tasks_by_id()) == raw.container_ids() == {"c"}
    stop(client, "c")
    wait_until(lambda: not traces(), "shims and runc have cleaned up")


@pytest.mark.timeout(240)
def test_clients_leave_nothing(client: Client, remote: Remote, namespace: str, count: Count) -> None:
    def come_and_go(_: int) -> None:
        with remote.new_client(namespace, RecordingBackend()) as other:
            assert other.version() == client.version()

    crowd(come_and_go, range(WARM))
    with nothing_left():
        crowd(come_and_go, range(count(400, 40)))
