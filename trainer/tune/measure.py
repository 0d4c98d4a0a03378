"""Real steps of a plan on ranks of this machine, through the engine that trains."""

from __future__ import annotations

import statistics
import time

from ..plan.plan import Plan
from ..testing.local_ranks import on_local_ranks

WARM_UP = 1  # steps that are not counted


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
