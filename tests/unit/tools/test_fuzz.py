"""The readers of what comes from outside, on damaged samples; and the fuzzer itself finds what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Count
from tests.fuzz import targets
from tools import fuzz


@pytest.mark.parametrize("name", targets.TARGETS)
def test_samples_are_taken(name: str) -> None:
    for sample in targets.seeds(name):
        targets.TARGETS[name](sample)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_damaged_samples_do_no_harm(name: str, count: Count) -> None:
    samples = targets.seeds(name)
    tries = count(3000, 200)

    @given(st.randoms(use_true_random=False), st.sampled_from(samples))
    def damage(chance: object, sample: bytes) -> None:
        for _ in range(tries // 30):
            sample = fuzz.damaged(sample, chance)  # type: ignore[arg-type] # hypothesis's Random is one
            targets.TARGETS[name](sample)

    damage()


@pytest.mark.parametrize("name", targets.TARGETS)
def test_any_bytes_do_no_harm(name: str) -> None:
    given(st.binary(max_size=300))(targets.TARGETS[name])()


def test_what_is_found_is_kept_and_can_be_seen_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(data: bytes) -> None:
        if b"/../" in data:
            raise KeyError(data)

    monkeypatch.setattr(fuzz, "_FOUND", tmp_path / "found")
    monkeypatch.setitem(targets.TARGETS, "specs", broken)
    assert not fuzz.without_atheris("specs", 60, 1)
    (found,) = (tmp_path / "found").iterdir()
    assert f"--replay specs {found}" in capsys.readouterr().out
    with pytest.raises(KeyError):
        fuzz.main(["--replay", "specs", str(found)])


def test_what_cannot_be_run_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["x"], ["5", "nothing"]):
        assert fuzz.main(arguments) == 2
        assert "Targets: events, type_urls, specs, answers, archives" in capsys.readouterr().out


def test_a_target_that_holds_has_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.without_atheris("type_urls", 0.05, 7)
    assert "damaged samples, seed 7" in capsys.readouterr().out
