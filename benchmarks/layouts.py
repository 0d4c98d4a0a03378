"""What pipelines and tensor parallelism cost on this machine, against their bounds, all measured in one run.

    python benchmarks/layouts.py [--micro-batches 4 8 16] [--turns 3] [--layers 8] [--width 256]

Pipeline: a step of m micro batches on two stages cannot be faster than its time on one rank, divided by two, times
(m + 1) / m for filling and draining. Tensor parallelism: two ranks on one micro batch against two ranks on two, at the
same global batch, and the share of the time that goes into collectives. One thread a rank; one rank's and two ranks'
runs alternate, so that a busy machine slows both; the fastest step of each turn counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

from tests import tiny
from zeropipe.trainer.plan.plan import Plan, make_plan
from zeropipe.trainer.recipe.recipe import Recipe
from zeropipe.trainer.testing.local_ranks import on_local_ranks

VOCAB, TIME, MICRO = 8192, 256, 2
STEPS = 4  # of a turn; the first warms up
GOAL = 0.9  # of the pipeline's bound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    arguments = parser.parse_args()
    print(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        store = tiny.tiny_store(Path(folder) / "store", documents=4000, vocab=VOCAB)
        model = {**tiny.GPT2, **tiny.NO_DROPOUT, "n_layer": arguments.layers, "n_embd": arguments.width}
        model |= {"n_positions": TIME, "n_head": 4}
        print(
            f"GPT-2 of {arguments.layers} layers, {arguments.width} wide, {VOCAB} words, {MICRO} x {TIME} tokens each"
        )
        for count in arguments.micro_batches:
            pipeline(store, model, count, arguments.turns)
        tensor(store, model, arguments.turns)


def pipeline(store: Path, model: dict, micro_batches: int, turns: int) -> None:
    one = plan(store, model, 1, micro_batches * MICRO)
    two = plan(store, model, 2, micro_batches * MICRO, pipeline=2)
    alone, staged = [], []
    for _ in range(turns):
        alone.append(on_local_ranks(1, timed, one)[0][0])
        staged.append(on_local_ranks(2, timed, two)[0][0])
    bounds = [seconds / 2 * (micro_batches + 1) / micro_batches for seconds in alone]
    kept = statistics.median(bound / seconds for bound, seconds in zip(bounds, staged, strict=True))
    print(
        f"pipeline 2, {micro_batches:>2} micro batches: one rank {min(alone):.3f} s, two stages {min(staged):.3f} s, "
        f"bound {min(bounds):.3f} s: {kept:.0%} of the bound (goal {GOAL:.0%})",
        flush=True,
    )


def tensor(store: Path, model: dict, turns: int, sequences: int = 16) -> None:
    layouts = {
        "data 2": plan(store, model, 2, sequences),
        "tensor 2": plan(store, model, 2, sequences, tensor_parallel={"autotp_size": 2}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in layouts}
    shares = []
    for _ in range(turns):
        for name, planned in layouts.items():
            step, waiting = on_local_ranks(2, timed, planned)[0]
            seconds[name].append(step)
            if name == "tensor 2":
                shares.append(waiting / step)
    ratio = statistics.median(t / d for t, d in zip(seconds["tensor 2"], seconds["data 2"], strict=True))
    print(
        f"tensor 2 {min(seconds['tensor 2']):.3f} s a step, data 2 {min(seconds['data 2']):.3f} s: {ratio:.2f} times "
        f"as long, {statistics.median(shares):.0%} of it in all-reduces of activations"
    )


def plan(store: Path, model: dict, ranks: int, sequences: int, pipeline: int = 1, **ds: Any) -> Plan:
    recipe = tiny.tiny_recipe(
        store,
        store.parent / "run",
        model={"config": model},
        data={"seq_len": TIME},
        batch={"global": sequences},
        duration={"steps": STEPS},
        parallel={"pipeline": pipeline, "partition": "measured"},
    )
    return make_plan(Recipe.model_validate(recipe), tiny.tiny_json("zero1", MICRO, **ds), ranks)


def timed(planned: Plan) -> tuple[float, float]:
    """Seconds of the fastest step, and how long it was in all-reduces."""
    import torch.distributed as dist

    from zeropipe.trainer.engine.build import build_engine
    from zeropipe.trainer.ranks.ranks import init_distributed
    from zeropipe.trainer.run.data import RunData

    waited, all_reduce = [0.0], dist.all_reduce

    def clocked(*arguments: Any, **keywords: Any) -> Any:
        started = time.perf_counter()
        try:
            return all_reduce(*arguments, **keywords)
        finally:
            waited[0] += time.perf_counter() - started

    dist.all_reduce = clocked
    layout = planned.layout
    ranks = init_distributed(layout.tensor, layout.sequence, layout.pipeline)
    engine, stream = build_engine(planned, ranks), RunData.open(planned).stream(ranks)
    steps = []
    for step in range(STEPS):
        waited[0], started = 0.0, time.perf_counter()
        engine.train_step(stream, step)
        steps.append((time.perf_counter() - started, waited[0]))
    stream.close()
    return min(steps[1:])


if __name__ == "__main__":
    main()
