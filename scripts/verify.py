"""Runs the long matrices (tests marked `slow`) and writes what was run, on what, with which figures, to a page.

usage: verify.py FILE [pytest arguments]. With arguments, the page's other sections stay as they are. A test reports a
figure with pytest's `record_property(name, value)`.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

VERSIONS = ("torch", "deepspeed", "transformers", "peft", "tokenizers", "gigatoken", "safetensors", "numpy")
TITLE = """# Verification

Written by `make verify`, nothing by hand. These are the long matrices, by test file; `make test` runs the rest.
"""
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
    kept = read_page(target) if argv[1:] and target.exists() else {}
    target.write_text(page(kept | sections(cases)), encoding="utf-8")
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


def sections(cases: Sequence[Case]) -> dict[str, str]:
    """The Markdown of each test file: when and on what it ran, and its table."""
    by_file: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        by_file[case.file].append(case)
    return {file: _section(group) for file, group in by_file.items()}


def _section(group: Sequence[Case]) -> str:
    outcomes = [case.outcome for case in group]
    counts = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("passed", "failed", "skipped"))
    lines = [
        f"{counts}, {sum(case.seconds for case in group) / 60:.1f} minutes; {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, "
        f"revision {revision()}, {machine()}, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in VERSIONS),
        "",
        "| test | outcome | seconds | figures |",
        "|---|---|---|---|",
    ]
    for case in group:
        figures = "; ".join(f"{name} {_short(value)}" for name, value in case.figures.items()).replace("|", "\\|")
        lines.append(f"| `{case.name}` | {case.outcome} | {case.seconds:.1f} | {figures} |")
    return "\n".join(lines)


def page(found: Mapping[str, str]) -> str:
    body = "".join(f"\n## {file}\n\n{text}\n" for file, text in sorted(found.items()))
    return f"{TITLE}\n{body}"


def read_page(path: Path) -> dict[str, str]:
    """The sections of a page, so that one file's tests can be run again alone."""
    parts = path.read_text(encoding="utf-8").split("\n## ")[1:]
    return {file: text.strip() for file, _, text in (part.partition("\n") for part in parts)}


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
