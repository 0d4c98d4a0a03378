"""Evaluation while a run trains, through its engine."""

from __future__ import annotations

from ...data_prep.errors import UserError
from ..data.batches import Batch, evaluation_batches
from ..engine.base import Engine
from ..metrics.record import RunLog
from ..run.data import RunData
from ..run.state import TrainState
from .evaluate import EvalResult, token_bytes


class Evaluator:
    """Evaluates every `eval.every` steps and after the last, where there is something to evaluate on."""

    def __init__(self, engine: Engine, data: RunData, log: RunLog) -> None:
        """Collective. Raises UserError on every rank if the tokenizer cannot be read."""
        self.engine, self.data, self.log = engine, data, log
        plan = engine.plan
        self.lengths = engine.ranks.together(
            lambda: token_bytes(plan.recipe.tokenizer, data.valid, plan.vocab_size)
        )  # UTF-8 bytes of each token

    def run_if_due(self, state: TrainState) -> None:
        """Collective.

        Raises:
            UserError: on every rank, where one of them cannot read its held-out data.
        """
        every = self.engine.plan.recipe.eval.every
        if not every or state.stopped or not any(map(len, self.data.valid)):
            return
        if state.step % every == 0 or state.done:
            # read before any rank begins: one that cannot must not leave the others waiting
            result = self.evaluate(self.engine.ranks.together(self._batches))
            self.log.eval(state.step, "valid", result.record(), f"eval at step {state.step}, valid: {result}")

    def evaluate(self, batches: list[Batch]) -> EvalResult:
        """The objective's mean over all ranks' batches. Collective."""
        found = self.engine.evaluate(batches)
        if not found.weight:
            raise UserError("eval: nothing to evaluate on: the valid split holds less than one sample of data.seq_len")
        metrics = {name: value / found.weight for name, value in found.metrics.items()}
        loss = found.loss / found.weight
        if not self.engine.objective.per_token:
            return EvalResult(loss, found.tokens, metrics=metrics, per_token=False)
        return EvalResult(loss, found.tokens, self._bytes_per_token(batches), metrics)

    def _bytes_per_token(self, batches: list[Batch]) -> float | None:
        if self.lengths is None:
            return None
        labels = [batch.labels[batch.labels >= 0].numpy() for batch in batches]
        mine = [float(sum(map(len, labels))), float(sum(self.lengths[ids].sum() for ids in labels))]
        # ranks that share their samples count them alike, so the ratio holds
        seen, text_bytes = self.engine.ranks.all_sum(mine)
        return text_bytes / seen if seen else None

    def _batches(self) -> list[Batch]:
        """This rank's micro batches of one evaluation."""
        count = self.engine.plan.recipe.eval.batches
        return list(evaluation_batches(self.data.valid, self.data.shape, self.engine.ranks, count))
