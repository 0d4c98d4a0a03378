"""The axes of the layout, on real gloo ranks."""

import pytest

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


def _fail_on_one():
    ranks = init_distributed()
    if ranks.rank == 1:
        raise RuntimeError("planted")
    ranks.barrier()


def test_the_harness_reports_a_failing_rank():
    with pytest.raises(RankFailed, match="planted"):
        run_ranks(2, _fail_on_one)
