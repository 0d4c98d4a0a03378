"""AdamW, which DeepSpeed builds; its "Adam" is the same with decoupled weight decay unless told otherwise."""

from __future__ import annotations

from .base import Group, Optimizer, decayed, every

ADAMW = Optimizer(
    types=("AdamW", "Adam"),
    states=("exp_avg", "exp_avg_sq"),
    keys=("lr", "betas", "eps", "weight_decay"),
    options=frozenset({"bias_correction", "torch_adam", "adam_w_mode", "foreach", "fused", "fp32_optimizer_states"}),
    groups=(Group(decayed), Group(every, {"weight_decay": 0.0})),
    params_of_device={"cpu": {"torch_adam": True}},  # DeepSpeed's own needs a compiler there
)
