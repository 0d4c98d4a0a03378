"""What counts as a spike, and the limits of going back, without ranks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.engine.bad_steps import BadSteps
from zeropipe.trainer.engine.replicas import checksum
from zeropipe.trainer.metrics.fared import MOST_HOSTS, by_host
from zeropipe.trainer.recipe.bad_step import OnBadStep
from zeropipe.trainer.run.state import Fared, StepOutput


def bad_steps(**policy) -> BadSteps:
    recipe = SimpleNamespace(on_bad_step=OnBadStep(**policy), output="runs/x")
    return BadSteps(SimpleNamespace(recipe=recipe, global_batch=8, precision=SimpleNamespace(name="fp32")))  # type: ignore[arg-type]


def output(loss: float, step: int = 0) -> StepOutput:
    return StepOutput(loss, 1.0, 1e-3, 100, 1.0, 0.0, (step * 8, step * 8 + 8), 0)


def test_a_spike_is_so_many_robust_deviations_over_the_median():
    losses = np.random.default_rng(0).normal(5.0, 0.2, 64)
    deviation = 1.4826 * np.median(np.abs(losses[-16:] - np.median(losses[-16:])))
    limit = float(np.median(losses[-16:]) + 6 * deviation)
    judge = bad_steps(type="rewind", spike=6.0, window=16)
    assert not any(judge.judge(output(float(loss), step), step) for step, loss in enumerate(losses))
    assert not judge.judge(output(limit - 1e-6), 64)
    judge.restore({"recent_losses": losses[-16:].tolist()})
    assert judge.judge(output(limit + 1e-6), 64)
    assert judge.record() == {"recent_losses": losses[-16:].tolist()}  # a spike is none to compare with
    # one outlier among those does not hide the next, as a mean and a standard deviation would
    judge.restore({"recent_losses": [*losses[-15:].tolist(), 50.0]})
    assert judge.judge(output(8.0), 65)


def test_a_loss_that_hardly_moves_makes_no_spike_of_a_little():
    judge = bad_steps(type="rewind", spike=5.0, window=8)
    judge.restore({"recent_losses": [2.0] * 8})
    assert not judge.judge(output(2.09), 9) and judge.judge(output(2.2), 10)


def test_it_goes_back_to_one_checkpoint_four_times():
    judge = bad_steps(type="rewind", leave_out=3)
    assert judge.goes_back(output(5.0, 20), 10) == (144, 168) and judge.known == {144, 152, 160}
    assert judge.goes_back(output(5.0, 11), 10) == (80, 96)  # not what the checkpoint has behind it
    judge.goes_back(output(5.0, 22), 10)
    judge.goes_back(output(5.0, 23), 10)
    with pytest.raises(UserError, match="went back to its checkpoint of step 10 4 times"):
        judge.goes_back(output(5.0, 24), 10)


def test_hosts_that_fared_worst_are_listed():
    fared = [Fared(1.0 + rank % 7 / 10, rank / 100, 1e9 + rank, 2e9) for rank in range(80)]
    found = by_host(fared, [f"h{rank // 2:02d}" for rank in range(80)])
    assert found["slowest_rank"] == 6 and found["most_data_seconds"] == 0.79 and len(found["hosts"]) == MOST_HOSTS
    assert found["hosts"]["h03"] == {
        "forward_seconds": 1.6,
        "data_seconds": 0.07,
        "memory": 1e9 + 7,
        "host_memory": 2e9,
    }
    assert by_host([], []) == {} and "slowest_rank" not in by_host([Fared(0.0, 0.1, 1.0, 2.0)], ["h"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("numel", [64, 65])
def test_every_single_bit_changes_the_checksum(dtype, numel):
    whole = torch.randint(0, 255, (numel + 8, torch.empty((), dtype=dtype).element_size()), dtype=torch.uint8)
    tensor = whole.view(-1).view(dtype)[8:]
    words, before = whole[8:].view(-1), int(checksum(tensor))
    for place in (0, 1, 17, len(words) - 1):
        for bit in range(8):
            words[place] ^= 1 << bit
            assert int(checksum(tensor)) != before
            words[place] ^= 1 << bit
    assert int(checksum(tensor)) == before
