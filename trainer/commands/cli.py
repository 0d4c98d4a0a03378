"""The trainer's verbs: train, eval, generate, export, ckpt, report, parity. `commands.py` runs them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from . import exchange as exchange_commands
from . import parity as parity_command
from . import verbs as commands
from .arguments import add_run_arguments

DTYPES = ("float32", "bfloat16", "float16")
MODEL_HELP = "a run directory, one of its checkpoints, or a Hugging Face folder"


def register(verbs: argparse._SubParsersAction) -> None:
    """Adds this room's verbs to the command line."""
    _register_train(verbs)
    _register_eval(verbs)
    _register_generate(verbs)
    _register_export(verbs)
    _register_ckpt(verbs)
    parser = _add(verbs, "report", commands.report, "a run's loss curve, throughput, evaluations and resumes")
    parser.add_argument("run_directory", metavar="RUN")
    parity_command.register(verbs)


def _add(
    verbs: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int] | None,
    text: str,
    epilog: str = "",
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if run is not None:
        parser.set_defaults(run=run)
    return parser


def _register_train(verbs: argparse._SubParsersAction) -> None:
    parser = _add(verbs, "train", commands.train, "train in this process group: one process when started alone")
    add_run_arguments(parser)


def _register_eval(verbs: argparse._SubParsersAction) -> None:
    epilog = """\
examples:
  zeropipe eval runs/gpt2-345m
  zeropipe eval runs/gpt2-345m --split test --batches 100
  zeropipe eval some-hf-folder --store data/other --json
"""
    parser = _add(verbs, "eval", commands.evaluate, "loss, perplexity and bits per byte on held-out tokens", epilog)
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--split", choices=("valid", "test"), default="valid", help="of the run's data")
    parser.add_argument("--store", help="evaluate on this whole store instead; needed for a Hugging Face folder")
    parser.add_argument("--batches", default="all", metavar="N|all", help="global batches; default: all of the split")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="of a run; default: the newest")
    parser.add_argument("--seq-len", type=int, metavar="T", help="with --store; default: the run's, or the context")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights; default: %(default)s")
    parser.add_argument("--device", help="such as cuda:1 or cpu; default: the accelerator, if there is one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _register_generate(verbs: argparse._SubParsersAction) -> None:
    epilog = """\
examples:
  zeropipe generate runs/gpt2-345m --prompt 'Once upon a time'
  zeropipe generate runs/gpt2-345m --prompt A --prompt B --temperature 0.8 --top-p 0.95 --seed 7
"""
    parser = _add(
        verbs, "generate", commands.generate, "continue prompts: greedy, or sampled with --temperature", epilog
    )
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="one prompt a line")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the K likeliest tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest that make up P; 1: all")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="of a run; default: the newest")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="default: the run's or the folder's own")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: float32 on a CPU, else as trained")
    parser.add_argument("--device", help="such as cuda:1 or cpu; default: the accelerator, if there is one")
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def _register_export(verbs: argparse._SubParsersAction) -> None:
    text = "write a Hugging Face folder, verified against the logits that training computed"
    parser = _add(verbs, "export", commands.export, text)
    parser.add_argument("run_directory", metavar="RUN", help="a run directory or a checkpoint")
    parser.add_argument("--output", metavar="FOLDER", help="default: RUN/export")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="of a run; default: the newest")
    parser.add_argument("--dtype", choices=DTYPES, help="default: what the run computed with")
    parser.add_argument("--max-shard-gb", type=float, default=4.0, metavar="GB", help="largest file; default: 4")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is there")


def _register_ckpt(verbs: argparse._SubParsersAction) -> None:
    parser = _add(verbs, "ckpt", None, "list, verify, prune, import, convert checkpoints; audit the samples")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True, parser_class=type(parser))
    listing = _add(actions, "ls", commands.ckpt_ls, "list checkpoints, their step and size")
    verify = _add(actions, "verify", commands.ckpt_verify, "compare every byte with the manifest")
    prune = _add(actions, "prune", commands.ckpt_prune, "remove all whole checkpoints but the newest")
    audit = _add(
        actions, "audit", commands.ckpt_audit, "prove that every sample was consumed exactly once and in order"
    )
    for action in (listing, verify, prune):
        action.add_argument("path", metavar="RUN", help="a run directory, its checkpoints/, or one of them")
    prune.add_argument("--keep", type=int, required=True, metavar="N", help="how many to keep")
    audit.add_argument("path", metavar="RUN", help="a run directory")
    exchange_commands.register(actions)
