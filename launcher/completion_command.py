"""The verb `completion`: what a shell is to source, so that Tab completes verbs, options and files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from ..data_prep.errors import UserError
from ..trainer.commands.arguments import add_verb

_SHELLS = ("bash", "zsh", "fish")
_WHERE = """\
  bash   source <(zeropipe completion bash)                          into ~/.bashrc
  zsh    zeropipe completion zsh > ~/.zfunc/_zeropipe                 with fpath+=~/.zfunc before compinit in ~/.zshrc
  fish   zeropipe completion fish > ~/.config/fish/completions/zeropipe.fish"""


def register(verbs: argparse._SubParsersAction, whole: argparse.ArgumentParser) -> None:
    """Args: `whole`: the command line, with all of its verbs by the time that this one runs."""
    text = "prints what lets a shell complete verbs, options and files"
    parser = add_verb(verbs, "completion", lambda args: run(args, whole), text, epilog=_WHERE)
    parser.add_argument("shell", choices=_SHELLS)


def run(args: argparse.Namespace, whole: argparse.ArgumentParser) -> int:
    try:
        shtab: Any = import_module("shtab")
    except ImportError as error:
        raise UserError("completion needs shtab: pip install 'zeropipe[completion]'") from error
    for action in _taking_words(whole):
        action.complete = shtab.FILE
    print(shtab.complete(whole, shell=args.shell))
    return 0


def _taking_words(parser: argparse.ArgumentParser) -> Iterator[Any]:
    """The arguments of a parser and its verbs that may be files: all that are not one of a few words, or a number."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in {id(one): one for one in action.choices.values()}.values():
                yield from _taking_words(inner)
        elif action.nargs != 0 and action.choices is None and action.type not in (int, float):
            yield action
