"""The truth that every layout is held against: plain Hugging Face and torch's AdamW in one process, nothing of ours."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zeropipe.trainer.families.specs import gradient_noise

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


@dataclass
class Curve:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    noise: dict[str, slice] = field(default_factory=dict)  # elements of weights that are not to be compared


def hugging_face(config: dict, dtype: torch.dtype = torch.float32):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="sdpa").to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(value(name, tuple(parameter.shape)))
    return model


def train(config: dict, steps: int, seed: int | None = None) -> Curve:
    """Trains on the whole global batch at once. `seed` reseeds torch before every step, for dropout."""
    model, curve = hugging_face(config).train(), Curve()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS)
    for step in range(steps):
        if seed is not None:
            torch.manual_seed(seed + step)
        ids, labels, positions = batch(step, config["vocab_size"])
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        curve.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        optimizer.zero_grad()
        curve.losses.append(loss.item())
    curve.weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    curve.noise = gradient_noise(config)
    return curve


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
