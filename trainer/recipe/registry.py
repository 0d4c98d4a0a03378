"""Registries: what a name in a recipe or a DeepSpeed JSON stands for. Each kind of extension has one, in its room."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Generic, TypeVar

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
        self.require(name)
        if name not in self._entries:
            file, attribute = self._files[name].split(":")
            self._entries[name] = getattr(import_module(f".{file}", self._package), attribute)
        return self._entries[name]

    def require(self, name: str, *others: str) -> None:
        """Raises UserError, with the nearest name, where there is none such; imports no entry.

        Args:
            others: names that mean something without being entries.
        """
        if name not in self and name not in others:
            known = [*others, *self]
            raise UserError(f"no {self.kind} {name!r}{did_you_mean(name, known)}; there is {', '.join(known)}")

    def get(self, name: object) -> _T | None:
        return self[name] if isinstance(name, str) and name in self else None

    def __contains__(self, name: object) -> bool:
        return name in self._files or name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._files, *self._entries]))
