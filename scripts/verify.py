"""Runs the long matrices (tests marked `slow`) and writes what was run, on what, with which figures, to a page.

usage: verify.py FILE [pytest arguments]. A test reports a figure with pytest's `record_property(name, value)`.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

VERSIONS = ("torch", "deepspeed", "transformers", "tokenizers", "gigatoken", "safetensors", "numpy")
TEST_SECONDS = 3600  # of one test; in `make test` it is far less


@dataclass
class Case:
    """One test that ran."""

    file: str
    name: str
    seconds: float
    outcome: str  # passed, failed, skipped
    figures: dict[str, str] = field(default_factory=dict)


def main(argv: Sequence[str]) -> int:
    target, arguments = Path(argv[0]), list(argv[1:]) or ["tests"]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        options = ["-o", "junit_family=xunit1", f"--junit-xml={results}", "-o", f"timeout={TEST_SECONDS}"]
        command = [sys.executable, "-m", "pytest", "-m", "slow and not gpu", *options, *arguments]
        status = subprocess.run(command).returncode
        cases = read_cases(results)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(report(cases), encoding="utf-8")
    print(f"{target}: {len(cases)} tests")
    return status


def read_cases(results: Path) -> list[Case]:
    """The tests of a JUnit file, in the order they ran."""
    cases = []
    for case in ElementTree.parse(results).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        figures = {item.attrib["name"]: item.attrib["value"] for item in case.iter("property")}
        file = case.attrib["classname"].replace(".", "/") + ".py"
        cases.append(Case(file, case.attrib["name"], float(case.attrib["time"]), outcome, figures))
    return cases


def report(cases: Sequence[Case]) -> str:
    """The Markdown page."""
    outcomes = [case.outcome for case in cases]
    counts = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("passed", "failed", "skipped"))
    lines = [
        "# Verification",
        "",
        "Written by `make verify`; nothing here is by hand. These are the long matrices; `make test` runs the rest.",
        "",
        f"- {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, revision {revision()}",
        f"- {machine()}",
        f"- Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in VERSIONS),
        f"- {counts}, {sum(case.seconds for case in cases) / 60:.1f} minutes",
    ]
    by_file: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        by_file[case.file].append(case)
    for file, group in by_file.items():
        lines += ["", f"## {file}", "", "| test | outcome | seconds | figures |", "|---|---|---|---|"]
        for case in group:
            figures = "; ".join(f"{name} {_short(value)}" for name, value in case.figures.items()).replace("|", "\\|")
            lines.append(f"| `{case.name}` | {case.outcome} | {case.seconds:.1f} | {figures} |")
    return "\n".join(lines) + "\n"


def _short(value: str) -> str:
    try:
        return f"{float(value):.3g}"
    except ValueError:
        return value


def revision() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()

    changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + changed


def machine() -> str:
    """Processor, cores and memory."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores of {model}, {memory:.0f} GiB of memory, no accelerator used"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
