"""What becomes of a step that went wrong, and what counts as one, by `on_bad_step` of the recipe."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ...data_prep.errors import UserError
from ..plan.plan import Plan
from ..run.state import StepOutput

MOST_IN_A_ROW = 5
NORMAL = 1.4826  # the median absolute deviation of a normal distribution times this is its standard deviation
LEAST_DEVIATION = 0.01  # of the median: in a run whose loss hardly moves, a step that moves a little is none to stop at


@dataclass(frozen=True)
class BadStep:
    """A step that went wrong, as all ranks found it."""

    step: int  # from 1
    output: StepOutput
    wrong: str  # in words: "the loss is nan"


class BadSteps:
    """Stops the run, lets it go on without the step's samples, or sends it back to its last checkpoint.

    All ranks decide alike, for they judge by numbers that are the same on all: sums over the world. DeepSpeed leaves
    out the update of a step that is no number on all ranks by itself, at ZeRO 1 to 3; the engine sees to it at 0.

    Attributes:
        witness: called on every rank with each bad step, before the run ends or goes on; gives what more to say of it.
    """

    def __init__(self, plan: Plan) -> None:
        self.policy = plan.recipe.on_bad_step
        self.skips, self._plan, self._in_a_row = self.policy.type == "skip", plan, 0
        self.known: set[int] = set()  # first samples of the steps that are left out; the same on every rank
        self.witness: Callable[[BadStep], str] = lambda _: ""
        self._losses: deque[float] = deque(maxlen=self.policy.window)  # of the last steps that were applied
        self._back_to, self._went_back = -1, 0

    @property
    def leaves_out(self) -> bool:
        """Whether the run goes on without bad samples."""
        return self.policy.type != "stop"

    def remember(self, ranges: Iterable[Sequence[int]]) -> None:
        """Leaves these ranges of samples, of whole steps, out from now on."""
        if self.leaves_out:
            self.known |= {s for first, stop in ranges for s in range(first, stop, self._plan.global_batch)}

    def record(self) -> dict[str, Any]:
        """What a checkpoint must hold, so that a resumed run judges as one that was never stopped."""
        return {} if self.policy.spike is None else {"recent_losses": list(self._losses)}

    def restore(self, saved: dict[str, Any]) -> None:
        self._losses.clear()
        self._losses.extend(saved.get("recent_losses", ()))

    def goes_back(self, bad: StepOutput, step: int) -> tuple[int, int]:
        """The range of samples to leave out, now that the run goes back to its checkpoint of `step` steps.

        Raises:
            UserError: it came back to this one too often.
        """
        self._went_back = self._went_back + 1 if step == self._back_to else 1
        self._back_to = step
        if self._went_back >= MOST_IN_A_ROW:
            raise UserError(
                f"the run went back to its checkpoint of step {step} {MOST_IN_A_ROW - 1} times and met a bad step each "
                "time: it is not these samples; lower optimizer.lr or warm up longer, and resume from an older one"
            )
        batch, stop = self._plan.global_batch, bad.samples[1]
        found = max(stop - self.policy.leave_out * batch, step * batch), stop
        self.remember([found])
        return found

    def judge(self, output: StepOutput, step: int) -> bool:
        """Looks at a step when its numbers are at hand; whether the run has to go back.

        Raises:
            UserError: the run cannot go on: it may not skip, the update was made all the same, or too many in a row.
        """
        wrong = self._wrong(output)
        if wrong is None:
            if output.applied:
                self._in_a_row = 0
                self._losses.append(output.loss)
            return False
        more = self.witness(BadStep(step + 1, output, wrong))
        where = f"step {step + 1}: {wrong} (samples {output.samples[0]} to {output.samples[1] - 1})"
        before = f"Checkpoints in {self._plan.recipe.output} are from before{more}"
        if self.policy.type == "rewind":
            return True
        if not output.bad:
            instead = "on_bad_step=skip" if self.policy.spike is None else "on_bad_step.type=rewind"
            raise UserError(
                f"{where[:-1]}, lr {output.lr:.3g}); lower optimizer.lr, warm up longer or use bf16 instead of fp16, "
                f"or go on without such samples by {instead}. {before}"
            )
        self._in_a_row += 1
        if self._in_a_row >= MOST_IN_A_ROW:
            raise UserError(
                f"{where}, as in {MOST_IN_A_ROW} steps in a row: it is not these samples; lower optimizer.lr or warm "
                f"up longer. {before}"
            )
        return False

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
        for name, value in numbers.items():
            if not math.isfinite(value):
                return f"the {name} is {value}"
        limit = self._limit()
        if limit is None or output.loss <= limit:
            return None
        return (
            f"the loss of {output.loss:.4f} is above {limit:.4f}, {self.policy.spike:g} robust deviations over the "
            f"median of the last {self.policy.window} steps"
        )

    def _limit(self) -> float | None:
        """The loss above which a step is a spike; None as long as there is nothing to compare with."""
        if self.policy.spike is None or len(self._losses) < self.policy.window:
            return None
        middle = median(self._losses)
        deviation = NORMAL * median(abs(loss - middle) for loss in self._losses)
        return middle + self.policy.spike * max(deviation, LEAST_DEVIATION * abs(middle))
