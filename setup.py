"""Maps the top-level folders into one namespace, so that `trainer` and `launcher` collide with nobody else's."""

from setuptools import setup

ROOMS = ("data_prep", "trainer", "trainer.models", "launcher", "ds_configs", "recipes")

setup(
    packages=[f"zeropipe.{room}" for room in ROOMS],
    package_dir={f"zeropipe.{room}": room.replace(".", "/") for room in ROOMS},
    package_data={
        "zeropipe.ds_configs": ["*.json"],
        "zeropipe.recipes": ["*.yaml", "*.json"],
        "zeropipe.trainer": ["*.json"],
    },
)
