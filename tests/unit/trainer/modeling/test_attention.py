"""Attention text by text against the dense mask, and against each text alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny import GPT2, LLAMA, NO_DROPOUT, VOCAB
from zeropipe.trainer.modeling import causal
from zeropipe.trainer.modeling.attention import text_lengths
from zeropipe.trainer.modeling.build import build_model
from zeropipe.trainer.modeling.causal import CausalLM
from zeropipe.trainer.ranks.ranks import Ranks

TEXTS = [[20, 28], [48], [1, 1, 30, 16]]
POSITIONS = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in TEXTS])
IDS = torch.randint(1, VOCAB, POSITIONS.shape, generator=torch.Generator().manual_seed(3))


def net_of(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> CausalLM:
    full = {**config, "vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
    return CausalLM(build_model(full, None, 5, dtype, Ranks()), VOCAB, Ranks())


@pytest.mark.parametrize("config", [{**GPT2, **NO_DROPOUT}, LLAMA], ids=["gpt2", "llama"])
def test_it_equals_the_dense_mask_in_loss_and_gradient(config, monkeypatch):
    net = net_of(config)
    labels = IDS.roll(-1, 1)

    def losses_and_gradients() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        net.zero_grad()
        losses = net(IDS, labels, POSITIONS)
        (losses * torch.linspace(0, 1, losses.numel()).view(losses.shape)).sum().backward()
        return losses.detach(), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

    by_text, gradients = losses_and_gradients()
    monkeypatch.setattr(causal, "text_lengths", lambda positions: None)
    dense, dense_gradients = losses_and_gradients()
    torch.testing.assert_close(by_text, dense, rtol=1e-6, atol=1e-6)
    for name, gradient in dense_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)
    assert not torch.equal(by_text, dense)  # two ways, or the test says nothing


@pytest.mark.parametrize("config", [{**GPT2, **NO_DROPOUT}, LLAMA], ids=["gpt2", "llama"])
def test_no_text_sees_another_or_what_follows(config):
    net = net_of(config).eval()
    before = net(IDS, None, POSITIONS)
    changed = IDS.clone()
    changed[0, 5] += 1  # in the first text of the first row
    after = net(changed, None, POSITIONS)
    assert torch.equal(before[0, :5], after[0, :5]) and torch.equal(before[0, 20:], after[0, 20:])
    assert (before[0, 5:20] != after[0, 5:20]).any(-1).all()
    assert torch.equal(before[1:], after[1:])


def test_rows_of_one_text_need_no_mask():
    assert text_lengths(None) is None
    assert text_lengths(torch.arange(7).expand(3, 7)) is None
    lengths = text_lengths(POSITIONS)
    assert lengths is not None and lengths.flatten().tolist() == [length for row in TEXTS for length in row]
    assert text_lengths(torch.tensor([[0, 1, 2], [2, 3, 0]])).flatten().tolist() == [
        3,
        2,
        1,
    ]  # a row's start is a text's
