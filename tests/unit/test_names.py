"""No public name is defined in two modules, so that a name says which thing is meant; tests' helpers included."""

import ast
from collections import defaultdict
from pathlib import Path

from tests.unit.test_layers import LAYERS, dotted, imports, modules

ALLOWED = {"register", "run", "main"}  # the protocol of a verb


def public_names(path: Path) -> set[str]:
    """What a module defines at its top level without a leading underscore; imports are none."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def defined_twice() -> dict[str, list[str]]:
    where = defaultdict(list)
    for path in (path for top in LAYERS for path in modules(top)):
        for name in public_names(path) - ALLOWED:
            where[name].append(dotted(path))
    return {name: places for name, places in where.items() if len(places) > 1}


def test_no_public_name_is_defined_twice():
    assert defined_twice() == {}


def helpers_defined_twice() -> dict[str, list[str]]:
    """Functions and classes that tests import by name from a helper and that the product or another helper has, too."""
    helpers = [path for path in modules("tests") if not path.name.startswith("test_")]
    where = defaultdict(list)
    for path in [*(path for top in LAYERS for path in modules(top)), *helpers]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                where[node.name].append(dotted(path))
    taken = {tuple(name.rpartition(".")[::2]) for path in modules("tests") for name, _ in imports(path)}
    known = {dotted(path) for path in helpers}
    return {name: where[name] for module, name in taken if module in known and len(where[name]) > 1}


def test_no_helper_of_tests_has_the_name_of_something_else():
    assert helpers_defined_twice() == {}


def test_every_kind_of_definition_is_seen(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("from y import z\nA = b = 1\nC: int = 2\n(D, _e) = 3, 4\ndef f(): g = 1\nclass H: i = 1\n_J = 1\n")
    assert public_names(file) == {"A", "b", "C", "D", "f", "H"}
