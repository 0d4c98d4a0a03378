"""Reads DeepSpeed's own checkpoints, parameter by parameter: ZeRO 0-3 as `save_checkpoint` writes them, and universal.

They are pickles, and a pickle can run code: nothing here is opened unless the user vouches for it. Files are mapped,
not read, so that memory is that of one parameter. Keys and file names are those of DeepSpeed 0.19.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data_prep.errors import UserError
from ..checkpoint.reader import MASTER
from .deepspeed_files import (
    find_tag,
    first_optimizer_state,
    load_pickle,
    model_files,
    optimizer_files,
    optimizer_states,
    refuse_split_models,
)

_WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.")  # torch.compile, activation checkpointing
_UNIVERSAL_KINDS = {"fp32.pt": MASTER, "exp_avg.pt": "exp_avg", "exp_avg_sq.pt": "exp_avg_sq"}

_Run = Callable[[], Tensor]  # gives a run of consecutive elements of a parameter


@dataclass
class DeepSpeedCheckpoint:
    """A checkpoint of DeepSpeed's. Names are the module's own; shapes are None where it does not record them."""

    path: Path
    kind: str  # ZeRO-0 … ZeRO-3, universal
    shapes: dict[str, tuple[int, ...] | None] = field(default_factory=dict)
    runs: dict[str, dict[str, list[_Run]]] = field(default_factory=dict)  # by name and kind, in the tensor's order
    step: int = 0  # of the optimizer
    groups: list[dict[str, Any]] = field(default_factory=list)  # the optimizer's hyperparameters
    states: Mapping[str, Any] = field(default_factory=dict)  # what rank 0 wrote beside the tensors

    @property
    def names(self) -> list[str]:
        return sorted(self.runs)

    def kinds(self, name: str) -> list[str]:
        return sorted(self.runs.get(name, {}))

    def add(self, name: str, kind: str, run: _Run) -> None:
        """Notes the next run of elements of a tensor."""
        self.runs.setdefault(name, {}).setdefault(kind, []).append(run)

    def read(self, name: str, kind: str, shape: Sequence[int]) -> Tensor:
        """The whole tensor in fp32, contiguous, on the CPU.

        Raises:
            UserError: what is stored has another number of elements.
        """
        flat = torch.cat([run().reshape(-1) for run in self.runs[name][kind]])
        if flat.numel() != math.prod(shape):
            raise UserError(
                f"{self.path}: {kind} of {name} has {flat.numel()} elements, a shape of {list(shape)} needs "
                f"{math.prod(shape)}; is every rank's file there?"
            )
        return flat.to(torch.float32).view(tuple(shape))


def open_deepspeed(path: str | Path, trust: bool) -> DeepSpeedCheckpoint:
    """Opens a checkpoint: the folder given to `save_checkpoint`, one tag in it, or a universal folder.

    Args:
        trust: the user says that these files may be unpickled.

    Raises:
        UserError: not trusted, none there, incomplete, or of a kind that is not taken in, with what to do instead.
    """
    folder = find_tag(Path(path))
    if not trust:
        raise UserError(
            f"{folder}: DeepSpeed checkpoints are pickles, and opening a pickle can run any code that is in it; if you "
            "wrote these files or trust whoever did, say --trust"
        )
    if (folder / "zero").is_dir():
        return _universal(folder)
    refuse_split_models(folder)
    states = load_pickle(model_files(folder)[0])
    if not isinstance(states, dict) or "module" not in states:
        raise UserError(f"{model_files(folder)[0]}: not what DeepSpeed's save_checkpoint writes")
    if not optimizer_files(folder):
        return _stage_0(folder, states)
    return (
        _stage_3(folder, states) if "fp32_flat_groups" in first_optimizer_state(folder) else _stages_1_2(folder, states)
    )


def _stage_0(folder: Path, states: Mapping[str, Any]) -> DeepSpeedCheckpoint:
    """Without ZeRO the optimizer's state has numbers for names: the order of the parameters, group by group."""
    optimizer = states.get("optimizer")
    if not optimizer or "state" not in optimizer:
        raise UserError(
            f"{folder}: ZeRO-0 in bf16 or fp16 leaves no names with its master weights; load it with DeepSpeed and "
            "save it with zero_optimization.stage 1"
        )
    found = DeepSpeedCheckpoint(folder, "ZeRO-0", states=states)
    _take_module(found, states)
    order = _order_of_groups(folder, found.shapes, optimizer)
    for number, name in order.items():
        moments = _moments(optimizer["state"].get(number, {}))  # none before the first step
        for kind, tensor in moments.items():
            found.add(name, kind, _run(tensor))
    _take_scalars(found, optimizer)
    return found


def _order_of_groups(
    folder: Path, shapes: Mapping[str, tuple[int, ...] | None], optimizer: Mapping[str, Any]
) -> dict[int, str]:
    """Names by the optimizer's numbers: one group in the model's order, or matrices and vectors apart.

    Raises:
        UserError: the groups are others, so that names would be guesses.
    """
    groups, state = [group["params"] for group in optimizer["param_groups"]], optimizer["state"]
    trained = list(shapes)
    matrices = [name for name in trained if len(shapes[name] or ()) > 1]
    vectors = [name for name in trained if len(shapes[name] or ()) <= 1]
    for ordered in (trained, matrices + vectors, vectors + matrices):
        numbers = [number for group in groups for number in group]
        pairs = dict(zip(numbers, ordered, strict=False))
        moments = {number: next(iter(_moments(state.get(number, {})).values()), None) for number in pairs}
        same = all(m is None or tuple(m.shape) == shapes[pairs[number]] for number, m in moments.items())
        split = len(groups) == 1 or (len(groups) == 2 and len(groups[0]) in (len(matrices), len(vectors)))
        if len(numbers) == len(ordered) and same and split and (len(groups) > 1 or ordered is trained):
            return pairs
    raise UserError(
        f"{folder}: ZeRO-0 stores no names with the optimizer's {len(groups)} groups, and they are neither one group "
        "nor matrices and vectors apart; load it with DeepSpeed and save it with zero_optimization.stage 1"
    )


def _stages_1_2(folder: Path, states: Mapping[str, Any]) -> DeepSpeedCheckpoint:
    """Each rank holds a range of every group's flat tensor, and says which names lie where in it."""
    found = DeepSpeedCheckpoint(folder, "ZeRO-1 or 2", states=states)
    for own in optimizer_states(folder, states):
        found.kind = f"ZeRO-{int(own.get('zero_stage', 1))}"
        base = own["base_optimizer_state"]
        if isinstance(base, list):
            raise UserError(f"{folder}: written with zero_optimization.elastic_checkpoint; save it again without")
        if any(any(paddings) for paddings in own.get("param_alignment_paddings") or []):
            raise UserError(f"{folder}: written with zero_optimization.parameter_alignment; save it again without")
        for group, mapping in enumerate(own["param_slice_mappings"]):
            master, moments = own["single_partition_of_fp32_groups"][group], base["state"].get(group, {})
            for name, place in mapping.items():
                for kind, flat in ({MASTER: master} | _moments(moments)).items():
                    found.add(_plain(name), kind, _run(flat, place.start, place.numel))
        _take_scalars(found, base)
    for shapes in states["param_shapes"]:
        found.shapes |= {_plain(name): tuple(shape) for name, shape in shapes.items()}
    _take_module(found, states)  # frozen parameters have nothing in the optimizer
    return found


def _stage_3(folder: Path, states: Mapping[str, Any]) -> DeepSpeedCheckpoint:
    """Each rank holds an equal share of every parameter, the last one padded, one after the other in flat groups."""
    found = DeepSpeedCheckpoint(folder, "ZeRO-3", states=states)
    if states.get("frozen_param_shapes"):
        raise UserError(f"{folder}: ZeRO-3 with frozen parameters is not taken in; save it with stage 2")
    world = states["dp_world_size"]
    for rank, own in enumerate(optimizer_states(folder, states)):
        base = own["optimizer_state_dict"]
        for group, shapes in enumerate(states["param_shapes"]):
            flats = {MASTER: own["fp32_flat_groups"][group]} | _moments(base["state"].get(group, {}))
            offset = 0
            for name, shape in shapes.items():
                share = -(-math.prod(shape) // world)
                held = max(0, min(share, math.prod(shape) - rank * share))
                found.shapes[_plain(name)] = tuple(shape)
                for kind, flat in flats.items():
                    found.add(_plain(name), kind, _run(flat, offset, held))
                offset += share
        _take_scalars(found, base)
    return found


def _universal(folder: Path) -> DeepSpeedCheckpoint:
    """One folder for each parameter, its tensors whole (flat ones from stage 3)."""
    models = model_files(folder)
    found = DeepSpeedCheckpoint(folder, "universal", states=load_pickle(models[0]) if models else {})
    twice = found.states.get("shared_params") or {}  # the converter can write a tied head a second time
    for file in sorted((folder / "zero").glob("*/*.pt")):
        name = _plain(file.parent.name)
        if file.name in _UNIVERSAL_KINDS and file.parent.name not in twice:
            found.shapes[name] = None
            found.add(name, _UNIVERSAL_KINDS[file.name], _universal_run(file))
    state = folder / "zero" / "optimizer_state.pt"
    if not found.runs or not state.is_file():
        raise UserError(f"{folder}: not a whole universal checkpoint: zero/ lacks parameters or optimizer_state.pt")
    stored = load_pickle(state)
    base = stored.get("optimizer_state_dict") or {}
    steps = [load_pickle(file) for file in sorted((folder / "zero").glob("*/step.pt"))]
    entries = {number: {"step": step} for number, step in enumerate(steps)} or base.get("state", {})
    _take_scalars(found, {"state": entries, "param_groups": stored.get("param_groups") or base.get("param_groups", [])})
    return found


def _universal_run(file: Path) -> _Run:
    def read() -> Tensor:
        stored = load_pickle(file)
        return (stored["param"] if isinstance(stored, dict) else stored).detach()

    return read


def _take_module(found: DeepSpeedCheckpoint, states: Mapping[str, Any]) -> None:
    """Weights of the module itself, for names that have no master: all of ZeRO-0's, frozen ones elsewhere.

    Tied tensors are taken once, under their first name, as the optimizer has them.
    """
    seen = set()
    skipped = {*(states.get("buffer_names") or []), *(states.get("shared_params") or {})}
    for name, tensor in states["module"].items():
        where = (tensor.data_ptr(), tuple(tensor.shape))
        if name in skipped or where in seen or MASTER in found.runs.get(_plain(name), {}):
            continue
        seen.add(where)
        found.shapes[_plain(name)] = tuple(tensor.shape)
        found.add(_plain(name), MASTER, _run(tensor))


def _take_scalars(found: DeepSpeedCheckpoint, base: Mapping[str, Any]) -> None:
    """The optimizer's step, and its groups' hyperparameters.

    Raises:
        UserError: parameters have taken different numbers of steps, or it is Muon.
    """
    if any(group.get("use_muon") for group in base["param_groups"]):
        raise UserError(
            f"{found.path}: written with Muon, whose momentum ZeRO stores by layouts of its own; export the weights "
            "with DeepSpeed's zero_to_fp32.py, and continue from them with model.init"
        )
    steps = {int(state["step"]) for state in base["state"].values() if "step" in state} | ({found.step} - {0})
    if len(steps) > 1:
        raise UserError(f"{found.path}: parameters have taken different numbers of steps: {sorted(steps)}")
    found.step = steps.pop() if steps else 0
    found.groups = [{key: value for key, value in group.items() if key != "params"} for group in base["param_groups"]]


def _moments(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.dim() > 0}


def _run(flat: Tensor, start: int = 0, numel: int | None = None) -> _Run:
    return lambda: flat.detach().reshape(-1)[start : None if numel is None else start + numel]


def _plain(name: str) -> str:
    return _WRAPPERS.sub("", name)
