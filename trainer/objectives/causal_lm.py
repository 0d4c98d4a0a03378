"""Next-token prediction: the mean cross entropy of all tokens that carry a label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from .base import LossSum

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.batches import Batch
    from ..data.samples import Record


class CausalLMLoss:
    metrics: ClassVar[tuple[str, ...]] = ()
    per_token: ClassVar[bool] = True
    reads: ClassVar[str] = "text"
    reference: ClassVar[bool] = False

    def collate(self, records: Sequence[Record]) -> Batch:
        from ..data.batches import stack

        return stack(records)

    def weight(self, batch: Batch) -> float:
        return batch.tokens

    def loss(self, batch: Batch, token_losses: Tensor) -> LossSum:
        return LossSum(token_losses.sum())
