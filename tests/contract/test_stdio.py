"""Stdio through FIFOs: every byte, the end of input, terminals, and what becomes of what nobody reads."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from libcontainerd import Client, cio
from libcontainerd._wire.pb.services import tasks_pb2
from tests.contract import programs
from tests.contract.servers import Services, process_document
from tests.integration.containers import Collected, wait_until


def test_input_comes_out_again(client: Client, services: Services) -> None:
    """Fidelity 53."""
    data = os.urandom(200_000)
    collected = Collected(data)
    client.create("c", services.spec(*programs.CAT))
    client.start("c", with_stdin=True, attach_stdio=collected)

    assert client.wait("c").code == 0
    client.delete_task("c")
    assert collected.out == data


def test_a_conversation(client: Client, services: Services) -> None:
    """Fidelity 40, 48, 53."""
    collected = Collected()
    client.create("c", services.spec(*programs.CAT))
    client.start("c", with_stdin=True, attach_stdio=collected)

    for line in (b"one\n", b"two\n"):
        collected.stdin.write(line)
        collected.wait_for(line)
    client.close_stdin("c", "init")

    assert client.wait("c").code == 0


def test_an_execs_input_and_its_end(client: Client, services: Services) -> None:
    """Fidelity 35, 48."""
    client.create("c", services.spec())
    client.start("c")
    collected = Collected(b"x" * 70_000)
    client.exec("c", "e", process_document(*programs.COUNT), with_stdin=True, attach_stdio=collected)

    assert client.wait("c", "e").code == 0
    collected.wait()
    assert collected.out == b"70000\n"


def test_stdin_that_is_closed_before_the_process_is_there(client: Client, services: Services) -> None:
    """Fidelity 48, 54; DESIGN 5, stdin."""
    collected = Collected()

    def attach(dio: cio.DirectIO) -> cio.IO:
        assert dio.stdin is not None
        dio.stdin.close()
        return collected(dio)

    client.create("c", services.spec(*programs.COUNT))
    client.start("c", with_stdin=True, attach_stdio=attach)

    assert client.wait("c").code == 0
    client.delete_task("c")
    assert collected.out == b"0\n"


def test_a_process_without_stdin_reads_nothing(client: Client, services: Services) -> None:
    """Fidelity 47."""
    collected = Collected()
    client.create("c", services.spec(*programs.COUNT))
    client.start("c", attach_stdio=collected)

    assert client.wait("c").code == 0
    client.delete_task("c")
    assert collected.out == b"0\n"


def test_a_flood_arrives_whole(client: Client, services: Services) -> None:
    """DESIGN 5, delete_task: output written before the exit has come."""
    collected = Collected()
    client.create("c", services.spec(*programs.FLOOD))
    client.start("c", attach_stdio=collected)

    assert client.wait("c").code == 0
    client.delete_task("c")
    assert len(collected.out) == programs.FLOOD_BYTES


def test_who_does_not_read_holds_the_process_up(client: Client, services: Services) -> None:
    """DESIGN 7."""
    taken: list[cio.DirectIO] = []

    def attach(dio: cio.DirectIO) -> cio.IO:
        taken.append(dio)
        return dio

    client.create("c", services.spec(*programs.FLOOD))
    client.start("c", attach_stdio=attach)
    task = services.process("c")
    assert task is not None
    assert task.status == 2

    data = taken[0].stdout.read(programs.FLOOD_BYTES)

    assert data is not None
    total = len(data)
    while piece := taken[0].stdout.read(65536):
        total += len(piece)
    assert total == programs.FLOOD_BYTES
    assert client.wait("c").code == 0
    client.delete_task("c")


def test_output_to_nowhere(client: Client, services: Services) -> None:
    """DESIGN 7."""
    client.create("c", services.spec(*programs.FLOOD))
    client.start("c")

    assert client.wait("c").code == 0


def test_output_to_a_file(client: Client, services: Services, tmp_path: Path) -> None:
    """DESIGN 7."""
    log = tmp_path / "log"
    client.create("c", services.spec(*programs.SPEAK))
    client.start("c", attach_stdio=cio.log_file(log))

    assert client.wait("c").code == 3
    client.delete_task("c")
    assert sorted(log.read_bytes().splitlines()) == [b"err", b"out"]


def test_output_to_what_a_uri_names(client: Client, services: Services, tmp_path: Path) -> None:
    """DESIGN 7."""
    log = tmp_path / "log"
    client.create("c", services.spec(*programs.OBEY))
    client.start("c", attach_stdio=cio.log_uri(f"file://{log}"))

    # While it runs: of what is written at the end, the shim may lose one stream's when the other ends.
    wait_until(lambda: log.read_bytes() == b"ready\n", "the shim has written it", timeout=30)
    client.signal_process("c", "init", signal.SIGTERM)
    assert client.wait("c").code == 42
    client.delete_task("c")


def test_a_terminal(client: Client, services: Services) -> None:
    """Fidelity 25, 27."""
    collected = Collected()
    client.create("c", services.spec(*programs.TERMINAL, terminal=True))
    client.start("c", with_stdin=True, attach_stdio=collected)
    task = services.process("c")
    assert task is not None
    assert (task.terminal, task.stderr, bool(task.stdout)) == (True, "", True)

    assert client.wait("c").code == 0
    client.delete_task("c")
    assert collected.out == b"tty\r\n"


def test_a_terminals_size(client: Client, services: Services) -> None:
    """Fidelity 39."""
    collected = Collected()
    client.create("c", services.spec(*programs.SIZE, terminal=True))
    client.start("c", with_stdin=True, attach_stdio=collected)
    collected.wait_for(b"ready\r\n")

    client.resize_terminal("c", "init", 120, 40)
    collected.stdin.write(b"\n")
    client.wait("c")

    client.delete_task("c")
    assert b"40 120\r\n" in collected.out


def test_the_end_of_a_terminals_input_hangs_it_up(client: Client, services: Services) -> None:
    """Fidelity 40: the shim closes the terminal; its output ends, and the session is sent SIGHUP."""
    client.create("c", services.spec())
    client.start("c")
    collected = Collected()
    document = process_document(*programs.HANG_UP, terminal=True)
    client.exec("c", "e", document, with_stdin=True, attach_stdio=collected)
    collected.wait_for(b"hello\r\n")

    collected.stdin.close()

    assert client.wait("c", "e").code == 9
    collected.wait()
    assert collected.out == b"hello\r\n"


# It ends with its input, whatever signal comes first; and it keeps what it was told beside the output.
LOGGER = """#!/bin/sh
trap '' TERM
exec 5>&-
echo "$CONTAINER_NAMESPACE $CONTAINER_ID" >"$2.words"
cat <&3 >"$2.out" &
cat <&4 >"$2.err"
wait
"""


def test_output_to_a_program(client: Client, services: Services, tmp_path: Path) -> None:
    """DESIGN 7."""
    logger = tmp_path / "logger"
    logger.write_text(LOGGER)
    logger.chmod(0o755)

    def logged(name: str) -> list[str]:
        paths = [tmp_path / f"{name}.{kind}" for kind in ("words", "out", "err")]
        return [path.read_text() if path.exists() else "" for path in paths]

    client.create("c", services.spec(*programs.SPEAK))
    client.start("c", attach_stdio=cio.log_uri(f"binary://{logger}?-o={tmp_path}/init"))
    assert client.wait("c").code == 3
    client.delete_task("c")
    wait_until(lambda: logged("init")[1:] == ["out\n", "err\n"], "the logger has written")
    assert logged("init")[0] == f"{services.namespace} c\n"

    client.create("d", services.spec())
    client.start("d")
    output = cio.log_uri(f"binary://{logger}?-o={tmp_path}/exec")
    client.exec("d", "e", process_document(*programs.SPEAK), attach_stdio=output)
    assert client.wait("d", "e").code == 3
    wait_until(lambda: logged("exec")[1:] == ["out\n", "err\n"], "the logger has written")
    assert logged("exec")[0] == f"{services.namespace} e\n"


def test_fifos_that_are_told_are_told_again(client: Client, services: Services) -> None:
    """Fidelity 27."""
    collected = Collected()
    client.create("c", services.spec(*programs.CAT))
    client.start("c", with_stdin=True, attach_stdio=collected)

    task = services.process("c")

    assert task is not None
    assert [Path(path).name for path in (task.stdin, task.stdout, task.stderr)] == [
        "init-stdin",
        "init-stdout",
        "init-stderr",
    ]
    client.close_stdin("c", "init")
    client.wait("c")


def test_closing_io_twice_is_no_error(services: Services, tmp_path: Path) -> None:
    services.run("c")
    request = tasks_pb2.CloseIORequest(container_id="c", stdin=True)

    services.call(services.tasks.CloseIO, request)
    services.call(services.tasks.CloseIO, request)


@pytest.mark.parametrize("only", ["stdout", "stderr"])
def test_stdout_and_stderr_go_together(services: Services, tmp_path: Path, only: str) -> None:
    services.make_container("c")
    path = tmp_path / "plain"
    path.write_bytes(b"")

    refused = services.refused(
        services.tasks.Create,
        tasks_pb2.CreateTaskRequest(
            container_id="c",
            stdout=str(path) if only == "stdout" else "",
            stderr=str(path) if only == "stderr" else "",
        ),
    )

    assert "no such file or directory" in refused.details
    wait_until(lambda: services.process("c") is None, "nothing is left")
