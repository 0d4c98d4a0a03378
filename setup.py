"""Maps the top-level folders into one namespace, so that `trainer` and `launcher` collide with nobody else's."""

from pathlib import Path

from setuptools import setup

TOP = ("data_prep", "trainer", "launcher", "ds_configs", "recipes")
ROOMS = sorted(path.parent.as_posix() for top in TOP for path in Path(top).rglob("__init__.py"))

setup(
    packages=[f"zeropipe.{room.replace('/', '.')}" for room in ROOMS],
    package_dir={f"zeropipe.{room.replace('/', '.')}": room for room in ROOMS},
    package_data={
        "zeropipe.ds_configs": ["*.json"],
        "zeropipe.recipes": ["*.yaml", "*.json"],
        "zeropipe.trainer.families": ["tried.json"],
        "zeropipe.trainer.page": ["*.html", "*.css", "*.js", "vendor/*"],
    },
)
