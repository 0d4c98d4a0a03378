"""Expert parallelism: the ranks of an expert group share the experts of each layer, and their tokens travel.

A rank sorts its (token, choice) pairs by the expert chosen, sends each pair's token and weight to the rank that holds
the expert, and gets back what the family's own module of experts makes of it there: the choice and the weights are the
family's router's, the arithmetic is the family's experts'. No token is dropped, and none is padded to a capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import Tensor, nn

from ...families.derived import Derived, starred
from ...ranks.ranks import Ranks


def share_experts(model: nn.Module, family: Derived, ranks: Ranks) -> None:
    """Makes the experts of `model`, whose stacks hold this rank's part already, compute for their expert group."""
    for path, module in list(model.named_modules()):
        if starred(path) in family.experts:
            model.set_submodule(path, SharedExperts(module, ranks))


class SharedExperts(AutoEPMoELayer):
    """In the place of a layer's experts, of which this rank holds some.

    It is one of DeepSpeed's layers in name alone: its engine counts expert groups apart where it finds such a layer,
    and stage 3 takes experts from no other.
    """

    def __init__(self, experts: nn.Module, ranks: Ranks) -> None:
        nn.Module.__init__(self)
        self.experts, self._group, self._size = experts, ranks.expert_group, ranks.expert_size
        self.num_experts: int = experts.num_experts  # type: ignore[assignment]  # of the layer
        experts.num_experts = self.num_experts // self._size  # type: ignore[assignment]

    def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
        """DeepSpeed's layers make their groups here; these have theirs."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, hidden], [tokens, chosen] twice → [tokens, hidden]. Collective over the expert group."""
        local, chosen = self.num_experts // self._size, top_k_index.shape[-1]
        experts, order = top_k_index.flatten().sort(stable=True)
        sent = torch.bincount(experts // local, minlength=self._size)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._group)
        there, here = sent.tolist(), received.tolist()
        tokens = self._exchange(hidden_states[order // chosen], there, here)
        weights = self._exchange(top_k_weights.flatten()[order], there, here)
        with torch.no_grad():
            own = self._exchange(experts % local, there, here)
        # one row more, of weight 0: a rank whose experts got no token has a gradient for them, too
        tokens, weights = (torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in (tokens, weights))
        made = self.experts(tokens, torch.cat([own, own.new_zeros(1)])[:, None], weights[:, None])[:-1]
        back = self._exchange(made, here, there)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        return back[place].view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)

    def _exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        return _Exchange.apply(rows, sent, received, self._group)  # type: ignore[return-value]


class _Exchange(torch.autograd.Function):
    """Rows, in the order of the ranks that they go to, for rows in the order of those they come from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: Sequence[int], received: Sequence[int], group: Any) -> Tensor:
        ctx.how = sent, received, group
        return _exchanged(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received, group = ctx.how
        return _exchanged(gradients[0], received, sent, group), None, None, None


def _exchanged(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: Any) -> Tensor:
    found = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(found, rows.contiguous(), list(received), list(sent), group=group)
    return found
