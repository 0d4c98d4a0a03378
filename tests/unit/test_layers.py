"""Imports go down only, in one stated order, and never in a circle; what a login node needs is without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = {"data_prep": (), "trainer": ("data_prep",), "launcher": ("trainer", "data_prep")}
# rooms and single files of a package; each imports itself and what stands to its right
ORDER = {
    "trainer": [
        "__main__", "commands", "page", "tune", "testing", "loop", "evaluation", "export", "engine", "metrics", "run",
        "plan", "objectives", "adapters", "sinks", "modeling", "kernels", "optim", "checkpoint", "families", "anatomy",
        "data", "ranks", "recipe", "keeper",
    ],
    "launcher": [
        "__main__", "cli", "rehearse_command", "rehearsal", "doctor_command", "families_command", "import_command",
        "init_command", "completion_command", "launch_command", "plan_command", "running", "supervision",
        "doctor", "ways", "command", "backends", "run_module", "hosts", "axolotl",
    ],
}  # fmt: skip
HEAVY = {"torch", "deepspeed", "transformers", "datasets", "accelerate", "peft", "bitsandbytes", "tensorboard"}
LIGHT_ROOMS = (
    "keeper",
    "recipe",
    "families",
    "optim",
    "sinks",
    "objectives",
    "plan",
    "tune",
    "commands",
)  # without HEAVY
LIGHT_FILES = (
    "data.order", "data.splits", "data.ledger", "data.vocabulary", "data.packing", "data.samples",
    "modeling.partition", "modeling.chunks", "modeling.penalty",
)  # fmt: skip
OURS = ("zeropipe.", "tests.")
MOST_MODULES = 14


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def dotted(path: Path) -> str:
    """Name of a module without `zeropipe.`: trainer.plan.memory."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, everywhere: bool = True) -> Iterator[tuple[str, int]]:
    """Modules and names of ours that a file imports, without `zeropipe.`, with the line; `everywhere`: also inside
    functions and for type checking.
    """
    package = ("zeropipe", *path.relative_to(ROOT).parent.parts)
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name.removeprefix("zeropipe."), node.lineno) for name in names if name.startswith(OURS))


def wrong_imports(path: Path) -> list[str]:
    """Imports of a package above, or of a room above inside one."""
    top, *inside = path.relative_to(ROOT).with_suffix("").parts
    wrong = []
    for name, line in imports(path):
        other, *rest = name.split(".")
        if other in (*LAYERS, "tests") and other != top and other not in LAYERS[top]:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
        if other != top or top not in ORDER or inside == ["__init__"]:
            continue
        if ORDER[top].index(rest[0]) < ORDER[top].index(inside[0]):
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}, which is above {inside[0]}")
    return wrong


@pytest.mark.parametrize("top", LAYERS)
def test_imports_go_down_only(top):
    assert modules(top)
    assert [wrong for path in modules(top) for wrong in wrong_imports(path)] == []


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("data_prep/x.py", "from ..trainer import plan"),
        ("data_prep/x.py", "from zeropipe.launcher.cli import main"),
        ("data_prep/x.py", "import zeropipe.trainer.plan"),
        ("data_prep/x.py", "from .. import trainer"),
        ("launcher/x.py", "from tests.tiny import tiny_store"),
        ("trainer/families/x.py", "from ..plan.memory import rows"),
        ("trainer/loop.py", "from .commands import train"),
        ("launcher/hosts/x.py", "from ..supervision.session import Session"),
    ],
)
def test_a_wrong_import_is_seen(file, statement, monkeypatch, tmp_path):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(f"def f():\n    {statement}\n")
    assert len(wrong_imports(path)) == 1
    assert ":2 imports" in wrong_imports(path)[0]


def circles() -> list[list[str]]:
    """Modules that import each other, directly or through others, by any import anywhere in them."""
    files = {dotted(path): path for top in (*LAYERS, "tests") for path in modules(top)}
    graph = {name: {_module(other, files) for other, _ in imports(path)} - {name, None} for name, path in files.items()}
    found = []
    for name in graph:
        reached, waiting = set(), list(graph[name])
        while waiting:
            other = waiting.pop()
            if other not in reached:
                reached.add(other)
                waiting += graph[other]
        if name in reached:
            found.append([name, *sorted(other for other in reached if name in graph[other])])
    return found


def _module(name: str, files: dict[str, Path]) -> str | None:
    """The module that an imported name is, or is in."""
    return name if name in files else name.rpartition(".")[0] if name.rpartition(".")[0] in files else None


def test_no_module_imports_itself_through_others():
    assert circles() == []


def test_no_room_is_crowded():
    rooms = {path.parent for top in LAYERS for path in modules(top)}
    counts = {room: len([p for p in room.glob("*.py") if p.name != "__init__.py"]) for room in rooms}
    assert {str(room.relative_to(ROOT)): n for room, n in counts.items() if n > MOST_MODULES} == {}


def test_files_and_functions_stay_short():
    long = []
    for path in (path for top in LAYERS for path in modules(top)):
        text = path.read_text()
        if text.count("\n") > 300:
            long.append(dotted(path))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60:
                long.append(f"{dotted(path)}.{node.name}")
    assert long == []


def test_imports_inside_the_packages_are_relative():
    absolute = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for top in LAYERS
        for path in modules(top)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("zeropipe")
    ]
    assert absolute == []


def test_a_login_node_needs_no_torch():
    """One process imports every light module and looks at what has come with it."""
    rooms = ["data_prep", "launcher", *(f"trainer/{room}" for room in LIGHT_ROOMS)]
    paths = [path for room in rooms for path in modules(room) if path.stem not in ("__init__", "__main__")]
    names = [f"zeropipe.{dotted(path)}" for path in paths] + [f"zeropipe.trainer.{name}" for name in LIGHT_FILES]
    script = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = {HEAVY!r} & set(sys.modules)\n"
        "    if heavy: sys.exit(f'{name} imports {sorted(heavy)}')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
