"""What the routers of a mixture of experts do in training: where tokens go, and what is added to the loss for it.

All is summed over tokens, sequences and layers, so that no split of a batch changes it:

- The auxiliary loss is that of each sequence by itself (DeepSeek-V3, arXiv:2412.19437, 2.1.2): the sum over experts of
  f P, where f is the share of the sequence's tokens that went to an expert, times experts / experts of a token, and P
  the mean of its scores, which sum to 1 for each token. A sequence counts by its tokens. It is 1 where all is balanced.
- The z-loss is the square of the logarithm of the sum of the exponentials of a token's logits (ST-MoE,
  arXiv:2202.08906, 2.2).

Tokens whose places carry no label (padding, masked) count in neither, nor in the load.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...anatomy.buffers import kept_buffers
from ...anatomy.routing import Routing
from ...data.labels import IGNORE
from ...ranks.ranks import Ranks
from ...recipe.router import Router


class Routers:
    """The routers of a model, listened to while it computes a training loss.

    Args:
        model: whose routers these are; it keeps the hooks.
        weights: of what is added to the loss.
    """

    def __init__(self, model: nn.Module, routing: Routing, weights: Router, ranks: Ranks) -> None:
        self.routing, self.weights, self._ranks, self._model = routing, weights, ranks, model
        self._listening = False
        self._said: list[tuple[int, Tensor, Tensor]] = []  # by routers in one forward pass: number, logits, choice
        self._loss = torch.zeros((), device=ranks.device)
        self._clear()
        for number, path in enumerate(routing.paths):
            model.get_submodule(path).register_forward_hook(partial(self._hear, number))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """What the routers say inside is kept until `weigh`: a block that is computed again says it a second time."""
        self._listening, self._said = True, []
        try:
            yield
        finally:
            self._listening = False

    def weigh(self, labels: Tensor) -> None:
        """Counts what the routers have said of these tokens, [batch, time]; `loss` is what to add to the loss sum."""
        said, self._said, self._loss = self._said, [], torch.zeros((), device=self._ranks.device)
        kept = (labels != IGNORE).to(said[0][1].device, torch.float32)
        counts = torch.stack([self._counted(choice.view(*kept.shape, -1), kept) for _, _, choice in said])
        of_sequences, tokens = counts, kept.sum(1)
        if self._ranks.sequence_size > 1:  # of whole sequences; this rank's tokens add their part to the loss
            of_sequences, tokens = self._over_sequence(counts, tokens)
        for (number, logits, _), own, there in zip(said, counts, of_sequences, strict=True):
            self._loads[number] += own.sum(0).double()
            self._lose(logits.view(*kept.shape, -1).float(), kept, there, tokens)

    def take(self) -> Tensor:
        """This rank's sums since the last call: unweighted losses, then tokens by router and expert, in float64."""
        sums = torch.cat([torch.stack(self._sums), self._loads.flatten()])
        self._clear()
        return sums * (self._ranks.tensor == 0)  # tensor ranks have counted the same

    @property
    def loss(self) -> Tensor:
        """What the last `weigh` adds to the loss sum: of this rank's tokens."""
        return self._loss

    def cost(self, sums: Sequence[float]) -> float:
        """What sums of `take`, over all ranks, have added to the loss sum."""
        balance, square, *_ = sums
        return self.weights.aux_loss * balance + self.weights.z_loss * square

    @torch.no_grad()
    def shift(self, loads: Tensor) -> None:
        """Moves the bias of every expert towards the mean load (DeepSeek-V3, 2.1.2), by `bias_update`.

        Args:
            loads: [routers, experts], of the global batch.
        """
        buffers = dict(kept_buffers(self._model))
        for name, load in zip(self.routing.biases, loads, strict=True):
            bias = buffers[name]
            bias += self.weights.bias_update * (load.mean() - load).sign().to(bias).view_as(bias)

    def _clear(self) -> None:
        zero = torch.zeros((), dtype=torch.float64, device=self._ranks.device)
        self._sums = [zero, zero]
        self._loads = zero.new_zeros(len(self.routing.paths), self.routing.experts)

    def _hear(self, number: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if self._listening:
            logits = output[self.routing.logits]
            weighed = self.weights.aux_loss or self.weights.z_loss
            self._said.append((number, logits if weighed else logits.detach(), output[self.routing.choice]))

    def _counted(self, choice: Tensor, kept: Tensor) -> Tensor:
        """Tokens of each sequence that went to each expert, [batch, experts]."""
        counts = kept.new_zeros(len(kept), self.routing.experts)
        return counts.scatter_add_(1, choice.flatten(1), kept[..., None].expand(choice.shape).flatten(1))

    def _over_sequence(self, counts: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([counts.flatten(), tokens])
        dist.all_reduce(both, group=self._ranks.sequence_group)
        return both[: counts.numel()].view_as(counts), both[counts.numel() :]

    def _lose(self, logits: Tensor, kept: Tensor, counts: Tensor, tokens: Tensor) -> None:
        """Adds what one router's logits, [batch, time, experts], cost."""
        scores = logits.softmax(-1) if self.routing.scores == "softmax" else logits.sigmoid()
        shares = scores / scores.sum(-1, keepdim=True)
        means = torch.einsum("bt,bte->be", kept, shares) / tokens.clamp(min=1)[:, None]
        balance = (counts * means).sum() * (self.routing.experts / self.routing.chosen)
        square = (logits.logsumexp(-1).square() * kept).sum()
        self._loss = self._loss + self.weights.aux_loss * balance + self.weights.z_loss * square
        self._sums = [was + new.detach().double() for was, new in zip(self._sums, (balance, square), strict=True)]


def told(sums: Sequence[float], routing: Routing, weight: float) -> dict[str, Any]:
    """What a step's record says of the routers.

    Args:
        sums: as `Routers.take`, over all ranks.
        weight: of the global batch: its tokens.
    """
    balance, square, *loads = sums
    layers, width = len(routing.paths), routing.experts
    by_layer = [loads[layer * width : (layer + 1) * width] for layer in range(layers)]
    tokens = [sum(layer) or 1.0 for layer in by_layer]
    shares = [[load / total for load in layer] for layer, total in zip(by_layer, tokens, strict=True)]
    entropies = [-sum(share * math.log(share) for share in layer if share) / math.log(width) for layer in shares]
    return {
        "router/aux_loss": balance / weight / layers,
        "router/z_loss": square / weight / layers,
        "router/load_entropy": sum(entropies) / layers,
        "router/load_max": sum(max(layer) * width for layer in shares) / layers,
        "router/unused": sum(load == 0 for load in loads),
        "router/load": shares,
    }
