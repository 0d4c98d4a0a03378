"""Tasks of lm-evaluation-harness while a run trains, through its engine, on any layout."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from ...data_prep.errors import UserError
from ..engine.base import Engine
from ..export.load import hf_config, load_tokenizer
from ..metrics.record import RunLog
from ..run.data import RunData
from .harness import TaskResult, ask_tasks, load_tasks, part

_SAID = "eval.tasks"
DRAWS = 1000  # the harness's own 100,000 are ten seconds for which all ranks wait


class TaskRounds:
    """Asks `eval.tasks`. The main rank alone runs the harness; what that wants of the model, all ranks compute."""

    def __init__(self, engine: Engine, data: RunData, log: RunLog) -> None:
        """Collective.

        Raises:
            UserError: on every rank: no harness, no tokenizer, a task that cannot be loaded or generates text.
        """
        self.engine, self.log, self.tasks = engine, log, engine.plan.recipe.eval.tasks
        if self.tasks:
            ranks = engine.ranks
            self._asked: Any = ranks.together(lambda: self._prepare(data) if ranks.is_main else None)

    def run(self, step: int) -> None:
        """Collective. Raises UserError on every rank if a task cannot be asked."""
        if not self.tasks:
            return
        ranks = self.engine.ranks
        for result in ranks.together(self._ask if ranks.is_main else self._follow):
            self.log.task(step, result.record(), f"tasks at step {step}, {result}")

    def _prepare(self, data: RunData) -> Any:
        plan = self.engine.plan
        load_tasks(self.tasks, _SAID)
        folder = plan.recipe.tokenizer or data.train[0].part.store.tokenizer
        tokenizer = load_tokenizer(folder) if folder else None
        if tokenizer is None:
            raise UserError(f"{_SAID}: the data has no tokenizer; state the recipe's `tokenizer`, or leave them out")
        logits = self._logits

        class Live(part("models.huggingface", _SAID).HFLM):  # type: ignore[misc]
            """The harness's own view of a Hugging Face model, but for where its logits come from."""

            def _model_call(self, inps: Tensor, *_: object, **__: object) -> Tensor:
                return logits(inps)

        stand_in = SimpleNamespace(config=hf_config(plan.model_config), device=self.engine.ranks.device)
        return Live(pretrained=stand_in, tokenizer=tokenizer, batch_size=plan.micro_batch)

    def _ask(self) -> list[TaskResult]:
        try:
            return ask_tasks(self._asked, self.tasks, _SAID, draws=DRAWS)
        finally:
            self.engine.ranks.of_main(None)  # nobody waits for more

    def _logits(self, ids: Tensor) -> Tensor:
        self.engine.ranks.of_main(ids.cpu())
        return self._computed(ids)

    def _follow(self) -> list[TaskResult]:
        while (ids := self.engine.ranks.of_main(None)) is not None:
            self._computed(ids)
        return []

    def _computed(self, ids: Tensor) -> Tensor:
        self.engine.pulse.beat()
        return self.engine.logits(ids)
