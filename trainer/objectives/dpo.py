"""Direct preference optimisation (Rafailov et al., arXiv:2305.18290), and IPO (Azar et al., arXiv:2310.12036)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ...data_prep.errors import UserError
from ..modeling.penalty import NO_PENALTY, Penalty
from .base import LossSum

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.batches import Batch
    from ..data.samples import Record


class DPO:
    """The mean over pairs of how much more the model prefers the chosen text than it did before training.

    Args:
        beta: strength of the pull towards the model as it was.
        loss: `sigmoid` (DPO) or `ipo`, whose log-probabilities are per token, as TRL's.
        label_smoothing: the share of pairs that are taken to be the wrong way round (cDPO); of `sigmoid` alone.
        reference_free: takes a uniform model in place of the one before training.
    """

    metrics: ClassVar[tuple[str, ...]] = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    )
    per_token: ClassVar[bool] = False
    reads: ClassVar[str] = "dpo"
    penalty: ClassVar[Penalty] = NO_PENALTY
    uniform: ClassVar[bool] = False

    def __init__(
        self, beta: float = 0.1, loss: str = "sigmoid", label_smoothing: float = 0.0, reference_free: bool = False
    ) -> None:
        if isinstance(beta, bool) or not isinstance(beta, int | float) or not beta > 0:
            raise UserError(f"objective.beta {beta!r}: must be a number above 0")
        if loss not in ("sigmoid", "ipo"):
            raise UserError(f"objective.loss {loss!r}: there are sigmoid and ipo")
        if not isinstance(label_smoothing, int | float) or not 0 <= label_smoothing < 0.5:
            raise UserError(f"objective.label_smoothing {label_smoothing!r}: must be from 0 to below 0.5")
        if label_smoothing and loss == "ipo":
            raise UserError("objective.label_smoothing is for loss sigmoid; leave it out with ipo")
        if not isinstance(reference_free, bool):
            raise UserError(f"objective.reference_free {reference_free!r}: must be true or false")
        self.beta, self.ipo, self.label_smoothing = float(beta), loss == "ipo", float(label_smoothing)
        self.reference = not reference_free

    def collate(self, records: Sequence[Record]) -> Batch:
        """`texts` [rows, time]: which of the batch's texts a place belongs to, -1 for none; two by two they are pairs.

        `numbers` and `reference` [texts]: as in `Record`.
        """
        import numpy as np
        import torch

        from ..data.batches import stack

        texts, numbers, reference, first = [], [], [], 0
        for record in records:
            assert record.texts is not None and record.numbers is not None
            texts.append(np.where(record.texts < 0, -1, record.texts + first))
            first += len(record.numbers)
            numbers.append(record.numbers)
            reference.append(np.zeros(len(record.numbers)) if record.reference is None else record.reference)
        columns = {
            "texts": np.stack(texts),
            "numbers": np.concatenate(numbers),
            "reference": np.concatenate(reference).astype(np.float32),
        }
        return stack(records, {name: torch.from_numpy(column) for name, column in columns.items()})

    def weight(self, batch: Batch) -> float:
        """Pairs."""
        return len(batch.extras["reference"]) / 2

    def loss(self, batch: Batch, token_losses: Tensor) -> LossSum:
        import torch.nn.functional as F

        logps, tokens = text_sums(batch, -token_losses), text_sums(batch, (batch.labels >= 0).to(token_losses.dtype))
        ratios = logps - batch.extras["reference"].to(logps.dtype) * self.reference
        chosen, rejected = ratios[0::2], ratios[1::2]
        if self.ipo:
            scores = ratios / tokens.clamp(min=1)
            losses = (scores[0::2] - scores[1::2] - 1 / (2 * self.beta)) ** 2
        else:
            margin, smoothing = self.beta * (chosen - rejected), self.label_smoothing
            losses = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
        rewards = self.beta * chosen.sum(), self.beta * rejected.sum()
        found = {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/accuracies": (chosen > rejected).sum(),
            "rewards/margins": rewards[0] - rewards[1],
            "logps/chosen": logps[0::2].sum(),
            "logps/rejected": logps[1::2].sum(),
        }
        return LossSum(losses.sum(), found)


def text_sums(batch: Batch, values: Tensor) -> Tensor:
    """Sums over each text of a batch that `DPO.collate` made, [texts], of values of its places [rows, time].

    By comparison, not by scattering: on a GPU that would add in another order each time.
    """
    import torch

    texts = batch.extras["texts"]
    belongs = texts.flatten() == torch.arange(len(batch.extras["numbers"]), device=texts.device)[:, None]
    return torch.where(belongs, values.flatten(), 0).sum(-1)
