"""What an Axolotl file states: every key is taken, or left out with a reason, so that none is lost without a word."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...data_prep.errors import UserError, did_you_mean
from ...trainer.recipe.text_files import dotted

Lines = Mapping[tuple[str | int, ...], int]


@dataclass
class Notes:
    """What becomes of keys that are not simply taken over."""

    left_out: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)  # taken over, but not as Axolotl does it
    empty: list[str] = field(default_factory=list)  # stated, but they ask for nothing


class Stated:
    """A section of the file, read key by key."""

    def __init__(self, values: Mapping[str, Any], source: str, lines: Lines, notes: Notes, path: tuple = ()) -> None:
        self.notes, self.source = notes, source
        self._values, self._lines, self._path = values, lines, path
        self._open = dict.fromkeys(values)  # keys that nothing has been said about yet

    @property
    def home(self) -> str | int:
        """The key of the file's top level that this is part of; nothing for the whole."""
        return self._path[0] if self._path else ""

    def __contains__(self, key: str) -> bool:
        """Whether the key has a value, be it false."""
        return self._values.get(key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is. Of a key without one: the default."""
        self._open.pop(key, None)
        value = self._values.get(key)
        if value is None and key in self._values:
            self._empty(key)
        return default if value is None else value

    def number(self, key: str, default: float | None = None) -> Any:
        value = self.get(key, default)
        if isinstance(value, str):  # Axolotl takes quoted numbers
            try:
                value = float(value)
            except ValueError:
                raise self.error(key, "must be a number") from None
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise self.error(key, "must be a number")
        return value

    def whole(self, key: str, default: int | None = None) -> Any:
        value = self.number(key, default)
        if value is not None and value != int(value):
            raise self.error(key, "must be a whole number")
        return value if value is None else int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return value

    def text(self, key: str, default: str | None = None) -> Any:
        value = self.get(key, default)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "must be text")
        return value

    def names(self, key: str) -> list[str]:
        """A list of texts, empty where there is none; one text is a list of one."""
        value = self.get(key, [])
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise self.error(key, "must be a list of names")
        return listed

    def section(self, key: str) -> Stated:
        """A mapping, empty where there is none."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self.error(key, "must be a mapping of keys")
        return Stated(value, self.source, self._lines, self.notes, (*self._path, key))

    def sections(self, key: str) -> list[Stated]:
        """A list of mappings, empty where there is none; one mapping is a list of one."""
        value = self.get(key, [])
        value = [value] if isinstance(value, dict) else value
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise self.error(key, "must be a list of mappings")
        return [
            Stated(entry, self.source, self._lines, self.notes, (*self._path, key, place))
            for place, entry in enumerate(value)
        ]

    def leave(self, key: str, why: str) -> None:
        """Says that a key is left out, if it asks for anything."""
        value = self.get(key)
        if value not in (None, False, "", [], {}):
            self.notes.left_out.append(f"{self._named(key)}: {why}")
        elif value is not None:
            self._empty(key)

    def change(self, key: str, how: str) -> None:
        """Says how a key is taken over otherwise than Axolotl takes it."""
        self.notes.changed.append(f"{self._named(key)}: {how}")

    def leave_rest(self, reasons: Mapping[str, str], otherwise: str, known: Iterator[str] | None = None) -> None:
        """Leaves out every key that nothing has been said about."""
        for key in list(self._open):
            hint = "" if key in reasons else did_you_mean(str(key), known or ())
            self.leave(key, reasons.get(key, otherwise + hint))

    def error(self, key: str, problem: str) -> UserError:
        """A UserError that names file, line, key and value."""
        line = self._lines.get((*self._path, key)) or self._lines.get(
            self._path
        )  # of a key that is missing: its section's
        where = f", line {line}" if line else ""
        stated = f", got {self._values[key]!r}" if key in self else ""
        return UserError(f"{self.source}{where}: {dotted((*self._path, key))}: {problem}{stated}")

    def _empty(self, key: str) -> None:
        self.notes.empty.append(dotted((*self._path, key)))

    def _named(self, key: str) -> str:
        line = self._lines.get((*self._path, key))
        return dotted((*self._path, key)) + (f" (line {line})" if line else "")
