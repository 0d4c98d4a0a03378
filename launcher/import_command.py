"""`zeropipe import-axolotl CONFIG`: an Axolotl file's recipe, DeepSpeed JSON and commands to run."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ..data_prep.errors import UserError, as_user_error
from ..trainer.commands.arguments import add_verb

if TYPE_CHECKING:
    from .axolotl.stated import Notes

_DESCRIPTION = """\
Turns the common keys of an Axolotl file into FOLDER/recipe.yaml and FOLDER/deepspeed.json, prints the commands that
prepare the data and train, and lists every key that it left out, and why. Nothing is downloaded: models and data sets
that are named by their place on a hub have to be on this machine, and are named in the list.
"""


def register(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(verbs, "import-axolotl", run, "recipe and DeepSpeed JSON from an Axolotl YAML", _DESCRIPTION)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="an Axolotl YAML")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: CONFIG's name without suffix")
    parser.add_argument(
        "--devices", type=int, default=1, metavar="N", help="that it ran on, over all hosts, for the global batch; 1"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")


def run(args: argparse.Namespace) -> int:
    from .axolotl.convert import convert

    if args.devices < 1:
        raise UserError(f"--devices {args.devices}: expected 1 or more")
    output = args.output or Path(args.config.stem)
    files, commands, notes = convert(args.config, output, args.devices)
    if (there := [str(output / name) for name in files if (output / name).exists()]) and not args.overwrite:
        raise UserError(f"{', '.join(there)}: there already; name another folder with --output, or add --overwrite")
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (output / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise as_user_error(error, where=output) from None
    print(f"{', '.join(files)} in {output}")
    print("\n".join(_report(commands, notes)))
    return 0


def _report(commands: list[list[str]], notes: Notes) -> list[str]:
    lines = ["", "next:", *(f"  {shlex.join(command)}" for command in commands)]
    if notes.changed:
        lines += ["", "not as Axolotl does it:", *(f"  {note}" for note in notes.changed)]
    if notes.left_out:
        lines += ["", "left out:", *(f"  {note}" for note in notes.left_out)]
    if notes.empty:
        lines += ["", f"ask for nothing: {', '.join(dict.fromkeys(notes.empty))}"]
    return lines
