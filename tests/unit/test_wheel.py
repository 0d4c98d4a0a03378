"""The wheel: the namespace mapping of setup.py puts everything under `zeropipe`, the data files included."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("launcher", "trainer", "ds_configs", "data_prep", "recipes")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that no build folder is left in the tree, with what is installed here: no network."""
    source = tmp_path_factory.mktemp("source")
    for room in ("zeropipe", *SOURCES):
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    (source / "tests").mkdir()
    (source / "tests" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"],
        cwd=source, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (source / "dist").glob("*.whl")
    return path


def test_it_holds_zeropipe_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"zeropipe", wheel.name.split("-py3")[0] + ".dist-info"}


def test_it_holds_every_source_and_data_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"zeropipe/{path.relative_to(ROOT)}"
        for room in SOURCES
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected.add("zeropipe/__init__.py")
    assert len(expected) > 20
    assert {name for name in names if name.startswith("zeropipe/")} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_runs_from_where_it_is_installed(wheel, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(tmp_path), str(wheel)], check=True, timeout=120)
    script = tmp_path / "bin" / "zeropipe"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for command in ([str(script)], [sys.executable, "-m", "zeropipe.launcher"]):
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "VERB" in done.stdout
    where = subprocess.run(
        [sys.executable, "-c", "import zeropipe.launcher.cli as cli; print(cli.__file__)"],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert where.stdout.startswith(str(tmp_path)), where.stdout + where.stderr
