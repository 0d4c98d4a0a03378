"""Learning rates against torch's and transformers' own schedulers, and at the corners."""

from itertools import pairwise

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from zeropipe.trainer.optim.schedule import learning_rate


def test_cosine_follows_transformers():
    """transformers counts a step later: its rate at step s + 1 is ours at s, warm-up and decay alike."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=10, num_training_steps=101)
    for step in range(100):
        optimizer.step()
        scheduler.step()
        ours = learning_rate(step, "cosine", 3e-4, 0.0, total=100, warmup=10)
        assert ours == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
def test_peak_and_floor_are_reached(kind):
    rates = [learning_rate(s, kind, 1.0, 0.1, total=50, warmup=5, decay=20) for s in range(60)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert 0.1 < rates[49] < 0.15 and rates[50] == pytest.approx(0.1) and rates[59] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[4:]))
    if kind == "wsd":
        assert rates[4:30] == [1.0] * 26 and rates[30] < 1.0


def test_constant_stays():
    assert {learning_rate(s, "constant", 0.5, 0.0, total=10, warmup=0) for s in range(20)} == {0.5}
