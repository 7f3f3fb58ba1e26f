"""Dead links, broken code and failing examples in the documents are found."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tools import check_docs


@pytest.mark.parametrize(
    ("text", "findings"),
    [
        ("[a](other.md)", 0),
        ("[a](other.md#the-second-part)", 0),
        ("[a](#here)\n\n# Here", 0),
        ("[a](https://example.com/x)", 0),
        ("```\n[a](gone.md)\n```\n", 0),
        ("[a](gone.md)", 1),
        ("[a](other.md#gone)", 1),
        ("[a](#gone)", 1),
    ],
)
def test_a_dead_link_is_found(tmp_path: Path, text: str, findings: int) -> None:
    (tmp_path / "other.md").write_text("# Other\n\n## The second `part`\n")
    document = tmp_path / "document.md"
    document.write_text(text)

    assert len(list(check_docs.dead_links(document))) == findings


def test_a_test_that_is_named_and_not_there_is_found(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_x.py").write_text("def test_one() -> None:\n    pass\n")
    document = tmp_path / "document.md"
    document.write_text(
        "`tests/test_x.py::test_one` `tests/test_x.py::test_on` `tests/test_y.py::test_one`\n"
    )

    assert list(check_docs.missing_tests(document, tmp_path)) == [
        f"{document}: there is no test tests/test_x.py::test_on",
        f"{document}: there is no test tests/test_y.py::test_one",
    ]


def test_broken_python_is_found_with_its_line(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text(
        "Text\n\n```python\nx = 1\n```\n\n```sh\nif then\n```\n\n```python\ny = 1\ny = = 2\n```\n"
    )

    (found,) = check_docs.broken_code(document)

    assert found.startswith(f"{document}:13: ")


def test_a_failing_example_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    module = ModuleType("sample", ">>> 1 + 1\n3\n>>> 'a...z'\n'a...z'\n")

    results = check_docs.run_examples(module)

    assert (results.failed, results.attempted) == (1, 2)
    assert "Expected:\n    3" in capsys.readouterr().out
