"""The verb `verify`, of exported models: data_prep's, which looks at token stores, learns of them here. Heavy imports
wait until it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from ...data_prep.cli import count, positive_count, run_verify
from ...data_prep.errors import EXIT_DONE, EXIT_USER_ERROR, UserError
from ..run.quiet import quiet

_DESCRIPTION = """\
Of a token store: compares sizes, offsets, token ids and digests. Of a folder that `zeropipe export` wrote: compares
every file with its provenance.json; with --against also the run that it came from: recipe, JSON, every byte of its
data, tokenizer, checkpoints, the record of its steps, and each weight with the checkpoint. --replay takes steps of the
run again, from one checkpoint to the next, on as many ranks of this machine as then, and compares weights, moments and
losses bit for bit."""


def register(verbs: argparse._SubParsersAction) -> None:
    """Adds what is asked of models to the verb that data_prep has registered."""
    parser = verbs.choices["verify"]
    parser.description, parser.formatter_class = _DESCRIPTION, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--against", metavar="RUN", help="of an exported model: the run that it came from")
    parser.add_argument("--replay", type=positive_count, metavar="K", help="with --against: K random ranges of steps")
    parser.add_argument("--seed", type=count, metavar="N", help="with --replay: the same ranges each time")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..run.directory import is_hf_folder

    models = [path for path in args.store if is_hf_folder(Path(path))]
    if args.replay is not None and args.against is None:
        raise UserError("--replay: of which run? name it with --against")
    if args.seed is not None and args.replay is None:
        raise UserError("--seed: is for --replay; leave it out")
    if not models:
        if args.against is not None:
            raise UserError(f"--against {args.against}: {args.store[0]} is no exported model; it has no config.json")
        return run_verify(args)
    if len(models) < len(args.store):
        other = next(path for path in args.store if path not in models)
        raise UserError(
            f"{other}: is no exported model, and {models[0]} is one; verify stores by a command of their own"
        )
    problems = [problem for model in models for problem in _problems(Path(model), args)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        print(f"whole: {', '.join(models)}")
    return EXIT_USER_ERROR if problems else EXIT_DONE


def _problems(model: Path, args: argparse.Namespace) -> Iterator[str]:
    quiet()  # before the libraries are imported
    from ..export.verified import export_problems
    from ..run.directory import run_directory

    against = None if args.against is None else Path(args.against)
    if against is not None and run_directory(against) != against.absolute():
        raise UserError(f"--against {against}: no run directory, which has a recipe.yaml")
    yield from export_problems(model, against)
    if against is None or args.replay is None:
        return
    from ..testing.retrace import chosen_stretches, retrace

    for stretch in chosen_stretches(against, args.replay, args.seed):
        print(f"taking steps {stretch.steps[0] + 1} to {stretch.steps[1]} again", file=sys.stderr, flush=True)
        yield from retrace(against, stretch)
