"""Next-token prediction: the mean cross entropy of all tokens that carry a label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ...data_prep.errors import UserError
from ..modeling.penalty import Penalty
from .base import LossSum

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.batches import Batch
    from ..data.samples import Record


class CausalLMLoss:
    """Args: see `Penalty`."""

    metrics: ClassVar[tuple[str, ...]] = ()
    per_token: ClassVar[bool] = True
    reads: ClassVar[str] = "text"
    reference: ClassVar[bool] = False
    uniform: ClassVar[bool] = True

    def __init__(self, label_smoothing: float = 0.0, z_loss: float = 0.0) -> None:
        for name, value in (("label_smoothing", label_smoothing), ("z_loss", z_loss)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise UserError(f"objective.{name} {value!r}: must be a number from 0 to below 1")
        self.penalty = Penalty(float(label_smoothing), float(z_loss))

    def collate(self, records: Sequence[Record]) -> Batch:
        from ..data.batches import stack

        return stack(records)

    def weight(self, batch: Batch) -> float:
        return batch.tokens

    def loss(self, batch: Batch, token_losses: Tensor) -> LossSum:
        return LossSum(token_losses.sum())
