"""The verb `report`. Heavy imports wait until it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...data_prep.sizes import format_bytes
from .arguments import add_verb


def register(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(verbs, "report", run, "a run's loss curve, throughput, evaluations and resumes, or a page")
    parser.add_argument("run_directories", nargs="+", metavar="RUN")
    parser.add_argument("--html", type=Path, metavar="FILE", help="all runs as one page, which opens without a network")


def run(args: argparse.Namespace) -> int:
    if args.html is not None:
        from ..page.page import write_page

        size = write_page(args.run_directories, args.html)
        print(f"{args.html}: {format_bytes(size)}, open it in a browser")
        return 0
    from ..metrics.report import report as text_of

    print("\n\n".join(map(text_of, args.run_directories)))
    return 0
