"""`section.key=value` on the command line, in place of what a file says."""

from __future__ import annotations

from typing import Any

from ...data_prep.errors import UserError
from .text_files import dotted, parse_yaml


def apply_override(
    values: dict[str, Any], override: str, lines: dict[tuple[str | int, ...], int], whole: str = "the recipe"
) -> dict[tuple[str | int, ...], int]:
    """Sets one key in place; makes the sections on the way where there are none.

    Args:
        values: a recipe or a DeepSpeed JSON as read.
        override: section.key=value, the value in YAML; a number is the place in a list.
        lines: of the recipe's file, by key path.
        whole: what `values` are, in words.

    Returns:
        `lines` without those that no longer speak of what is set.

    Raises:
        UserError: not of that form, or the path leads nowhere.
    """
    key, equals, text = override.partition("=")
    path: list[str | int] = [int(part) if part.isdigit() else part for part in key.strip().split(".")]
    if not equals or not all(path[0:1]) or "" in path:
        raise UserError(f"{override!r}: overrides are written section.key=value, such as optimizer.lr=3e-4")
    place: Any = values
    for depth, part in enumerate(path):
        _check_step(place, part, dotted(path[:depth]) or whole, override)
        if depth == len(path) - 1:
            place[part] = parse_yaml(text, f"override {override!r}")
        elif isinstance(place, dict):
            place = place.setdefault(part, {})
        else:
            place = place[part]
    return {known: line for known, line in lines.items() if list(known[: len(path)]) != path}


def _check_step(place: Any, part: str | int, above: str, override: str) -> None:
    if isinstance(place, dict) and isinstance(part, str):
        return
    if isinstance(place, list) and isinstance(part, int) and part < len(place):
        return
    what = f"a list of {len(place)}" if isinstance(place, list) else "a plain value"
    if isinstance(place, dict):
        what = "a mapping, and takes names"
    raise UserError(f"override {override!r}: {above} is {what}; there is no {part!r} in it")
