"""The arguments of every verb that takes the two files of a run."""

from __future__ import annotations

import argparse

DEFAULT_DEEPSPEED_CONFIG = "zero0"


def add_run_arguments(parser: argparse.ArgumentParser, default: str = DEFAULT_DEEPSPEED_CONFIG, note: str = "") -> None:
    """`recipe`, `overrides` and `--deepspeed_config`, alike everywhere."""
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override of the recipe: section.key=value")
    parser.add_argument(
        "--deepspeed_config",
        "--deepspeed-config",
        default=default,
        metavar="JSON",
        help=f"a DeepSpeed JSON file, or a shipped one's name{note}; default: %(default)s",
    )
