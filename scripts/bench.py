"""Runs the benchmarks one after another and writes what they printed to a page. usage: bench.py FILE [benchmark …]"""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from verify import VERSIONS, machine, revision

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def main(argv: Sequence[str]) -> int:
    target = Path(argv[0])
    files = [Path(name) for name in argv[1:]] or sorted(BENCHMARKS.glob("[a-z]*.py"))
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`, nothing by hand. Each measures this project and a peer or a limit in one run.",
        "",
        f"- {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, revision {revision()}",
        f"- {machine()}",
        f"- Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in VERSIONS),
    ]
    failed = []
    for file in files:
        if "__main__" not in file.read_text(encoding="utf-8"):
            continue  # shared parts
        print(f"== {file.name}", flush=True)
        started = time.monotonic()
        done = subprocess.run([sys.executable, str(file)], stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        outcome = "" if done.returncode == 0 else f", FAILED with exit code {done.returncode}"
        failed += [file.name] if done.returncode else []
        seconds = time.monotonic() - started
        lines += ["", f"## {file.name} ({seconds:.0f} s{outcome})", "", "```", done.stdout.rstrip(), "```"]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{target}: {len(files)} benchmarks" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
