"""Weights in fp32 that a run in bf16 begins with: the masters hold them as they are, on every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.harness import run_ranks
from tests.tiny import GPT2, LLAMA, NO_DROPOUT, VOCAB, plan_of, tiny_json, tiny_recipe, tiny_store
from zeropipe.trainer.checkpoint.boxes import pieces
from zeropipe.trainer.checkpoint.deepspeed_state import holdings
from zeropipe.trainer.checkpoint.reader import MASTER
from zeropipe.trainer.engine.build import build_engine
from zeropipe.trainer.ranks.ranks import join_world

pytestmark = pytest.mark.distributed

BF16 = {"bf16": {"enabled": True}}
FP32_SUMS = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
LORA = {"type": "lora", "r": 4, "modules_to_save": ["lm_head"]}
LAYOUTS = {
    "zero1": ("gpt2", "zero1", BF16, {}),
    "zero1-fp32-sums": ("llama", "zero1", FP32_SUMS, {}),
    "zero2-offload": ("llama", "zero2_offload", BF16, {}),
    "zero3": ("gpt2", "zero3", BF16, {}),
    "zero3-lora": ("llama", "zero3", BF16, {"adapter": LORA}),
    "pipeline": ("gpt2", "zero1", BF16, {"parallel": {"pipeline": 2}}),
    "tensor": ("llama", "zero2", {**BF16, "tensor_parallel": {"autotp_size": 2}}, {}),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tiny_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Hugging Face folders of weights in fp32 that bf16 has no numbers for."""
    made = {}
    for name, config in (("gpt2", {**GPT2, **NO_DROPOUT}), ("llama", LLAMA)):
        torch.manual_seed(5)
        net = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config, vocab_size=VOCAB, bos_token_id=0))
        made[name] = tmp_path_factory.mktemp("init") / name
        net.save_pretrained(made[name])
    return made


def _unlike(recipe: dict, ds: dict, folder: Path) -> tuple[int, list[str], list[str]]:
    """How many elements this rank's masters hold of the folder's parameters, and the names of those that are not the
    folder's values, and of weights that are not their rounding."""
    ranks = join_world()
    plan = plan_of(recipe, ds, ranks.world)
    ranks = ranks.lay_out(plan.layout.tensor, plan.layout.sequence, plan.layout.pipeline)
    engine = build_engine(plan, ranks)
    truth = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    held, masters, weights = 0, [], []
    for holding in holdings(engine.live):
        if holding.name not in truth or MASTER not in holding.views:
            continue
        whole = truth[holding.name]
        for piece in pieces(holding.spec, ranks.tensor, ranks.tensor_size, holding.start, holding.stop):
            held += piece.box.numel
            own = whole[piece.box.slices]
            if not torch.equal(holding.view(MASTER, piece.local), own):
                masters.append(holding.name)
            p = holding.parameter
            model = p.ds_tensor if hasattr(p, "ds_id") else p.detach().flatten()[holding.start : holding.stop]  # type: ignore
            if own.numel() == holding.stop - holding.start and not torch.equal(
                model[: own.numel()].flatten(), own.flatten().bfloat16()
            ):
                weights.append(holding.name)
    return held, masters, weights


SAMPLE = ("zero1-fp32-sums", "zero3-lora", "pipeline")


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in LAYOUTS]
)
def test_masters_are_what_the_folder_holds(layout, store, folders, tmp_path):
    model, zero, ds, sections = LAYOUTS[layout]
    recipe = tiny_recipe(store, tmp_path / "run", **{**sections, "model": {"config": {}, "init": str(folders[model])}})
    found = run_ranks(2, _unlike, recipe, tiny_json(zero, **ds), folders[model])
    assert [(masters, weights) for _, masters, weights in found] == [([], [])] * 2
    assert min(held for held, _, _ in found) > 10_000
