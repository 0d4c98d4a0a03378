"""An optimizer of one file, with one moment: gradient descent with momentum, built by torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zeropipe.trainer.optim.base import Group, Optimizer, decayed, every
from zeropipe.trainer.optim.registry import OPTIMIZERS


def _build(groups: Sequence[dict[str, Any]], params: Mapping[str, Any]) -> Any:
    import torch

    return torch.optim.SGD(groups, **params)


MOMENTUM = OPTIMIZERS.register(
    "momentum",
    Optimizer(
        types=("ToyMomentum",),
        states=("momentum_buffer",),
        keys=("lr", "weight_decay"),
        options=frozenset({"momentum"}),
        groups=(Group(decayed), Group(every, {"weight_decay": 0.0})),
        build=_build,
    ),
)
