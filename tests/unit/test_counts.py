"""What the library costs in calls, threads, descriptors and copies; `benchmarks/counts.py` counts, and says what should be."""

from __future__ import annotations

from benchmarks import counts


def test_no_verb_makes_more_calls_than_it_must() -> None:
    assert counts.calls() == counts.CALLS


def test_a_lifecycle_is_six_calls_at_most() -> None:
    assert len(counts.LIFECYCLE) <= 6


def test_containers_have_no_threads_and_idle_ones_no_descriptors() -> None:
    assert counts.threads_and_descriptors() == counts.THREADS_AND_DESCRIPTORS


def test_no_byte_of_output_is_copied_twice() -> None:
    assert counts.copies() == counts.COPIES
