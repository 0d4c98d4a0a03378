"""QLoRA against peft over the dequantized base, on every layout that plans allow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.distributed import test_lora
from tests.harness import run_ranks
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.checkpoint.reader import Checkpoint
from zeropipe.trainer.export.huggingface import export
from zeropipe.trainer.export.peft_adapter import export_adapter
from zeropipe.trainer.metrics.reading import read_metrics
from zeropipe.trainer.testing.plain import Curve

pytestmark = pytest.mark.distributed

LAYOUTS = test_lora.LAYOUTS
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {"modules_to_save": ["mlp.c_fc"], "targets": ["c_attn", "mlp.c_proj"]}),
    "dora": ("llama", {"dora": True, "targets": ["q_proj", "up_proj", "down_proj"]}),
}


def slow(*values: Any) -> Any:
    """A cell for `make verify`."""
    return pytest.param(*values, marks=pytest.mark.slow)


def recipe_of(variant: str, folder: Path, stages: int = 1, run: str = "run", **sections: Any) -> dict[str, Any]:
    model, options = VARIANTS[variant]
    own = {
        "model": {"config": test_lora.MODELS[model]},
        "adapter": {"type": "qlora", "r": 4, "alpha": 8, **options},
    }
    return test_lora.recipe_of("llama", folder, stages, run, **{**own, **sections})


def train(variant: str, folder: Path, layout: str, run: str = "run", ds: Any = None, **sections: Any) -> dict[str, Any]:
    world, zero, extra, stages = LAYOUTS[layout]
    recipe = recipe_of(variant, folder, stages, run, **sections)
    run_ranks(world, tiny._train, recipe, tiny.tiny_json(zero, **extra, **(ds or {})))
    records = [record for record in read_metrics(recipe["output"]) if record["kind"] == "train"]
    return {key: [record[key] for record in records] for key in records[0]}


def dequantized(model: torch.nn.Module, trained: list[str]) -> torch.nn.Module:
    """The model after bitsandbytes' round trip of every linear in its blocks, by bitsandbytes' own module."""
    from bitsandbytes import functional
    from bitsandbytes.nn import Params4bit
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        saved = any(name.endswith(f".{one}") for one in trained)
        if isinstance(module, torch.nn.Linear | Conv1D) and name != "lm_head" and not saved:
            dense = module.weight.detach()
            turned = dense.T.contiguous() if isinstance(module, Conv1D) else dense
            packed = Params4bit(turned.clone(), quant_type="nf4").to("cpu")
            back = functional.dequantize_4bit(packed.data, packed.quant_state)
            assert 0 < torch.dist(back, turned) < 0.2 * turned.norm()
            module.weight.data.copy_(back.T if isinstance(module, Conv1D) else back)
    return model


@pytest.fixture(scope="module")
def truths(tmp_path_factory) -> Callable[[str], Curve]:
    folder, known = tmp_path_factory.mktemp("truth"), {}
    tiny.tiny_store(folder / "store")

    def truth(variant: str) -> Curve:
        if variant not in known:
            trained = VARIANTS[variant][1].get("modules_to_save", [])
            known[variant] = test_lora.plain(recipe_of(variant, folder), lambda model: dequantized(model, trained))
        return known[variant]

    return truth


@pytest.mark.parametrize(("layout", "variant"), test_lora.some(LAYOUTS, VARIANTS))
def test_it_trains_as_peft_does_over_the_dequantized_base(variant, layout, tmp_path, truths):
    tiny.tiny_store(tmp_path / "store")
    truth, found = truths(variant), train(variant, tmp_path, layout)
    assert found["loss"] == pytest.approx(truth.losses, rel=2e-6)
    assert found["grad_norm"] == pytest.approx(truth.norms, rel=1e-4)
    assert truth.losses[-1] < truth.losses[0] - 0.01
    checkpoint = Checkpoint.open(tmp_path / "run")
    assert set(checkpoint.names()) == set(truth.weights)
    for name, weight in truth.weights.items():
        expected = torch.from_numpy(weight)
        assert torch.dist(checkpoint.read(name), expected) <= 1e-3 * expected.norm(), name


CONSTANT = test_lora.CONSTANT


@pytest.mark.parametrize("layout", [slow("one"), slow("dp2-zero1"), "dp2-zero3", "pp2"])
def test_a_resume_quantises_to_the_same_bits(layout, tmp_path):
    tiny.tiny_store(tmp_path / "store")
    autocast = {"torch_autocast": {"enabled": True}} if layout != "pp2" else {}
    sections = {**CONSTANT, "adapter": {"type": "qlora", "r": 4, "dropout": 0.1, "dora": True}}
    whole = train("llama", tmp_path, layout, "whole", autocast, duration={"steps": 6}, **sections)
    train("llama", tmp_path, layout, "run", autocast, duration={"steps": 3}, **sections)
    found = train("llama", tmp_path, layout, "run", autocast, duration={"steps": 6}, **sections)
    assert found["loss"] == whole["loss"] and found["grad_norm"] == whole["grad_norm"]


@pytest.mark.parametrize(("before", "after"), [slow("one", "dp2-zero3"), ("dp2-zero2", "pp2")])
def test_it_resumes_on_another_layout(before, after, tmp_path):
    tiny.tiny_store(tmp_path / "store")
    whole = train("llama", tmp_path, "one", "whole", duration={"steps": 6}, **CONSTANT)
    train("llama", tmp_path, before, duration={"steps": 3}, **CONSTANT)
    assert train("llama", tmp_path, after, duration={"steps": 6}, **CONSTANT)["loss"] == pytest.approx(
        whole["loss"], rel=1e-6
    )


def packed_bits(recipe: dict[str, Any], ds: dict[str, Any]) -> tuple[int, bool]:
    """How many packed weights there are, and whether those of a rank are quantised exactly and stay so in training
    and evaluation.
    """
    import deepspeed

    from zeropipe.trainer.adapters.quantised import QuantisedLinear, round_trip
    from zeropipe.trainer.engine.build import build_engine
    from zeropipe.trainer.modeling.values import RandomValues
    from zeropipe.trainer.ranks.ranks import join_world
    from zeropipe.trainer.run.data import RunData
    from zeropipe.trainer.run.quiet import quiet

    quiet()
    ranks = join_world()
    plan = tiny.plan_of(recipe, ds, ranks.world)
    ranks = ranks.lay_out(plan.layout.tensor, plan.layout.sequence, plan.layout.pipeline)
    engine, values = build_engine(plan, ranks), RandomValues(plan.recipe.seed)
    linears = [module for module in engine.module.modules() if isinstance(module, QuantisedLinear)]
    engine.logits(torch.arange(8)[None])
    with RunData.open(plan).stream(ranks) as stream:
        engine.train_step(stream, 0)
    engine.logits(torch.arange(8)[None])
    exact = True
    for linear in linears:
        with deepspeed.zero.GatheredParameters([linear.weight]):
            assert linear.weight.dtype == torch.uint8
            full = values(linear.weight.spec)  # type: ignore[arg-type]
            expected = round_trip(full.T.contiguous() if linear.weight.spec.conv else full)  # type: ignore[union-attr]
            exact &= torch.equal(linear.dense(), expected)
    dense = [p for p in engine.module.parameters() if p.dtype != torch.uint8]
    return len(linears), exact and all(p.dtype == torch.float32 for p in dense)


@pytest.mark.parametrize("layout", [slow("one"), slow("dp2-zero2"), "dp2-zero3", "pp2"])
def test_only_the_blocks_are_quantised_and_stay_as_they_are(layout, tmp_path):
    tiny.tiny_store(tmp_path / "store")
    world, zero, extra, stages = LAYOUTS[layout]
    for variant, linears in (("llama", 14), ("gpt2", 6)):  # of two blocks; GPT-2's c_fc is trained whole here
        ds = tiny.tiny_json(zero, **extra, **({} if stages > 1 else {"torch_autocast": {"enabled": True}}))
        found = run_ranks(world, packed_bits, recipe_of(variant, tmp_path, stages), ds)
        assert all(exact for _, exact in found)
        assert {count for count, _ in found} == {linears // stages}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_merged_onto_either_base(variant, tmp_path):
    tiny.tiny_store(tmp_path / "store")
    base = test_lora.saved_base(tmp_path / "base", test_lora.MODELS[VARIANTS[variant][0]])
    run = tmp_path / "run"
    train(variant, tmp_path, "dp2-zero2", model={"init": str(base), "config": {}}, duration={"steps": 4})
    onto = export(run)
    assert onto.deviation is not None and onto.deviation < 1e-5 and onto.bound is not None
    original = export(run, tmp_path / "original", merge_onto="original")
    assert original.bound is None and original.deviation is not None and original.deviation > 1e-3
    assert original.lost == onto.lost and 0.05 < (onto.lost or 0) < 0.15
    adapter = export_adapter(run, tmp_path / "adapter")
    assert adapter.deviation is not None and adapter.deviation < 1e-5

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
    ids = torch.arange(16)[None]
    with torch.no_grad():
        expected = by_peft.eval()(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "original").eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_what_cannot_be_is_refused(tmp_path, monkeypatch):
    tiny.tiny_store(tmp_path / "store")
    recipe = recipe_of("llama", tmp_path)
    with pytest.raises(UserError, match=r"adapter qlora with bf16: .*use torch_autocast"):
        tiny.plan_of(recipe, tiny.tiny_json("zero1", bf16={"enabled": True}), 1)
    with pytest.raises(UserError, match=r"adapter .*qlora.* with tensor parallel 2: not exact when split"):
        tiny.plan_of(recipe, tiny.tiny_json("zero1", tensor_parallel={"autotp_size": 2}), 2)
    with pytest.raises(UserError, match=r"adapter qlora: init pissa would have to quantise"):
        tiny.plan_of(recipe_of("llama", tmp_path, adapter={"type": "qlora", "init": "pissa"}), tiny.tiny_json(), 1)
    train("llama", tmp_path, "one", duration={"steps": 2}, adapter={"type": "lora"})
    with pytest.raises(UserError, match=r"its base was not quantised, so there is one base to merge onto"):
        export(tmp_path / "run", merge_onto="original")

    from zeropipe.trainer.adapters import quantised

    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"bitsandbytes cannot be imported .*; pip install 'zeropipe\[qlora\]'"):
        quantised.round_trip(torch.ones(64, 64))
