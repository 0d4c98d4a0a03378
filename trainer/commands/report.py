"""The verb `report`. Heavy imports wait until it runs."""

from __future__ import annotations

import argparse

from .arguments import add_verb


def register(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(verbs, "report", run, "a run's loss curve, throughput, evaluations and resumes")
    parser.add_argument("run_directory", metavar="RUN")


def run(args: argparse.Namespace) -> int:
    from ..metrics.report import report as text_of

    print(text_of(args.run_directory))
    return 0
