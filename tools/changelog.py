"""The changelog's fragments: one file per change in changelog.d/, put together at a release.

python tools/changelog.py check                        are they well-formed, and is there one for this change?
python tools/changelog.py build VERSION YYYY-MM-DD     move them into CHANGELOG.md
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

KINDS = ("added", "changed", "deprecated", "removed", "fixed", "security")
LONGEST = 600
_NAME = re.compile(rf"[a-z0-9]+(?:-[a-z0-9]+)*\.(?:{'|'.join(KINDS)})\.md")
_FIRST_RELEASE = re.compile(r"^## ", re.MULTILINE)


def fragments(root: Path) -> list[Path]:
    """Return the fragments by name; the folder's own README is none."""
    return sorted(path for path in (root / "changelog.d").iterdir() if path.name != "README.md")


def malformed(path: Path) -> Iterator[str]:
    """Yield what is wrong with one fragment."""
    if not _NAME.fullmatch(path.name):
        yield f"{path.name}: the name must be some-words.KIND.md, KIND one of {', '.join(KINDS)}"
    text = path.read_text(encoding="utf-8").strip()
    if not text:
        yield f"{path.name}: is empty"
        return
    if "\n\n" in text or text[0] in "#-*":
        yield f"{path.name}: must be one paragraph, without heading or bullet"
    if len(text) > LONGEST:
        yield f"{path.name}: is longer than {LONGEST} characters"
    if not text.endswith("."):
        yield f"{path.name}: must end with a full stop"


def changed_since_release(root: Path) -> bool:
    """Say whether the package's source differs from what CHANGELOG.md last told of; false where git cannot tell."""
    told = _git(root, "log", "-1", "--format=%H", "--", "CHANGELOG.md")
    return bool(told) and bool(_git(root, "diff", "--name-only", told, "--", "src"))


def problems(root: Path) -> Iterator[str]:
    """Yield everything that is wrong with the fragments."""
    found = fragments(root)
    for path in found:
        yield from malformed(path)
    if not found and changed_since_release(root):
        yield "changelog.d/: the source has changed since the last release; say how in a fragment"


def build(root: Path, version: str, date: datetime.date) -> None:
    """Put the fragments into CHANGELOG.md as a new release, and remove them.

    Raises:
        ValueError: there is no fragment, one is malformed, or the release is already there.
    """
    found = fragments(root)
    wrong = list(problems(root)) or ([] if found else ["changelog.d/: holds no fragment"])
    changelog = root / "CHANGELOG.md"
    text = changelog.read_text(encoding="utf-8")
    if re.search(rf"^## {re.escape(version)} ", text, re.MULTILINE):
        wrong.append(f"CHANGELOG.md already has {version}")
    if wrong:
        raise ValueError("\n".join(wrong))
    place = _FIRST_RELEASE.search(text)
    before, after = (text[: place.start()], text[place.start() :]) if place else (text.rstrip() + "\n\n", "")
    changelog.write_text(f"{before}{_section(found, version, date)}{after}".rstrip() + "\n", encoding="utf-8")
    for path in found:
        path.unlink()


def _section(found: Sequence[Path], version: str, date: datetime.date) -> str:
    lines = [f"## {version} ({date.isoformat()})", ""]
    for kind in KINDS:
        entries = [path for path in found if path.name.endswith(f".{kind}.md")]
        if entries:
            lines += [f"### {kind.capitalize()}", ""]
            lines += [
                "- " + path.read_text(encoding="utf-8").strip().replace("\n", "\n  ") for path in entries
            ]
            lines.append("")
    return "\n".join(lines) + "\n"


def _git(root: Path, *arguments: str) -> str:
    # The tree may belong to another user than the one who checks it, as in a container's build.
    command = ["git", "-c", "safe.directory=*", "-C", str(root), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except FileNotFoundError:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def main(arguments: Sequence[str] | None = None, root: Path = Path(__file__).parents[1]) -> int:
    """Do what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(
        description="Check changelog.d/, or build a release's part of CHANGELOG.md."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check")
    release = commands.add_parser("build")
    release.add_argument("version")
    release.add_argument("date", type=datetime.date.fromisoformat)
    chosen = parser.parse_args(arguments)
    if chosen.command == "check":
        wrong = list(problems(root))
        print("\n".join(wrong) or f"changelog.d: {len(fragments(root))} fragments, all well-formed")
        return 1 if wrong else 0
    try:
        build(root, chosen.version, chosen.date)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"CHANGELOG.md: {chosen.version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
