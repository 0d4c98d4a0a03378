"""Sequence parallelism: each rank holds a stretch of every sequence; attention exchanges it for some of the heads.

The exchange is DeepSpeed's Ulysses (arXiv:2309.14509) around Hugging Face's own attention. Unlike DeepSpeed's wrapper
for Hugging Face, this one keeps document masks, takes any batch size, knows GPT-2, and leaves gradients to the engine:
every rank's loss sum is divided by the tokens of the whole batch, so that summing gradients over all ranks is right on
every ZeRO stage.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..anatomy.outline import Outline, masks_of
from ..families.derived import Derived
from ..kernels.compiled import uncompiled
from ..ranks.ranks import Ranks
from .attention import attention_by_text, text_lengths

_NAME = "zeropipe_ulysses"  # of the attention, in Hugging Face's registry
SEQUENCE, HEADS = 1, 2  # dimensions of [batch, time, heads, head size]


class _Gather(torch.autograd.Function):
    """The stretches of all sequence ranks, [batch, time, …]; its gradient is this rank's stretch of the gradient.

    Every rank goes on to compute the same from the whole, so that the sum over ranks counts each gradient once.
    """

    @staticmethod
    def forward(ctx: Any, mine: Tensor, ranks: Ranks) -> Tensor:
        ctx.rank, ctx.size = ranks.sequence, ranks.sequence_size
        pieces = [torch.empty_like(mine) for _ in range(ctx.size)]
        dist.all_gather(pieces, mine.contiguous(), group=ranks.sequence_group)
        return torch.cat(pieces, SEQUENCE)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].chunk(ctx.size, SEQUENCE)[ctx.rank].contiguous(), None


class SequenceParallel(nn.Module):
    """A causal LM on whole sequences, of which this rank computes its stretch.

    Args:
        causal: a `CausalLM`.
    """

    def __init__(self, causal: nn.Module, ranks: Ranks) -> None:
        super().__init__()
        assert ranks.sequence_group is not None
        self.causal: Any = causal
        self.ranks: Any = ranks
        self.mask: Tensor | None = None
        self.masks: list[Tensor | None] | None = None  # of every block, where they are transformers' own
        self._config = self.causal.model.config.get_text_config()
        self._own: str = self._config._attn_implementation
        family = self.causal.family
        self._outline: Any = None
        if family is not None and not family.by_text:
            self._outline = [Outline(self.causal.model, family.blocks, family.embedding, family.norm)]  # no child
        self._config._attn_implementation = _NAME
        exchange = DistributedAttention(_local_attention, ranks.sequence_group, HEADS, SEQUENCE)  # type: ignore[arg-type]
        for module in causal.modules():
            # what transformers' attention interface asks of a module, in any family
            if hasattr(module, "is_causal") and (hasattr(module, "head_dim") or hasattr(module, "layer_idx")):
                _convert(module, exchange, self, ranks, self._own)

    def _masks(self, positions: Tensor) -> list[Tensor | None]:
        """Every block's mask of whole sequences, as transformers makes it for the attention that is local here."""
        self._config._attn_implementation = self._own
        try:
            width = self.causal.model.get_input_embeddings().embedding_dim
            hidden = torch.zeros(*positions.shape, width, device=self.ranks.device)
            with torch.no_grad():
                return masks_of(self._outline[0].run(hidden, positions.to(hidden.device))[0])
        finally:
            self._config._attn_implementation = _NAME

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        """The token losses of the whole sequences, or, without labels, their logits, on every rank.

        Args:
            input_ids, labels, position_ids: [batch, time] of whole sequences, the same on every sequence rank.
        """
        time, size = input_ids.shape[1], self.ranks.sequence_size
        if time % size:
            assert labels is None, f"{size} ranks cannot share {time} tokens"
            input_ids = F.pad(input_ids, (0, size - time % size))  # a later token changes no earlier logit
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        self.mask = text_lengths(position_ids)  # of whole sequences
        self.masks = None if self._outline is None else self._masks(position_ids)
        mine = None if labels is None else self._mine(labels)
        output: Any = _Gather.apply(self.causal(self._mine(input_ids), mine, self._mine(position_ids)), self.ranks)
        return output[:, :time]

    def _mine(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.ranks.sequence_size, SEQUENCE)[self.ranks.sequence].contiguous()


def _convert(
    module: Any, exchange: DistributedAttention, owner: SequenceParallel, ranks: Ranks, implementation: str
) -> None:
    """Tells an attention module how to attend. Its owner is kept in a closure: as an attribute it would be a child."""
    size = ranks.sequence_size
    function = None
    if owner.causal.family is None or not owner.causal.family.by_text:
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)  # type: ignore[arg-type]
    if hasattr(module, "num_key_value_groups"):  # the interface repeats key-value heads by it
        whole = isinstance(owner.causal.family, Derived) and not owner.causal.family.splits_heads
        heads = module.config.num_attention_heads // (1 if whole else ranks.tensor_size)
        if heads // module.num_key_value_groups < size:  # the key-value heads are repeated, one for each rank
            module.num_key_value_groups = heads // size

    def attend(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        if key.shape[HEADS] < size:
            copies = size // key.shape[HEADS]
            key, value = key.repeat_interleave(copies, HEADS), value.repeat_interleave(copies, HEADS)
        mask = owner.mask if owner.masks is None else owner.masks[module.layer_idx]
        return exchange(query, key, value, 0, None, module, mask, function, **kwargs)

    module.attend_in_parallel = attend


@uncompiled
def _ulysses_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Hugging Face's attention interface: query, key and value [batch, heads, local time, head size].

    The mask that Hugging Face passes is of the local stretch, and is not used.
    """
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    kwargs.pop("position_ids", None)  # of the local stretch
    return module.attend_in_parallel(query, key, value, dropout=dropout, scaling=scaling, **kwargs), None


def _local_attention(
    query: Tensor, key: Tensor, value: Tensor, module: Any, mask: Tensor | None, function: Any, **kwargs: Any
) -> Tensor:
    """Attention of this rank's heads over the whole sequence; [batch, time, heads, head size] in and out.

    Args:
        function: transformers' own for the family; None: by text.
    """
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return (function or attention_by_text)(module, query, key, value, mask, **kwargs)[0]


ALL_ATTENTION_FUNCTIONS.register(_NAME, _ulysses_attention)
