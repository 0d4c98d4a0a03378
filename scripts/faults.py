"""Rehearses every fault so often and writes what became of each to a page, beside plain `deepspeed --hostfile`.

usage: faults.py FILE [--times N] [--plain N] [--faults NAME,…] [--seed S]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts.verify import machine, revision
from zeropipe.launcher.rehearsal.drive import ENOUGH_SECONDS
from zeropipe.launcher.rehearsal.faults import FAULTS, GOES_ON, REFUSED
from zeropipe.launcher.rehearsal.matrix import TABLE_HEADING, Matrix, write_line
from zeropipe.launcher.rehearsal.netns import virtual_hosts, what_is_missing
from zeropipe.launcher.rehearsal.small import write_small
from zeropipe.launcher.rehearse_command import chosen_faults
from zeropipe.trainer.plan.deepspeed_json import load_pair

TITLE = """# Faults

Written by `scripts/faults.py` (`make verify`), nothing by hand; `zeropipe rehearse RECIPE` does the same with your
own recipe.

Hosts are network namespaces of one machine, each with its own sshd, a name that means 127.0.1.1 and a second
interface that leads nowhere. One run (the recipe `demo`, small, ZeRO-2, two hosts of one rank) goes through all the
faults of the first table: each launch resumes it, comes to harm at a random step of the phase named, and must end
within the time stated, with the right exit code, no process left on any host 15 s after the fault, the right cause
on its last line (rank, host, phase or step), and no more lost than what the last two checkpoints that were due
leave open. "goes on": the run must go on, and is then asked to stop (SIGTERM; exit code 4: it has saved).
"refused": before a rank begins, exit code 2.

Not done here: lossy links (the kernel has no `netem`; slow ones are made by `tbf`), and a GPU's own faults.
"""

PLAIN = f"""\
`deepspeed --hostfile` alone with the same ranks, address and port given by hand, on a run of
its own; what has not ended after {ENOUGH_SECONDS:.0f} s is killed. "left" counts processes on all hosts 15 s after
the fault, or at its end if that is later.
"""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--plain", type=int, default=1, metavar="N", help="times for plain deepspeed")
    parser.add_argument("--faults", default="all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if missing := what_is_missing():
        sys.exit(f"error: {missing}")
    names = chosen_faults(args.faults)
    began = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, revision {revision()}, {machine()}"
    lines: dict[str, list[dict[str, Any]]] = {"ours": [], "plain": []}
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "hosts").mkdir()
        slots = write_small(*load_pair("demo", "zero2", [f"data.train=[{{store: {store(folder)}}}]"]), 2, folder)
        with virtual_hosts(folder / "hosts", 2, loopback_names=True, dead_interfaces=True) as hosts:
            matrix, ledger = Matrix(hosts, slots, folder, args.seed), "not audited"
            print(TABLE_HEADING, flush=True)
            once = [("ours", fault) for fault in names]
            plain = [("plain", fault) for fault in names if fault != "hang"]
            # plain after the first round: what is there when this is ended early has both
            rounds = once + plain * args.plain + once * (args.times - 1)
            for who, fault in rounds:
                line = matrix.line(fault, plain=who == "plain")
                print(write_line(line, as_json=False), flush=True)
                lines[who].append(line.as_json())
                loads.append(os.getloadavg()[0])
                ledger = matrix.audited() if (who, fault) == once[-1] else ledger
                busy = f"load average {min(loads):.1f} to {max(loads):.1f} meanwhile"
                args.file.write_text(page(lines, f"{began}; {busy}.", ledger), encoding="utf-8")
    return int(any(line["wrong"] for line in lines["ours"]))


def store(folder: Path) -> Path:
    """A small store of text that every machine has."""
    words = ["prepare", "--builtin", "stdlib", "--limit-bytes", "400K", "--train-tokenizer", "512", "--workers", "0"]
    command = [sys.executable, "-m", "zeropipe.launcher", *words, "--output", str(folder / "store")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "store"


def page(lines: dict[str, list[dict[str, Any]]], began: str, ledger: str) -> str:
    ours, plain = lines["ours"], lines["plain"]
    wrong = sum(bool(line["wrong"]) for line in ours)
    parts = [
        TITLE,
        f"{began} {len(ours)} faults, {len(ours) - wrong} as they must be. The run in the end: {ledger}.",
        "",
        "## zeropipe launch",
        "",
        "| fault | times | must | where | seconds: median, longest | exit code | left | cause last | as it must be |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(fault, found) for fault, found in _by_fault(ours).items()),
    ]
    if wrong:
        parts += ["", "What was not as it must be:", ""]
        parts += [
            f"- {x['fault']}, {x['place']}, rank {x['rank']}: {'; '.join(x['wrong'])}" for x in ours if x["wrong"]
        ]
    if plain:
        parts += [
            "",
            "## plain deepspeed --hostfile",
            "",
            PLAIN,
            "| fault | place | seconds to the end | exit code | left | its last line |",
            "|---|---|---|---|---|---|",
            *(_plain_row(line) for line in plain),
        ]
    return "\n".join(parts) + "\n"


def _by_fault(lines: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found = defaultdict(list)
    for line in lines:
        found[line["fault"]].append(line)
    return found


def _row(name: str, lines: Sequence[dict[str, Any]]) -> str:
    fault = FAULTS[name]
    goes_on = fault.outcome == GOES_ON
    seconds = [line["seconds"] for line in lines if line["seconds"] is not None]
    took = f"{statistics.median(seconds):.1f}, {max(seconds):.1f}" if seconds and not goes_on else "-"
    named = "-" if goes_on or not fault.says else f"{sum(line['right'] for line in lines)}"
    must = fault.outcome if fault.outcome in (GOES_ON, REFUSED) else f"end in {fault.seconds:.0f} s"
    cells = [
        name, len(lines), must, ", ".join(line["place"] for line in lines), took, _codes(lines),
        sum(line["left"] for line in lines), named, sum(not line["wrong"] for line in lines),
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _codes(lines: Sequence[dict[str, Any]]) -> str:
    return ", ".join(sorted({str(line["code"]) for line in lines}))


def _plain_row(line: dict[str, Any]) -> str:
    took = f"still running after {ENOUGH_SECONDS:.0f} s" if line["seconds"] is None else f"{line['seconds']:.1f}"
    code = "-" if line["code"] is None else line["code"]
    last = json.dumps(line["last"][:100], ensure_ascii=False)[1:-1].replace("|", "\\|")
    return f"| {line['fault']} | {line['place']} | {took} | {code} | {line['left']} | `{last}` |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
