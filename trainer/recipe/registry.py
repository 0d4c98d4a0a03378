"""Registries: what a name in a recipe or a DeepSpeed JSON stands for. Each kind of extension has one, in its room."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from inspect import signature
from typing import Any, Generic, TypeVar

from ...data_prep.errors import UserError, did_you_mean

_T = TypeVar("_T")


class Registry(Generic[_T]):
    """Entries by name. A file is imported when its entry is first asked for, so that names alone cost nothing."""

    def __init__(self, kind: str, package: str | None, files: Mapping[str, str]) -> None:
        """Args: `kind` in words for messages; `files` maps each name to "file:attribute" in `package`."""
        self.kind, self._package, self._files = kind, package, dict(files)
        self._entries: dict[str, _T] = {}

    def register(self, name: str, entry: _T) -> _T:
        """Adds an entry of somebody else's under a name that is free.

        Raises:
            ValueError: the name is taken by another entry.
        """
        if name in self._files or self._entries.get(name, entry) is not entry:
            raise ValueError(f"{self.kind} {name!r} is registered already")
        self._entries[name] = entry
        return entry

    def __getitem__(self, name: str) -> _T:
        """Raises UserError, with the nearest name, where there is none such."""
        if name not in self:
            raise UserError(
                f"no {self.kind} {name!r}{did_you_mean(name, self)}; there are: {', '.join(self) or 'none'}"
            )
        if name not in self._entries:
            file, attribute = self._files[name].split(":")
            self._entries[name] = getattr(import_module(f".{file}", self._package), attribute)
        return self._entries[name]

    def make(self, stated: str | Mapping[str, Any]) -> Any:
        """What a recipe states by name, or as a mapping of `type` and options, which are its constructor's arguments.

        Raises:
            UserError: there is none such, or an option that it does not take.
        """
        options = {"type": stated} if isinstance(stated, str) else dict(stated)
        name = str(options.pop("type", None))
        entry: Any = self[name]
        known = [key for key in signature(entry).parameters if key != "self"]
        if wrong := [key for key in options if key not in known]:
            hint = did_you_mean(wrong[0], known) or (f"; it takes {', '.join(known)}" if known else "; it takes none")
            raise UserError(f"{self.kind} {name}: unknown option {wrong[0]!r}{hint}")
        return entry(**options)

    def get(self, name: object) -> _T | None:
        return self[name] if isinstance(name, str) and name in self else None

    def __contains__(self, name: object) -> bool:
        return name in self._files or name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._files, *self._entries]))
