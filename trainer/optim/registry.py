"""The optimizers, by name; a DeepSpeed JSON names one in optimizer.type."""

from __future__ import annotations

from ..recipe.registry import Registry
from .base import Optimizer

OPTIMIZERS: Registry[Optimizer] = Registry("optimizer", __package__, {"adamw": "adamw:ADAMW", "muon": "muon:MUON"})


def optimizer_of(spelling: object) -> Optimizer | None:
    """The optimizer that answers to an optimizer.type, or None."""
    wanted = str(spelling).lower()
    return next((entry for entry in map(OPTIMIZERS.__getitem__, OPTIMIZERS) if wanted in _types(entry)), None)


def optimizer_types() -> list[str]:
    """Every optimizer.type that there is."""
    return [spelling for name in OPTIMIZERS for spelling in OPTIMIZERS[name].types]


def _types(optimizer: Optimizer) -> list[str]:
    return [spelling.lower() for spelling in optimizer.types]
