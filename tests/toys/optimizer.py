"""An optimizer from outside: SGD with momentum, one moment a parameter. Importing this file registers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zeropipe.trainer.optim.base import Group, Optimizer, decayed, every
from zeropipe.trainer.optim.registry import OPTIMIZERS


def build(groups: Sequence[dict[str, Any]], params: Mapping[str, Any]) -> Any:
    import torch

    return torch.optim.SGD(groups, lr=params["lr"], momentum=params["momentum"], weight_decay=params["weight_decay"])


TOY_MOMENTUM = OPTIMIZERS.register(
    "toy_momentum",
    Optimizer(
        types=("ToyMomentum",),
        states=("momentum_buffer",),
        keys=("lr", "weight_decay"),
        options=frozenset({"momentum"}),
        groups=(Group(decayed), Group(every, {"weight_decay": 0.0})),
        build=build,
    ),
)
