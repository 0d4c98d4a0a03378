"""MLPs over long sequences: what is inside one, several times as wide as the rest, is held for some tokens only.

The idea is that of tiled computation in Arctic long sequence training (arXiv:2506.13996), with torch's own checkpoints:
a parameter that several of them use still gets its gradient once, whole, so that no ZeRO stage has to be told.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..families.derived import Derived
from ..families.family import Family


def tile_mlps(module: nn.Module, family: Family | Derived | None, tokens: int) -> None:
    """Has every MLP in a model or a block compute `tokens` at a time, and again in the backward pass.

    The sums over tokens in the weights' gradients are then of several sums, and dropout inside draws other numbers.
    """
    assert family is not None and family.mlp is not None, "plans refuse it"
    for path, part in module.named_modules():
        if path == family.mlp or path.endswith(f".{family.mlp}"):
            part.forward = partial(_in_tiles, part.forward, tokens)


def _in_tiles(forward: Callable[[Tensor], Tensor], tokens: int, hidden: Tensor) -> Tensor:
    flat = hidden.flatten(0, -2)
    if len(flat) <= tokens:
        return forward(hidden)
    tiles = [checkpoint(forward, tile, use_reentrant=False) for tile in flat.split(tokens)]
    return torch.cat(tiles).view_as(hidden)  # type: ignore[arg-type]
