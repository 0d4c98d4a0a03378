"""The data of a run: opened once, at its start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..data.batches import BatchShape, BatchStream, Windows, open_windows, sample_order
from ..objectives.registry import objective_of
from ..plan.plan import Plan
from ..ranks.ranks import Ranks


@dataclass(frozen=True)
class RunData:
    """The windows that a plan trains and is validated on."""

    plan: Plan
    train: tuple[Windows, ...]
    valid: tuple[Windows, ...]

    @classmethod
    def open(cls, plan: Plan) -> RunData:
        """Opens the stores.

        Raises:
            UserError: one is missing or damaged.
        """
        return cls(plan, *(tuple(open_windows(plan.recipe, split)) for split in ("train", "valid")))

    @property
    def shape(self) -> BatchShape:
        plan = self.plan
        cut = plan.micro_batch, plan.accumulation, plan.global_batch, plan.seq_len, plan.vocab_size
        return BatchShape(*cut, plan.recipe.data.document_mask, objective_of(plan.recipe.objective).collate)

    def stream(self, ranks: Ranks) -> BatchStream:
        """This rank's share of the training data, from the first sample on."""
        return BatchStream(self.train, sample_order(self.plan.recipe, self.train), self.shape, ranks)

    def identity(self) -> Mapping[str, Any]:
        """What must not change when a run is resumed: with another value, the rest would be another run."""
        return {
            "data": [windows.fingerprint for windows in self.train],
            "weights": [windows.part.weight for windows in self.train],
            "seed": self.plan.recipe.seed,
            "seq_len": self.plan.seq_len,
            "global_batch": self.plan.global_batch,
            "document_mask": self.plan.recipe.data.document_mask,
            "model_config": self.plan.model_config,
            "objective": self.plan.recipe.objective,
            "adapter": self.plan.recipe.adapter,
        }
