"""Tries combinations of DeepSpeed for real: the engine that the plan would build, a few steps, against one process."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tests.distributed import layouts, reference
from tests.distributed.legality_table import OFFLOADS, Combination, Outcome, Trial
from tests.distributed.reference import Curve, gpt2
from tests.harness import RankFailed, RankGroup, run_ranks

STEPS = 3
AXES = ("pipeline", "data", "sequence", "tensor")
PRECISIONS = ("fp32", "bf16", "bf16_autocast")
MODEL = gpt2()
# relative, against fp32 in one process; what separates rounding from a wrong step was measured (docs/legality.md)
BOUNDS = {
    "fp32": {"loss": 1e-6, "norm": 1e-5, "weights": 1e-4},
    "bf16": {"loss": 3e-4, "norm": 1e-2, "weights": 5e-2},
    "bf16_autocast": {"loss": 3e-4, "norm": 1e-2, "weights": 5e-2},
}
MARK = "TRIAL "
HANGS = "the ranks wait for each other for ever"


def splits() -> list[dict[str, int]]:
    """One rank, every axis alone on two ranks, every pair of axes on four."""
    chosen = [axes for count in range(3) for axes in itertools.combinations(AXES, count)]
    return [dict.fromkeys(axes, 2) for axes in chosen]


def combinations(split: dict[str, int]) -> Iterator[Combination]:
    small = len(split) < 2
    for stage, precision in itertools.product(range(4), PRECISIONS):
        for offload in OFFLOADS if small or precision == "fp32" else OFFLOADS[:1]:
            yield Combination(**split, stage=stage, precision=precision, offload=offload)
        if small and precision != "bf16_autocast":
            yield Combination(**split, stage=stage, precision=precision, clipping=False)
        if small and precision != "bf16_autocast":
            yield Combination(**split, stage=stage, precision=precision, checkpointing=True)


def truth(clipping: bool) -> Curve:
    if not clipping:
        reference.CLIP = math.inf  # this process is there for one curve
    return reference.train(MODEL, STEPS)


def truths() -> dict[bool, Curve]:
    return {clipping: run_ranks(1, truth, clipping)[0] for clipping in (True, False)}


def train_trial(combination: Combination, sections: dict[str, Any] | None = None) -> tuple[Curve, list[str]]:
    """A few steps of the engine that a plan would build, and what DeepSpeed left out without a word.

    Args:
        sections: of the JSON; None: the combination's own.
    """
    sections = combination.sections if sections is None else sections
    engine = layouts.start(MODEL, combination.layout, **sections)
    stream, curve = layouts.Stream(MODEL, engine.ranks, 2), Curve()
    for step in range(STEPS):
        output = engine.train_step(stream, step)
        curve.losses.append(output.loss)
        curve.norms.append(math.nan if output.grad_norm is None else output.grad_norm)
    curve.weights, torn = layouts.whole_weights(engine)
    assert not torn, f"ranks hold unlike copies of {torn}"
    no_norm = ["gives no gradient norm"] if all(map(math.isnan, curve.norms)) else []
    return curve, ignored_offloads(engine.deepspeed.optimizer, combination) + no_norm


def ignored_offloads(optimizer: Any, combination: Combination) -> list[str]:
    """What the JSON asks for and DeepSpeed leaves where it is, without a word."""
    does = {
        "optimizer": getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False),
        "parameters": getattr(optimizer, "offload_param", False),
    }
    left_out = [what for what, done in does.items() if what in combination.offload and not done]
    return [f"offload of {' and '.join(left_out)}"] if left_out else []


def differences(found: Curve, known: Curve) -> dict[str, float]:
    def apart(ours: Sequence[float], theirs: Sequence[float]) -> float:
        return max(abs(a / b - 1) if math.isfinite(a) else math.inf for a, b in zip(ours, theirs, strict=True))

    def off(name: str) -> float:
        difference = found.weights[name] - known.weights[name]
        if name in known.noise:
            difference = np.delete(difference, known.noise[name])
        return float(np.linalg.norm(difference) / np.linalg.norm(known.weights[name]))

    apart_by = {"loss": apart(found.losses, known.losses), "weights": max(off(name) for name in known.weights)}
    if not all(map(math.isnan, found.norms)):  # an engine that gives no norm
        apart_by["norm"] = apart(found.norms, known.norms)
    return apart_by


def attempts(combinations: Sequence[Combination], known: dict[bool, Curve]) -> list[dict[str, Any]]:
    """One after the other in the same processes; stops at the first that raises, which is told by its mark."""
    from zeropipe.trainer.run.quiet import quiet

    quiet()
    done: list[dict[str, Any]] = []
    for combination in combinations:
        try:
            found, ignored = train_trial(combination)
            done.append({"ignored": ignored, **differences(found, known[combination.clipping])})
        except Exception as error:
            raise RuntimeError(MARK + json.dumps([done, first_line(error)])) from None
    return done


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]}"


def try_all(
    combinations: Sequence[Combination], known: dict[bool, Curve], batch: int = 8, timeout: float = 60
) -> Iterator[Trial]:
    """Tries combinations of one layout. What did not work among others is tried again in processes of its own."""
    waiting = list(combinations)
    while waiting:
        some, waiting = waiting[:batch], waiting[batch:]
        done, problem = _run(some, known, timeout + 10 * len(some))
        for combination, apart in zip(some, done, strict=False):
            trial = Trial(combination, *judge(combination.precision, apart))
            yield trial if trial.outcome in ("works", "ignored") else try_alone(combination, known, timeout)
        if problem is not None:
            next_one, rest = some[len(done)], some[len(done) + 1 :]
            fresh = not done and problem != HANGS
            yield Trial(next_one, "raises", problem) if fresh else try_alone(next_one, known, timeout)
            waiting = rest + waiting


def try_alone(combination: Combination, known: dict[bool, Curve], timeout: float = 60) -> Trial:
    """Tries one combination in processes of its own."""
    done, problem = _run([combination], known, timeout)
    if done:
        return Trial(combination, *judge(combination.precision, done[0]))
    assert problem is not None
    return Trial(combination, "hangs" if problem == HANGS else "raises", problem)


def judge(precision: str, apart: dict[str, Any]) -> tuple[Outcome, str]:
    bounds = BOUNDS[precision]
    works = all(apart[key] <= bounds[key] for key in bounds if key in apart)  # NaN does not
    if works and apart["ignored"]:
        return "ignored", "; ".join(apart["ignored"])
    return "works" if works else "differs", ", ".join(f"{key} {apart[key]:.0e}" for key in bounds if key in apart)


def _run(
    combinations: Sequence[Combination], known: dict[bool, Curve], timeout: float
) -> tuple[list[dict[str, Any]], str | None]:
    """Figures of those that ran, and what stopped the next one."""
    group = RankGroup(combinations[0].world, attempts, combinations, known)
    try:
        return group.results(timeout)[0], None
    except RankFailed as error:
        text = str(error)
        if MARK in text:
            done, problem = json.loads(text.rsplit(MARK, 1)[1])
            return done, problem
        return [], HANGS if "did not finish" in text else text.splitlines()[0]
    finally:
        group.kill()
