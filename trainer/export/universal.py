"""Writes a checkpoint as a DeepSpeed universal folder, which loads on ZeRO-1, 2 and 3 of any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...data_prep.durable import publishing
from ...data_prep.errors import UserError
from ..checkpoint.reader import MASTER, Checkpoint

_MOST_GROUPS = 1024
_FILES = {MASTER: "fp32.pt", "exp_avg": "exp_avg.pt", "exp_avg_sq": "exp_avg_sq.pt"}


def write_universal(source: str | Path, output: str | Path, prefix: str = "", overwrite: bool = False) -> Path:
    """Writes `output/step-…` and `output/latest_universal`; memory is that of one parameter.

    Args:
        source: a run directory (its newest whole checkpoint) or one checkpoint.
        prefix: what the module that will load it puts before Hugging Face's names, such as "model.".

    Returns:
        The folder to give to `load_checkpoint`, with `{"checkpoint": {"load_universal": true}}` in the JSON.

    Raises:
        UserError: no whole checkpoint, or the output is there already.
    """
    checkpoint, output = Checkpoint.open(source), Path(output)
    if checkpoint.state.get("adapter", "none") != "none":
        raise UserError(
            f"{source}: holds an adapter, not a model that DeepSpeed could go on from; use `zeropipe export`"
        )
    if "momentum_buffer" in checkpoint.state["engine"]["kinds"]:
        raise UserError(
            f"{source}: holds Muon's momentum_buffer, which DeepSpeed's universal checkpoints have no place for; use "
            "`zeropipe export` for the weights"
        )
    with publishing(output, overwrite) as folder:
        tag = checkpoint.path.name
        _write(checkpoint, folder / tag, prefix)
        (folder / "latest_universal").write_text(tag)
    return output


def _write(checkpoint: Checkpoint, folder: Path, prefix: str) -> None:
    import torch

    step = checkpoint.state["engine"]["scalars"].get("step", 0.0)
    for name in checkpoint.names():
        place = folder / "zero" / (prefix + name)
        place.mkdir(parents=True)
        for kind in checkpoint.kinds(name):
            if kind in _FILES:
                torch.save({"param": checkpoint.read(name, kind)}, place / _FILES[kind])
        torch.save(torch.tensor(step), place / "step.pt")
    torch.save(_optimizer_state(step), folder / "zero" / "optimizer_state.pt")
    states = _model_states(checkpoint)
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):  # ZeRO-1 and 2; ZeRO-3
        torch.save(states, folder / name)


def _optimizer_state(step: float) -> dict[str, Any]:
    """Groups without hyperparameters: those of the JSON stay. DeepSpeed loads no more groups than are listed here."""
    import torch

    state = {"state": {0: {"step": torch.tensor(step)}}, "param_groups": [{}]}
    return {"ds_version": _version(), "param_groups": [{} for _ in range(_MOST_GROUPS)], "optimizer_state_dict": state}


def _model_states(checkpoint: Checkpoint) -> dict[str, Any]:
    counters = checkpoint.state["engine"]["counters"]
    return {
        "module": {},  # universal loading takes the weights from zero/
        "lr_scheduler": checkpoint.state["engine"]["scheduler"],
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": _version(),
        "zeropipe": {key: checkpoint.state.get(key) for key in ("step", "samples_consumed", "model_config")},
        **counters,
    }


def _version() -> str:
    import deepspeed

    return deepspeed.__version__
