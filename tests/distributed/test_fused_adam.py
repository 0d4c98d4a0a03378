"""torch's fused AdamW (`optimizer.params.fused`): the same steps within rounding, and resumes bit for bit."""

from __future__ import annotations

import pytest

from tests import tiny

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("zero", [pytest.param("zero1", marks=pytest.mark.slow), "zero3", "zero2_offload"])
def test_trains_and_resumes_as_torchs_other_adamw(zero, tmp_path):
    store = tiny.tiny_store(tmp_path / "store")
    fused = {"optimizer": {"type": "AdamW", "params": {"fused": True}}}

    def train(run: str, ds: dict, steps: int = 6) -> list[float]:
        schedule = {"type": "constant", "warmup": 0}
        recipe = tiny.tiny_recipe(store, tmp_path / run, duration={"steps": steps}, schedule=schedule)
        return tiny.train_on_ranks(2, recipe, tiny.tiny_json(zero, **ds))["loss"]

    whole = train("whole", fused)
    assert whole == pytest.approx(
        train("other", {"optimizer": {"type": "AdamW", "params": {"foreach": True}}}), rel=1e-6
    )
    train("run", fused, steps=3)
    assert train("run", fused) == whole
