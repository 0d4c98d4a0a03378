"""Muon in plain torch, as Jordan (2024) describes it: momentum, Nesterov, five steps of Newton-Schulz, all in fp64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def orthogonalised(matrix: Tensor) -> Tensor:
    """Newton-Schulz, the quintic iteration; of the transpose where that has fewer rows."""
    x = matrix.double() / (matrix.double().norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class PlainMuon(torch.optim.Optimizer):
    """For whole matrices in one process."""

    def __init__(self, params: Any, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                buffer = state.setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad, alpha=1 - group["momentum"])
                update = (1 - group["momentum"]) * p.grad + group["momentum"] * buffer
                scale = math.sqrt(max(1.0, p.shape[0] / p.shape[1]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_((group["lr"] * scale * orthogonalised(update)).to(p.dtype))


class Both:
    """Two optimizers that step as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def hidden(name: str, parameter: nn.Parameter) -> bool:
    """A matrix of the blocks, told by Hugging Face's names."""
    return parameter.ndim == 2 and (".h." in name or ".layers." in name)
