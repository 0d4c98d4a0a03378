"""Supervised fine-tuning: the mean cross entropy of the trained tokens of records, each token counting alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from ...data_prep.errors import UserError
from .causal_lm import CausalLMLoss

if TYPE_CHECKING:
    from ..data.batches import Batch
    from ..data.samples import Record


class SFT(CausalLMLoss):
    """What is trained of a record was decided when the store was prepared.

    Args:
        label_smoothing, z_loss: see `Penalty`.
        neftune: strength of the noise on embeddings in training; see data/noise.
    """

    reads: ClassVar[str] = "sft"

    def __init__(self, label_smoothing: float = 0.0, z_loss: float = 0.0, neftune: float | None = None) -> None:
        super().__init__(label_smoothing, z_loss)
        if neftune is not None and (
            isinstance(neftune, bool) or not isinstance(neftune, int | float) or not 0 < neftune < float("inf")
        ):
            raise UserError(f"objective.neftune {neftune!r}: must be a number above 0; leave it out for no noise")
        self.neftune = neftune

    def collate(self, records: Sequence[Record]) -> Batch:
        batch = super().collate(records)
        if self.neftune is None or records[0].drawn is None:  # evaluations have none
            return batch
        from ..data.noise import noise_of

        return replace(batch, noise=noise_of(records, self.neftune))
