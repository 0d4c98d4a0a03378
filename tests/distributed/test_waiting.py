"""How long ranks wait for each other: in a step, and while a run is set up or saved; in every group there is."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from tests.harness import run_ranks
from tests.tiny import _train, tiny_json, tiny_recipe, tiny_store
from zeropipe.trainer.ranks.ranks import init_distributed, waiting_at_most

pytestmark = pytest.mark.distributed


def _minutes() -> set[float]:
    """The limits of all groups of this rank, in minutes."""
    backends = [group._get_backend(torch.device("cpu")) for group in c10d._world.pg_map]
    return {backend.options._timeout.total_seconds() / 60 for backend in backends}


def _waits_of_a_run(recipe: dict, ds: dict) -> tuple[dict[str, set[float]], int]:
    from zeropipe.trainer.engine.base import Engine
    from zeropipe.trainer.engine.checkpoints import Checkpoints
    from zeropipe.trainer.evaluation.evaluator import Evaluator

    found: dict[str, set[float]] = {}

    def noting(name: str, real: Callable) -> Callable:
        def noted(*arguments):
            found[name] = found.get(name, set()) | _minutes()
            return real(*arguments)

        return noted

    for owner, name in (
        (Engine, "train_step"),
        (Checkpoints, "resume_or_start"),
        (Checkpoints, "save"),
        (Evaluator, "evaluate"),
    ):
        setattr(owner, name, noting(name, getattr(owner, name)))
    _train(recipe, ds)
    return found, len(c10d._world.pg_map)


def test_every_group_knows_how_long_to_wait_and_for_what(tmp_path):
    """Those that DeepSpeed makes for its pipeline and says nothing of, too."""
    waits = {"pipeline": 2, "timeout": 7, "setup_timeout": 42}
    recipe = tiny_recipe(
        tiny_store(tmp_path / "store"),
        tmp_path / "run",
        parallel=waits,
        duration={"steps": 2},
        eval={"every": 1, "batches": 1},
        save={"every": 1},
    )
    for found, groups in run_ranks(2, _waits_of_a_run, recipe, tiny_json("zero1")):
        assert groups > 4
        assert found == {"train_step": {7.0}, "resume_or_start": {42.0}, "save": {42.0}, "evaluate": {42.0}}


def _alone() -> tuple[str, float, set[float]]:
    ranks = init_distributed(tensor=2)
    ranks.barrier()
    said, started = "", time.monotonic()
    if ranks.rank == 0:
        with waiting_at_most(1 / 60):
            try:
                dist.all_reduce(torch.ones(1), group=ranks.tensor_group)
            except RuntimeError as error:
                said = str(error)
    else:
        time.sleep(4)
    return said, time.monotonic() - started, _minutes()


def test_a_rank_that_does_not_come_is_waited_for_as_long_as_was_said():
    (said, waited, after), _ = run_ranks(2, _alone)
    assert "Timed out waiting 1000ms" in said and waited >= 1.0 and after == {10.0}
