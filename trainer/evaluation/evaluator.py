"""Evaluation while a run trains, through its engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...data_prep.errors import UserError
from ..data.batches import Batch, evaluation_batches
from ..data.samples import Samples
from ..engine.base import Engine
from ..keeper.pulse import EVALUATION
from ..metrics.record import RunLog
from ..run.data import RunData
from ..run.state import TrainState
from .answers import Answers
from .evaluate import EvalResult, token_bytes
from .task_rounds import TaskRounds


class Evaluator:
    """Evaluates and asks every `eval.every` steps and after the last, where there is something to evaluate on."""

    def __init__(self, engine: Engine, data: RunData, log: RunLog) -> None:
        """Collective. Raises UserError on every rank if the tokenizer cannot be read, or a prompt is too long."""
        self.engine, self.data, self.log = engine, data, log
        plan = engine.plan
        self.lengths = {
            name: engine.ranks.together(lambda own=own: token_bytes(plan.recipe.tokenizer, own, plan.vocab_size))
            for name, own in data.held_out.items()
        }  # UTF-8 bytes of each token
        self.answers, self.tasks = Answers(engine, data, log), TaskRounds(engine, data, log)

    def run_if_due(self, state: TrainState) -> None:
        """Collective.

        Raises:
            UserError: on every rank, where one of them cannot read its held-out data.
        """
        every = self.engine.plan.recipe.eval.every
        if not every or state.stopped or (state.step % every and not state.done):
            return
        with self.engine.pulse.during(EVALUATION):
            self._run(state)
            if (state.step // every) % self.engine.plan.recipe.eval.task_every == 0 or state.done:
                self.tasks.run(state.step)

    def _run(self, state: TrainState) -> None:
        for name, samples in self.data.held_out.items():
            if not any(map(len, samples)):
                continue
            # read before any rank begins: one that cannot must not leave the others waiting
            batches = self.engine.ranks.together(lambda samples=samples: self._batches(samples))
            result = self.evaluate(batches, self.lengths[name])
            self.log.eval(state.step, name, result.record(), f"eval at step {state.step}, {name}: {result}")
        self.answers.write(state.step)

    def evaluate(self, batches: list[Batch], lengths: np.ndarray | None) -> EvalResult:
        """The objective's mean over all ranks' batches. Collective."""
        found = self.engine.evaluate(batches)
        if not found.weight:
            raise UserError("eval: nothing to evaluate on: a held-out set holds less than one sample of data.seq_len")
        metrics = {name: value / found.weight for name, value in found.metrics.items()}
        loss = found.loss / found.weight
        if not self.engine.objective.per_token:
            return EvalResult(loss, found.tokens, metrics=metrics, per_token=False)
        return EvalResult(loss, found.tokens, self._bytes_per_token(batches, lengths), metrics)

    def _bytes_per_token(self, batches: list[Batch], lengths: np.ndarray | None) -> float | None:
        if lengths is None:
            return None
        labels = [batch.labels[batch.labels >= 0].numpy() for batch in batches]
        mine = [float(sum(map(len, labels))), float(sum(lengths[ids].sum() for ids in labels))]
        # ranks that share their samples count them alike, so the ratio holds
        seen, text_bytes = self.engine.ranks.all_sum(mine)
        return text_bytes / seen if seen else None

    def _batches(self, samples: Sequence[Samples]) -> list[Batch]:
        """This rank's micro batches of one evaluation."""
        count = self.engine.plan.recipe.eval.batches
        return list(evaluation_batches(samples, self.data.shape, self.engine.ranks, count))
