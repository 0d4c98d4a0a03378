"""The metric sinks that a recipe may name under `log.sinks`."""

from __future__ import annotations

from collections.abc import Callable

from ..recipe.registry import Registry
from .base import Sink, SinkSettings

ALWAYS = ("jsonl", "console")  # of every run
SINKS: Registry[Callable[[SinkSettings], Sink]] = Registry(
    "metric sink",
    __package__,
    {"jsonl": "jsonl:JsonLines", "console": "console:Console", "tensorboard": "tensorboard:TensorBoard"},
)
