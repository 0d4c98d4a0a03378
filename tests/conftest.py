"""Settings that every test needs before torch is imported anywhere; in CI, a skipped test fails."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from collections.abc import Generator
from pathlib import Path

import pytest

VERIFY_ONLY = Path(__file__).with_name("verify_only.txt")
IN_CI = os.environ.get("CI", "").lower() in ("true", "1")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    lines = VERIFY_ONLY.read_text(encoding="utf-8").splitlines()
    listed = {line for line in lines if not line.startswith("#")}
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.slow)
    gone = listed - {item.nodeid for item in items}
    if gone and config.args_source is pytest.Config.ArgsSource.TESTPATHS:  # all tests were collected
        raise pytest.UsageError(f"{VERIFY_ONLY.name}: there is no test {min(gone)}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        _fail(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if IN_CI and report.skipped:
        _fail(report)
    return report


def _fail(report: pytest.TestReport | pytest.CollectReport) -> None:
    """A machine that cannot run a test must not pass for one that ran it."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid}: {reason}\nIn CI every test must run: install what this one needs."
