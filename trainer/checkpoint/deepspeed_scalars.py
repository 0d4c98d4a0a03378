"""Everything small that a live DeepSpeed engine's future depends on, as JSON. Private names of DeepSpeed 0.19 as in
`deepspeed_state.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .deepspeed_state import base_optimizer, is_torchs, moment_kinds

_HYPERPARAMETERS = ("lr", "initial_lr", "betas", "eps", "weight_decay", "momentum")
_SCHEDULED = ("lr", "initial_lr", "betas", "momentum")  # what DeepSpeed's schedulers move
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def read_scalars(engine: Any) -> dict[str, Any]:
    """Everything small that the engine's future depends on, as JSON: Adam's step, hyperparameters, counters, scaler.

    Raises:
        ValueError: parameters have taken different numbers of steps, which one number cannot describe.
    """
    base = base_optimizer(engine)
    numbers: dict[str, set[float]] = {}
    for state in base.state.values():
        for key, value in state.items():
            if isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0):
                numbers.setdefault(key, set()).add(float(value))
    if "step" in numbers and not is_torchs(base):
        numbers["step"] = _deepspeed_steps(base)
    uneven = {key: sorted(values) for key, values in numbers.items() if len(values) > 1}
    if uneven:
        raise ValueError(f"parameters differ in their optimizer scalars: {uneven}")
    scaler = _loss_scaler(engine)
    autocast_scaler = getattr(engine.optimizer, "torch_autocast_gradscaler", None)
    scalars = {
        "optimizer": type(base).__name__,
        "kinds": moment_kinds(engine),
        "scalars": {key: values.pop() for key, values in numbers.items()},
        "groups": [{key: group[key] for key in _HYPERPARAMETERS if key in group} for group in base.param_groups],
        "counters": {key: getattr(engine, key) for key in _COUNTERS},
        "scheduler": engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None,
        "loss_scaler": {key: getattr(scaler, key) for key in _SCALER if hasattr(scaler, key)},
        "autocast_scaler": autocast_scaler.state_dict() if autocast_scaler is not None else None,
    }
    return json.loads(json.dumps(scalars))


def _deepspeed_steps(base: torch.optim.Optimizer) -> set[float]:
    """Step counts of a DeepSpeed Adam, one a group: FusedAdam counts on the last parameter of each alone, and moves all
    by that count. Stage 3 lends the optimizer its flat tensors; they count for themselves.
    """
    counts = {tensor: float(state["step"]) for tensor, state in base.state.items() if "step" in state}
    groups = [[tensor for tensor in group["params"] if tensor in counts] for group in base.param_groups]
    alone = counts.keys() - {tensor for group in groups for tensor in group}
    return {max(counts[tensor] for tensor in group) for group in groups if group} | {counts[t] for t in alone}


def write_scalars(engine: Any, saved: Mapping[str, Any]) -> None:
    """Puts back what `read_scalars` read, except the optimizer's own step (`create_state`).

    Of the hyperparameters, the learning rate, and what else a scheduler of the JSON moves. The others are as
    configured now, so that a resumed run may change them.
    """
    for key in _COUNTERS:
        setattr(engine, key, saved["counters"][key])
    if saved["scheduler"] is not None and engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(saved["scheduler"])
    _write_hyperparameters(engine, saved["groups"])
    scaler = _loss_scaler(engine)
    if scaler is not None and getattr(scaler, "dynamic", getattr(scaler, "dynamic_loss_scale", False)):
        for key, value in saved["loss_scaler"].items():
            if hasattr(scaler, key):
                setattr(scaler, key, value)
    autocast_scaler = getattr(engine.optimizer, "torch_autocast_gradscaler", None)
    if autocast_scaler is not None and saved["autocast_scaler"] is not None:
        autocast_scaler.load_state_dict(saved["autocast_scaler"])


def _write_hyperparameters(engine: Any, saved: Sequence[Mapping[str, Any]]) -> None:
    """A scheduler's `load_state_dict` does not set the learning rate of the step to come."""
    keys = _SCHEDULED if engine.lr_scheduler is not None else ("lr",)
    groups = base_optimizer(engine).param_groups
    for index, group in enumerate(groups):
        # a pipeline stage may have fewer groups than rank 0; schedules treat all alike
        source = saved[index if len(groups) == len(saved) else 0]
        for key in keys:
            if key in source and key in group:
                value = source[key]
                group[key] = tuple(value) if isinstance(value, list) else value


def _loss_scaler(engine: Any) -> Any:
    return getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)
