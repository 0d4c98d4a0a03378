"""The loss of every token in its three ways (at once, in chunks, fused with the head) against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zeropipe.trainer.data.labels import IGNORE
from zeropipe.trainer.modeling import cross_entropy
from zeropipe.trainer.modeling.cross_entropy import Scoring, head_token_losses, token_losses
from zeropipe.trainer.modeling.penalty import NO_PENALTY, Penalty
from zeropipe.trainer.ranks.ranks import Ranks

TOKENS, WIDTH, SIZE, COLUMNS = 37, 16, 100, 128
DRAW = torch.Generator().manual_seed(0)
LABELS = torch.randint(0, SIZE, (TOKENS,), generator=DRAW)
LABELS[::3] = IGNORE
HIDDEN = torch.randn(TOKENS, WIDTH, generator=DRAW)
WEIGHT = torch.randn(COLUMNS, WIDTH, generator=DRAW)


def torchs_own(penalty: Penalty, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and the gradients of half their sum by hidden states and weight."""
    hidden, weight = HIDDEN.to(dtype, copy=True).requires_grad_(), WEIGHT.to(dtype, copy=True).requires_grad_()
    scores = F.linear(hidden, weight)[:, :SIZE].float()
    smoothing = penalty.label_smoothing
    losses = F.cross_entropy(scores, LABELS, ignore_index=IGNORE, reduction="none", label_smoothing=smoothing)
    losses = losses + penalty.z_loss * scores.logsumexp(-1).square() * (LABELS != IGNORE)
    (losses.sum() / 2).backward()
    assert hidden.grad is not None and weight.grad is not None
    return losses.detach(), hidden.grad, weight.grad


def ours(penalty: Penalty, dtype: torch.dtype, uniform: bool, sparse: bool, autocast: bool = False):
    hidden, head = HIDDEN.to(dtype, copy=True).requires_grad_(), nn.Linear(WIDTH, COLUMNS, bias=False, dtype=dtype)
    head.weight = nn.Parameter(WEIGHT.to(dtype, copy=True))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scoring = Scoring(SIZE, COLUMNS, Ranks(), penalty)
        losses = head_token_losses(head, hidden, LABELS, scoring, uniform, sparse)
    (losses.sum() / 2).backward()
    assert "forward" not in vars(head) and torch.equal(head.weight, WEIGHT.to(dtype))
    assert hidden.grad is not None and head.weight.grad is not None
    assert hidden.grad.dtype == head.weight.grad.dtype == dtype
    return losses.detach(), hidden.grad, head.weight.grad


@pytest.mark.parametrize("penalty", [NO_PENALTY, Penalty(0.1, 1e-3)], ids=["plain", "penalty"])
@pytest.mark.parametrize("sparse", [False, True], ids=["all", "sparse"])
@pytest.mark.parametrize("uniform", [False, True], ids=["recomputed", "fused"])
@pytest.mark.parametrize("rows", [1000, 8])
def test_losses_and_gradients_are_torchs(penalty, sparse, uniform, rows, monkeypatch):
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda columns, device: rows)
    monkeypatch.setattr(cross_entropy, "cached_rows", lambda columns, device: 3)
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for found, expected in zip(ours(penalty, dtype, uniform, sparse), torchs_own(penalty, dtype), strict=True):
            assert (found - expected).float().norm() <= error * expected.float().norm()
    assert not torch.isnan(torch.cat([part.flatten() for part in ours(penalty, torch.float32, uniform, sparse)])).any()


def test_under_autocast_gradients_keep_the_weights_type():
    for found, expected in zip(
        ours(NO_PENALTY, torch.float32, True, False, autocast=True), torchs_own(NO_PENALTY, torch.float32), strict=True
    ):
        assert 0 < (found - expected).norm() <= 2e-2 * expected.norm()


def test_without_labels_and_with_a_frozen_head():
    head = nn.Linear(WIDTH, COLUMNS, bias=False).requires_grad_(False)
    hidden = HIDDEN.clone().requires_grad_()
    nothing = torch.full_like(LABELS, IGNORE)
    for sparse in (False, True):
        losses = head_token_losses(head, hidden, nothing, Scoring(SIZE, COLUMNS, Ranks()), True, sparse)
        losses.sum().backward()
        assert not losses.any() and head.weight.grad is None
    assert hidden.grad is not None and not hidden.grad.any()


def test_what_is_not_weighted_alike_is_noticed():
    head, hidden = nn.Linear(WIDTH, COLUMNS, bias=False), HIDDEN.clone().requires_grad_()
    losses = head_token_losses(head, hidden, LABELS, Scoring(SIZE, COLUMNS, Ranks()), uniform=True)
    with pytest.raises(AssertionError, match="does not weight all tokens alike"):
        (losses * torch.arange(TOKENS)).sum().backward()


def test_padding_gets_no_probability():
    logits = torch.zeros(1, COLUMNS)
    logits[0, SIZE:] = 50.0
    losses = token_losses(logits, torch.tensor([3]), Scoring(SIZE, COLUMNS, Ranks()))
    assert losses.item() == pytest.approx(torch.tensor(float(SIZE)).log().item(), rel=1e-6)
    assert (logits[0, SIZE:] == 50.0).all()  # the caller's logits are as they were
