"""An objective of one file: tokens count by weights of their own, and it reports a metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from zeropipe.trainer.modeling.penalty import NO_PENALTY, Penalty
from zeropipe.trainer.objectives.base import LossSum
from zeropipe.trainer.objectives.registry import OBJECTIVES

if TYPE_CHECKING:
    from torch import Tensor

    from zeropipe.trainer.data.batches import Batch
    from zeropipe.trainer.data.samples import Record


class WeightedTokens:
    """Tokens with an even id count `even` times as much as the others."""

    metrics: ClassVar[tuple[str, ...]] = ("loss/even",)
    per_token: ClassVar[bool] = False
    reads: ClassVar[str] = "text"
    reference: ClassVar[bool] = False
    penalty: ClassVar[Penalty] = NO_PENALTY
    uniform: ClassVar[bool] = False

    def __init__(self, even: float = 3.0) -> None:
        self.even = even

    def collate(self, records: Sequence[Record]) -> Batch:
        import torch

        from zeropipe.trainer.data.batches import stack

        plain = stack(records)
        weights = torch.where(plain.labels % 2 == 0, self.even, 1.0) * (plain.labels >= 0)
        return stack(records, {"weights": weights})

    def weight(self, batch: Batch) -> float:
        return float(batch.extras["weights"].double().sum())

    def loss(self, batch: Batch, token_losses: Tensor) -> LossSum:
        weights = batch.extras["weights"]
        even = (token_losses * (weights == self.even)).sum()
        return LossSum((token_losses * weights).sum(), {"loss/even": even})


OBJECTIVES.register("weighted_tokens", WeightedTokens)
