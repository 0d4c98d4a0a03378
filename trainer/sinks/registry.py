"""The metric sinks that a recipe may name under `log.sinks`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec

from ...data_prep.errors import UserError, did_you_mean
from ..recipe.registry import Registry
from .base import Sink, SinkSettings

ALWAYS = ("jsonl", "console")  # of every run
SINKS: Registry[Callable[[SinkSettings], Sink]] = Registry(
    "metric sink",
    __package__,
    {
        "jsonl": "jsonl:JsonLines",
        "console": "console:Console",
        "tensorboard": "tensorboard:TensorBoard",
        "wandb": "wandb:Wandb",
        "mlflow": "mlflow:Mlflow",
        "trackio": "trackio:Trackio",
    },
)
_PACKAGES = {"wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic"), "trackio": ("trackio",)}


def check_sink(name: str) -> None:
    """Refuses a sink that a recipe names and that nobody has, or whose packages are not installed here.

    Raises:
        UserError: with the nearest name, or what to install.
    """
    if name not in SINKS:
        raise UserError(f"log.sinks: no metric sink {name!r}{did_you_mean(name, SINKS)}; there are {', '.join(SINKS)}")
    if missing := [package for package in _PACKAGES.get(name, ()) if find_spec(package) is None]:
        raise UserError(
            f"log.sinks: {name} needs {', '.join(missing)}, which {sys.executable} has not: "
            f"pip install 'zeropipe[{name}]'"
        )
