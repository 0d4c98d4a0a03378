"""Attention inside each text against the dense mask, its definition, and each text alone; and that no mask is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny import GPT2, LLAMA, NO_DROPOUT, VOCAB
from zeropipe.trainer.modeling import attention, causal
from zeropipe.trainer.modeling.attention import attention_by_text, text_lengths
from zeropipe.trainer.modeling.build import build_model
from zeropipe.trainer.modeling.causal import CausalLM
from zeropipe.trainer.modeling.pipeline import Builder
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
    monkeypatch.setattr(causal, "text_lengths", lambda positions: None)  # transformers makes a mask of its own
    masked, masked_gradients = losses_and_gradients()
    torch.testing.assert_close(by_text, masked, rtol=1e-6, atol=1e-6)
    for name, gradient in masked_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)
    assert not torch.equal(by_text, masked)  # two ways, or the test says nothing


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


def test_rows_of_one_text_have_no_lengths():
    assert text_lengths(None).shape == text_lengths(torch.arange(7).expand(3, 7)).shape == (1, 1, 1, 0)
    assert text_lengths(POSITIONS).flatten().tolist() == [length for row in TEXTS for length in row]
    # a row's start is a text's, even where its position follows from the end of the row before
    assert text_lengths(torch.tensor([[0, 1, 2], [2, 3, 0]])).flatten().tolist() == [3, 2, 1]


def dense(query, key, value, lengths, scaling):
    """Attention by its definition, of [tokens, heads, head size], with a matrix of time x time."""
    text = torch.arange(len(lengths)).repeat_interleave(lengths)
    seen = (text[:, None] == text) & torch.ones(len(text), len(text), dtype=torch.bool).tril()
    copies = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(copies, 1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scaling
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_rows_of_texts_against_the_definition(kernel, kv_heads, monkeypatch):
    """Values and gradients; `kernel` as on a GPU, with the definition in the place of the kernel, which runs nowhere
    else: what it is given is checked, also by its own shapes of tensors without values."""
    given = []

    def stand_in(query, key, value, starts, key_starts, longest, key_longest, *, scale, window_size, enable_gqa):
        assert starts is key_starts and longest == key_longest == 48 and window_size == (-1, 0)
        assert starts.dtype == torch.int32 and enable_gqa == (kv_heads < 4)
        without_values = [tensor.detach().to("meta").bfloat16() for tensor in (query, key, value)]
        shape = varlen_attn(
            *without_values, *[starts.to("meta")] * 2, 48, 48, scale=scale, window_size=(-1, 0), enable_gqa=enable_gqa
        ).shape
        assert shape == query.shape
        given.append(starts.tolist())
        return dense(query, key, value, starts.diff(), scale)

    if kernel:
        monkeypatch.setattr(attention, "varlen_attn", stand_in)
        monkeypatch.setattr(attention, "_has_kernel", lambda *arguments: True)
    made = torch.Generator().manual_seed(0)
    rows, time = POSITIONS.shape
    tensors = [torch.randn(rows, heads, time, 8, generator=made) for heads in (4, kv_heads, kv_heads)]
    weights = torch.randn(rows, time, 4, 8, generator=made)

    def output_and_gradients(attend):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        output = attend(*leaves)
        return [output.detach(), *torch.autograd.grad((output * weights).sum(), leaves)]

    lengths = text_lengths(POSITIONS)
    ours = output_and_gradients(lambda q, k, v: attention_by_text(None, q, k, v, lengths, scaling=0.3)[0])
    flat = output_and_gradients(
        lambda q, k, v: dense(*(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)), lengths.flatten(), 0.3).view(
            rows, time, 4, 8
        )
    )
    for one, other in zip(ours, flat, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert given == ([[0, 20, 48, 96, 97, 98, 128, 144]] if kernel else [])


class NothingSquare(TorchDispatchMode):
    """Fails where an operation makes a tensor as large as a matrix of time x time."""

    def __init__(self, time: int) -> None:
        super().__init__()
        self.limit = time * time

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for made in output if isinstance(output, tuple | list) else (output,):
            if isinstance(made, torch.Tensor) and made.numel() >= self.limit:
                raise AssertionError(f"{func} made {tuple(made.shape)}")
        return output


LONG = 4096
DOCUMENTS = torch.cat([torch.arange(length) for length in (1500, 7, 2000, LONG - 3507)])[None]


def long(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "n_positions" if config["model_type"] == "gpt2" else "max_position_embeddings": LONG}


@pytest.mark.parametrize("positions", [None, torch.arange(LONG)[None], DOCUMENTS], ids=["unsaid", "one", "documents"])
@pytest.mark.parametrize("way", ["plain", "checkpointed", "pipeline"])
@pytest.mark.parametrize("config", [long({**GPT2, **NO_DROPOUT}), long(LLAMA)], ids=["gpt2", "llama"])
def test_no_way_makes_a_mask_of_time_x_time(config, way, positions):
    """Forward and backward of a row of 4,096 tokens."""
    ids = torch.randint(1, VOCAB, (1, LONG), generator=torch.Generator().manual_seed(3))
    if way == "pipeline":
        full = {**config, "vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
        layers = [spec.build() for spec in Builder(full, None, 5, torch.float32, Ranks()).layers()[:-1]]
        with NothingSquare(LONG):
            carried = ids, torch.arange(LONG)[None] if positions is None else positions
            for layer in layers:
                carried = layer(carried)
            carried.sum().backward()
        return
    net = net_of(config).train()
    if way == "checkpointed":
        net.model.gradient_checkpointing_enable({"use_reentrant": False})
    with NothingSquare(LONG):
        net(ids, ids, positions).sum().backward()


def test_a_mask_of_time_x_time_is_noticed(monkeypatch):
    monkeypatch.setattr(causal, "text_lengths", lambda positions: None)
    with pytest.raises(AssertionError, match=r"made \(.*4096, 4096\)"), NothingSquare(LONG):
        net_of(long(LLAMA))(DOCUMENTS % VOCAB, None, DOCUMENTS)
