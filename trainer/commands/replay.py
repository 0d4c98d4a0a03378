"""The verb `replay`: a bad step of a run, taken again in one process. Heavy imports wait until it runs."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from ..run.quiet import quiet
from .arguments import add_verb

_DESCRIPTION = """\
Takes a bad step again in one process, from its replay capsule, and names the first module whose output or gradient is
no number. It begins at the checkpoint that was the newest before the step and takes the steps in between first, with
the same micro batches and the same dropout. Nothing is written into the run."""


def register(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(verbs, "replay", run, "take a bad step again in one process; name what came first", _DESCRIPTION)
    parser.add_argument("capsule", metavar="CAPSULE", help="RUN/capsules/step-…, which a run leaves at a bad step")


def run(args: argparse.Namespace) -> int:
    quiet()
    from ..engine.capsule import read_capsule
    from ..engine.replay import replay
    from ..ranks.ranks import init_distributed, shut_down

    folder = Path(args.capsule).absolute()
    capsule, micro_batches = read_capsule(folder)
    print(f"step {capsule.step}, samples {capsule.samples[0]} to {capsule.samples[1] - 1}: {capsule.wrong}")
    stores = capsule.directory if Path(capsule.directory).is_dir() else "."
    with contextlib.chdir(stores):  # the recipe's relative paths count from there
        found = replay(capsule, micro_batches, folder.parent.parent, init_distributed(), _say)
    print(found)
    shut_down()
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
