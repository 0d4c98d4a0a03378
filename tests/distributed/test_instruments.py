"""DeepSpeed's own instruments change no number, and their figures are in the record and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.metrics.reading import read_metrics
from zeropipe.trainer.metrics.report import report

pytestmark = pytest.mark.distributed

ALL: dict[str, Any] = {
    "wall_clock_breakdown": True,
    "comms_logger": {"enabled": True, "prof_all": True},
    "flops_profiler": {"enabled": True, "profile_step": 2},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tiny.tiny_store(tmp_path_factory.mktemp("data") / "store")


@pytest.mark.parametrize("zero", ["zero1", "zero3"])
def test_figures_are_recorded_and_nothing_else_changes(zero, store, tmp_path, capfd):
    without = tiny.train_on_ranks(2, tiny.tiny_recipe(store, tmp_path / "without"), tiny.tiny_json(zero))
    capfd.readouterr()
    found = tiny.train_on_ranks(2, tiny.tiny_recipe(store, tmp_path / "run"), tiny.tiny_json(zero, **ALL))
    assert found["loss"] == without["loss"]
    assert "Flops Profiler" not in capfd.readouterr().out
    (record,) = [record for record in read_metrics(tmp_path / "run") if record.get("event") == "profile"]
    assert not [record for record in read_metrics(tmp_path / "without") if record.get("event") == "profile"]
    spent = record["milliseconds"]
    assert spent["fwd"] > 0 and spent["bwd"] > 0 and spent["step"] > 0
    assert sum(entry["bytes"] for entry in record["communication"].values()) > 4 * 6 * 100_000  # its gradients
    # one micro batch of 2 x 32 tokens: 2 flops a parameter and token, of the blocks' and the head's matrices
    matrices = 2 * (4 + 8) * 64 * 64 + 512 * 64
    assert record["flops"]["forward_flops"] >= 2 * matrices * 2 * 32
    assert record["flops"]["forward_flops"] < 4 * matrices * 2 * 32
    assert (tmp_path / "run" / "flops_profile.txt").stat().st_size > 1000
    text = report(tmp_path / "run")
    assert (
        "wall clock of a step: " in text
        and " fwd " in text
        and "communication: " in text
        and "flops profiler: forward " in text
    )


def test_a_pipeline_counts_its_communication_alone(store, tmp_path):
    recipe = tiny.tiny_recipe(store, tmp_path / "without", parallel={"pipeline": 2})
    without = tiny.train_on_ranks(2, recipe, tiny.tiny_json("zero1"))
    logger = {"comms_logger": ALL["comms_logger"]}
    found = tiny.train_on_ranks(2, {**recipe, "output": str(tmp_path / "run")}, tiny.tiny_json("zero1", **logger))
    assert found["loss"] == without["loss"]
    assert "communication: " in report(tmp_path / "run")
    for key in ("wall_clock_breakdown", "flops_profiler"):
        with pytest.raises(UserError, match=f"{key} with a pipeline: .* leave it out"):
            tiny.plan_of(recipe, tiny.tiny_json("zero1", **{key: ALL[key]}), 2)
