"""What transformers declares of a family, read from its source: importing it would import torch. Where transformers is
not installed, or is written in a way that is not understood here, nothing is said.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def model_folders() -> list[str]:
    """Names of the folders of transformers' families, some of which hold several; empty if it is not installed."""
    root = _root()
    return [] if root is None else sorted(entry.name for entry in (root / "models").iterdir() if entry.is_dir())


def folders_for(model_type: str) -> list[str]:
    """The folders that can hold a family of this name, the likeliest first."""
    name = model_type.replace("-", "_")
    return sorted((folder for folder in model_folders() if name.startswith(folder)), key=len, reverse=True)


def declared_keys(model_type: str) -> frozenset[str] | None:
    """Keys that the configuration class of a family takes by name, its base classes' included; None: cannot be told."""
    found = _configuration(model_type)
    return None if found is None else _keys(*found)


def declared_default(model_type: str, key: str) -> Any:
    """What the configuration class of a family sets a key to where nobody does; None also where that cannot be told."""
    where = _configuration(model_type)
    while where is not None:
        file, node = where
        if (found := _value_of(node, key)) is not None:
            return found
        bases = (_definition(file, base.id) for base in node.bases if isinstance(base, ast.Name))
        where = next((base for base in bases if base is not None), None)
    return None


def declared_parts(model_type: str) -> list[str]:
    """Keys under which a configuration holds those of whole models: of texts, of images; empty for a plain one."""
    found = _configuration(model_type)
    for statement in [] if found is None else found[1].body:
        match statement:
            case ast.Assign(targets=[ast.Name("sub_configs_defaults" | "sub_configs")], value=ast.Dict(keys=keys)):
                names = [str(key.value) for key in keys if isinstance(key, ast.Constant)]
                return [name for name in names if name not in ("attn_config", "ffn_config")]  # of every block
    return []


@lru_cache(maxsize=64)
def _configuration(model_type: str) -> tuple[Path, ast.ClassDef] | None:
    """File and class of a family's configuration."""
    root = _root()
    folders = [] if root is None else [root / "models" / folder for folder in folders_for(model_type)]
    for file in (file for folder in folders for file in sorted(folder.glob("configuration_*.py"))):
        for node in _classes(file).values():
            if _value_of(node, "model_type") == model_type:
                return file, node
    return None


def _root() -> Path | None:
    found = find_spec("transformers")
    return Path(found.origin).parent if found is not None and found.origin is not None else None


@lru_cache(maxsize=64)
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _classes(file: Path) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in _tree(file).body if isinstance(node, ast.ClassDef)}


def _keys(file: Path, node: ast.ClassDef) -> frozenset[str] | None:
    keys = set(_own_keys(node))
    for base in node.bases:
        where = _definition(file, base.id) if isinstance(base, ast.Name) else None
        inherited = None if where is None else _keys(*where)
        if inherited is not None:
            keys |= inherited
        elif node.name != "PreTrainedConfig":  # whose mix-ins declare no keys
            return None
    return frozenset(keys)


@lru_cache(maxsize=256)
def _definition(file: Path, name: str) -> tuple[Path, ast.ClassDef] | None:
    """File and class of a name that is defined in `file` or imported there from another file of transformers."""
    if name in (classes := _classes(file)):
        return file, classes[name]
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.ImportFrom) and node.level and name in [alias.name for alias in node.names]:
            folder = file.parents[node.level - 1]
            other = folder.joinpath(*(node.module or "").split(".")).with_suffix(".py")
            if other.is_file() and name in (classes := _classes(other)):
                return other, classes[name]
    return None


def _own_keys(node: ast.ClassDef) -> Iterator[str]:
    """Fields, attributes and aliases of a class, and what its methods set or take out of keyword arguments."""
    for alias, own in (_value_of(node, "attribute_map") or {}).items():
        yield from (alias, own)
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id
        elif isinstance(statement, ast.Assign):
            yield from (target.id for target in statement.targets if isinstance(target, ast.Name))
        elif isinstance(statement, ast.FunctionDef):
            yield statement.name  # properties
            yield from (argument.arg for argument in (*statement.args.args, *statement.args.kwonlyargs))
            yield from _taken(statement)


def _taken(function: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        match node:
            case ast.Call(func=ast.Attribute(attr="pop" | "get" | "setdefault"), args=[ast.Constant(str(key)), *_]):
                yield key
            case ast.Attribute(value=ast.Name("self"), attr=key, ctx=ast.Store()):
                yield key


def _value_of(node: ast.ClassDef, name: str) -> Any:
    """Literal value of an attribute of a class; None where there is none or it is computed."""
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            try:
                return ast.literal_eval(statement.value)  # type: ignore[attr-defined]
            except (ValueError, AttributeError):
                return None
    return None
