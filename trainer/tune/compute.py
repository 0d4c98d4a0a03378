"""Seconds that one rank computes on a micro batch: a roofline of products, attention and everything element-wise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..families.specs import ParamSpec, parameter_table
from ..plan.activations import kept_by_block
from ..plan.settings import Settings
from ..plan.stages import split_layers
from ..plan.work import Product, StageWork, attention_flops, head_product, known_family, model_flops, stage_work
from .hardware import Device

# what the host does, in operations (`Device.dispatch`), fitted on a GPT-2 of four layers on two cores
OPERATIONS = 40  # of a block's forward pass; twice as many of its backward pass
HOOKS = {0: 1, 1: 4, 2: 18, 3: 120}  # and DeepSpeed's, for a parameter in a micro batch, by ZeRO stage
FORWARD = 0.4  # share of the element-wise traffic that the forward pass has
FLASH_BACKWARD = 2.5  # fused attention computes its scores again in the backward pass (arXiv:2205.14135, 3.1)
SCORES = 5  # bytes that unfused attention keeps for a score (arXiv:2205.05198, table 2)


@dataclass(frozen=True)
class Training:
    """What is trained, whatever the layout.

    `fused` and `interleave` describe others' programs, for comparison with what they published: whether attention keeps
    no scores, and how many stretches of layers each pipeline stage has (arXiv:2104.04473, 2.2). Ours has one.
    """

    model: Mapping[str, Any]
    seq_len: int
    partition: str = "parameters"
    rows: Callable[[Sequence[ParamSpec]], list[ParamSpec]] = list  # puts an adapter's rows beside those of a stage
    uniform: bool = True  # whether all tokens count alike; else the head's logits are computed twice
    fused: bool = True
    interleave: int = 1
    _parts: dict[tuple[int, int], list[StageWork]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def flops(self) -> float:
        """Of a token, as `model_flops` counts them."""
        return model_flops(self.model, self.seq_len)

    def parts(self, tensor: int, pipeline: int) -> list[StageWork]:
        """The stages as the plan cuts them; kept, for a search asks for the same ones again and again."""
        if (tensor, pipeline) not in self._parts:
            stages = split_layers(parameter_table(self.model, tensor), pipeline, self.partition)
            self._parts[tensor, pipeline] = [stage_work(self.rows(own.specs), own.blocks, tensor) for own in stages]
        return self._parts[tensor, pipeline]


@dataclass(frozen=True)
class Passes:
    """Seconds of a stage's forward and backward passes, and of what the backward pass computes again."""

    forward: float
    backward: float
    again: float = 0.0

    @property
    def both(self) -> float:
        """All of it, what is computed again included."""
        return self.forward + self.backward + self.again


def stage_passes(
    training: Training, part: StageWork, settings: Settings, device: Device, tensor: int, tokens: int, head: bool
) -> Passes:
    """Seconds of one micro batch on one rank of a stage, as if nobody shared its processor.

    Args:
        tokens: of the micro batch on this rank.
        head: whether the output embedding and the loss are on this stage.
    """
    block = _block(training, part, settings, device, tensor, tokens)
    forward, backward = part.blocks * block.forward, part.blocks * block.backward
    again = forward if settings.activation_checkpointing else 0.0
    if head:
        extra = _head(training, settings, device, tensor, tokens)
        forward, backward = forward + extra.forward, backward + extra.backward
    # gradients are written once and, from the second micro batch on, read and written again
    backward += 3 * settings.precision.width * part.trained / device.bandwidth
    return Passes(forward, backward, again)


def _block(training: Training, part: StageWork, settings: Settings, device: Device, tensor: int, tokens: int) -> Passes:
    times = [(product, _product(product, tokens, settings, device)) for product in part.products]
    forward = sum(seconds for _, seconds in times)
    slopes = forward + sum(seconds for product, seconds in times if product.trained)
    attend, slope = _attention(training, settings, device, tensor, tokens)
    family = known_family(training.model)
    kept = kept_by_block(training.model, family, settings.precision, tensor)
    if not training.fused:
        kept += SCORES * family.value(training.model, "num_attention_heads") / tensor * training.seq_len
    moved = device.passes * kept * tokens / device.bandwidth
    hooks = HOOKS[settings.zero_stage] * part.parameters * device.dispatch
    started = OPERATIONS * device.dispatch
    return Passes(
        _with_host(device, forward + attend + FORWARD * moved, started + hooks / 3),
        _with_host(device, slopes + slope + (1 - FORWARD) * moved, 2 * started + hooks * 2 / 3),
    )


def _with_host(device: Device, computed: float, started: float) -> float:
    """A queue hides the host's time, as long as the device has more to do."""
    return max(computed, started) if device.queued else computed + started


def _product(product: Product, tokens: int, settings: Settings, device: Device) -> float:
    sides = (tokens, product.inner, product.outer)
    slower = 1 + device.tile * sum(1 / side for side in sides)
    width = settings.precision.compute
    moved = width * (tokens * product.inner + product.inner * product.outer + tokens * product.outer)
    computed = product.flops * tokens / device.rate(settings.precision.products) * slower
    return max(computed, moved / device.bandwidth)


def _attention(training: Training, settings: Settings, device: Device, tensor: int, tokens: int) -> tuple[float, float]:
    """Forward and backward of one block's scores and their use; the fused kernels leave out what is not causal."""
    flops = attention_flops(training.model, training.seq_len) * tokens / tensor
    rate = device.rate(settings.precision.products) * device.attention
    if training.fused:
        return flops / 2 / rate, FLASH_BACKWARD * flops / 2 / rate
    return flops / rate, 2 * flops / rate


def _head(training: Training, settings: Settings, device: Device, tensor: int, tokens: int) -> Passes:
    product = head_product(training.model, tensor)
    once = _product(product, tokens, settings, device)
    scored = device.logit_passes * 4 * tokens * product.outer / device.bandwidth
    return Passes(once * (1 if training.uniform else 2) + scored, 2 * once)
