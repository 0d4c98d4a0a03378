"""The verb `parity`: does every layout train as one process would? Heavy imports wait until it runs."""

from __future__ import annotations

import argparse

from ..run.quiet import quiet
from .arguments import add_run_arguments, add_verb

EXIT_DIFFERS = 1  # some layout does not follow one process

_DESCRIPTION = """\
Trains a recipe for a few steps on every legal layout of 1, 2, 4 … ranks of this machine, in fp32 without dropout,
noise or penalties, and compares each loss, gradient norm and the final weights with one process of plain Hugging Face
and torch.

Use it with a small model, after an upgrade of torch, DeepSpeed or transformers, or on new machines.
Exit code 0: all are the same; 1: some layout differs, and its line names the first step and quantity.
"""


def register(verbs: argparse._SubParsersAction) -> None:
    text = "train a recipe on every layout of this machine and compare them"
    parser = add_verb(verbs, "parity", run, text, _DESCRIPTION)
    add_run_arguments(parser, "zero1", " (its layout and precision are replaced)")
    parser.add_argument("--ranks", type=int, default=4, help="most ranks to start; default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps; default: %(default)s")


def run(args: argparse.Namespace) -> int:
    quiet()  # before the libraries are imported
    from ..plan.deepspeed_json import load_pair
    from ..testing.parity import HEADING, parity

    recipe, ds = load_pair(args.recipe, args.deepspeed_config, args.overrides)
    differing, tried = 0, 0
    for found in parity(recipe, ds, args.ranks, args.steps):
        if not tried:
            print(HEADING)
        print(found, flush=True)
        tried += 1
        differing += found.difference is not None
    print(f"{tried} layouts, {args.steps} steps each: {'all the same' if not differing else f'{differing} differ'}")
    return EXIT_DIFFERS if differing else 0
