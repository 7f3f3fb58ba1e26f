"""Checks the documents: links inside the project lead somewhere, named tests exist, Python compiles, docstrings' examples run.

python tools/check_docs.py
"""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

# What tools and packages leave in the tree.
_OTHER = {".git", ".venv", ".venv-oldest", ".venv-protos", ".pytest_cache"}
_GENERATED = "libcontainerd._wire.pb"
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^( *)```([\w-]*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
_TEST = re.compile(r"`(tests/[\w./-]+\.py)::(\w+)`")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def documents(root: Path) -> list[Path]:
    """Return the Markdown files of the project."""
    return sorted(
        path for path in root.rglob("*.md") if not _OTHER.intersection(path.relative_to(root).parts)
    )


def anchors(text: str) -> set[str]:
    """Return the anchors that a document's headings make, as the common hosts of Git repositories do it."""
    headings = _HEADING.findall(_FENCE.sub("", text))
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def dead_links(document: Path) -> Iterator[str]:
    """Yield each link of a document that leads to no file of the project, or to no heading of one."""
    text = document.read_text(encoding="utf-8")
    for link in _LINK.findall(_FENCE.sub("", text)):
        if _SCHEME.match(link):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name) if name else document
        if not target.exists():
            yield f"{document}: {link} leads to no file"
        elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text(encoding="utf-8")):
            yield f"{document}: {link} leads to no heading"


def missing_tests(document: Path, root: Path) -> Iterator[str]:
    """Yield each test that a document names, as a file and a function in it, and that is not there."""
    for name, function in _TEST.findall(document.read_text(encoding="utf-8")):
        file = root / name
        if not file.exists() or not re.search(
            rf"^ *def {function}\(", file.read_text(encoding="utf-8"), re.MULTILINE
        ):
            yield f"{document}: there is no test {name}::{function}"


def broken_code(document: Path) -> Iterator[str]:
    """Yield each Python block of a document that does not compile."""
    text = document.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        if found.group(2) not in {"python", "py"}:
            continue
        line = text.count("\n", 0, found.start()) + 2
        try:
            compile(textwrap.dedent(found.group(3)), str(document), "exec")
        except SyntaxError as error:
            yield f"{document}:{line + (error.lineno or 1) - 1}: {error.msg}"


def modules(package: str) -> Iterator[ModuleType]:
    """Import and yield a package and all its modules, but for generated ones."""
    root = importlib.import_module(package)
    yield root
    for found in pkgutil.walk_packages(root.__path__, f"{package}."):
        if not found.name.startswith(_GENERATED):
            yield importlib.import_module(found.name)


def run_examples(module: ModuleType) -> doctest.TestResults:
    """Run the examples in a module's docstrings; failures are printed as they come."""
    return doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)


def main(root: Path = Path(__file__).parents[1]) -> int:
    """Check everything; return the exit code."""
    wrong = []
    texts = documents(root)
    for document in texts:
        wrong += [*dead_links(document), *missing_tests(document, root), *broken_code(document)]
    results = [run_examples(module) for module in modules("libcontainerd")]
    failed, tried = sum(result.failed for result in results), sum(result.attempted for result in results)
    for line in wrong:
        print(line)
    print(f"{len(texts)} documents, {len(wrong)} findings; {tried} examples in docstrings, {failed} failed")
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main())
