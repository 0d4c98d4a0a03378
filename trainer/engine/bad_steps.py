"""What becomes of a step whose loss or gradient is no number, by `on_bad_step` of the recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...data_prep.errors import UserError
from ..plan.plan import Plan
from ..run.state import StepOutput

MOST_IN_A_ROW = 5


class BadSteps:
    """Stops the run, or lets it go on without the step's samples.

    DeepSpeed leaves out the update of such a step on all ranks by itself, at ZeRO 1 to 3; the engine sees to it at 0.
    """

    def __init__(self, plan: Plan) -> None:
        self.skips, self._plan, self._in_a_row = plan.recipe.on_bad_step == "skip", plan, 0
        self.known: set[int] = set()  # first samples of the steps that were skipped before; the same on every rank

    def remember(self, skipped: Sequence[Sequence[int]]) -> None:
        """Leaves these ranges of samples out from now on."""
        if self.skips:
            self.known = {first for first, _ in skipped}

    def judge(self, output: StepOutput, step: int) -> None:
        """Looks at a step when its numbers are at hand.

        Raises:
            UserError: the run cannot go on: it may not skip, the update was made all the same, or too many in a row.
        """
        wrong = self._wrong(output)
        if wrong is None:
            if output.applied:
                self._in_a_row = 0
            return
        where = f"step {step + 1}: the {wrong} (samples {output.samples[0]} to {output.samples[1] - 1})"
        if not output.bad:
            raise UserError(
                f"{where[:-1]}, lr {output.lr:.3g}); lower optimizer.lr, warm up longer or use bf16 instead of fp16, "
                "or go on without such samples by on_bad_step=skip. Checkpoints in "
                f"{self._plan.recipe.output} are from before"
            )
        self._in_a_row += 1
        if self._in_a_row >= MOST_IN_A_ROW:
            raise UserError(
                f"{where}, as in {MOST_IN_A_ROW} steps in a row: it is not these samples; lower optimizer.lr or warm "
                f"up longer. Checkpoints in {self._plan.recipe.output} are from before"
            )

    def left_out(self, loss: float, norm: float | None, applied: bool) -> bool:
        """Whether a step that has been computed is one to skip. fp16 looks for its loss scale by steps without updates:
        that is not for the samples.
        """
        fine = math.isfinite(loss) and (norm is None or math.isfinite(norm) or self._plan.precision.name == "fp16")
        return self.skips and not applied and not fine

    def _wrong(self, output: StepOutput) -> str | None:
        if output.bad and output.samples[0] in self.known:
            return None  # not computed this time
        numbers = {"loss": output.loss}
        if self._plan.precision.name != "fp16" and output.grad_norm is not None:
            numbers["gradient norm"] = output.grad_norm
        return next((f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)), None)
