"""The tests' own rules: what runs where, what CI refuses to skip, and what counts as a leak."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import leaks, servers
from tests.conftest import Count, fill_rootfs

ROOT = Path(__file__).parents[2]


def run_pytest(directory: Path, text: str, *options: str, **environment: str) -> tuple[int, str]:
    """Run one test file under this project's rules, on a machine where no server is found."""
    test = directory / "test_sample.py"
    test.write_text(text)
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in {"CI", "LIBCONTAINERD_STRESS", servers.CHOSEN}
    }
    rules = ["-p", "tests.conftest", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
    hide = "import tests.servers as s; s._which = lambda name: None; import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
    answer = subprocess.run(
        [sys.executable, "-c", hide, *rules, *options, str(test)],
        cwd=ROOT,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    return answer.returncode, answer.stdout + answer.stderr


REAL = "import pytest\n\n@pytest.mark.real\ndef test_it(containerd_binary):\n    pass\n\ndef test_other():\n    pass\n"


def test_without_containerd_a_real_test_is_skipped_with_the_reason(tmp_path: Path) -> None:
    code, output = run_pytest(tmp_path, REAL)

    assert code == 0, output
    assert "1 passed, 1 skipped" in output
    assert "no real containerd: not found: containerd, runc, a static busybox" in output


def test_the_containerd_to_test_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = tmp_path / "bin"
    chosen.mkdir()
    for name in ("containerd", "runc"):
        (chosen / name).write_text(f"#!/bin/sh\necho {name} 9.8.7\n")
        (chosen / name).chmod(0o755)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setenv(servers.CHOSEN, str(chosen))

    servers.choose()
    servers.choose()

    found = servers.find()
    assert str(found.containerd) == f"containerd 9.8.7 ({chosen}/containerd)"
    assert str(found.runc) == f"runc 9.8.7 ({chosen}/runc)"
    assert os.environ["PATH"].count(str(chosen)) == 1


def test_a_chosen_directory_without_containerd_ends_the_run(tmp_path: Path) -> None:
    code, output = run_pytest(tmp_path, REAL, LIBCONTAINERD_TEST_CONTAINERD=str(tmp_path))

    assert code == pytest.ExitCode.USAGE_ERROR
    assert f"LIBCONTAINERD_TEST_CONTAINERD: no containerd in {tmp_path}" in output


def test_in_ci_that_skip_is_a_failure(tmp_path: Path) -> None:
    code, output = run_pytest(tmp_path, REAL, CI="true")

    assert code == 1, output
    assert "skipped in CI, where every real-containerd test must run" in output


def test_in_ci_other_skips_stay(tmp_path: Path) -> None:
    code, output = run_pytest(
        tmp_path, "import pytest\ndef test_it():\n    pytest.skip('other')\n", CI="true"
    )

    assert code == 0, output
    assert "1 skipped" in output


def test_a_test_among_the_integration_tests_is_a_real_one(tmp_path: Path) -> None:
    folder = tmp_path / "integration"
    folder.mkdir()

    code, output = run_pytest(folder, "def test_it():\n    pass\n")

    assert code == 0, output
    assert "1 skipped" in output


@pytest.mark.parametrize(("environment", "seen"), [({}, 5), ({"LIBCONTAINERD_STRESS": "1"}, 1000)])
def test_counts_follow_the_environment(tmp_path: Path, environment: dict[str, str], seen: int) -> None:
    text = f"def test_it(count):\n    assert count(1000, 5) == {seen}\n\ndef test_plain():\n    pass\n"

    code, output = run_pytest(tmp_path, text, "-m", "stress", **environment)

    assert code == 0, output
    assert "1 passed, 1 deselected" in output


@pytest.mark.parametrize(
    "body",
    [
        "import threading; t = threading.Thread(target=int, args=('x',)); t.start(); t.join()",
        "import warnings; warnings.warn('old', DeprecationWarning)",
        "class A:\n        def __del__(self): raise ValueError\n    A()",
    ],
    ids=["in a thread", "as a warning", "in a finalizer"],
)
def test_what_would_pass_unseen_fails_a_test(tmp_path: Path, body: str) -> None:
    code, output = run_pytest(tmp_path, f"def test_it():\n    {body}\n")

    assert code == 1, output
    assert "1 failed" in output


def test_a_test_that_hangs_is_failed_with_every_thread_shown(tmp_path: Path) -> None:
    text = "import threading, time\ndef test_it():\n"
    text += (
        "    threading.Thread(target=time.sleep, args=(60,), name='the-other', daemon=True).start()\n"
        "    time.sleep(60)\n"
    )

    code, output = run_pytest(tmp_path, text, "--timeout=3")

    assert code == 1, output
    assert "Timeout" in output
    assert "the-other" in output


def test_a_descriptor_left_open_is_a_leak(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"descriptor of .*/left"), leaks.no_leaks(within=0.05):
        left = (tmp_path / "left").open("wb")
    left.close()


def test_a_thread_left_running_is_a_leak() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="left-running")

    with pytest.raises(AssertionError, match="thread left-running"), leaks.no_leaks(within=0.05):
        thread.start()
    stop.set()
    thread.join()


def test_a_pool_that_was_there_may_grow_and_a_new_one_may_not_stay() -> None:
    held = threading.Event()
    with (
        ThreadPoolExecutor(8, thread_name_prefix="before") as earlier,
        ThreadPoolExecutor(8, thread_name_prefix="within") as another,
    ):
        try:
            earlier.submit(held.wait)
            with leaks.no_leaks(within=0.05):
                earlier.submit(held.wait)
            with pytest.raises(AssertionError, match="thread within_0"), leaks.no_leaks(within=0.05):
                another.submit(held.wait)
        finally:
            held.set()


def test_what_is_gone_before_the_deadline_is_no_leak() -> None:
    stop = threading.Event()
    read, write = os.pipe()

    def close_later() -> None:
        stop.wait()
        os.close(extra)

    with leaks.no_leaks():
        extra = os.dup(read)
        thread = threading.Thread(target=close_later)
        thread.start()
        threading.Timer(0.1, stop.set).start()
    thread.join()
    os.close(read)
    os.close(write)


def test_many_event_loops_are_a_leak_and_a_few_are_grpcs() -> None:
    few = [os.eventfd(0) for _ in range(3)]
    with leaks.no_leaks(within=0.05):
        few += [os.eventfd(0) for _ in range(3)]
    with pytest.raises(AssertionError, match="event loops"), leaks.no_leaks(within=0.05):
        few += [os.eventfd(0) for _ in range(30)]
    for descriptor in few:
        os.close(descriptor)


def test_python_here_is_dynamic_and_a_text_is_no_program(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("no program")

    assert not servers.is_static(Path("/bin/sh"))
    assert not servers.is_static(text)


def test_a_root_filesystem_has_every_applet(tmp_path: Path) -> None:
    busybox = tmp_path / "its-busybox"
    busybox.write_text("#!/bin/sh\nprintf 'sh\\nstty\\nbusybox\\n'\n")
    busybox.chmod(0o755)
    root = tmp_path / "root"
    root.mkdir(mode=0o700)

    fill_rootfs(root, busybox)

    assert sorted(path.name for path in (root / "bin").iterdir()) == ["busybox", "sh", "stty"]
    assert (root / "bin/sh").readlink() == Path("busybox")
    assert root.stat().st_mode & 0o777 == 0o755
    assert {"dev", "etc", "proc", "sys", "tmp"} <= {path.name for path in root.iterdir()}


def test_count_is_a_choice(count: Count) -> None:
    assert count(7, 7) == 7


def test_counts_of_several_processes_are_added_up(tmp_path: Path) -> None:
    text = (
        "import pytest\nfrom tests.conftest import USED\n"
        "@pytest.mark.parametrize('number', range(6))\n"
        "def test_it(number, pytestconfig):\n    pytestconfig.stash[USED]['a fake'] += 1\n"
    )
    _, alone = run_pytest(tmp_path, text)
    _, shared = run_pytest(tmp_path, text, "--numprocesses", "2")

    assert "contract: 6 tests on a fake" in alone
    assert "contract: 6 tests on a fake" in shared


def test_programs_of_tests_take_signals_however_the_tests_were_started(tmp_path: Path) -> None:
    text = (
        "import signal, subprocess, sys\n"
        "def test_it():\n"
        "    show = 'import signal; print(*(signal.getsignal(each).value for each in (signal.SIGHUP, signal.SIGQUIT)))'\n"
        "    assert subprocess.check_output([sys.executable, '-c', show], text=True).split() == ['0', '1']\n"
        "    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    )
    ignored = {
        number: signal.signal(number, signal.SIG_IGN)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
    }
    try:
        code, output = run_pytest(tmp_path, text)
    finally:
        for number, handler in ignored.items():
            signal.signal(number, handler)

    assert code == 0, output
