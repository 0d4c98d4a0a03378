"""The coming global batch. What all ranks together have in it is summed along with the step before it, so that a step
needs one reduction of numbers, at its end. Beside what DeepSpeed's update waits for, a GPU is then waited for once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...data_prep.errors import UserError, as_user_error
from ..data.batches import BatchStream, StepBatch
from ..data.ledger import join, split
from ..objectives.base import Objective
from ..ranks.ranks import Ranks

NUMBERS = 5  # of a coming batch that are summed over all ranks


@dataclass(frozen=True)
class Coming:
    """This rank's part of the next global batch, or why it cannot be read; not consumed yet."""

    first: int  # of the stream's samples
    batch: StepBatch | None
    problem: str | None
    numbers: tuple[float, ...]  # to be summed over all ranks: failed or not, weight, tokens, ledger (two)

    @classmethod
    def of(cls, stream: BatchStream, ranks: Ranks, objective: Objective) -> Coming:
        """Waits until the batch is read."""
        first = stream.samples_consumed
        try:
            batch = stream.ahead()
        except (UserError, OSError, MemoryError) as error:
            told = str(error) if isinstance(error, UserError) else str(as_user_error(error, "cannot read the data"))
            return cls(first, None, told, (1.0, 0.0, 0.0, 0.0, 0.0))
        mine = [0.0] * 4
        if ranks.reads_samples:
            weight = sum(objective.weight(micro) for micro in batch.micro_batches)
            mine = [weight, float(batch.tokens), *split(batch.ledger)]
        return cls(first, batch, None, (0.0, *mine))


@dataclass(frozen=True)
class StepTotals:
    """What all ranks together bring to a step; fields as in `StepOutput`."""

    weight: float  # of the global batch, by the objective
    tokens: int
    ledger: int


@dataclass(frozen=True)
class Agreed:
    """A coming batch with the sums of its numbers over all ranks, in the same order."""

    coming: Coming
    sums: Sequence[float]

    def take(self, stream: BatchStream, ranks: Ranks) -> tuple[StepBatch, StepTotals]:
        """The batch, which the stream has then consumed. Collective where a rank failed.

        Raises:
            UserError: on every rank, where one of them cannot read its data, or no sample carries loss.
        """
        failed, weight, tokens, low, high = self.sums
        if failed:
            ranks.raise_together(self.coming.problem)
        batch = stream.next_step()
        if not weight > 0:
            raise UserError(
                f"samples {batch.first} to {batch.stop - 1} hold nothing to train on: every label is masked; look at "
                "them with `zeropipe inspect`, or use a larger batch.global"
            )
        return batch, StepTotals(weight, int(tokens), join([low, high]))
