"""The data of a run: opened once, at its start."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..data.batches import BatchShape, BatchStream
from ..data.samples import Samples, open_samples, open_stores, sample_order
from ..objectives.registry import objective_of
from ..plan.plan import Plan
from ..ranks.ranks import Ranks


@dataclass(frozen=True)
class RunData:
    """The samples that a plan trains and is validated on."""

    plan: Plan
    train: tuple[Samples, ...]
    held_out: Mapping[str, tuple[Samples, ...]]  # what is evaluated, by name: `valid`, and the sets of the recipe

    @classmethod
    def open(cls, plan: Plan, ranks: Ranks | None = None) -> RunData:
        """Opens the stores. Collective over `ranks`, if there are any.

        Raises:
            UserError: on every rank: one is missing or damaged.
        """
        return (ranks or Ranks()).together(lambda: cls._opened(plan))

    @classmethod
    def _opened(cls, plan: Plan) -> RunData:
        recipe = plan.recipe
        train, valid = (tuple(open_samples(recipe, split)) for split in ("train", "valid"))
        sets = {name: tuple(open_stores(recipe, stores)) for name, stores in recipe.eval.sets.items()}
        return cls(plan, train, {"valid": valid, **sets})

    def with_samples(self, change: Callable[[Samples], Samples]) -> RunData:
        """The same data, each part of it changed."""
        held_out = {name: tuple(map(change, samples)) for name, samples in self.held_out.items()}
        return RunData(self.plan, tuple(map(change, self.train)), held_out)

    @property
    def shape(self) -> BatchShape:
        """How the samples are cut into batches."""
        plan = self.plan
        cut = plan.micro_batch, plan.accumulation, plan.global_batch, plan.seq_len, plan.vocab_size
        return BatchShape(*cut, self._multiple, objective_of(plan.recipe.objective).collate)

    @property
    def _multiple(self) -> int:
        """Stages of a pipeline expect rows of one length; the ranks of a sequence group share a row out evenly."""
        plan = self.plan
        return plan.seq_len if plan.layout.pipeline > 1 else math.lcm(8, plan.layout.sequence)

    def stream(self, ranks: Ranks) -> BatchStream:
        """This rank's share of the training data, from the first sample on."""
        return BatchStream(self.train, sample_order(self.plan.recipe, self.train), self.shape, ranks)

    def identity(self) -> Mapping[str, Any]:
        """What must not change when a run is resumed: with another value, the rest would be another run."""
        return {
            "data": [samples.fingerprint for samples in self.train],
            "weights": [samples.part.weight for samples in self.train],
            "seed": self.plan.recipe.seed,
            "seq_len": self.plan.seq_len,
            "global_batch": self.plan.global_batch,
            "document_mask": self.plan.recipe.data.document_mask,
            "model_config": self.plan.model_config,
            "objective": self.plan.recipe.objective,
            "adapter": self.plan.recipe.adapter,
        }
