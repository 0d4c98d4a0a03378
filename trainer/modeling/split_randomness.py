"""Random numbers of activations that are split over tensor-parallel ranks.

Replicated activations must drop the same elements on every tensor rank, so those ranks share their generators' state.
Attention probabilities belong to the rank's own heads, and the same mask on every rank would correlate the heads:
inside the attention core the generators are seeded anew, by a number drawn from the shared state and the rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.compiled import uncompiled
from ..ranks.ranks import Ranks, accelerator

SEEDS = 1 << 62


class SplitRandomness:
    """Gives a module random numbers of the rank's own between two of its children.

    Nothing is kept from step to step: the seed comes from the shared generator, so that activation checkpointing,
    which restores that one, draws the same masks again.
    """

    def __init__(self, module: nn.Module, ranks: Ranks):
        self.module, self.rank = module, ranks.tensor
        self.shared: tuple[Tensor, Tensor | None] | None = None

    def between(self, first: nn.Module, last: nn.Module) -> None:
        """From the output of `first` to the input of `last`, while the module trains; of several, the earliest."""
        first.register_forward_hook(lambda _module, _inputs, _output: self.enter())
        last.register_forward_pre_hook(lambda _module, _inputs: self.leave())

    @uncompiled
    def enter(self) -> None:
        if not self.module.training or self.shared is not None:
            return
        seed = int(torch.randint(SEEDS, ()))  # advances the shared generator alike on every rank
        device = accelerator()
        self.shared = torch.get_rng_state(), device.get_rng_state() if device.device_name() != "cpu" else None
        torch.manual_seed(seed + self.rank)

    @uncompiled
    def leave(self) -> None:
        if self.shared is None:
            return
        host, device = self.shared
        self.shared = None
        torch.set_rng_state(host)
        if device is not None:
            accelerator().set_rng_state(device)
