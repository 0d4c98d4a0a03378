"""Building on ranks: under ZeRO-3 no rank ever holds the model."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch

from tests.harness import run_ranks
from tests.tiny import GPT2, NO_DROPOUT, tiny_json, tiny_recipe, tiny_store, train_on_ranks
from zeropipe.trainer.families.specs import parameter_table
from zeropipe.trainer.modeling.build import RandomValues, build_model
from zeropipe.trainer.ranks.ranks import init_distributed

pytestmark = pytest.mark.distributed
GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_gpt2.json"
CONFIG = {**GPT2, "n_embd": 128, "n_layer": 6, "vocab_size": 2000, "bos_token_id": 0, "eos_token_id": 0}


def _live_bytes() -> int:
    """Of all tensors made since `gc.freeze`, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _build_zero3() -> tuple[int, int, bool]:
    ranks = init_distributed()
    ds = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    gc.collect()
    gc.freeze()  # what is there already is not looked at again and again
    peak = 0
    random = RandomValues(1)

    def values(spec):
        nonlocal peak
        value = random(spec)
        peak = max(peak, _live_bytes())
        return value

    model = build_model(CONFIG, values, 1, torch.float32, ranks, ds)
    right = True
    for parameter in model.parameters():
        shard, spec = parameter.ds_tensor, parameter.spec  # type: ignore[attr-defined]
        full = torch.zeros(spec.padded_shape)
        full[: spec.shape[0]] = random(spec)
        start = ranks.rank * shard.ds_numel
        own = full.flatten()[start : start + shard.ds_numel]
        right &= torch.equal(shard[: len(own)], own) and parameter.numel() == 0
    return peak, sum(p.ds_tensor.numel() * 4 for p in model.parameters()), right  # type: ignore[attr-defined]


def test_zero3_holds_its_share_and_one_parameter():
    specs = parameter_table(CONFIG)
    whole, largest = sum(4 * spec.numel for spec in specs), max(4 * spec.numel for spec in specs)
    for peak, share, right in run_ranks(2, _build_zero3):
        assert right
        assert share < 0.51 * whole
        # while a value is made: the share so far, the value, and its predecessor before the collector comes
        assert peak < share + 2.5 * largest < whole


def test_golden_losses(tmp_path):
    """A change of order, initial values, schedule or loss shows here. To accept one, delete the file and rerun."""
    store = tiny_store(tmp_path / "store")
    recipe = tiny_recipe(store, tmp_path / "run", model={"config": {**GPT2, **NO_DROPOUT}}, duration={"steps": 10})
    losses = train_on_ranks(1, recipe, tiny_json("zero1"))["loss"]
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")
        pytest.fail(f"wrote {GOLDEN}; look at it and commit it")
    assert losses == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-6)
