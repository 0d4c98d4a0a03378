"""Checkpoints and exports that an earlier revision wrote (tests/golden) still load, go on and export bit for bit."""

from __future__ import annotations

import filecmp
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from tests.tiny import plan_of, tiny_store, train_on_ranks
from zeropipe.launcher.cli import main

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ("gpt2", "llama")  # written on ZeRO-2 over 2 data-parallel ranks, on ZeRO-1 over 2 tensor-parallel ranks
STEP = "step-00000003"


@pytest.fixture
def run(tmp_path, monkeypatch, request):
    """The golden run as it was left after step 3, its store beside it."""
    monkeypatch.chdir(tmp_path)
    tiny_store(tmp_path / "store", documents=60, vocab=150)
    shutil.copytree(GOLDEN / request.param, tmp_path / "runs" / request.param)
    return Path("runs") / request.param


def pair(run: Path) -> tuple[dict, dict]:
    return yaml.safe_load((run / "recipe.yaml").read_text()), json.loads((run / "deepspeed.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("run", FAMILIES, indirect=True)
def test_it_resumes_and_goes_on_as_it_did(run):
    recipe, ds = pair(run)
    expected = json.loads((run / "metrics.json").read_text())
    found = train_on_ranks(2, recipe, ds)
    assert found["ledger"] == expected["ledger"][3:]
    assert found["samples"] == expected["samples"][3:]
    assert found["lr"] == expected["lr"][3:]
    assert found["loss"] == pytest.approx(expected["loss"][3:], rel=1e-6)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"][3:], rel=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("run", FAMILIES, indirect=True)
@pytest.mark.parametrize("world", [1, 2])
def test_what_is_loaded_and_saved_again_is_the_same_bits(run, world):
    from tests.harness import run_ranks

    recipe, ds = pair(run)
    layout = {} if world == 1 else {"tensor_parallel": {"autotp_size": 2}}
    micro = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    ds = {**ds, "zero_optimization": {"stage": 1}, "tensor_parallel": {}, **layout, **micro}
    again = run_ranks(world, _load_and_save, {**recipe, "output": "again"}, ds, str(run))[0]
    before, after = tensors(run / "checkpoints" / STEP), tensors(Path(again))
    assert before.keys() == after.keys() and len(before) > 3 * 15
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("run", FAMILIES, indirect=True)
def test_the_export_is_the_same_bytes(run):
    assert main(["export", str(run / "checkpoints" / STEP), "--output", "exported"]) == 0
    names = sorted(path.name for path in (run / "export").iterdir())
    made_since = ["README.md", "provenance.json"]  # which no export had then
    assert sorted(path.name for path in Path("exported").iterdir()) == sorted([*names, *made_since])
    assert filecmp.cmpfiles(run / "export", "exported", names, shallow=False)[0] == names


def _load_and_save(recipe: dict, ds: dict, run: str) -> str:
    from tests.saving import save
    from zeropipe.trainer.checkpoint.loader import load
    from zeropipe.trainer.engine.build import build_engine
    from zeropipe.trainer.ranks.ranks import join_world

    ranks = join_world()
    plan = plan_of(recipe, ds, ranks.world)
    ranks = ranks.lay_out(plan.layout.tensor, 1, 1)
    engine = build_engine(plan, ranks)
    live = engine.live
    state = load(live, Path(run) / "checkpoints" / STEP)
    return str(save(live, plan.recipe.output, state))


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor put together without this project's reader: kind/name → fp32."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.glob("rank-*.safetensors")):
        with safe_open(file, "pt") as handle:
            shapes = json.loads(handle.metadata()["shapes"])
            for key in handle.keys():  # noqa: SIM118
                kind, rest = key.split("/", 1)
                name, offset = rest.rsplit("/", 1)
                piece, start = handle.get_tensor(key), [int(o) for o in offset.split(",")]
                whole = found.setdefault(f"{kind}/{name}", torch.full(shapes[name], float("nan")))
                whole[tuple(slice(o, o + n) for o, n in zip(start, piece.shape, strict=True))] = piece
    return found
