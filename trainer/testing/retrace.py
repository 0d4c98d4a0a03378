"""Steps of a run taken again, from one of its checkpoints to the next, on as many ranks as then: bit for bit or not."""

from __future__ import annotations

import itertools
import json
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...data_prep.errors import UserError
from ..checkpoint.folder import ls
from ..checkpoint.loader import load, resolve_resume
from ..checkpoint.reader import Checkpoint
from ..checkpoint.writer import SnapshotWriter
from ..engine.build import build_engine
from ..engine.reference import with_reference
from ..metrics.reading import read_metrics
from ..plan.deepspeed_json import load_pair
from ..plan.plan import make_plan
from ..ranks.ranks import join_world
from ..run.data import RunData
from ..run.quiet import quiet
from .local_ranks import RankFailed, on_local_ranks

_COUNTS = ("step", "samples_consumed", "tokens_consumed")
_TIMEOUT = 24 * 3600.0


@dataclass(frozen=True)
class Stretch:
    """Steps between two checkpoints that stand next to each other."""

    first: Path
    last: Path
    steps: tuple[int, int]  # taken when it begins, and when it ends


def stretches_of(run: Path) -> list[Stretch]:
    """Those of a run, by step; checkpoints that can be seen to be damaged are left out."""
    whole = sorted((item for item in ls(run) if item.problem is None), key=lambda item: item.step)
    return [Stretch(a.path, b.path, (a.step, b.step)) for a, b in itertools.pairwise(whole)]


def chosen_stretches(run: Path, count: int, seed: int | None = None) -> list[Stretch]:
    """`count` of them by chance, or all if there are no more, by step.

    Raises:
        UserError: the run has not two checkpoints.
    """
    found = stretches_of(run)
    if not found:
        raise UserError(f"{run}: a replay goes from one checkpoint to the next, and there are not two whole ones")
    return sorted(random.Random(seed).sample(found, min(count, len(found))), key=lambda stretch: stretch.steps)


def retrace(run: Path, stretch: Stretch) -> Iterator[str]:
    """Takes the steps of a stretch again; what is not as it was, one line each. Nothing is written into the run.

    Raises:
        UserError: the ranks cannot train here as they did then.
    """
    environment = _environment(run)
    ranks, threads = max(1, len(environment.get("hosts", ()))), environment.get("variables", {}).get("OMP_NUM_THREADS")
    with tempfile.TemporaryDirectory() as output:
        arguments = run.absolute(), environment.get("directory", "."), stretch, Path(output), threads
        try:
            losses, *_ = on_local_ranks(ranks, _retrace, *arguments, timeout=_TIMEOUT)
        except RankFailed as error:
            raise UserError(f"{run}: steps {_named(stretch)} cannot be taken again on {ranks} ranks: {error}") from None
        yield from _other_losses(run, stretch, losses)
        yield from _other_tensors(Checkpoint.open(output), Checkpoint.open(stretch.last), stretch)


def _retrace(run: Path, directory: str, stretch: Stretch, output: Path, threads: str | None) -> dict[int, float]:
    """On every rank: the loss of every step, by its number; the end of the stretch is saved in `output`."""
    quiet()
    if threads is not None:
        torch.set_num_threads(int(threads))
    os.chdir(directory if Path(directory).is_dir() else ".")  # the recipe's relative paths count from there
    recipe, ds = load_pair(str(run / "recipe.yaml"), str(run / "deepspeed.json"), [])
    ranks = join_world()
    plan = make_plan(recipe.model_copy(update={"output": output}), ds, ranks.world)
    ranks = ranks.lay_out(plan.layout.tensor, plan.layout.sequence, plan.layout.pipeline, plan.layout.expert)
    data = RunData.open(plan, ranks)
    engine = build_engine(plan, ranks, resumes=True)
    checkpoint = resolve_resume(output, str(stretch.first), ranks)
    assert checkpoint is not None
    losses = {}
    with with_reference(data, engine).stream(ranks) as stream:
        state = load(engine.live, checkpoint)
        engine.bad_steps.restore(state)
        last = json.loads((stretch.last / "state.json").read_bytes())
        engine.bad_steps.remember(last.get("skipped", ()))  # found then, and not to be found again
        stream.samples_consumed, tokens = state["samples_consumed"], state["tokens_consumed"]
        for step in range(*stretch.steps):
            taken = engine.train_step(stream, step)
            losses[step + 1], tokens = taken.loss, tokens + taken.tokens
        counts = {"step": stretch.steps[1], "samples_consumed": taken.samples[1], "tokens_consumed": tokens}
        writer = SnapshotWriter(output, None, None, plan.total_steps, background=False)
        writer.save(engine.live, counts)
        writer.wait()
    return losses


def _other_losses(run: Path, stretch: Stretch, losses: dict[int, float]) -> Iterator[str]:
    known = {r["step"]: r["loss"] for r in read_metrics(run) if r["kind"] == "train"}
    for step, loss in losses.items():
        if step in known and repr(known[step]) != repr(loss):
            yield f"step {step}: its loss is {loss!r} now, the run has {known[step]!r}"
            return  # what follows is other for that


def _other_tensors(now: Checkpoint, then: Checkpoint, stretch: Stretch) -> Iterator[str]:
    def differs(key: tuple[str, str]) -> bool:
        a, b = now.read(*key), then.read(*key)
        return not torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if a.ndim else repr(a) != repr(b)

    keys = [(name, kind) for name in then.names() for kind in then.kinds(name)]
    other = [f"{kind} of {name}" for name, kind in filter(differs, keys)]
    other += [key for key in _COUNTS if now.state[key] != then.state[key]]
    if other:
        much = f"{len(other)} of {len(keys)} tensors"
        yield f"steps {_named(stretch)}: {much} are not those of {then.path}: {_some(other)}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


def _named(stretch: Stretch) -> str:
    return f"{stretch.steps[0] + 1} to {stretch.steps[1]}"


def _environment(run: Path) -> dict[str, Any]:
    try:
        return json.loads((run / "environment.json").read_text())
    except (OSError, ValueError) as error:
        path = run / "environment.json"
        raise UserError(f"{path}: says on how many ranks to replay, and cannot be read ({error})") from None
