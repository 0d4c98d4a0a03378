"""Dropout whose masks a CPU draws quickly, and draws again in the backward pass instead of keeping them.

torch draws them one number after another, which takes as long there as the matrix products around them. On other
devices dropout is torch's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compiled import uncompiled

_SEEDS = 1 << 62
_STEPS = 1 << 16  # a mask takes 16 random bits a number


@dataclass(frozen=True)
class Masks:
    """Which numbers dropout zeroes: those of one seed, the same whenever they are asked for.

    The share is `p`, rounded to 1/65,536; `scale` is what the numbers that stay are multiplied with.
    """

    p: float
    seed: int

    @classmethod
    def drawn(cls, p: float) -> Masks:
        """With a seed from torch's generator, so that they follow from it as torch's own do."""
        return cls(p, int(torch.randint(_SEEDS, ())))

    @property
    def scale(self) -> float:
        """What the numbers that stay are multiplied with, so that their mean stays."""
        return _STEPS / (_STEPS - self._zeroed)

    def zeroed(self, shape: tuple[int, ...], part: int = 0) -> Tensor:
        """Bool, true where a number becomes zero; `part` tells apart several tensors of one dropout."""
        count = math.prod(shape)
        bits = np.random.SFC64([self.seed, part]).random_raw(-(-count // 4)).view(np.int16)
        return torch.from_numpy(bits[:count]).view(shape) < self._zeroed - _STEPS // 2

    @property
    def _zeroed(self) -> int:
        return min(round(self.p * _STEPS), _STEPS - 1)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, masks: Masks) -> Tensor:
        ctx.masks = masks
        return (x * masks.scale).masked_fill_(masks.zeroed(x.shape), 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return (gradients[0] * ctx.masks.scale).masked_fill_(ctx.masks.zeroed(gradients[0].shape), 0), None


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """As `torch.nn.functional.dropout`."""
    return _dropout(x, p) if training and 0 < p < 1 and x.device.type == "cpu" else F.dropout(x, p, training)


@uncompiled
def _dropout(x: Tensor, p: float) -> Tensor:
    return _Dropout.apply(x, Masks.drawn(p))  # type: ignore[return-value]


class Dropout(nn.Dropout):
    """As torch's."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training)
