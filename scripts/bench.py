"""Runs the benchmarks one after another and writes what they printed to a page.

usage: bench.py FILE [benchmark …]. With benchmarks named, the page's other sections stay as they are.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from verify import VERSIONS, machine, read_page, revision

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TITLE = """# Performance

Written by `make bench`, nothing by hand. Each measures this project and a peer or a limit in one run.
"""


def main(argv: Sequence[str]) -> int:
    target, named = Path(argv[0]), [Path(name) for name in argv[1:]]
    sections = read_page(target) if named and target.exists() else {}
    failed = []
    for file in named or sorted(BENCHMARKS.glob("[a-z]*.py")):
        if "__main__" not in file.read_text(encoding="utf-8"):
            continue  # shared parts
        print(f"== {file.name}", flush=True)
        started = time.monotonic()
        done = subprocess.run([sys.executable, str(file)], stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        failed += [file.name] if done.returncode else []
        outcome = "" if done.returncode == 0 else f"FAILED with exit code {done.returncode}, "
        facts = [
            f"{outcome}{time.monotonic() - started:.0f} s",
            f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            f"revision {revision()}",
            machine(),
            f"Python {platform.python_version()}",
            *(f"{name} {version(name)}" for name in VERSIONS),
        ]
        sections[file.name] = f"{', '.join(facts)}\n\n```\n{done.stdout.rstrip()}\n```"
        target.write_text(page(sections), encoding="utf-8")
    print(f"{target}: {len(sections)} benchmarks" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def page(sections: Mapping[str, str]) -> str:
    return TITLE + "".join(f"\n## {name}\n\n{text}\n" for name, text in sorted(sections.items()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
