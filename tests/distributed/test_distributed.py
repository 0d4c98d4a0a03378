"""The axes of the layout, on real gloo ranks."""

import time
from datetime import timedelta

import pytest
import torch

from tests.harness import RankFailed, run_ranks
from zeropipe.trainer.ranks.ranks import init_distributed

pytestmark = pytest.mark.distributed


def _coordinates(tensor: int, sequence: int, pipeline: int):
    ranks = init_distributed(tensor=tensor, sequence=sequence, pipeline=pipeline)
    return (ranks.pipeline, ranks.data, ranks.sequence, ranks.tensor), ranks.all_sum([1.0, ranks.rank])


def test_tensor_is_innermost_and_pipeline_outermost():
    results = run_ranks(4, _coordinates, 2, 1, 2)
    assert [place for place, _ in results] == [(0, 0, 0, 0), (0, 0, 0, 1), (1, 0, 0, 0), (1, 0, 0, 1)]
    assert all(total == [4.0, 6.0] for _, total in results)


def _wait_in_vain(group: str):
    ranks = init_distributed(tensor=2, timeout=timedelta(seconds=2))
    if ranks.rank == 1:
        time.sleep(8)
        return 0.0
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?i)timed? ?out"):
        torch.distributed.all_reduce(torch.ones(1), group=getattr(ranks, group) if group else None)
    return time.monotonic() - started


@pytest.mark.parametrize("group", ["", "tensor_group"], ids=["world", "group"])
def test_no_group_waits_longer_than_it_was_told(group):
    assert 1.5 < run_ranks(2, _wait_in_vain, group)[0] < 6


def _fail_on_one():
    ranks = init_distributed()
    if ranks.rank == 1:
        raise RuntimeError("planted")
    ranks.barrier()


def test_the_harness_reports_a_failing_rank():
    with pytest.raises(RankFailed, match="planted"):
        run_ranks(2, _fail_on_one)
