"""The verb `eval`. Heavy imports wait until it runs."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from ...data_prep.errors import UserError
from ..run.quiet import quiet
from .arguments import add_model_arguments, add_verb
from .chosen import chosen_checkpoint

if TYPE_CHECKING:
    from ..evaluation.evaluate import HeldOutData

_EPILOG = """\
examples:
  zeropipe eval runs/gpt2-345m
  zeropipe eval runs/gpt2-345m --split test --batches 100
  zeropipe eval some-hf-folder --store data/other --json
  zeropipe eval runs/gpt2-345m --tasks tasks/ours.yaml arc_easy
"""


def register(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(verbs, "eval", run, "loss, perplexity and bits per byte on held-out tokens", epilog=_EPILOG)
    add_model_arguments(parser, "float32", "%(default)s")
    parser.add_argument("--split", choices=("valid", "test"), default="valid", help="of the run's data")
    parser.add_argument("--store", help="evaluate on this whole store instead; needed for a Hugging Face folder")
    parser.add_argument("--reference", metavar="MODEL", help="that preferences are compared with; default: model.init")
    parser.add_argument("--batches", default="all", metavar="N|all", help="global batches; default: all of the split")
    parser.add_argument("--seq-len", type=int, metavar="T", help="with --store; default: the run's, or the context")
    by = "also the loss of each store, or by how much of a text comes before a token"
    parser.add_argument("--by", nargs="+", choices=("source", "position"), help=by)
    tasks = parser.add_argument_group("tasks (EleutherAI's lm-evaluation-harness; extra: tasks)")
    tasks.add_argument("--tasks", nargs="+", metavar="TASK", help="instead of held-out tokens: names, or task files")
    tasks.add_argument("--shots", type=int, metavar="N", help="examples before each question; default: the task's own")
    tasks.add_argument("--limit", type=int, metavar="N", help="samples of each task at most; default: all")
    tasks.add_argument("--batch-size", type=int, default=8, metavar="N", help="sequences at a time (8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    quiet()  # before the libraries are imported
    if args.tasks is not None:
        return _run_tasks(args)
    if args.shots is not None or args.limit is not None:
        raise UserError("--shots, --limit: are of --tasks; leave them out")
    from ...data_prep.making.bars import Bar
    from ..evaluation.breakdown import breakdown_lines
    from ..evaluation.evaluate import as_json, compared, evaluate_model, evaluation_text
    from ..evaluation.held_out import held_out_data
    from ..export.load import load_model, pick_device

    batches = _batches(args.batches)
    source = chosen_checkpoint(args.model, args.checkpoint)
    device = pick_device(args.device)
    data = held_out_data(source, args.split, args.store, args.seq_len)
    if data.objective.reference:
        data = compared(data, load_model(_reference(args, data), args.dtype)[0].to(device))
    elif args.reference is not None:
        raise UserError("--reference is for preferences; leave it out")
    model, _ = load_model(source, args.dtype, args.base)
    with Bar("evaluate", "sequences") as bar:
        evaluation = evaluate_model(model.to(device), data, batches, bar)
    breakdown, kinds = evaluation.breakdown, list(dict.fromkeys(args.by or ()))
    if kinds and breakdown is None:
        raise UserError(
            f"--by {' '.join(kinds)}: of {evaluation.data} pairs have a loss, and tokens have none; leave it out"
        )
    if args.json:
        more = {f"by_{kind}": [share.record() for share in breakdown.shares(kind)] for kind in kinds if breakdown}
        print(json.dumps({**as_json(evaluation), **more}))
    else:
        print("\n".join([evaluation_text(evaluation), *(breakdown_lines(breakdown, kinds) if breakdown else [])]))
    return 0


def _run_tasks(args: argparse.Namespace) -> int:
    """Evaluates at tasks; of a run's checkpoint the results go into its record, too."""
    from ..checkpoint.reader import Checkpoint
    from ..evaluation.harness import record_tasks, run_tasks
    from ..export.load import load_model, pick_device
    from ..run.directory import is_hf_folder, run_directory

    others = args.store, args.reference, args.seq_len, args.by
    if args.batches != "all" or any(other is not None for other in others):
        raise UserError(
            "--tasks: takes no --store, --reference, --batches, --seq-len, --by: tasks have their own texts"
        )
    for name in ("limit", "shots", "batch_size"):
        least = 0 if name == "shots" else 1
        if (value := getattr(args, name)) is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected {least} or more")
    source = chosen_checkpoint(args.model, args.checkpoint)
    run = None if is_hf_folder(source) else run_directory(source)
    if not is_hf_folder(source):
        source = Checkpoint.find(source)  # one and the same for the model and the record
    model, tokenizer = load_model(source, args.dtype, args.base)
    model.to(pick_device(args.device))
    results = run_tasks(model, tokenizer, args.tasks, args.shots, args.limit, args.batch_size)
    print(json.dumps([result.record() for result in results]) if args.json else "\n".join(map(str, results)))
    if run is not None and args.limit is None:  # of some samples they are nothing to keep
        record_tasks(run, Checkpoint(source).step, results)
    return 0


def _reference(args: argparse.Namespace, data: HeldOutData) -> str:
    """The model that preferences are compared with."""
    if (reference := args.reference or data.initial) is None:
        raise UserError(f"{data.name}: preferences are compared with a model: name it with --reference")
    return reference


def _batches(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--batches {text}: expected a number of 1 or more, or all")
    return int(text)
