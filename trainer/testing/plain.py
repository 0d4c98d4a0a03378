"""Training in plain Hugging Face and torch, in one process: the truth that every layout is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batches = Iterable[tuple[Tensor, Tensor, Tensor | None]]  # ids, labels, positions (or None) of one global batch each


@dataclass
class Curve:
    """Loss and gradient norm (before clipping) of every step, and how it ended."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)  # final ones, by Hugging Face's names
    first: dict[str, np.ndarray] = field(default_factory=dict)  # weights after the first step
    noise: dict[str, slice] = field(default_factory=dict)  # elements of weights that are not to be compared
    torn: list[str] = field(default_factory=list)  # weights of which ranks hold copies that are not the same
    torn_at_once: list[str] = field(default_factory=list)  # and those of the first step
    masks_differ: bool | None = None  # whether tensor ranks drop different things; None: there are no such ranks


def mean_loss(losses: Tensor, labels: Tensor) -> Tensor:
    """The mean over all labels."""
    return losses.mean()


def train_plainly(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    clip: float,
    before_step: Callable[[int], None] = lambda step: None,
    loss_of: Callable[[Tensor, Tensor], Tensor] = mean_loss,
) -> Curve:
    """Trains on whole global batches.

    Args:
        clip: largest norm of the gradient; 0: not clipped.
        before_step: is told the step's number, to seed or to set learning rates.
        loss_of: nats of every label and the labels, [labels] each, to the scalar that is trained on.
    """
    curve = Curve()
    for step, (ids, labels, positions) in enumerate(batches):
        before_step(step)
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits.flatten(0, 1)
        kept = labels.flatten() >= 0
        loss = loss_of(F.cross_entropy(logits[kept], labels.flatten()[kept], reduction="none"), labels.flatten()[kept])
        loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        curve.norms.append(float(torch.nn.utils.clip_grad_norm_(trained, clip or float("inf"))))
        optimizer.step()
        optimizer.zero_grad()
        curve.losses.append(loss.item())
        if not curve.first:
            curve.first = _copied(model)
    curve.weights = _copied(model)
    return curve


def _copied(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: parameter.detach().cpu().numpy().copy() for name, parameter in model.named_parameters()}


def decayed_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """Matrices with weight decay, norms and biases without."""
    listed = list(parameters)
    matrices, vectors = [p for p in listed if p.ndim > 1], [p for p in listed if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
