"""The same recipe on CUDA under NCCL as on a CPU under gloo, through the launcher: for whoever has a GPU.

Deselected by default; run with `pytest -m gpu tests/gpu`. Uses two devices where there are two, else one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import GPT2, LLAMA, NO_DROPOUT, tiny_json, tiny_recipe, tiny_store, write_pair
from zeropipe.trainer.metrics.reading import read_metrics

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

DEVICE = "cuda"
STEPS = 6


def devices() -> int:
    """How many devices a run uses; a machine without any fails, because nothing would have been tested."""
    import torch

    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.fail("these tests need a CUDA device; leave out `-m gpu` on a machine without one")
    return min(2, torch.cuda.device_count()) if DEVICE == "cuda" else 1


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.mktemp("data") / "store")


def command(device: str, *words: str) -> str:
    environment = {**os.environ, "DS_ACCELERATOR": device}
    done = subprocess.run(
        [sys.executable, "-m", "zeropipe.launcher", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def launch(device: str, world: int, folder: Path, recipe: dict[str, Any], ds: dict[str, Any]) -> list[dict[str, Any]]:
    """Trains through `zeropipe launch`; the train records that count."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe_file, ds_file = write_pair(folder, recipe, ds)
    command(device, "launch", str(recipe_file), "--deepspeed_config", str(ds_file), "--devices", str(world))
    return [record for record in read_metrics(recipe["output"]) if record["kind"] == "train"]


def recipe_for(store: Path, output: Path, config: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return tiny_recipe(store, output, model={"config": config}, duration={"steps": STEPS}, **sections)


@pytest.mark.parametrize("config", [{**GPT2, **NO_DROPOUT}, LLAMA], ids=["gpt2", "llama"])
def test_losses_follow_the_cpu(config, store, tmp_path):
    """fp32 on every ZeRO stage, against one CPU process: the same samples, and losses within 1e-5."""
    cpu = launch("cpu", 1, tmp_path / "cpu", recipe_for(store, tmp_path / "cpu" / "run", config), tiny_json("zero0"))
    for zero in ("zero0", "zero1", "zero2", "zero3", "zero3_offload"):
        folder = tmp_path / zero
        gpu = launch(DEVICE, devices(), folder, recipe_for(store, folder / "run", config), tiny_json(zero))
        assert [record["ledger"] for record in gpu] == [record["ledger"] for record in cpu]
        assert [record["loss"] for record in gpu] == pytest.approx([record["loss"] for record in cpu], rel=1e-5)
        assert [record["grad_norm"] for record in gpu] == pytest.approx([r["grad_norm"] for r in cpu], rel=1e-4)


def test_bf16_follows_fp32(store, tmp_path):
    """Within the bound that was measured on a CPU, 3e-4, and some room for other kernels."""
    config = {**GPT2, **NO_DROPOUT}
    cpu = launch("cpu", 1, tmp_path / "cpu", recipe_for(store, tmp_path / "cpu" / "run", config), tiny_json("zero0"))
    recipe = recipe_for(store, tmp_path / "bf16" / "run", config)
    gpu = launch(DEVICE, devices(), tmp_path / "bf16", recipe, tiny_json("zero2", bf16={"enabled": True}))
    assert [record["loss"] for record in gpu] == pytest.approx([record["loss"] for record in cpu], rel=1e-3)


@pytest.mark.parametrize("zero", ["zero1", "zero3"])
def test_a_resume_is_bitwise(zero, store, tmp_path):
    """6 steps, against 3 steps, new processes and 3 steps; with dropout."""
    whole = launch(
        DEVICE, devices(), tmp_path / "whole", recipe_for(store, tmp_path / "whole" / "run", GPT2), tiny_json(zero)
    )
    folder = tmp_path / "halves"
    recipe = recipe_for(store, folder / "run", GPT2, save={"every": 3})
    launch(DEVICE, devices(), folder, recipe, tiny_json(zero))
    remove_last_checkpoint(folder / "run")
    resumed = launch(DEVICE, devices(), folder, recipe, tiny_json(zero))
    assert len({record["run"] for record in resumed}) == 2, "nothing was resumed"
    for key in ("loss", "grad_norm", "lr"):
        assert [record[key].hex() for record in resumed] == [record[key].hex() for record in whole]


def remove_last_checkpoint(run: Path) -> None:
    """As if the run had been killed after step 3."""
    last = run / "checkpoints" / f"step-{STEPS:08d}"
    last.rename(run / "lost")


@pytest.mark.parametrize("extra", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
def test_an_export_holds_what_was_trained(extra, store, tmp_path):
    """`zeropipe export` compares the reloaded model with the live engine: here one on CUDA, the other on either."""
    recipe = recipe_for(store, tmp_path / "run", LLAMA, eval={"every": STEPS, "batches": 1})
    launch(DEVICE, devices(), tmp_path, recipe, tiny_json("zero3", **extra))
    run = str(tmp_path / "run")
    for device in (DEVICE, "cpu"):
        out = command(device, "export", run, "--output", str(tmp_path / f"export-{device}"))
        assert "verified: logits within" in out
    files = [(tmp_path / f"export-{device}" / "model.safetensors").read_bytes() for device in (DEVICE, "cpu")]
    assert files[0] == files[1]
    losses = [
        json.loads(command("cpu", "eval", run, "--batches", "1", "--json", "--device", device))["loss"]
        for device in (DEVICE, "cpu")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
