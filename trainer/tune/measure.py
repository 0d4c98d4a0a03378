"""Real steps of a plan on ranks of this machine, through the engine that trains."""

from __future__ import annotations

import statistics
import time

from ...data_prep.errors import UserError
from ..plan.plan import Plan
from ..recipe.recipe import Recipe
from ..testing.local_ranks import RankFailed, on_local_ranks
from .search import Candidate, plan_of_candidate

WARM_UP = 1  # steps that are not counted


def refuse_elsewhere(gpu: str | None, ranks: int) -> None:
    """UserError where the ranks cannot be had on this machine."""
    from ..ranks.ranks import accelerator

    if accelerator().device_name() == "cpu":
        if gpu is not None:
            raise UserError(f"--measure runs here, on a machine without {gpu}; leave --gpu out, or run it there")
        return
    there = accelerator().device_count()
    if ranks > there:
        raise UserError(f"--measure of {ranks} ranks, but this machine has {there} accelerators; use --devices {there}")


def measure_candidate(recipe: Recipe, one: Candidate) -> float | str:
    """Seconds of a step, or why it could not be run (memory, most likely)."""
    try:
        return measure_plan(plan_of_candidate(recipe, one))
    except RankFailed as failure:
        return f"failed: {str(failure).strip().splitlines()[-1]}"


def measure_plan(plan: Plan, steps: int = 3) -> float:
    """Seconds of a step: the median over `steps` of the slowest rank.

    Raises:
        RankFailed: a rank did.
    """
    found = on_local_ranks(plan.layout.world, timed_steps, plan, WARM_UP + steps)
    return statistics.median(max(seconds) for seconds in list(zip(*found, strict=True))[WARM_UP:])


def timed_steps(plan: Plan, steps: int) -> list[float]:
    """Seconds of each of the first steps, on one rank."""
    from ..engine.build import build_engine
    from ..ranks.ranks import init_distributed
    from ..run.data import RunData

    layout = plan.layout
    ranks = init_distributed(layout.tensor, layout.sequence, layout.pipeline)
    engine, stream = build_engine(plan, ranks), RunData.open(plan).stream(ranks)
    found = []
    for step in range(steps):
        started = time.perf_counter()
        engine.train_step(stream, step)
        found.append(time.perf_counter() - started)
    stream.close()
    return found
