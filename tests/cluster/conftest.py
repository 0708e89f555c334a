"""Clusters for tests: ``slurm`` has two nodes, ``slurm4`` four. Every test finds them as they are just powered on.

Where none can run these tests are skipped, and pytest's summary says so; with EQUIPOISE_REQUIRE_CLUSTER=1 they fail.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Generator, Iterator

import pytest

from tests.cluster.slurm import Slurm, SlurmError, obstacle

_CLUSTERS = ("slurm", "slurm4")
_NO_CLUSTER = "no cluster: "

_obstacle = functools.cache(obstacle)


@pytest.fixture(scope="session")
def _possible() -> None:
    """Skips or fails what needs a cluster where there can be none."""
    if reason := _obstacle():
        if os.environ.get("EQUIPOISE_REQUIRE_CLUSTER") == "1":
            pytest.fail(_NO_CLUSTER + reason, pytrace=False)
        pytest.skip(_NO_CLUSTER + reason)


def _cluster(folders: pytest.TempPathFactory, nodes: int) -> Iterator[Slurm]:
    with Slurm.start(folders.mktemp("slurm"), nodes) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def slurm(_possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two nodes, n1 and n2."""
    yield from _cluster(tmp_path_factory, 2)


@pytest.fixture(scope="module")
def slurm4(_possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Four nodes, n1 to n4."""
    yield from _cluster(tmp_path_factory, 4)


@pytest.fixture(autouse=True)
def _restart(request: pytest.FixtureRequest) -> Iterator[None]:
    clusters = [request.getfixturevalue(name) for name in _CLUSTERS if name in request.fixturenames]
    yield
    for cluster in clusters:
        cluster.restart()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What SLURM and the jobs wrote, below the error of a test that failed."""
    report = yield
    if report.failed:
        arguments = getattr(item, "funcargs", {})
        for cluster in (arguments[name] for name in _CLUSTERS if name in arguments):
            try:
                report.sections += cluster.record().items()
            except SlurmError as error:  # a cluster that is broken itself
                report.sections.append(("slurm", str(error)))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if _NO_CLUSTER in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(f"SKIPPED {len(skipped)} cluster tests: {_obstacle()}", yellow=True)
