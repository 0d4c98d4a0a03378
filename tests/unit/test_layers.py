"""Imports go down only: launcher → trainer → data_prep; and what a login node needs never imports torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = {"data_prep": (), "trainer": ("data_prep",), "launcher": ("trainer", "data_prep")}
HEAVY = {"torch", "deepspeed", "transformers", "datasets", "accelerate", "peft", "bitsandbytes", "tensorboard"}

# modules beyond data_prep and launcher that must be importable without any of HEAVY
LIGHT_TRAINER = [
    "config", "ds_config", "plan", "order", "cli", "schedule", "splits", "layout", "memory", "legality", "exit_notes",
    "models.parameters",
]  # fmt: skip


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported_rooms(path: Path) -> set[tuple[str, int]]:
    """Rooms of ours that a file imports anywhere in it, with the line."""
    found = set()
    package = ("zeropipe", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "zeropipe" and len(parts) > 1 and parts[1] in LAYERS:
                found.add((parts[1], node.lineno))
    return found


def wrong_imports(path: Path) -> list[str]:
    room = path.relative_to(ROOT).parts[0]
    return [
        f"{path.relative_to(ROOT)}:{line} imports {other}"
        for other, line in sorted(imported_rooms(path))
        if other != room and other not in LAYERS[room]
    ]


@pytest.mark.parametrize("room", LAYERS)
def test_imports_go_down_only(room):
    assert modules(room)
    assert [wrong for path in modules(room) for wrong in wrong_imports(path)] == []


@pytest.mark.parametrize(
    "statement",
    [
        "from ..trainer import plan",
        "from zeropipe.launcher.cli import main",
        "import zeropipe.trainer.plan",
        "from .. import trainer",
    ],
)
def test_a_wrong_import_is_seen(statement, monkeypatch, tmp_path):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "data_prep").mkdir()
    path = tmp_path / "data_prep" / "x.py"
    path.write_text(f"def f():\n    {statement}\n")
    assert len(wrong_imports(path)) == 1
    assert ":2 imports" in wrong_imports(path)[0]


def test_imports_inside_the_packages_are_relative():
    absolute = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for room in LAYERS
        for path in modules(room)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("zeropipe")
    ]
    assert absolute == []


def test_a_login_node_needs_no_torch():
    """One process imports every light module and looks at what has come with it."""
    names = [
        "zeropipe." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for room in ("data_prep", "launcher")
        for path in modules(room)
        if path.stem not in ("__init__", "__main__")
    ]
    names += [
        f"zeropipe.trainer.{name}"
        for name in LIGHT_TRAINER
        if (ROOT / "trainer" / f"{name.replace('.', '/')}.py").exists()
    ]
    script = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = {HEAVY!r} & set(sys.modules)\n"
        "    if heavy: sys.exit(f'{name} imports {sorted(heavy)}')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
