"""A live DeepSpeed engine's master weights and optimizer state, as views of the storage that it trains on.

One shape for every ZeRO stage: a rank holds flat range [start, stop) of its (tensor-parallel) tensor, once as master
weight and once per moment. Reading a view saves, writing into it loads. Names of DeepSpeed 0.19 that are not public
are used here and nowhere else; the round-trip tests guard them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..families.specs import ParamSpec
from ..ranks.ranks import Ranks
from .boxes import Box, flat_index, strides
from .reader import MASTER


@dataclass(frozen=True)
class Live:
    """What is saved from and loaded into: DeepSpeed's engine between two steps, and which of its parameters.

    `parameters`: (Hugging Face name, parameter that carries `.spec`), tied ones once, the same on all ranks of a
    pipeline stage. Those that are not named are neither saved nor loaded. `buffers` belong to the weights and are not
    trained: fp32, whole on every rank.
    """

    engine: Any
    parameters: Sequence[tuple[str, Parameter]]
    ranks: Ranks
    buffers: Sequence[tuple[str, Tensor]] = ()


@dataclass(frozen=True)
class Holding:
    """What this rank holds of one parameter: elements [start, stop) of its row-major (tensor-parallel) tensor.

    `views` maps "master" and each moment to a 1-D tensor of those elements, a view of what the engine trains on.
    Replica `replica` of the `replicas` data-parallel ranks that hold the same elements.
    """

    name: str
    spec: ParamSpec
    parameter: Parameter
    start: int
    stop: int
    replica: int
    replicas: int
    local_shape: tuple[int, ...]
    views: Mapping[str, Tensor]

    def view(self, kind: str, local: Box) -> Tensor:
        """The elements of a box of the local tensor (which must lie within [start, stop)), as a view."""
        flat = self.views[kind]
        offset = flat.storage_offset() + flat_index(local.offset, self.local_shape) - self.start
        return flat.as_strided(local.shape, strides(self.local_shape), offset)


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer proper, beneath DeepSpeed's wrappers."""
    optimizer = engine.optimizer
    while not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def is_torchs(base: Any) -> bool:
    """Whether torch made the optimizer, or the one in it that counts steps; DeepSpeed's own count them otherwise."""
    return type(getattr(base, "aux_optimizer", None) or base).__module__.startswith("torch.")


def moment_kinds(engine: Any) -> list[str]:
    """Names of the optimizer's tensor states (exp_avg, exp_avg_sq, …); none before the first step."""
    states = base_optimizer(engine).state.items()
    return sorted({key for _, state in states for key, value in state.items() if _is_moment(value)})


def _is_moment(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def kinds_of(parameters: Iterable[Any], kinds: Sequence[str]) -> Callable[[Any], list[str]]:
    """Which states an optimizer keeps of one of `parameters`: those that its `.states` names, where its group has some
    of its own, else those of `kinds` that no other group has for itself. None before the first step, without `kinds`.
    """
    taken = {kind for p in parameters for kind in getattr(p, "states", ())}

    def of(p: Any) -> list[str]:
        own = getattr(p, "states", None)
        return [kind for kind in kinds if kind not in taken] if own is None else list(own if kinds else ())

    return of


def holdings(live: Live) -> list[Holding]:
    """What this rank holds of every parameter and buffer, sorted by name; an empty range where it holds nothing."""
    wrapped = _wrapped_masters(live.engine)
    found = [_holding(live, name, p, wrapped) for name, p in live.parameters]
    return sorted([*found, *(_whole(live, *named) for named in live.buffers)], key=lambda holding: holding.name)


def _whole(live: Live, name: str, buffer: Tensor) -> Holding:
    spec, copies = ParamSpec(name, tuple(buffer.shape)), (live.ranks.replica, live.ranks.replicas)
    own = {MASTER: buffer.detach().view(-1)}
    return Holding(name, spec, buffer, 0, buffer.numel(), *copies, spec.shape, own)  # type: ignore[arg-type]


def _holding(live: Live, name: str, p: Parameter, wrapped: Mapping[Parameter, _FlatRange]) -> Holding:
    engine, ranks, spec = live.engine, live.ranks, p.spec  # type: ignore[attr-defined]
    if hasattr(p, "ds_id"):
        start, stop, flat = _zero3_range(engine.optimizer, p)
    elif p in wrapped:
        start, stop, flat = 0, p.numel(), wrapped[p]
    elif hasattr(p, "_hp_mapping"):
        start, stop, flat = _zero12_range(engine, p)
    else:
        start, stop, flat = 0, p.numel(), _FlatRange(p, 0, p.numel())
    replica, replicas = 0, 1
    if not _partitioned(p):  # every data-parallel rank holds it whole
        replica, replicas, _ = ranks.holders(spec.axis)
    views = flat.views(base_optimizer(engine).state) if flat is not None else {}
    local_shape = spec.local_shape(*ranks.along(spec.axis)[:2])
    return Holding(name, spec, p, start, stop, replica, replicas, local_shape, views)


def _partitioned(p: Parameter) -> bool:
    """Whether ZeRO has split this parameter's master over the data-parallel ranks."""
    return hasattr(p, "ds_id") or hasattr(p, "_hp_mapping")


@dataclass(frozen=True)
class _FlatRange:
    """A range of one of the optimizer's own tensors, and where it lies in states that hold matrices whole."""

    tensor: Tensor
    offset: int
    numel: int
    offset_of_states: int | None = None  # None: as in the tensor

    def views(self, state: Mapping[Any, Mapping[str, Any]]) -> dict[str, Tensor]:
        moments = {key: value for key, value in state.get(self.tensor, {}).items() if _is_moment(value)}
        offset = self.offset if self.offset_of_states is None else self.offset_of_states
        own = {MASTER: self.tensor.detach().view(-1).narrow(0, self.offset, self.numel)}
        return own | {key: t.detach().view(-1).narrow(0, offset, self.numel) for key, t in moments.items()}


def _zero3_range(zero: Any, p: Any) -> tuple[int, int, _FlatRange]:
    """Equal flat partitions, the last ones padded; frozen parameters have no master and stand for themselves."""
    size = p.ds_tensor.ds_numel
    start, stop = (min(p.ds_zero_partition_rank * size + n, p.ds_numel) for n in (0, size))
    if not p.requires_grad:
        return start, stop, _FlatRange(p.ds_tensor, 0, stop - start)
    group, offset, _ = zero.grad_position[zero.get_param_id(p)]
    return start, stop, _FlatRange(zero.fp32_partitioned_groups_flat[group], offset, stop - start)


def _zero12_range(engine: Any, p: Any) -> tuple[int, int, _FlatRange | None]:
    """A range of the group's flat partition. Read by address: DeepSpeed links the moments only after a step."""
    mapping = p._hp_mapping
    if mapping is None:
        return 0, 0, None
    flat = base_optimizer(engine).param_groups[mapping.param_group_index]["params"][0]
    local, inside = mapping.lp_fragment_address, mapping.hp_fragment_address
    begins = _begin_of_matrix(engine.optimizer, mapping.param_group_index, p)
    of_states = None if begins is None else begins + local.start
    return local.start, local.start + local.numel, _FlatRange(flat, inside.start, inside.numel, of_states)


def _matrices(zero: Any, group: int) -> list[Parameter] | None:
    """The matrices of which ZeRO-1 and 2 keep Muon's momentum whole, one after the other: all that touch this rank's
    partition. None where states are partitioned as the weights are.
    """
    matrices = getattr(zero, "params_in_partition", {group: []})[group]
    if getattr(zero, "cpu_offload", False) or not matrices or not getattr(matrices[0], "use_muon", False):
        return None
    return matrices


def _begin_of_matrix(zero: Any, group: int, p: Parameter) -> int | None:
    matrices = _matrices(zero, group)
    if matrices is None:
        return None
    return sum(matrix.numel() for matrix in itertools.takewhile(lambda matrix: matrix is not p, matrices))


def whole_states(live: Live) -> list[Holding]:
    """Of every matrix whose momentum this rank keeps whole though it holds a part of its weights: all of the momentum,
    as a holding of nothing else. What has been loaded must be put here too.
    """
    found, zero = [], live.engine.optimizer
    for name, p in live.parameters:
        mapping = getattr(p, "_hp_mapping", None)
        begin = None if mapping is None else _begin_of_matrix(zero, mapping.param_group_index, p)
        if mapping is None or begin is None:
            continue
        base = base_optimizer(live.engine)
        states = base.state.get(base.param_groups[mapping.param_group_index]["params"][0], {})
        views = {key: t.narrow(0, begin, p.numel()) for key, t in states.items() if _is_moment(t)}
        shape = p.spec.local_shape(*live.ranks.along(p.spec.axis)[:2])  # type: ignore[attr-defined]
        found.append(Holding(name, p.spec, p, 0, p.numel(), 0, 1, shape, views))  # type: ignore[attr-defined]
    return found


def _wrapped_masters(engine: Any) -> dict[Parameter, _FlatRange]:
    """Masters of DeepSpeed's fp16 wrappers without ZeRO: one flat tensor per group (fused), or one per parameter."""
    found: dict[Parameter, _FlatRange] = {}
    optimizer: Any = engine.optimizer
    groups: list[list[Parameter]] = getattr(optimizer, "fp16_groups", [])
    for index, group in enumerate(groups):
        if hasattr(optimizer, "fp32_groups_flat"):
            offset = 0
            for p in group:
                found[p] = _FlatRange(optimizer.fp32_groups_flat[index], offset, p.numel())
                offset += p.numel()
        elif hasattr(optimizer, "fp32_groups"):
            masters = optimizer.fp32_groups[index]
            found.update({p: _FlatRange(master, 0, master.numel()) for p, master in zip(group, masters, strict=True)})
    return found


def create_state(engine: Any, kinds: Sequence[str], scalars: Mapping[str, float]) -> None:
    """Gives the optimizer zero moments and the step count, which it would otherwise create in its first step."""
    base, zero = base_optimizer(engine), engine.optimizer
    base.state.clear()
    flats = _flats(base, zero)
    own_kinds = kinds_of((member for _, member in flats), kinds)
    for number, (flat, member) in enumerate(flats):
        if not kinds and not scalars:
            continue
        dtype = torch.float32 if getattr(base, "fp32_optimizer_states", False) else flat.dtype
        if hasattr(member, "states") and hasattr(member, "ds_id"):  # stage 3 gathers Muon's momentum as it is
            dtype = zero.communication_data_type
        matrices = _matrices(zero, number)
        like = flat if matrices is None else flat.new_empty(sum(matrix.numel() for matrix in matrices))
        state = {kind: torch.zeros_like(like, dtype=dtype, requires_grad=False) for kind in own_kinds(member)}
        counted = {} if hasattr(member, "states") else scalars
        base.state[flat] = {**state, **{key: _scalar(base, flat, value) for key, value in counted.items()}}
    if hasattr(zero, "_hp_optimizer_states_linked"):  # its links still hold the old moments: cut until the next step
        zero._hp_optimizer_states_linked = False
        for p in engine.module.parameters():
            if getattr(p, "_hp_mapping", None) is not None:
                p._hp_mapping.optim_fragment = None


def _flats(base: torch.optim.Optimizer, zero: Any) -> list[tuple[Tensor, Any]]:
    """The tensors that the optimizer has states of, and one of the parameters in each."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3 hands them to the optimizer one at a time
        flats, members = zero.fp32_partitioned_groups_flat, zero.fp16_groups
    else:
        flats = [flat for group in base.param_groups for flat in group["params"]]
        members = getattr(zero, "bit16_groups", None) or [[flat] for flat in flats]
    return [(flat, own[0]) for flat, own in zip(flats, members, strict=True)]


def _scalar(base: torch.optim.Optimizer, flat: Tensor, value: float) -> Tensor | int:
    """torch counts steps in a tensor (on the device where its kernels read it there); DeepSpeed's Adams in an int."""
    if not is_torchs(base):
        return int(value)
    on_device = base.defaults.get("capturable") or base.defaults.get("fused")
    return torch.tensor(float(value), dtype=torch.float32, device=flat.device if on_device else "cpu")


@torch.no_grad()
def refresh_model(engine: Any, held: Sequence[Holding]) -> None:
    """Brings the model's own (low-precision, gathered) copies up to the master weights. Collective under ZeRO."""
    if hasattr(engine.optimizer, "update_lp_params"):
        engine.optimizer.update_lp_params()
    if hasattr(engine.optimizer, "invalidate_secondary_tensor"):
        engine.optimizer.invalidate_secondary_tensor()
    whole = []
    for holding in held:
        p: Any = holding.parameter
        if hasattr(p, "ds_id"):
            p.ds_tensor.data[: holding.stop - holding.start].copy_(holding.views[MASTER])
            whole.append(p)
        elif not _partitioned(p):
            p.data.view(-1).copy_(holding.views[MASTER])
    _refresh_gathered(whole)


def _refresh_gathered(parameters: Sequence[Any]) -> None:
    """Small parameters stay whole on every rank of stage 3 and are gathered only after a step: gather those at once."""
    import deepspeed.comm as dist
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    ready = [p for p in parameters if p.ds_status == ZeroParamStatus.AVAILABLE]
    for dtype, group in dict.fromkeys((p.dtype, p.ds_process_group) for p in ready):
        these = [p for p in ready if p.dtype == dtype and p.ds_process_group is group]
        own = torch.cat([p.ds_tensor.data.to(p.device).view(-1) for p in these])
        flat = own.new_empty(these[0].ds_zero_partition_world_size * own.numel())
        dist.all_gather_into_tensor(flat, own, group=group)
        parts = flat.view(-1, own.numel()).split([p.ds_tensor.numel() for p in these], dim=1)
        for p, part in zip(these, parts, strict=True):
            p.data.copy_(part.reshape(-1)[: p.ds_numel].view(p.ds_shape))
