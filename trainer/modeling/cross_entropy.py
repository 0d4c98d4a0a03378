"""Cross entropy over a padded vocabulary, whole or split over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..data.labels import IGNORE
from ..ranks.ranks import Ranks
from .chunks import chunk_rows
from .penalty import NO_PENALTY, Penalty


class _SplitCrossEntropy(torch.autograd.Function):
    """Loss of every token from logits of which each rank holds some columns (Megatron-LM, arXiv:1909.08053, 3)."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, first: int, vocab_size: int, group: Any, penalty: Penalty
    ) -> Tensor:
        scores, real = logits.float(), max(0, min(logits.shape[1], vocab_size - first))
        scores[:, real:] = torch.finfo(scores.dtype).min  # padding is never predicted
        peak = scores.amax(-1)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        scores = scores - peak[:, None]
        here = (labels >= first) & (labels < first + scores.shape[1])
        column = torch.where(here, labels - first, 0)
        target, every = scores.gather(1, column[:, None])[:, 0] * here, scores[:, :real].sum(-1)
        powers = scores.exp_()
        totals = torch.stack([powers.sum(-1), target, every])
        dist.all_reduce(totals, group=group)
        kept, norm, smoothing = labels != IGNORE, totals[0].log(), penalty.label_smoothing
        ctx.save_for_backward(powers.div_(totals[0][:, None]), column, here, kept, norm + peak)
        ctx.dtype, ctx.real, ctx.vocab_size, ctx.penalty = logits.dtype, real, vocab_size, penalty
        losses = norm - (1 - smoothing) * totals[1] - smoothing / vocab_size * totals[2]
        return (losses + penalty.z_loss * (norm + peak).square()) * kept

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        probabilities, column, here, kept, norm = ctx.saved_tensors
        smoothing = ctx.penalty.label_smoothing
        slope = probabilities * (1 + 2 * ctx.penalty.z_loss * norm)[:, None]
        slope[:, : ctx.real] -= smoothing / ctx.vocab_size
        slope[torch.arange(len(column), device=column.device), column] -= here.to(slope.dtype) * (1 - smoothing)
        slope *= (kept * gradients[0])[:, None]
        return slope.to(ctx.dtype), None, None, None, None, None


def token_losses(
    logits: Tensor, labels: Tensor, vocab_size: int, ranks: Ranks, penalty: Penalty = NO_PENALTY
) -> Tensor:
    """Cross entropy of every label in nats, fp32 [...], 0 where it is IGNORE; the same on every tensor rank.

    Args:
        logits: [..., columns], this tensor rank's columns of the padded vocabulary.
        labels: [...], ids already shifted: the token that follows, or IGNORE.
        vocab_size: without padding.
    """
    flat, targets = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    if ranks.tensor_size == 1:
        scores, smoothing = flat[:, :vocab_size].float(), penalty.label_smoothing
        losses = F.cross_entropy(scores, targets, ignore_index=IGNORE, reduction="none", label_smoothing=smoothing)
        if penalty.z_loss:
            losses = losses + penalty.z_loss * scores.logsumexp(-1).square() * (targets != IGNORE)
    else:
        first = ranks.tensor * flat.shape[1]
        losses = _SplitCrossEntropy.apply(flat, targets, first, vocab_size, ranks.tensor_group, penalty)
    return losses.view(labels.shape)  # type: ignore[union-attr]


def head_token_losses(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    labels: Tensor,
    vocab_size: int,
    columns: int,
    ranks: Ranks,
    penalty: Penalty = NO_PENALTY,
    sparse: bool = False,
) -> Tensor:
    """As `token_losses` of `head(hidden)`, without ever holding the logits of more than a chunk of the tokens.

    Args:
        head: hidden states [tokens, width] to this tensor rank's columns of the logits, token by token.
        hidden: [..., width].
        columns: of all tensor ranks: the padded vocabulary.
        sparse: leaves out the places without a label, of which there should be many: looking for them makes a GPU's
            host wait.
    """
    if sparse:
        kept = (labels.reshape(-1) != IGNORE).nonzero()[:, 0]
        few = hidden.reshape(-1, hidden.shape[-1]).index_select(0, kept), labels.reshape(-1)[kept]
        losses = head_token_losses(head, *few, vocab_size, columns, ranks, penalty)
        whole = torch.zeros(labels.numel(), dtype=losses.dtype, device=losses.device)
        return whole.index_copy(0, kept, losses).view(labels.shape)
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    rows = chunk_rows(columns)

    def chunk(hidden_chunk: Tensor, label_chunk: Tensor) -> Tensor:
        return token_losses(head(hidden_chunk), label_chunk, vocab_size, ranks, penalty)

    if len(targets) <= rows:
        return chunk(flat, targets).view(labels.shape)
    chunks = zip(flat.split(rows), targets.split(rows), strict=True)
    losses = [checkpoint(chunk, *pair, use_reentrant=False) for pair in chunks]
    return torch.cat(losses).view(labels.shape)


def whole_logits(logits: Tensor, vocab_size: int, ranks: Ranks) -> Tensor:
    """[..., vocab_size] on every tensor rank, fp32, padding stripped, from each rank's columns. Not differentiable."""
    columns = logits.detach().float().contiguous()
    if ranks.tensor_size > 1:
        parts = [torch.empty_like(columns) for _ in range(ranks.tensor_size)]
        dist.all_gather(parts, columns, group=ranks.tensor_group)
        columns = torch.cat(parts, -1)
    return columns[..., :vocab_size]
