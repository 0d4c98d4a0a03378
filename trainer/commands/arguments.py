"""Arguments that several verbs take alike."""

from __future__ import annotations

import argparse
from collections.abc import Callable

DEFAULT_DEEPSPEED_CONFIG = "zero0"
MODEL_DTYPES = ("float32", "bfloat16", "float16")
MODEL_HELP = "a run directory, one of its checkpoints, or a Hugging Face folder"


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


def add_model_arguments(parser: argparse.ArgumentParser, dtype: str | None, note: str) -> None:
    """`model`, and in what and where it is computed, for verbs that only compute with one."""
    parser.add_argument("model", help=MODEL_HELP)
    add_checkpoint_argument(parser)
    add_base_argument(parser)
    parser.add_argument("--dtype", choices=MODEL_DTYPES, default=dtype, help=f"of the weights; default: {note}")
    parser.add_argument("--device", help="such as cuda:1 or cpu; default: the accelerator, if there is one")


def add_base_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", metavar="FOLDER", help="of a run with an adapter, if its base has moved")


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="of a run; default: the newest")
