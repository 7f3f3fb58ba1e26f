"""The changelog's fragments are checked, and become a release."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path

import pytest

from tools import changelog

DATE = datetime.date(2026, 3, 1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "changelog.d").mkdir()
    (tmp_path / "changelog.d/README.md").write_text("About fragments.\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\nAbout it.\n")
    return tmp_path


def write(root: Path, name: str, text: str = "Something is new.\n") -> Path:
    path = root / "changelog.d" / name
    path.write_text(text)
    return path


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=T", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", root, *identity, *arguments], capture_output=True, check=True, timeout=30)


def test_good_fragments_have_no_problems(root: Path) -> None:
    write(root, "new-verb.added.md")
    write(root, "fifo-leak.fixed.md", "A FIFO is\nunlinked.\n")

    assert list(changelog.problems(root)) == []


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("new.feature.md", "New.", "the name must be"),
        ("New Verb.added.md", "New.", "the name must be"),
        ("new.added.txt", "New.", "the name must be"),
        ("new.added.md", " \n", "is empty"),
        ("new.added.md", "- New.", "must be one paragraph"),
        ("new.added.md", "New.\n\nAnd more.", "must be one paragraph"),
        ("new.added.md", "x" * 600 + ".", "is longer than"),
        ("new.added.md", "New", "must end with a full stop"),
    ],
)
def test_a_malformed_fragment_is_named(root: Path, name: str, text: str, problem: str) -> None:
    (found,) = changelog.malformed(write(root, name, text))

    assert found.startswith(f"{name}: {problem}")


def test_a_change_without_a_fragment_is_found(root: Path) -> None:
    (root / "src").mkdir()
    (root / "src/a.py").write_text("A = 1\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "release")
    assert list(changelog.problems(root)) == []

    (root / "src/a.py").write_text("A = 2\n")
    git(root, "commit", "-q", "-a", "-m", "change")

    assert len(list(changelog.problems(root))) == 1
    write(root, "a-is-two.changed.md")
    assert list(changelog.problems(root)) == []


def test_a_release_takes_the_fragments_by_kind(root: Path) -> None:
    write(root, "leak.fixed.md", "A leak is\nmended.\n")
    write(root, "verb.added.md", "A verb is there.\n")

    changelog.build(root, "0.1.0", DATE)

    assert (root / "CHANGELOG.md").read_text() == (
        "# Changelog\n\nAbout it.\n\n## 0.1.0 (2026-03-01)\n\n"
        "### Added\n\n- A verb is there.\n\n### Fixed\n\n- A leak is\n  mended.\n"
    )
    assert changelog.fragments(root) == []


def test_a_newer_release_stands_above_an_older_one(root: Path) -> None:
    for version in ("0.1.0", "0.2.0"):
        write(root, "verb.added.md", f"New in {version}.")
        changelog.build(root, version, DATE)

    text = (root / "CHANGELOG.md").read_text()
    assert (
        0
        < text.index("## 0.2.0")
        < text.index("New in 0.2.0")
        < text.index("## 0.1.0")
        < text.index("New in 0.1.0")
    )


def test_a_release_without_fragments_or_a_second_time_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="holds no fragment"):
        changelog.build(root, "0.1.0", DATE)
    write(root, "verb.added.md")
    changelog.build(root, "0.1.0", DATE)
    kept = write(root, "verb.added.md")

    with pytest.raises(ValueError, match=r"already has 0\.1\.0"):
        changelog.build(root, "0.1.0", DATE)

    assert kept.exists()


def test_the_command_line_says_what_is_wrong(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert changelog.main(["check"], root) == 0
    write(root, "new.added.md", "New")
    assert changelog.main(["check"], root) == 1
    assert "full stop" in capsys.readouterr().out
    assert changelog.main(["build", "0.1.0", "2026-03-01"], root) == 1
