"""What all tests share: the servers at hand, a root filesystem, counts, leak checks, and the closing summary."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Protocol

import pytest
from hypothesis import settings

from tests import late, leaks, servers

# Long enough for the full counts on two slow cores; tests that name a timeout of their own keep it.
_STRESS_TIMEOUT = 600
_REAL_DIRECTORIES = {"integration", "chaos"}
_found: pytest.StashKey[servers.Servers] = pytest.StashKey()
USED: pytest.StashKey[Counter[str]] = pytest.StashKey()
"""How many contract tests ran, by server."""

_COUNTS_OF_WORKER = "libcontainerd-contract"


class _Worker(Protocol):
    """What is used of pytest-xdist's view of one of the processes that share the tests."""

    config: pytest.Config
    workeroutput: dict[str, dict[str, int]]


class Count(Protocol):
    """Chooses between a test's two counts."""

    def __call__(self, stress: int, test: int) -> int:
        """Return `stress` under LIBCONTAINERD_STRESS=1, else `test`."""


def _stressed() -> bool:
    return os.environ.get("LIBCONTAINERD_STRESS") == "1"


def _in_ci() -> bool:
    return os.environ.get("CI") == "true"


# ------------------------------------------------------------------------------------------------------------ hooks


def pytest_configure(config: pytest.Config) -> None:
    """Look for the servers once, and choose how many examples property-based tests draw."""
    try:
        servers.choose()
        late.install(os.environ.get(late.VARIABLE, ""))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    _take_signals()
    config.stash[_found] = servers.find()
    config.stash[USED] = Counter()
    settings.register_profile("test", max_examples=30, deadline=None)
    settings.register_profile("stress", max_examples=300, deadline=None)
    settings.load_profile("stress" if _stressed() else "test")


def _take_signals() -> None:
    """Undo what `nohup` and a shell's `&` do: what is ignored here would be ignored in every program that a test starts."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what follows from a test's place and fixtures, so that no author has to remember it."""
    for item in items:
        if _REAL_DIRECTORIES.intersection(item.path.parts):
            item.add_marker(pytest.mark.real)
        if "count" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.stress)
            if _stressed() and item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(_STRESS_TIMEOUT))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that needs a real containerd where none can run."""
    missing = item.config.stash[_found].missing
    if missing and item.get_closest_marker("real") is not None:
        pytest.skip(f"no real containerd: {missing}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn the skip of a real-containerd test into a failure in CI, whatever its reason."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("real") and _in_ci():
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where every real-containerd test must run: {report.longrepr}"
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the process that prints the summary what this one has counted, where several share the tests."""
    output: dict[str, dict[str, int]] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        counts: Counter[str] = session.config.stash[USED]
        output[_COUNTS_OF_WORKER] = dict(counts)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: _Worker) -> None:
    """Add up what they told; one that died told nothing."""
    counts: dict[str, int] = getattr(node, "workeroutput", {}).get(_COUNTS_OF_WORKER, {})
    node.config.stash[USED].update(counts)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say at the end on which servers the tests ran."""
    terminalreporter.write_sep("=", "servers")
    terminalreporter.write_line(config.stash[_found].describe())
    for name, count in sorted(config.stash[USED].items()):
        terminalreporter.write_line(f"contract: {count} tests on {name}")
    if _stressed():
        terminalreporter.write_line("LIBCONTAINERD_STRESS=1: with the full counts")
    if os.environ.get(late.VARIABLE):
        terminalreporter.write_line(f"{late.VARIABLE}={os.environ[late.VARIABLE]}: and that late")


# --------------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def containerd_binary(pytestconfig: pytest.Config) -> Path:
    """The containerd to start; skips where none can run, which in CI is a failure."""
    found = pytestconfig.stash[_found]
    if found.missing or found.containerd is None:
        pytest.skip(f"no real containerd: {found.missing}")
    return found.containerd.path


@pytest.fixture(scope="session")
def release(containerd_binary: Path, pytestconfig: pytest.Config) -> tuple[int, int]:
    """That containerd's major and minor version, for what differs: `release >= (1, 7)`."""
    found = pytestconfig.stash[_found].containerd
    assert found is not None
    return found.release


@pytest.fixture(scope="session")
def criu() -> servers.Criu:
    """A criu for checkpoints; skips where none can work, which in CI is a failure for real containerds."""
    found = servers.find_criu()
    if found.program is None:
        pytest.skip(f"no criu: {found.missing}")
    return found


@pytest.fixture(scope="session")
def rootfs(pytestconfig: pytest.Config) -> Iterator[Path]:
    """A root filesystem of one static busybox: every applet in /bin, and the directories that mounts go to.

    All tests share it, so none may write to it. It can be entered by any user, as user namespaces need.
    """
    busybox = pytestconfig.stash[_found].busybox
    if busybox is None:
        pytest.skip(f"no root filesystem: {pytestconfig.stash[_found].missing}")
    root = Path(tempfile.mkdtemp(prefix="libcontainerd-rootfs-"))
    try:
        fill_rootfs(root, busybox)
        yield root
    finally:
        shutil.rmtree(root)


def fill_rootfs(root: Path, busybox: Path) -> None:
    """Make `root` a root filesystem around a static busybox."""
    root.chmod(0o755)
    for name in ("bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "var"):
        (root / name).mkdir()
    (root / "tmp").chmod(0o1777)
    (root / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
    )
    (root / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
    shutil.copy(busybox, root / "bin/busybox")
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, timeout=20, check=True)
    for applet in applets.stdout.split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")


@pytest.fixture
def count() -> Count:
    """`count(1000, 50)` is 1,000 under LIBCONTAINERD_STRESS=1 and 50 otherwise; marks its test `stress`."""

    def choose(stress: int, test: int) -> int:
        return stress if _stressed() else test

    return choose


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Fail the test if it leaves descriptors or threads behind.

    Fixtures named before this one may stay; `tests.leaks.no_leaks` is the same for a block.
    """
    with leaks.no_leaks():
        yield
