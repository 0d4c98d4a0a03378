"""Small files that people write: YAML with YAML 1.2 numbers, JSON without duplicate keys, shipped files by name."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ...data_prep.errors import UserError, did_you_mean

# YAML 1.1, which PyYAML follows, reads 6e-4 and 10e9 as strings; YAML 1.2 reads them as numbers, and so do we
_FLOAT = re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.\d*)?[eE][-+]?\d+$|^[-+]?\.\d+[eE][-+]?\d+$")
_FLOAT_TAG = "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """Safe YAML, with exponents as numbers and duplicate keys refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is stated twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+0123456789."))


def parse_yaml(text: str, source: str) -> Any:
    """The value that `text` states.

    Raises:
        UserError: not YAML, or a key twice; names `source` and the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{source}, line {mark.line + 1}" if mark else source
        raise UserError(f"{where}: {error.problem or 'not valid YAML'}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML ({error})") from None


def yaml_lines(text: str) -> dict[tuple[str | int, ...], int]:
    """Line number (from 1) of every key path of a YAML text that `parse_yaml` accepts."""
    lines: dict[tuple[str | int, ...], int] = {}

    def walk(node: yaml.Node | None, path: tuple[str | int, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                lines[(*path, key.value)] = key.start_mark.line + 1
                walk(value, (*path, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[(*path, index)] = value.start_mark.line + 1
                walk(value, (*path, index))

    walk(yaml.compose(text, _Loader), ())
    return lines


def parse_json(text: str, source: str) -> Any:
    """The value that a JSON text states.

    Raises:
        UserError: not JSON (names line and column), or a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := [key for key in dict.fromkeys(keys) if keys.count(key) > 1]:
            raise UserError(f"{source}: {', '.join(map(repr, twice))} is stated twice; keep one")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UserError(f"{source}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        UserError: missing, unreadable or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None


def shipped_names(room: str, suffix: str) -> list[str]:
    """Names, without suffix, of the files that come with the package in `room` ("recipes", "ds_configs")."""
    names = (entry.name for entry in resources.files(f"zeropipe.{room}").iterdir())
    return sorted(name.removesuffix(suffix) for name in names if name.endswith(suffix))


def read_named(path_or_name: str, room: str, suffix: str) -> tuple[str, str]:
    """Text and display name of a file, or of a shipped file given by its bare name.

    Raises:
        UserError: there is neither; names the closest shipped file.
    """
    path = Path(path_or_name)
    if path.is_file():
        return read_text(path), path_or_name
    names = shipped_names(room, suffix)
    bare = path_or_name.removesuffix(suffix)
    if path.name == path_or_name and bare in names:
        entry = resources.files(f"zeropipe.{room}") / (bare + suffix)
        return entry.read_text(encoding="utf-8"), bare + suffix
    problem = "is a directory" if path.is_dir() else "no such file"
    hint = did_you_mean(path.name.removesuffix(suffix), names)
    raise UserError(f"{path_or_name}: {problem}{hint}; shipped {room}: {', '.join(names)}")


def words(text: str) -> frozenset[str]:
    """The words of a text, for long lists of names."""
    return frozenset(text.split())


def dotted(path: Sequence[str | int]) -> str:
    """A key path as people write it: data.train.0.store."""
    return ".".join(str(part) for part in path)
