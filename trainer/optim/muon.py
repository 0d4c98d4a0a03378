"""Muon (Jordan, 2024) for the matrices of the blocks, and AdamW for embeddings, head, norms and biases: DeepSpeed's
`MuonWithAuxAdam`, which ZeRO-1 to 3 give whole matrices to orthogonalise.

It is built here because DeepSpeed would choose by names: what holds neither "embed" nor "lm_head" gets Muon there,
GPT-2's `wte` and `wpe` among it. The update of a matrix is scaled by sqrt(max(1, rows / columns)) of the tensor as it
is stored; GPT-2 stores its linears [in, out].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..families.specs import ParamSpec
from .base import Group, Optimizer, decayed, every
from .groups import RATE

_MUON = ("lr", "weight_decay", "momentum", "ns_method")
_ADAMW = ("lr", "weight_decay", "betas", "eps")


def hidden_matrix(spec: ParamSpec) -> bool:
    """The weights of the linears in the blocks."""
    return spec.linear and len(spec.shape) == 2 and spec.kind != "vocab"


def _build(groups: Sequence[dict[str, Any]], params: Mapping[str, Any]) -> Any:
    import torch
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group in groups:
        keys = _MUON if group["use_muon"] else _ADAMW
        for key in keys:
            if key in params:
                group.setdefault(key, params[key])
        if group["use_muon"] and params.get("muon_lr") is not None:
            group[RATE] = group.get(RATE, 1.0) * params["muon_lr"] / params["lr"]
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
            if parameter.device.type == "cpu":
                _without_compiler()
    return MuonWithAuxAdam(list(groups), adam_optimizer=torch.optim.AdamW)


def _without_compiler() -> None:
    """DeepSpeed compiles the iteration for every shape of matrix: on a CPU its matrix products gain nothing by it."""
    from deepspeed.runtime.zero.muon import muon_optimizer, original_muon

    for module in (original_muon, muon_optimizer):
        for name in ("zeropower_via_newtonschulz5", "zeropower_via_gram_newtonschulz", "muon_update"):
            if hasattr(module, name):
                function = getattr(module, name)
                setattr(module, name, getattr(function, "uncompiled", function))


MUON = Optimizer(
    types=("Muon",),
    states=("exp_avg", "exp_avg_sq"),
    keys=("lr", "muon_lr", "momentum", "betas", "eps", "weight_decay"),
    options=frozenset({"ns_method"}),
    groups=(
        Group(hidden_matrix, {"use_muon": True}, states=("momentum_buffer",)),
        Group(decayed, {"use_muon": False}),
        Group(every, {"use_muon": False, "weight_decay": 0.0}),
    ),
    build=_build,
    elementwise=False,
    zero_options={3: {"reduce_scatter": False}},
)
