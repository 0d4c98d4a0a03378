"""Arguments that several verbs take alike."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

DEFAULT_DEEPSPEED_CONFIG = "zero0"
MODEL_DTYPES = ("float32", "bfloat16", "float16")
MODEL_HELP = "a run directory, one of its checkpoints, or a Hugging Face folder"
TEXT_MODEL_HELP = f"{MODEL_HELP}; also a peft adapter's folder"


def add_verb(
    verbs: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int] | None,
    text: str,
    description: str | None = None,
    epilog: str = "",
) -> argparse.ArgumentParser:
    """The parser of a verb, or of an action of one, which `run` runs.

    Args:
        text: what it does, in a line; `description`: at length.
    """
    parser = verbs.add_parser(
        name,
        help=text,
        description=description or text[0].upper() + text[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if run is not None:
        parser.set_defaults(run=run)
    return parser


def add_run_arguments(parser: argparse.ArgumentParser, default: str = DEFAULT_DEEPSPEED_CONFIG, note: str = "") -> None:
    """`recipe`, `overrides` and `--deepspeed_config`, alike everywhere."""
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped one")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="section.key=value overrides the recipe, ds.section.key=value the DeepSpeed JSON",
    )
    parser.add_argument(
        "--deepspeed_config",
        default=default,
        metavar="JSON",
        help=f"a DeepSpeed JSON file, or a shipped one's name{note}; default: %(default)s",
    )


def add_model_arguments(
    parser: argparse.ArgumentParser, dtype: str | None, note: str, models: str = MODEL_HELP
) -> None:
    """`model`, and in what and where it is computed, for verbs that only compute with one."""
    parser.add_argument("model", help=models)
    add_checkpoint_argument(parser)
    add_base_argument(parser)
    parser.add_argument("--dtype", choices=MODEL_DTYPES, default=dtype, help=f"of the weights; default: {note}")
    parser.add_argument("--device", help="such as cuda:1 or cpu; default: the accelerator, if there is one")


def add_base_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", metavar="FOLDER", help="of an adapter, a run's or peft's, if its base has moved")


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="of a run; default: the newest")


def add_sampling_arguments(parser: argparse.ArgumentParser, new_tokens: int | None, note: str) -> None:
    """How the next token is chosen, and how many there may be."""
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the K likeliest tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest that make up P; 1: all")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    parser.add_argument("--max-new-tokens", type=int, default=new_tokens, metavar="N", help=f"default: {note}")


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """What a model is talked with by."""
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="default: the run's or the folder's own")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt; default: the template's own, if any")
    parser.add_argument("--chat-template", type=Path, metavar="FILE", help="Jinja; default: the tokenizer's own")
