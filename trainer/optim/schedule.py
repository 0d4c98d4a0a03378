"""Learning rate as a pure function of the step, so that there is no scheduler state to save or to restore wrongly."""

from __future__ import annotations

import math
from typing import Literal

ScheduleType = Literal["constant", "linear", "cosine", "wsd"]


def learning_rate(
    step: int, kind: ScheduleType, peak: float, floor: float, total: int, warmup: int, decay: int = 0
) -> float:
    """Learning rate of the update that ends step `step` (counted from 0).

    Warm-up is linear and ends on `peak` at its last step. `linear` and `cosine` then fall towards `floor`, which they
    would reach one step after the run's last, so that no step is wasted on a rate of zero; `wsd` (warmup–stable–decay,
    Hu et al., 2024) stays at `peak` and falls linearly over the last `decay` steps.

    Args:
        step, total, warmup, decay: in optimizer steps.
        peak, floor: learning rates; `floor` holds from step `total` on.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if kind == "constant":
        return peak
    start = total - decay if kind == "wsd" else warmup
    if step < start:
        return peak
    progress = min(1.0, (step - start + 1) / (total - start + 1))
    if kind == "cosine":
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    return floor + (peak - floor) * (1 - progress)
