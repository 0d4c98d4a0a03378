"""Where a run is, and what a step of it reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Fared(NamedTuple):
    """How one rank fared in a step."""

    forward_seconds: float  # in its forward passes; of layouts that make those wait for others, in parts that do not
    data_seconds: float  # of waiting for data
    memory: float  # bytes: its peak on the device; on a CPU, of its resident set
    host_memory: float  # bytes in use on its host, by all that runs there


@dataclass(frozen=True)
class StepOutput:
    """What one optimizer step reports, over all ranks."""

    loss: float  # the objective's sum over the global batch, divided by the weight of the global batch
    grad_norm: float | None  # before clipping
    lr: float
    tokens: int  # that carry loss, of the global batch
    seconds: float
    data_seconds: float  # of them, this rank waited for data
    samples: tuple[int, int]  # first global sample index, last + 1
    ledger: int  # digest of the samples that all ranks consumed
    stop: bool = False  # some rank was asked to stop
    save: bool = False  # or to save
    rewind: bool = False  # the run has to go back to its last checkpoint: nothing of this step counts
    applied: bool = True  # whether there was an update
    bad: bool = False  # no update, since loss or gradient is no number, now or the first time these samples came
    loss_scale: float | None = None  # of fp16
    metrics: Mapping[str, float] = field(default_factory=dict)  # the objective's own, divided by the weight too
    sources: Mapping[str, tuple[float, int]] = field(default_factory=dict)  # of a mixture's: loss, tokens that carry it
    routed: Mapping[str, Any] = field(default_factory=dict)  # of a mixture of experts: where its tokens went
    fared: tuple[Fared, ...] = ()  # by rank, on steps that people are shown


@dataclass(frozen=True)
class EvalSums:
    """What all ranks together found on held-out batches: sums, and the weight to divide them by."""

    loss: float
    weight: float
    tokens: int  # that carry loss
    metrics: dict[str, float]


@dataclass
class TrainState:
    """Everything that changes from step to step, beside weights and moments."""

    total_steps: int
    step: int = 0
    samples_consumed: int = 0
    tokens_consumed: int = 0  # those that carried loss
    stopped: bool = False
    save_asked: bool = False
    skipped: list[tuple[int, int]] = field(default_factory=list)  # samples of bad steps: first, last + 1

    def advance(self, output: StepOutput) -> None:
        """Counts a step that has been taken."""
        self.step += 1
        self.samples_consumed = output.samples[1]
        self.tokens_consumed += output.tokens
        self.stopped = output.stop
        self.save_asked |= output.save
        if output.bad:
            self.skipped.append(output.samples)

    @property
    def done(self) -> bool:
        return self.stopped or self.step >= self.total_steps
