"""Memory of one rank, planned without torch, by what DeepSpeed 0.19.8 allocates on each ZeRO stage.

Weights, gradients and optimizer states are exact, the padding of flat buffers included; the rest is an estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ...data_prep.sizes import format_bytes
from ..families.specs import ParamSpec, padded_vocab
from .activations import activation_bytes
from .layout import Layout
from .rank_sizes import Sizes, round_up, stage_sizes
from .settings import BUCKET, Settings

_GATHER_CACHE = 256 << 20  # DeepSpeed's own bound, in bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank. All but `host` and `snapshot` are on the accelerator; on a CPU both are the same memory."""

    parameters: int  # the weights that compute, whole or this rank's part of them
    gradients: int  # at the end of the backward pass, before ranks exchange them
    optimizer: int  # fp32 master weights and the optimizer's states
    buffers: int  # of communication, and parameters gathered by ZeRO-3
    activations: int  # at the peak of the backward pass
    update: int  # gradients that are left and their copies in the optimizer's step, when activations are gone
    host: int  # offloaded
    snapshot: int = 0  # on the host, from the first save on: what checkpoints are written from while training goes on

    @property
    def peak(self) -> int:
        """The most that is held at once on the accelerator."""
        return self.parameters + self.optimizer + max(self.gradients + self.buffers + self.activations, self.update)


def estimate_memory(
    model: Mapping[str, Any],
    layout: Layout,
    settings: Settings,
    seq_len: int,
    partition: str = "parameters",
    rows: Callable[[Sequence[ParamSpec]], list[ParamSpec]] = list,
    embedding_rate: float = 1.0,
    uniform: bool = True,
    mlp_tile: int = 0,
    stages: Sequence[tuple[Sizes, int]] | None = None,
) -> MemoryEstimate:
    """Memory of the heaviest rank.

    Args:
        model: complete configuration of a family that has a parameter table.
        settings: of the resolved JSON.
        partition: how a pipeline's layers are shared out.
        rows: puts the rows of an adapter beside those of a stage.
        embedding_rate: of embedding and head, which then are groups of their own.
        uniform, mlp_tile: as `activation_bytes`.
        stages: what `stage_sizes` says, for callers that estimate many layouts of one model.
    """
    assert settings.micro_batch is not None and settings.accumulation is not None
    if stages is None:
        shape = model, layout.tensor, layout.pipeline, partition
        stages = stage_sizes(*shape, settings.optimizer, rows, embedding_rate, layout.expert)
    tokens = settings.micro_batch * seq_len // layout.sequence
    estimates = []
    for number, (sizes, blocks) in enumerate(stages):
        last = number == layout.pipeline - 1
        states = _STATES[layout.zero_stage](sizes, layout, settings)
        activations = activation_bytes(
            model,
            settings.precision,
            tokens,
            blocks,
            in_flight=min(layout.pipeline - number, settings.accumulation),
            checkpointing=settings.activation_checkpointing,
            mlp_tile=mlp_tile,
            head=last,
            uniform=uniform,
            padded_vocab=padded_vocab(model["vocab_size"], layout.tensor),
            tensor=layout.tensor,
        )
        if last:
            activations += _head_gradient(sizes, layout, settings)
        snapshot = _written(sizes, layout, settings)
        estimates.append(MemoryEstimate(**states, activations=activations, snapshot=snapshot))
    return max(estimates, key=lambda estimate: estimate.peak + estimate.host)


def _head_gradient(sizes: Sizes, layout: Layout, settings: Settings) -> int:
    """Gradient of the head's weight: it is there before the backward pass begins, whole, as the products' type has it.

    ZeRO-0 and 1 count it among the gradients, but for one that is going to be added to those of earlier micro batches.
    """
    if layout.zero_stage < 2 and settings.accumulation == 1:
        return 0
    return settings.precision.compute * sizes.head


def _written(sizes: Sizes, layout: Layout, settings: Settings) -> int:
    """Bytes that a rank writes of a checkpoint: of what is trained, fp32 weight and states; of what an adapter keeps
    beside it, the weight. Ranks that hold the same share the writing; what only tensor-parallel ones do is neglected.
    """
    replicas = layout.data * layout.sequence
    own = zip(sizes.state_bytes, sizes.groups, sizes.holders(replicas, layout.expert), strict=True)
    trained = sum((4 + of) * round_up(sum(group), ranks) // ranks for of, group, ranks in own)
    return trained + round_up(settings.precision.width * sizes.beside, replicas) // replicas


def _no_zero(sizes: Sizes, layout: Layout, settings: Settings) -> dict[str, int]:
    """Everything whole on every rank; the all-reduce copies gradients into flat buckets."""
    elements, width = sum(sizes.trained), settings.precision.width
    master = 4 * elements if width == 2 else 0
    copies = width * min(elements, BUCKET) if layout.data * layout.sequence > 1 else 0
    return {
        "parameters": width * sum(sizes.all) + sum(sizes.packed) + sizes.scales,
        "gradients": width * elements,
        "optimizer": sum(of * sum(own) for of, own in zip(sizes.state_bytes, sizes.groups, strict=True)) + master,
        "buffers": 0,
        "update": width * elements + max(copies, master),
        "host": 0,
    }


def _zero_1_and_2(sizes: Sizes, layout: Layout, settings: Settings) -> dict[str, int]:
    """runtime/zero/stage_1_and_2.py: each group is one flat buffer, padded to 2 x ranks and cut into equal partitions;
    the master weights are a copy even in fp32."""
    width, ranks = settings.precision.width, layout.data * layout.sequence
    holders = sizes.holders(ranks, layout.expert)
    flats = [round_up(sum(group), 2 * over) for group, over in zip(sizes.groups, holders, strict=True)]
    partitions = [flat // over for flat, over in zip(flats, holders, strict=True)]
    part, owned = sum(partitions), _owned(sizes.groups, partitions)
    accumulates, sums = settings.accumulation != 1, settings.sum_width
    bucket = sums * settings.reduce_bucket_size
    buckets = bucket * (2 if settings.overlap_comm else 1)
    whole = width * sum(sizes.trained)
    gradients = whole if layout.zero_stage == 1 else width * owned * (1 + accumulates)
    if sums > width:  # stage 1: BF16_Optimizer's flat buffers, of all; stage 2: one of this rank's partition
        gradients = sums * sum(flats) if layout.zero_stage == 1 else width * owned + sums * part
    whole_base = width * sum(sizes.frozen) + sum(sizes.packed) + sizes.scales
    states = {"parameters": width * sum(flats) + whole_base, "buffers": buckets}
    if not layout.offload_optimizer:
        # the step copies one group's gradients at a time: into one tensor, which bf16 and fp16 copy once more, to fp32
        update = width * owned + max((6 if width == 2 else 4) * partition for partition in partitions)
        optimizer = 4 * part + _moments(sizes, partitions, width)
        return {**states, "gradients": gradients, "optimizer": optimizer, "update": update, "host": 0}
    largest = max(sizes.trained)
    moments = sum(of * partition for of, partition in zip(sizes.state_bytes, partitions, strict=True))
    on_host = moments + (8 + width) * part + width * largest + (width * owned if accumulates else 0)
    # gradients alone once, then with their momenta
    states["buffers"] += width * largest + 3 * _gathers(sizes, ranks, 4, sum(sizes.trained))
    gradients = whole if layout.zero_stage == 1 else width * owned
    return {**states, "gradients": gradients, "optimizer": 0, "update": 0, "host": on_host}


def _zero_3(sizes: Sizes, layout: Layout, settings: Settings) -> dict[str, int]:
    """runtime/zero/stage3.py: each parameter is cut into equal partitions; small ones stay whole beside theirs, unless
    there is but one rank. In fp32 the partition could be its own master weight, but DeepSpeed compares a device with a
    string and makes a copy."""
    width, ranks = settings.precision.width, layout.data * layout.sequence
    by_group = zip(sizes.groups, sizes.holders(ranks, layout.expert), strict=True)
    partitions = [[round_up(size, over) // over for size in group] for group, over in by_group]
    part = sum(map(sum, partitions))
    frozen, packed = (sum(round_up(size, ranks) // ranks for size in own) for own in (sizes.frozen, sizes.packed))
    resting = width * (part + frozen) + packed
    small, small_packed = (_persistent(own, settings) if ranks > 1 else 0 for own in (sizes.all, sizes.packed))
    gathered = width * _gathered(sizes.all, settings) + _gathered(sizes.packed, settings)
    as_wide = zip(sizes.state_bytes, sizes.whole, partitions, strict=True)
    moments = sum(of * (width if whole else 4) // 4 * sum(own) for of, whole, own in as_wide)
    states = 4 * part + moments  # fp32 master weights, and their states
    gradients = settings.sum_width * part
    bucket = width * settings.reduce_bucket_size
    second = width * sum(round_up(size, settings.hpz) // settings.hpz for size in sizes.all) if settings.hpz > 1 else 0
    copies = 4 * max(map(sum, partitions))  # the step's fp32 gradients of one group
    on_host = (resting if layout.offload_param else 0) + (
        states + gradients + 4 * part if layout.offload_optimizer else 0
    )
    return {
        "parameters": width * small + small_packed + sizes.scales + (0 if layout.offload_param else resting),
        "gradients": 0 if layout.offload_optimizer else gradients,
        "optimizer": 0 if layout.offload_optimizer else states,
        "buffers": bucket
        + second
        + (gathered if ranks > 1 else 0)
        + _gathers(sizes, ranks, width, settings.reduce_bucket_size),
        "update": bucket + (0 if layout.offload_optimizer else gradients + copies),
        "host": on_host,
    }


_STATES = {0: _no_zero, 1: _zero_1_and_2, 2: _zero_1_and_2, 3: _zero_3}


def _moments(sizes: Sizes, partitions: Sequence[int], width: int) -> int:
    """Bytes of the optimizer's states under ZeRO-1 and 2: of a rank's partition; or, of those that are kept whole (as
    wide as gradients, and a second time, for a step that may be skipped), of all the parameters that touch it.
    """
    own = zip(sizes.groups, sizes.state_bytes, sizes.whole, partitions, strict=True)
    return sum(of * width // 4 * 2 * _owned([group], [part]) if whole else of * part for group, of, whole, part in own)


def _gathers(sizes: Sizes, ranks: int, width: int, most: int) -> int:
    """Bytes that are kept for gathering the gradients of whole matrices, of at most `most` elements at a time."""
    matrices = sum(sum(group) for group, whole in zip(sizes.groups, sizes.whole, strict=True) if whole)
    return min(_GATHER_CACHE, width * (1 + ranks) * (round_up(min(matrices, most), ranks) // ranks)) if ranks > 1 else 0


def _owned(groups: Sequence[Sequence[int]], partitions: Sequence[int]) -> int:
    """Elements of the parameters that touch one rank's partition: the most that any rank has.

    ZeRO-1 and 2 keep the gradients of such parameters whole.
    """
    most: dict[int, int] = {}
    for group, partition in zip(groups, partitions, strict=True):
        start = 0
        for size in group:
            for rank in range(start // partition, (start + size - 1) // partition + 1):
                most[rank] = most.get(rank, 0) + size
            start += size
    return max(most.values())


def _persistent(sizes: Sequence[int], settings: Settings) -> int:
    return sum(size for size in sizes if size <= settings.persistence_threshold)


def _gathered(sizes: Sequence[int], settings: Settings) -> int:
    """Elements of gathered parameters: released only if not used again within the reuse distance, which holds a small
    model whole between forward and backward."""
    rest = sum(sizes) - _persistent(sizes, settings)
    if rest <= settings.max_reuse_distance:
        return min(rest, settings.max_live_parameters)
    return min(rest, max(sizes) + settings.prefetch_bucket_size)


def memory_rows(estimate: MemoryEstimate) -> list[tuple[str, str]]:
    """Name and size of each part, for a table."""
    return [(field.name, format_bytes(getattr(estimate, field.name))) for field in fields(estimate)]
