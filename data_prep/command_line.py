"""The parser of every command line of this project."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from .errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line is a `UserError` like any other, long options are never abbreviated, and
    their words may be joined by `-` and `_` alike.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        return super().parse_known_args(None if args is None else self.respelled(args), namespace)

    def respelled(self, words: Sequence[str]) -> list[str]:
        """The words, with this parser's own options as it spells them."""
        known = {option.replace("_", "-"): option for action in self._actions for option in action.option_strings}
        end = words.index("--") if "--" in words else len(words)

        def spelled(word: str) -> str:
            name, equals, value = word.partition("=")
            return known.get(name.replace("_", "-"), name) + equals + value if name.startswith("--") else word

        return [*map(spelled, words[:end]), *words[end:]]

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\n  usage: see `{self.prog} --help`")
