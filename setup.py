"""Maps the top-level folders into `zeropipe`, so that `trainer` and `launcher` collide with nobody else's."""

from pathlib import Path

from setuptools import setup

TOP = ("data_prep", "trainer", "launcher", "ds_configs", "recipes")
ROOMS = sorted(path.parent.as_posix() for top in TOP for path in Path(top).rglob("__init__.py"))

setup(
    packages=["zeropipe", *(f"zeropipe.{room.replace('/', '.')}" for room in ROOMS)],
    package_dir={"zeropipe": "zeropipe"} | {f"zeropipe.{room.replace('/', '.')}": room for room in ROOMS},
    package_data={
        "zeropipe.ds_configs": ["*.json"],
        "zeropipe.recipes": ["*.yaml", "*.json"],
        "zeropipe.trainer.families": ["tried.json"],
        "zeropipe.trainer.page": ["*.html", "*.css", "*.js", "vendor/*"],
    },
)
