"""`import zeropipe`: the same numbers as the verbs, and light until something heavy is asked for."""

import json
import subprocess
import sys

import pytest

import zeropipe
from tests.tiny import GPT2, NO_DROPOUT, tiny_recipe, tiny_store
from zeropipe.launcher.cli import main


def test_importing_it_needs_no_torch():
    script = "import sys, zeropipe; zeropipe.load_recipe('demo'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0


@pytest.mark.distributed
def test_a_run_from_recipe_to_table(tmp_path, capsys):
    store = tiny_store(tmp_path / "store")
    (tmp_path / "recipe.yaml").write_text(
        json.dumps(tiny_recipe(store, tmp_path / "run", model={"config": {**GPT2, **NO_DROPOUT}}))
    )
    recipe = zeropipe.load_recipe(tmp_path / "recipe.yaml", ["data.split=8,1,1", "eval.every=3", "eval.batches=2"])
    plan = zeropipe.make_plan(recipe, "zero1", devices=2)
    assert (plan.layout.data, plan.total_steps) == (2, recipe.duration.steps)
    run = zeropipe.train(recipe, "zero1", devices=2)

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    table = run.metrics()
    assert table["loss"].to_pylist() == losses and len(losses) == plan.total_steps
    assert zeropipe.open_run(run.path).metrics("eval")["step"].to_pylist() == [3, 6]
    assert run.metrics("task").num_rows == 0

    found = zeropipe.evaluate(run.path, device="cpu")
    assert main(["eval", str(run.path), "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["loss"] == found.result.loss
    assert zeropipe.export(run.path, device="cpu").step == plan.total_steps
    assert run.checkpoints[-1].name == "step-00000006"


def test_what_is_wrong_is_said_before_a_rank_starts(tmp_path):
    with pytest.raises(zeropipe.UserError, match="no run directory"):
        zeropipe.open_run(tmp_path)
    recipe = zeropipe.load_recipe("demo", [f"data.train=[{{store: {tmp_path}/none}}]"])
    with pytest.raises(zeropipe.UserError, match="no token store"):
        zeropipe.train(recipe, devices=2)
