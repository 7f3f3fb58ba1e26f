"""The table of features and versions is made of what pytest reports, and of nothing else. No test is run here."""

from __future__ import annotations

import pytest

from tools import matrix

REPORT = """\
<testsuites><testsuite>
<testcase classname="tests.integration.test_stdio" name="test_a_flood"/>
<testcase classname="tests.integration.test_stdio" name="test_a_broken_one"><failure message="m">t</failure></testcase>
<testcase classname="tests.integration.test_stdio" name="test_a_broken_one"><error message="m">t</error></testcase>
<testcase classname="tests.contract.test_stdio" name="test_a_flood[fake, host runtime]"/>
<testcase classname="tests.contract.test_stdio" name="test_a_flood[containerd]"/>
<testcase classname="tests.integration.test_runtimes" name="test_v1_linux">
<properties><property name="unavailable" value="refused: removed"/><property name="other" value="x"/></properties>
</testcase>
<testcase classname="tests.integration.test_runtimes" name="test_crun"><skipped message="m">t</skipped></testcase>
<testcase classname="tests.integration.test_new" name="test_it"/>
</testsuite></testsuites>
"""


def test_results_are_counted_by_feature() -> None:
    column = matrix.read_results(REPORT)

    assert {title: str(cell) for title, cell in column.items()} == {
        "stdin, stdout, stderr": "**1 of 3 tests fail**",
        "runtime: io.containerd.runtime.v1.linux": "refused: removed (1)",
        "runtime: crun": "not tested",
        "new": "ok (1)",
    }
    assert column["stdin, stdout, stderr"].failed == ["integration.test_stdio::test_a_broken_one"]


def test_a_table_has_a_row_for_each_feature_of_any_version() -> None:
    columns = {
        "1.6.20 (bookworm)": matrix.read_results(REPORT),
        "2.1.9 (sid)": {"new": matrix.Cell(passed=2)},
    }

    assert matrix.table(columns) == (
        "| feature | 1.6.20 (bookworm) | 2.1.9 (sid) |\n"
        "| --- | --- | --- |\n"
        "| runtime: crun | not tested | not tested |\n"
        "| runtime: io.containerd.runtime.v1.linux | refused: removed (1) | not tested |\n"
        "| stdin, stdout, stderr | **1 of 3 tests fail** | not tested |\n"
        "| new | ok (1) | ok (2) |\n"
    )


@pytest.mark.parametrize(
    ("test", "feature"),
    [
        ("integration.test_lifecycle::test_what_is_paused_stands_still", "pause and resume"),
        ("integration.test_lifecycle::test_an_execs_id_is_taken_once", "execs"),
        ("contract.test_lifecycle::test_an_exec[containerd]", "execs"),
        ("integration.test_lifecycle::test_a_new_container", "containers: create, start, wait, delete"),
        ("contract.test_store::test_images[containerd]", "content, images, leases, snapshots"),
        ("integration.test_something_new::test_it", "something new"),
    ],
)
def test_a_test_belongs_to_a_feature(test: str, feature: str) -> None:
    assert matrix.feature_of(test) == feature


def test_a_heading_has_upstreams_version() -> None:
    assert matrix.heading("sid", {"containerd": "2.1.9+ds1-5"}) == "2.1.9 (sid)"
    assert matrix.heading("bookworm", {"containerd": "1.6.20~ds1-1+deb12u3"}) == "1.6.20 (bookworm)"
    assert matrix.heading("sid", {}) == "? (sid)"
