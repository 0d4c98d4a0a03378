"""The training loop: reads as a table of contents."""

from __future__ import annotations

from .checkpoint.loader import resolve_resume
from .engine.build import build_engine
from .engine.checkpoints import Checkpoints
from .engine.reference import with_reference
from .evaluation.evaluator import Evaluator
from .metrics.profile import Profile
from .metrics.record import RunLog
from .plan.plan import Plan
from .ranks.ranks import Ranks
from .run.data import RunData
from .run.guard import StopRequest, exclusive
from .run.state import TrainState


def train(plan: Plan, ranks: Ranks) -> TrainState:
    """Trains to the plan's last step, or until a signal asks to stop; resumes where `recipe.resume` says. Collective.

    Raises:
        UserError: on every rank: the run directory is in use or cannot be written, the checkpoint does not fit the
            recipe, data cannot be read, or the loss is no number.
    """
    stop = StopRequest(ranks)
    with exclusive(plan.recipe.output, ranks), RunLog(plan, ranks, stop) as log, stop:
        data = ranks.together(lambda: RunData.open(plan))
        checkpoint = resolve_resume(plan.recipe.output, plan.recipe.resume, ranks)
        engine = build_engine(plan, ranks, resumes=checkpoint is not None)
        data = with_reference(data, engine)
        with data.stream(ranks) as stream, Checkpoints(engine, data, stream, log) as checkpoints:
            evaluator = Evaluator(engine, data, log)
            state, profile = checkpoints.resume_or_start(checkpoint), Profile(plan, engine.deepspeed, log)
            while not state.done:
                output = engine.train_step(stream, state.step, stop.asked)
                state.advance(output)
                log.step(state, output)
                profile.after_step(state)
                evaluator.run_if_due(state)
                checkpoints.save_if_due(state)
    return state
