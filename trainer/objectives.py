"""Objectives as modules around a Hugging Face model: micro batch in, loss *sum* and nothing else out.

The engine divides by the tokens of the whole global batch, so that the loss is the mean over all unmasked tokens
however the batch is split.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # label of a position that carries no loss
CHUNK_BYTES = 64 << 20  # of one chunk's fp32 logits; larger logits are computed chunk by chunk, twice


class CausalLM(nn.Module):
    """A Hugging Face causal LM with its next-token loss.

    Args:
        model: with `get_output_embeddings()`; its vocabulary may be padded beyond `vocab_size`.
        vocab_size: true vocabulary; the padding gets no probability.
    """

    def __init__(self, model: nn.Module, vocab_size: int) -> None:
        super().__init__()
        self.model: Any = model
        self.vocab_size = vocab_size

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        """Loss sum (fp32 scalar) over the positions whose label is not `IGNORE`; without labels, the logits.

        Args:
            input_ids: [batch, time] int64.
            labels: [batch, time] int64: the token that follows each input token.
            position_ids: [batch, time]; where they restart, attention does not look back. None: 0, 1, 2, …

        Returns:
            scalar, or logits [batch, time, vocab_size] in fp32.
        """
        if labels is None:
            logits = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
            return logits[..., : self.vocab_size].float()
        if not self._chunked_head_is_exact():
            logits = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
            return token_loss_sum(logits.flatten(0, 1), labels.flatten(), self.vocab_size)
        body = self.model.base_model
        hidden = body(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        return self._head_loss(hidden.flatten(0, 1), labels.flatten())

    def _chunked_head_is_exact(self) -> bool:
        """Families whose logits are head(hidden) and nothing more; others may scale or cap them."""
        return self.model.config.model_type in ("gpt2", "llama")

    def _head_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()
        rows = max(1, CHUNK_BYTES // (4 * self.model.config.vocab_size))
        if len(labels) <= rows:
            return token_loss_sum(head(hidden), labels, self.vocab_size)

        def chunk_loss(hidden_chunk: Tensor, label_chunk: Tensor) -> Tensor:
            return token_loss_sum(head(hidden_chunk), label_chunk, self.vocab_size)

        total = hidden.new_zeros((), dtype=torch.float32)
        for hidden_chunk, label_chunk in zip(hidden.split(rows), labels.split(rows), strict=True):
            total = total + checkpoint(chunk_loss, hidden_chunk, label_chunk, use_reentrant=False)
        return total


def token_loss_sum(logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """Sum of next-token cross entropies in fp32. `logits` [tokens, padded vocabulary], `labels` [tokens]."""
    return F.cross_entropy(logits[:, :vocab_size].float(), labels, reduction="sum", ignore_index=IGNORE)
