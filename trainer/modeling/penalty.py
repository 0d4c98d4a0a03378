"""What training adds to the cross entropy of a token. Needs no torch, so that objectives can state it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Penalty:
    """What is added to the nats of a token in training; evaluations leave it out."""

    label_smoothing: float = 0.0  # of the target, shared out over the whole vocabulary (Szegedy et al., 1512.00567)
    z_loss: float = 0.0  # times the square of the logarithm of the softmax's sum (PaLM, arXiv:2204.02311, 5)


NO_PENALTY = Penalty()
