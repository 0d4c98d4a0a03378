"""The training loop: reads as a table of contents."""

from __future__ import annotations

from .checkpoint.loader import resolve_resume
from .engine.build import build_engine
from .engine.checkpoints import Checkpoints
from .engine.reference import with_reference
from .engine.replicas import Replicas
from .evaluation.evaluator import Evaluator
from .metrics.profile import Profile
from .metrics.record import RunLog
from .plan.plan import Plan
from .ranks.ranks import Ranks, waiting_at_most
from .run.data import RunData
from .run.guard import StopRequest, exclusive
from .run.state import TrainState


def train(plan: Plan, ranks: Ranks) -> TrainState:
    """Trains to the plan's last step, or until a signal asks to stop; resumes where `recipe.resume` says. Collective.

    Raises:
        UserError: on every rank: the run directory is in use or cannot be written, the checkpoint does not fit the
            recipe, data cannot be read, or the loss is no number.
        RankFault: on every rank: replicas of a weight differ.
    """
    stop, waits = StopRequest(ranks, plan.recipe.output), plan.recipe.parallel
    with (
        waiting_at_most(waits.setup_timeout),
        exclusive(plan.recipe.output, ranks),
        RunLog(plan, ranks, stop) as log,
        stop,
    ):
        data = RunData.open(plan, ranks)
        checkpoint = resolve_resume(plan.recipe.output, plan.recipe.resume, ranks)
        engine = build_engine(plan, ranks, resumes=checkpoint is not None)
        data = with_reference(data, engine)
        with data.stream(ranks) as stream, Checkpoints(engine, data, stream, log) as checkpoints:
            evaluator, replicas = Evaluator(engine, data, log), Replicas(engine, log)
            state, profile = checkpoints.resume_or_start(checkpoint), Profile(plan, engine.deepspeed, log)
            while not state.done:
                engine.pulse.step(state.step)
                with waiting_at_most(waits.timeout):
                    output = engine.train_step(stream, state.step, *stop.look())
                if output.rewind:
                    state = checkpoints.rewind(output)
                    continue
                state.advance(output)
                log.step(state, output)
                profile.after_step(state)
                replicas.check_if_due(state)
                evaluator.run_if_due(state)
                checkpoints.save_if_due(state)
    return state
