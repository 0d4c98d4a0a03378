"""Seconds of an optimizer step, predicted without running it: what is computed, sent and waited for.

Assumed of overlap: on a device with a queue, reductions of gradients run beside the backward pass where the JSON says
`overlap_comm`, and ZeRO-3's gathers beside both passes, `OVERLAP` of them hidden as far as there is something to hide
behind. Tensor parallelism's all-reduces, sequence parallelism's exchanges, a pipeline's messages and the gathers after
an update are waited for. A CPU hides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from ..plan.layout import Layout
from ..plan.settings import Settings
from ..plan.work import StageWork, known_family
from .compute import Passes, Training, stage_passes
from .hardware import Device
from .links import Links

OVERLAP = 0.8
# what the host does, in operations, fitted as those of `compute`
STEP_OPERATIONS, MICRO_OPERATIONS = 2000, 175  # of DeepSpeed's engine and ours
STAGE_OPERATIONS = 180  # and of a pipeline, for a micro batch
STEP_REDUCTIONS = 2  # small ones over all ranks: what a step weighs, its loss, the gradient's norm


@dataclass(frozen=True)
class Cost:
    """Seconds of a step, by what they are spent on."""

    compute: float  # forward and backward of this rank's layers
    recompute: float  # activations that checkpointing dropped
    tensor: float  # all-reduces of activations
    sequence: float  # exchanges of attention
    pipeline: float  # waiting for other stages, and messages between them
    data: float  # gradients and, with ZeRO, parameters, as far as nothing hides it
    update: float  # the optimizer, and what goes to the host and back
    host: float  # what the program itself takes
    tokens: int  # of the step
    utilisation: float  # model FLOPs over the peak

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(getattr(self, field.name) for field in fields(self)[:8])

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def predict(training: Training, layout: Layout, settings: Settings, device: Device) -> Cost:
    """The step of a layout.

    Args:
        settings: of the resolved JSON: batches, checkpointing, offload, buckets.
        device: one rank's; `crowding` says how many share it.
    """
    assert settings.micro_batch is not None and settings.accumulation is not None
    if layout.pipeline > 1:  # the engine runs ZeRO-0 in a pipeline as ZeRO-1
        layout = replace(layout, zero_stage=max(1, layout.zero_stage))
    micros, tokens = settings.accumulation, settings.micro_batch * training.seq_len // layout.sequence
    parts = training.parts(layout.tensor, layout.pipeline)
    passes = [
        stage_passes(training, part, settings, device, layout.tensor, tokens, part is parts[-1]) for part in parts
    ]
    inner = _crowding_within_a_stage(layout, device)
    tensor = [_tensor(training, layout, settings, device, part, tokens, part is parts[-1]) for part in parts]
    sequence = micros * _sequence(training, layout, settings, device, parts[0], tokens)
    paces = [own.both * inner + sent for own, sent in zip(passes, tensor, strict=True)]
    slowest = paces.index(max(paces))  # sets the pace; filling and draining take what the others need once
    again = micros * passes[slowest].again * inner
    computed = micros * passes[slowest].both * inner
    waiting = _waiting(training, layout, settings, device, paces, tokens, micros, inner)
    weights = [_data(layout, settings, device, part, own) for part, own in zip(parts, passes, strict=True)]
    updates = [_update(layout, settings, device, part) for part in parts]
    per_step = settings.micro_batch * micros * layout.data * training.seq_len
    cost = Cost(
        compute=computed - again,
        recompute=again,
        tensor=micros * tensor[slowest],
        sequence=sequence,
        pipeline=waiting,
        data=max(weights),
        update=max(updates) * device.crowding,
        host=_host(layout, device, micros),
        tokens=per_step,
        utilisation=0.0,
    )
    peak = layout.world / device.crowding * device.peak[settings.precision.products]
    return replace(cost, utilisation=training.flops * cost.tokens_per_second / peak)


def _crowding_within_a_stage(layout: Layout, device: Device) -> float:
    """Ranks for each processor among those of one pipeline stage, which all compute at the same time."""
    processors = layout.world / device.crowding
    return max(1.0, layout.world / layout.pipeline / processors)


def _tensor(
    training: Training, layout: Layout, settings: Settings, device: Device, part: StageWork, tokens: int, last: bool
) -> float:
    """All-reduces of a micro batch: two a block forward and two backward, and two more where it is computed again."""
    group = Links(device, layout.tensor, 1)
    width = known_family(training.model).value(training.model, "hidden_size")
    calls = part.blocks * (6 if settings.activation_checkpointing else 4) + 1 + last
    return group.reduce(calls * tokens * width * settings.precision.compute, calls)


def _sequence(
    training: Training, layout: Layout, settings: Settings, device: Device, part: StageWork, tokens: int
) -> float:
    """Queries, keys, values and the output change hands in both passes (Jacobs et al., arXiv:2309.14509)."""
    group = Links(device, layout.sequence, layout.tensor)
    family = known_family(training.model)
    heads, head = family.value(training.model, "num_attention_heads"), family.head_size(training.model)
    kv_heads = max(family.value(training.model, "num_key_value_heads") or heads, layout.sequence * layout.tensor)
    rounds = part.blocks * (3 if settings.activation_checkpointing else 2)
    one = tokens * (2 * heads + 2 * kv_heads) * head / layout.tensor * settings.precision.compute
    return group.exchange(rounds * one, rounds * 4)


def _waiting(
    training: Training,
    layout: Layout,
    settings: Settings,
    device: Device,
    paces: Sequence[float],
    tokens: int,
    micros: int,
    inner: float,
) -> float:
    """What a step takes beyond the slowest stage's own work: filling, draining, messages.

    Where stages share processors, those that wait leave theirs to the others: then all work together is the bound.
    """
    if layout.pipeline == 1:
        return 0.0
    width = known_family(training.model).value(training.model, "hidden_size")
    group = Links(device, layout.pipeline, layout.world // layout.pipeline)
    # Megatron-LM's tensor ranks send a part each and gather it on the other node (arXiv:2104.04473, 4.1)
    shares = layout.tensor if training.interleave > 1 else 1
    message = group.send(tokens * width * settings.precision.stream / shares)
    fill = (sum(paces) - max(paces) + 2 * (layout.pipeline - 1) * message) / training.interleave
    path = micros * (max(paces) + 2 * training.interleave * message) + fill
    together = micros * sum(paces) / layout.pipeline * device.crowding / inner
    return max(path, together) - micros * max(paces)


def _data(layout: Layout, settings: Settings, device: Device, part: StageWork, passes: Passes) -> float:
    """Gradients, and parameters that ZeRO has cut, over the ranks that hold the same weights."""
    group = Links(device, layout.data * layout.sequence, layout.tensor)
    if group.size == 1:
        return 0.0
    assert settings.accumulation is not None
    trained, frozen = part.trained, part.frozen
    width, micros = settings.precision.width, settings.accumulation
    buckets = max(1, -(-trained // max(1, settings.reduce_bucket_size)))
    if layout.zero_stage == 0:
        return group.reduce(width * trained, buckets)
    if layout.zero_stage < 3:
        reduced = group.reduce(width * trained, buckets)
        overlaps = settings.overlap_comm and layout.pipeline == 1
        exposed = _exposed(reduced, passes.backward + passes.again, device, overlaps)
        times = micros if layout.zero_stage == 2 else 1
        return times * exposed + group.gather(width * trained, max(1, buckets))
    split = sum(size > settings.persistence_threshold for size in part.sizes)
    keeps = trained + frozen <= settings.max_reuse_distance  # then what forward gathered is still there in backward
    times = 1 if keeps else 3 if settings.activation_checkpointing else 2
    gathered = times * group.gather(width * (trained + frozen), split)
    scattered = group.gather(width * trained, buckets)
    return micros * _exposed(gathered + scattered, passes.both, device, True)


def _exposed(seconds: float, beside: float, device: Device, overlaps: bool) -> float:
    return seconds - OVERLAP * min(seconds, beside) if device.queued and overlaps else seconds


def _update(layout: Layout, settings: Settings, device: Device, part: StageWork) -> float:
    """The optimizer on a rank's share, where its states are; and the way to the host and back."""
    trained, frozen, width = part.trained, part.frozen, settings.precision.width
    replicas = layout.data * layout.sequence
    own = trained / replicas if layout.zero_stage > 0 else trained
    if not layout.offload_optimizer:
        return own * device.update_bytes / device.bandwidth
    assert settings.accumulation is not None
    downs = settings.accumulation if layout.zero_stage >= 2 else 1
    moved = own * (downs * width + width)
    if layout.offload_param:
        moved += 2 * settings.accumulation * width * (trained + frozen) / replicas
    return own * device.update_bytes / device.host_bandwidth + moved / device.host.bandwidth


def _host(layout: Layout, device: Device, micros: int) -> float:
    """The program's own work, which a queue hides but for that of the step."""
    operations = STEP_OPERATIONS
    if not device.queued:
        operations += micros * (MICRO_OPERATIONS + (STAGE_OPERATIONS if layout.pipeline > 1 else 0))
    everyone = Links(device, layout.world, 1)
    return operations * device.dispatch * device.crowding + STEP_REDUCTIONS * everyone.latency
