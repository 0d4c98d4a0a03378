"""What an objective is: how records become batches, and what a batch's token losses come to.

An objective is one file here and a line in `registry.py`. It never sees the layout: whatever splits the model, it gets
the cross entropy of every labelled token, and the engines divide what it returns by the weight of the global batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

from ..modeling.penalty import Penalty

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.batches import Batch
    from ..data.samples import Record


@dataclass(frozen=True)
class LossSum:
    """What a micro batch adds to the loss and to the objective's metrics."""

    sum: Tensor  # fp32 scalar, differentiable
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # sums as well: scalars, by `Objective.metrics`
    sources: Tensor | None = None  # float64 [sources], nats of each source of a mixture: filled in by the engine


class Objective(Protocol):
    """A training objective. Options of the recipe's mapping are arguments of its constructor; importing its file must
    not import torch, so that a login node can plan.
    """

    metrics: ClassVar[tuple[str, ...]]  # names of its own metrics, as the field calls them ("rewards/chosen")
    per_token: ClassVar[bool]  # whether the loss is nats per token, so that perplexity and bits per byte follow from it
    reads: ClassVar[str]  # kind of the stores it learns from: text, sft or dpo
    # whether it compares with the model before training, whose log-probabilities come as `Record.reference`
    reference: bool
    penalty: Penalty  # on every token in training
    uniform: ClassVar[bool]  # whether all token losses count alike in the loss, which makes the head cheaper

    def collate(self, records: Sequence[Record]) -> Batch:
        """A micro batch on the CPU; what the loss needs beside labels goes into `Batch.extras`."""
        ...

    def weight(self, batch: Batch) -> float:
        """What the batch counts in the mean: tokens for language modelling, pairs for preferences. On the CPU."""
        ...

    def loss(self, batch: Batch, token_losses: Tensor) -> LossSum:
        """The batch's share of the loss, never a mean.

        Args:
            batch: as `collate` made it, on the device; a pipeline has its `input_ids` on the first stage alone.
            token_losses: fp32 [rows, time], nats of every label, 0 where there is none (`IGNORE`); in training with
                `penalty`.
        """
        ...
