"""The trainer's verbs through the command line: exit codes, and one clear line for what is wrong."""

import shutil

import pytest

from tests.harness import run_ranks
from tests.tiny import tiny_json, write_pair
from tests.unit.trainer.runs import CONFIGS, VOCAB, fresh_model, run_recipe, write_run
from zeropipe.launcher.cli import main
from zeropipe.trainer.checkpoint.reader import Checkpoint

SMALL = {**CONFIGS["gpt2"], "vocab_size": VOCAB}


@pytest.fixture
def run(text_store, tmp_path):
    return write_run(tmp_path / "run", text_store, fresh_model(SMALL), SMALL)


@pytest.mark.distributed
def test_train_alone_is_one_process(text_store, tmp_path):
    recipe = run_recipe(text_store, tmp_path / "run", CONFIGS["gpt2"], duration={"steps": 2}, eval={"every": 0})
    files = write_pair(tmp_path, recipe, tiny_json("zero1", micro=8))
    assert run_ranks(1, main, ["train", str(files[0]), "--deepspeed_config", str(files[1]), "seed=3"]) == [0]
    checkpoint = Checkpoint.open(tmp_path / "run")
    assert checkpoint.step == 2 and checkpoint.state["seed"] == 3


def test_train_refuses_a_recipe_that_is_not_there(capsys):
    assert main(["train", "nowhere.yaml"]) == 2
    error = capsys.readouterr().err
    assert "nowhere" in error and error.startswith("error: ") and error.count("\n") == 1


def test_checkpoints_are_listed_and_verified(run, capsys):
    assert main(["ckpt", "ls", str(run)]) == 0
    assert "whole" in capsys.readouterr().out
    assert main(["ckpt", "verify", str(run)]) == 0
    file = Checkpoint.find(run) / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 128
    file.write_bytes(data)
    capsys.readouterr()
    assert main(["ckpt", "verify", str(run)]) == 2
    captured = capsys.readouterr()
    assert "DAMAGED" in captured.out and str(file) in captured.err and captured.err.count("\n") == 1


def test_pruning_keeps_the_newest(run, capsys):
    first = Checkpoint.find(run)
    shutil.copytree(first, first.with_name("step-00000009"))
    assert main(["ckpt", "prune", str(run), "--keep", "1"]) == 0
    assert "removed" in capsys.readouterr().out and len(list((run / "checkpoints").glob("step-*"))) == 1
    assert main(["ckpt", "prune", str(run), "--keep", "0"]) == 2
    assert len(list((run / "checkpoints").glob("step-*"))) == 1


@pytest.mark.parametrize(
    "words", [["eval"], ["generate"], ["chat"], ["export"], ["ckpt", "audit"], ["ckpt", "verify"], ["report"]]
)
def test_a_path_without_a_run_is_named(words, tmp_path, capsys):
    extra = ["--prompt", "x"] if words == ["generate"] else []
    assert main([*words, str(tmp_path / "nothing"), *extra]) == 2
    error = capsys.readouterr().err
    assert "nothing" in error and error.count("\n") == 1


def test_ckpt_needs_an_action(capsys):
    assert main(["ckpt"]) == 2
    assert "ACTION" in capsys.readouterr().err
