"""The truth that every layout is held against: plain Hugging Face and torch's AdamW in one process, nothing of ours."""

from __future__ import annotations

import json
import zlib
from functools import cache

import numpy as np
import torch
from torch import Tensor

from tests.harness import run_ranks
from zeropipe.trainer.families.specs import gradient_noise
from zeropipe.trainer.kernels.swap import use_kernels
from zeropipe.trainer.testing.plain import Curve, decayed_groups, train_plainly

VOCAB, TIME, BATCH = 331, 16, 8
CLIP, LR, BETAS, DECAY = 0.3, 3e-3, (0.9, 0.95), 0.1


def gpt2(**changes) -> dict:
    config = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": TIME, "vocab_size": VOCAB}
    off = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return {**config, **off, **changes}


def llama(**changes) -> dict:
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": TIME, "vocab_size": VOCAB}
    return {**config, "bos_token_id": 0, "eos_token_id": 0, **changes}


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    """Weights by name. Norms and biases are perturbed too, so that none of them can be forgotten unseen."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    is_norm = len(shape) == 1 and name.endswith("weight")
    return 1 + 0.1 * noise if is_norm else 0.05 * noise


def values(spec) -> Tensor:
    return value(spec.name, spec.shape)


def batch(step: int, vocab: int = VOCAB) -> tuple[Tensor, Tensor, Tensor]:
    """ids, labels, positions [BATCH, TIME] of one global batch: learnable, packed, with unevenly masked labels."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(0, vocab, (BATCH, TIME + 1), generator=generator)
    learnable = torch.rand(BATCH, TIME, generator=generator) < 0.7
    ids[:, 1:] = torch.where(learnable, (ids[:, :-1] * 7 + 3) % vocab, ids[:, 1:])
    labels = ids[:, 1:].clone()
    # sample i keeps about (i + 1) / BATCH of its labels: a mean of means would differ from the mean of tokens
    keep = torch.arange(1, BATCH + 1)[:, None] / BATCH
    labels[torch.rand(BATCH, TIME, generator=generator) >= keep] = -100
    starts = torch.rand(BATCH, TIME, generator=generator) < 0.1
    starts[:, 0] = True
    index = torch.arange(TIME).expand(BATCH, TIME)
    positions = index - torch.where(starts, index, 0).cummax(1).values
    return ids[:, :-1].contiguous(), labels.contiguous(), positions.contiguous()


def micro_batch(
    config: dict, step: int, data: int, data_size: int, micro: int, accumulation: int
) -> tuple[Tensor, ...]:
    """ids, labels, positions of one micro batch of one data-parallel rank."""
    size = BATCH // (data_size * accumulation)
    first = (micro * data_size + data) * size
    return tuple(tensor[first : first + size] for tensor in batch(step, config["vocab_size"]))


def hugging_face(config: dict, dtype: torch.dtype = torch.float32):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="sdpa").to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(value(name, tuple(parameter.shape)))
    return model


def train(config: dict, steps: int, seed: int | None = None) -> Curve:
    """Trains on the whole global batch at once. `seed` reseeds torch before every step, for dropout."""
    model = hugging_face(config).train()
    if seed is not None:
        use_kernels(model)  # so that it draws the same masks
    optimizer = torch.optim.AdamW(decayed_groups(model.parameters(), DECAY), lr=LR, betas=BETAS)
    batches = (batch(step, config["vocab_size"]) for step in range(steps))
    reseed = (lambda step: torch.manual_seed(seed + step)) if seed is not None else (lambda step: None)
    curve = train_plainly(model, batches, optimizer, CLIP, reseed)
    curve.noise = gradient_noise(config)
    return curve


def truth(config: dict, steps: int, seed: int | None = None) -> Curve:
    """What `train` comes to in a process of its own, once for all tests that ask. Not to be changed."""
    return _truth(json.dumps(config), steps, seed)


@cache
def _truth(config: str, steps: int, seed: int | None) -> Curve:
    return run_ranks(1, train, json.loads(config), steps, seed)[0]


def assert_same(found: Curve, truth: Curve, loss: float = 1e-6, norm: float = 1e-5, weights: float = 1e-4) -> None:
    """Relative bounds. Clipping must have been at work, or a wrong norm would go unseen."""
    assert min(truth.norms) > 1.5 * CLIP, f"clipping is not active: {truth.norms}"
    assert len(found.losses) == len(truth.losses) and len(found.norms) == len(truth.norms)
    for step in range(len(truth.losses)):
        for quantity, bound in (("loss", loss), ("gradient norm", norm)):
            series = "losses" if quantity == "loss" else "norms"
            one, two = getattr(found, series)[step], getattr(truth, series)[step]
            assert abs(one / two - 1) <= bound, f"step {step}: {quantity} {one!r}, one process {two!r}"
    assert found.weights.keys() == truth.weights.keys()
    for name, tensor in truth.weights.items():
        difference = found.weights[name] - tensor
        if name in truth.noise:
            difference = np.delete(difference, truth.noise[name])
        error = np.linalg.norm(difference) / np.linalg.norm(tensor)
        assert error <= weights, f"{name}: off by {error:.1e} of its norm"
