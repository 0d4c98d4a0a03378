"""What each layer of a pipeline costs on this machine, for the partition `measured`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec

from .cross_entropy import Scoring, head_token_losses
from .pipeline import Builder, as_linear

REPEATS = 3  # after one that warms up; the fastest counts


def layer_seconds(builder: Builder, micro_batch: int, seq_len: int) -> list[float]:
    """Seconds of forward and backward of every layer for one micro batch, the loss counted with the head. Collective.

    Blocks are alike, so one of each kind is made and measured. Every rank measures at the same time, as they will
    train, and all take the mean, so that they agree on the partition.
    """
    seconds: dict[str, float] = {}
    for kind, spec in zip(builder.layer_kinds(), builder.layers(), strict=True):
        if kind not in seconds:
            seconds[kind] = _seconds(_run(builder, kind, spec, micro_batch, seq_len))
    world = builder.ranks.world
    means = [total / world for total in builder.ranks.all_sum(list(seconds.values()))]
    of_kind = dict(zip(seconds, means, strict=True))
    return [of_kind[kind] for kind in builder.layer_kinds()]


def step_seconds(stages: list[float], micro_batches: int) -> float:
    """Predicted time of a step: the slowest stage for each micro batch, and as often again as stages must be filled."""
    return max(stages) * (micro_batches + len(stages) - 1)


def _run(builder: Builder, kind: str, spec: LayerSpec, micro_batch: int, seq_len: int) -> Callable[[], None]:
    """A layer's forward and backward pass on input of the right shape."""
    ranks = builder.ranks
    layer: Any = spec.build().to(ranks.device)
    if kind == "Head" and builder.tied:
        layer = functools.partial(spec.forward_fn, layer)  # type: ignore[attr-defined]
    shape = micro_batch, seq_len
    ids = torch.randint(builder.vocab_size, shape, device=ranks.device)
    scoring = Scoring(builder.vocab_size, builder.columns, ranks)
    positions = torch.arange(seq_len, device=ranks.device).expand(shape).contiguous()
    hidden = torch.randn(*shape, builder.width, dtype=builder.dtype, device=ranks.device, requires_grad=True)

    def run() -> None:
        if kind == "Embedding":
            output = layer((ids, positions))[0]
        elif kind == "Head":
            output = head_token_losses(as_linear(layer), hidden, ids, scoring, uniform=True)
        else:
            output = layer((hidden, positions))
        output = output[0] if isinstance(output, tuple) else output
        output.backward(torch.ones_like(output))

    return run


def _seconds(run: Callable[[], None]) -> float:
    accelerator: Any = get_accelerator()
    fastest = float("inf")
    for repeat in range(REPEATS + 1):
        accelerator.synchronize()
        started = time.perf_counter()
        run()
        accelerator.synchronize()
        if repeat:
            fastest = min(fastest, time.perf_counter() - started)
    return fastest
