"""Cross entropy over a padded vocabulary, whole or split over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..data.labels import IGNORE
from ..ranks.ranks import Ranks
from .chunks import cached_rows, chunk_rows
from .penalty import NO_PENALTY, Penalty


@dataclass(frozen=True)
class Scoring:
    """How logits are scored: which columns of the vocabulary a rank has, and what is added to a token's nats.

    The columns are split over tensor-parallel ranks as in Megatron-LM (arXiv:1909.08053, 3).
    """

    size: int  # without padding
    columns: int  # with it, of all tensor ranks together
    ranks: Ranks
    penalty: Penalty = NO_PENALTY
    scale: float = 1.0  # what the scores are of `head(hidden)`: `shaped`
    cap: float = 0.0

    def losses_and_slope(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Nats of every label [tokens], 0 for IGNORE, and their gradients with respect to this rank's logits.

        Args:
            scores: fp32 [tokens, columns] logits; the slope takes their place.
        """
        if self.cap or self.scale != 1:
            return self._shaped_losses_and_slope(scores, labels)
        smoothing, width, split = self.penalty.label_smoothing, scores.shape[1], self.ranks.tensor_size > 1
        first = self.ranks.tensor * width
        real = max(0, min(width, self.size - first))
        if real < width:
            scores[:, real:] = torch.finfo(scores.dtype).min  # padding is never predicted
        peak = scores.amax(-1)
        if split:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=self.ranks.tensor_group)
        scores -= peak[:, None]
        here = (labels >= first) & (labels < first + width)
        column = torch.where(here, labels - first, 0)
        target = scores.gather(1, column[:, None])[:, 0] * here
        every = scores[:, :real].sum(-1) if smoothing else torch.zeros_like(target)
        totals = torch.stack([scores.exp_().sum(-1), target, every])
        if split:
            dist.all_reduce(totals, group=self.ranks.tensor_group)
        kept, norm = (labels != IGNORE).to(scores.dtype), totals[0].log()
        losses = norm - (1 - smoothing) * totals[1] - smoothing / self.size * totals[2]
        losses += self.penalty.z_loss * (norm + peak).square()
        scores *= (kept * (1 + 2 * self.penalty.z_loss * (norm + peak)) / totals[0])[:, None]
        if smoothing:
            scores[:, :real] -= (smoothing / self.size * kept)[:, None]
        scores[torch.arange(len(column), device=column.device), column] -= here * (1 - smoothing)
        return losses * kept, scores

    def _shaped_losses_and_slope(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = shaped(scores, self.scale, self.cap)
        inner = self.scale * (1 - (logits / self.cap).square()) if self.cap else self.scale
        losses, slope = replace(self, scale=1.0, cap=0.0).losses_and_slope(logits, labels)
        return losses, slope.mul_(inner)


def shaped(scores: Tensor, scale: float, cap: float) -> Tensor:
    """Logits from `head(hidden)`: scaled, and bent so that none is beyond the cap (0: there is none)."""
    if cap:
        return cap * torch.tanh(scores * (scale / cap))
    return scores if scale == 1 else scores * scale


class _CrossEntropy(torch.autograd.Function):
    """Loss of every token from logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, scoring: Scoring) -> Tensor:
        losses, slope = scoring.losses_and_slope(logits.to(torch.float32, copy=True), labels)
        ctx.save_for_backward(slope)
        ctx.dtype = logits.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (slope * gradients[0][:, None]).to(ctx.dtype), None, None


class _HeadCrossEntropy(torch.autograd.Function):
    """Loss of every token from what goes into the head, where all losses are going to be weighted alike.

    Their gradients are then known up to that weight as soon as a chunk's logits are, so that no logits are computed
    twice and none are kept.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, scoring: Scoring) -> Tensor:
        device = hidden.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        inputs, matrix = hidden.to(cast), weight.to(cast)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        slope_in = torch.empty_like(inputs) if ctx.needs_input_grad[0] else None
        slope_weight = torch.zeros_like(matrix) if ctx.needs_input_grad[1] else None
        rows, inner = chunk_rows(scoring.columns, device), cached_rows(scoring.columns, device)
        with torch.autocast(device, enabled=False):
            for part in map(slice, range(0, len(inputs), rows), range(rows, len(inputs) + rows, rows)):
                logits = F.linear(inputs[part], matrix)  # whose slope takes its place, piece by piece
                for nats, piece, own in zip(
                    losses[part].split(inner), logits.split(inner), labels[part].split(inner), strict=True
                ):
                    found, slope = scoring.losses_and_slope(piece.to(torch.float32, copy=True), own)
                    nats.copy_(found)
                    piece.copy_(slope)
                if slope_in is not None:
                    torch.mm(logits, matrix, out=slope_in[part])
                if slope_weight is not None:
                    slope_weight.addmm_(logits.T, inputs[part])
        ctx.slopes, ctx.dtypes = (slope_in, slope_weight), (hidden.dtype, weight.dtype)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        given = gradients[0]
        if given.device.type == "cpu":
            assert (given == given[:1]).all(), "the objective does not weight all tokens alike"
        alike = given[:1].sum()  # of no tokens: 0
        slopes, ctx.slopes = ctx.slopes, (None, None)  # scaled in place: they are used once
        scaled = (
            None if slope is None else slope.mul_(alike).to(dtype)
            for slope, dtype in zip(slopes, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None


def token_losses(logits: Tensor, labels: Tensor, scoring: Scoring) -> Tensor:
    """Cross entropy of every label in nats, fp32 [...], 0 where it is IGNORE; the same on every tensor rank.

    Args:
        logits: [..., columns], this tensor rank's columns of the padded vocabulary.
        labels: [...], ids already shifted: the token that follows, or IGNORE; on that device or on the host.
    """
    flat, targets = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).to(logits.device, non_blocking=True)
    losses = _CrossEntropy.apply(flat, targets, scoring)
    return losses.view(labels.shape)  # type: ignore[union-attr]


def head_token_losses(
    head: nn.Linear,
    hidden: Tensor,
    labels: Tensor,
    scoring: Scoring,
    uniform: bool = False,
    sparse: bool = False,
) -> Tensor:
    """As `token_losses` of `head(hidden)`, without ever holding the logits of more than a chunk of the tokens.

    Args:
        head: gives this tensor rank's columns of the logits.
        hidden: [..., width].
        uniform: whether all token losses are going to be weighted alike; else a chunk's logits are computed again in
            the backward pass.
        sparse: leaves out the places without a label, of which there should be many. They are looked for where the
            labels are: on a GPU, the host would wait for that.
    """
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if sparse:
        labelled = (targets != IGNORE).nonzero()[:, 0]
        kept = labelled.to(hidden.device, non_blocking=True)
        losses = head_token_losses(head, flat.index_select(0, kept), targets[labelled], scoring, uniform)
        whole = torch.zeros(len(targets), dtype=losses.dtype, device=losses.device)
        return whole.index_copy(0, kept, losses).view(labels.shape)
    targets = targets.to(hidden.device, non_blocking=True)
    if uniform and head.bias is None and torch.is_grad_enabled():
        return _inside(head, flat, lambda x, weight: _HeadCrossEntropy.apply(x, weight, targets, scoring)).view(
            labels.shape
        )

    def chunk(hidden_chunk: Tensor, label_chunk: Tensor) -> Tensor:
        return _CrossEntropy.apply(head(hidden_chunk), label_chunk, scoring)  # type: ignore[return-value]

    rows = chunk_rows(scoring.columns, hidden.device.type)
    if len(targets) <= rows:
        return chunk(flat, targets).view(labels.shape)
    chunks = zip(flat.split(rows), targets.split(rows), strict=True)
    losses = [checkpoint(chunk, *pair, use_reentrant=False) for pair in chunks]
    return torch.cat(losses).view(labels.shape)


def _inside(head: nn.Linear, hidden: Tensor, use: Callable[[Tensor, Tensor], Any]) -> Tensor:
    """What `use` makes of the head's input and weight, in place of the head's own forward: ZeRO-3 has the weight whole
    only there.
    """
    head.forward = lambda input: use(input, head.weight)  # type: ignore[method-assign]
    try:
        return head(hidden)
    finally:
        del head.forward


def whole_logits(logits: Tensor, vocab_size: int, ranks: Ranks) -> Tensor:
    """[..., vocab_size] on every tensor rank, fp32, padding stripped, from each rank's columns. Not differentiable."""
    columns = logits.detach().float().contiguous()
    if ranks.tensor_size > 1:
        parts = [torch.empty_like(columns) for _ in range(ranks.tensor_size)]
        dist.all_gather(parts, columns, group=ranks.tensor_group)
        columns = torch.cat(parts, -1)
    return columns[..., :vocab_size]
