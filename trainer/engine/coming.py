"""The coming global batch. What all ranks together have in it is summed along with the step before it, so that a step
needs one reduction of numbers, at its end. Beside what DeepSpeed's update waits for, a GPU is then waited for once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...data_prep.errors import UserError, as_user_error
from ..data.batches import BatchStream, StepBatch
from ..data.labels import IGNORE
from ..data.ledger import join, split
from ..objectives.base import Objective
from ..ranks.ranks import Ranks


@dataclass(frozen=True)
class Coming:
    """This rank's part of the next global batch, or why it cannot be read; not consumed yet."""

    first: int  # of the stream's samples
    batch: StepBatch | None
    problem: str | None
    # to be summed over all ranks: failed or not, weight, tokens, ledger (two), tokens of each source
    numbers: tuple[float, ...]

    @classmethod
    def of(cls, stream: BatchStream, ranks: Ranks, objective: Objective, sources: int = 0) -> Coming:
        """Waits until the batch is read. `sources`: of a mixture, whose tokens are counted."""
        first = stream.samples_consumed
        nothing = [0.0] * (4 + sources)
        try:
            batch = stream.ahead()
        except (UserError, OSError, MemoryError) as error:
            told = str(error) if isinstance(error, UserError) else str(as_user_error(error, "cannot read the data"))
            return cls(first, None, told, (1.0, *nothing))
        if not ranks.reads_samples:
            return cls(first, batch, None, (0.0, *nothing))
        weight = sum(objective.weight(micro) for micro in batch.micro_batches)
        of_sources = np.zeros(sources)
        for micro in batch.micro_batches if sources else ():
            of_sources += micro.by_source(micro.labels != IGNORE, sources).numpy()
        mine = weight, float(batch.tokens), *split(batch.ledger), *of_sources.tolist()
        return cls(first, batch, None, (0.0, *mine))


@dataclass(frozen=True)
class StepTotals:
    """What all ranks together bring to a step; fields as in `StepOutput`."""

    weight: float  # of the global batch, by the objective
    tokens: int
    ledger: int
    sources: tuple[int, ...] = ()  # tokens of each source of a mixture

    def by_source(self, names: Sequence[str], nats: Sequence[float]) -> dict[str, tuple[float, int]]:
        """Loss and tokens of each source that has any in the step."""
        found = zip(names, nats, self.sources, strict=True)
        return {name: (own / tokens, tokens) for name, own, tokens in found if tokens}


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
        failed, weight, tokens, low, high, *sources = self.sums
        if failed:
            ranks.raise_together(self.coming.problem)
        batch = stream.next_step()
        if not weight > 0:
            raise UserError(
                f"samples {batch.first} to {batch.stop - 1} hold nothing to train on: every label is masked; look at "
                "them with `zeropipe inspect`, or use a larger batch.global"
            )
        return batch, StepTotals(weight, int(tokens), join([low, high]), tuple(map(int, sources)))
