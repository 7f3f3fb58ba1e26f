"""`replace` on a real containerd: what is in the way goes, whoever made it and whatever its state."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from libcontainerd import (
    Client,
    ConflictError,
    EventType,
    InvalidParameterError,
    Remote,
)
from libcontainerd.backends import RecordingBackend
from tests.conftest import Count
from tests.integration.containers import (
    Collected,
    MakeSpec,
    Raw,
    alive,
    bundle_of,
    process,
    run_task,
    wait_until,
)
from tests.leaks import no_leaks

SLEEP = ("sleep", "1000")


def test_where_nothing_is_in_the_way_it_creates(client: Client, raw: Raw, spec: MakeSpec) -> None:
    client.replace("c", spec("sh", "-c", "exit 3"), labels={"k": "v"})
    assert raw.container("c").labels["k"] == "v"
    assert run_task(client, "c").status.code == 3
    client.delete("c")


def test_our_own_running_container_gives_way(
    client: Client, backend: RecordingBackend, raw: Raw, spec: MakeSpec
) -> None:
    with no_leaks():
        client.create("c", spec("sh", "-c", "echo old; sleep 1000"))
        old, of_exec = Collected(), Collected()
        pid = client.start("c", with_stdin=True, attach_stdio=old)
        client.exec("c", "e", process("cat"), with_stdin=True, attach_stdio=of_exec)
        old.wait_for(b"old\n")
        client.replace("c", spec("sh", "-c", "echo new; exit 3"))
        assert not alive(pid)
        assert not raw.tasks_by_id()
        assert not list(bundle_of(raw, "c").iterdir())
        old.wait()
        of_exec.wait()
        result = run_task(client, "c")
        assert (result.out, result.status.code) == (b"new\n", 3)
        client.delete("c")
    backend.wait_for(lambda each: each.event is EventType.EXIT and each.info.exit_code == 3, "c")
    codes = [each.info.exit_code for each in backend.events("c") if each.event is EventType.EXIT]
    assert sorted(codes) == [3, 137, 137]


def start(client: Client, raw: Raw) -> None:
    client.start("c", with_stdin=True, attach_stdio=Collected())


def pause(client: Client, raw: Raw) -> None:
    start(client, raw)
    client.pause("c")


def end(client: Client, raw: Raw) -> None:
    start(client, raw)
    client.signal_process("c", "init", signal.SIGKILL)
    client.wait("c")


STATES: dict[str, Callable[[Client, Raw], None]] = {
    "never started": lambda client, raw: None,
    "created": lambda client, raw: raw.create_task("c"),
    "running": start,
    "paused": pause,
    "ended": end,
}


@pytest.mark.parametrize("state", STATES)
def test_what_an_earlier_program_has_left_gives_way(  # noqa: PLR0917 - fixtures
    client: Client, remote: Remote, namespace: str, raw: Raw, spec: MakeSpec, state: str
) -> None:
    with remote.new_client(namespace) as earlier:
        earlier.create("c", spec(*SLEEP), labels={"whose": "earlier"})
        STATES[state](earlier, raw)
    found = raw.tasks_by_id().get("c")
    with pytest.raises(ConflictError):
        client.create("c", spec("true"))
    client.replace("c", spec("sh", "-c", "cat; exit 3"), labels={"whose": "ours"}, timeout=20)
    assert raw.container("c").labels["whose"] == "ours"
    assert not raw.tasks_by_id()
    if found is not None:
        wait_until(lambda: not alive(found.pid), "the old process has ended")
    result = run_task(client, "c", stdin=b"new input")
    assert (result.out, result.status.code) == (b"new input", 3)
    bundle = bundle_of(raw, "c")
    client.delete("c")
    assert not bundle.exists()


def test_what_cannot_be_made_takes_nothing_away(client: Client, raw: Raw, spec: MakeSpec) -> None:
    client.create("c", spec(*SLEEP))
    pid = client.start("c")
    with pytest.raises(InvalidParameterError):
        client.replace("c", {"ociVersion": 7})
    with pytest.raises(InvalidParameterError):
        client.replace("c", spec("true"), {"no_such_field": 1})
    with pytest.raises(InvalidParameterError):
        client.replace("../c", spec("true"))
    assert alive(pid)
    assert raw.container_ids() == {"c"}


def test_replacements_at_once_leave_one_that_works(
    client: Client, raw: Raw, spec: MakeSpec, count: Count
) -> None:
    made = spec("sh", "-c", "echo hi; exit 3")

    def replace() -> bool:
        try:
            client.replace("c", made)
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        for _ in range(count(50, 5)):
            replacing = [pool.submit(replace) for _ in range(4)]
            succeeded = [each.result(timeout=40) for each in replacing]
            assert any(succeeded)
            assert raw.container_ids() == {"c"}
            result = run_task(client, "c")
            assert (result.out, result.status.code) == (b"hi\n", 3)
    client.delete("c")
