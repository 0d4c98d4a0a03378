"""LoRA on every kind of layout against peft in a plain loop; what its checkpoints hold, resume, and become."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.harness import run_ranks
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.adapters.merged import MergedWeights, initial_values
from zeropipe.trainer.adapters.registry import adapter_of
from zeropipe.trainer.checkpoint.reader import Checkpoint
from zeropipe.trainer.export.huggingface import export
from zeropipe.trainer.export.load import load_model
from zeropipe.trainer.export.peft_adapter import export_adapter
from zeropipe.trainer.families.specs import parameter_table
from zeropipe.trainer.metrics.reading import read_metrics
from zeropipe.trainer.modeling.build import RandomValues
from zeropipe.trainer.testing.curves import plain_model, whole_batch
from zeropipe.trainer.testing.plain import Curve, train_plainly

pytestmark = pytest.mark.distributed

MODELS = {
    "gpt2": {**tiny.GPT2, **tiny.NO_DROPOUT},  # Conv1D, tied
    "llama": {**tiny.LLAMA, "tie_word_embeddings": False},
}
LAYOUTS: Mapping[str, tuple[int, str, dict[str, Any], int]] = {
    "one": (1, "zero0", {}, 1),
    "dp2-zero1": (2, "zero1", {}, 1),
    "dp2-zero2": (2, "zero2", {}, 1),
    "dp2-zero3": (2, "zero3", {}, 1),
    "sp2": (2, "zero2", {"sequence_parallel_size": 2}, 1),
    "pp2": (2, "zero1", {}, 2),
}
STEPS = 20
VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "llama": ("llama", {"targets": ["q_proj", "mlp.down_proj"]}),
    "rslora": ("llama", {"rslora": True}),
    "dora": ("llama", {"dora": True}),
    "dora-conv": ("gpt2", {"dora": True}),
    "pissa": ("llama", {"init": "pissa"}),
    "pissa-dora-rslora": ("gpt2", {"init": "pissa", "dora": True, "rslora": True}),
    "saved": ("llama", {"modules_to_save": ["lm_head", "norm"]}),
    "saved-tied": ("gpt2", {"modules_to_save": ["wte"]}),
    "lora-plus": ("llama", {"lr_ratio": 2.0}),
}


def recipe_of(variant: str, folder: Path, stages: int = 1, run: str = "run", **sections: Any) -> dict[str, Any]:
    model, options = VARIANTS[variant]
    own = {
        "model": {"config": MODELS[model]},
        "adapter": {"type": "lora", "r": 4, "alpha": 8, **options},
        "parallel": {"pipeline": stages},
        "optimizer": {"lr": 5e-3, "weight_decay": 0.1},
        "duration": {"steps": STEPS},
    }
    return tiny.tiny_recipe(folder / "store", folder / run, **{**own, **sections})


def peft_model(plan: Any, module: Any) -> PeftModel:
    """peft's model of a plan, with our A and B to begin with; PiSSA's are its own."""
    options = adapter_of(plan.recipe.adapter).options  # type: ignore[union-attr]
    conv = plan.model_config["model_type"] == "gpt2"
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,  # type: ignore[arg-type]
        target_modules=list(options.named_targets) or "all-linear",
        use_rslora=options.rslora,
        use_dora=options.dora,
        init_lora_weights="pissa" if options.pissa else True,
        modules_to_save=list(options.modules_to_save) or None,
        ensure_weight_tying=bool(options.modules_to_save) and conv,
        fan_in_fan_out=conv,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(module, config)
    rows = adapter_of(plan.recipe.adapter).rows(parameter_table(plan.model_config))  # type: ignore[union-attr]
    theirs, values = dict(model.named_parameters()), RandomValues(plan.recipe.seed)
    for spec in rows:
        leaf = spec.name.split(".")[-2]
        if leaf in ("lora_A", "lora_B") and not options.pissa:
            with torch.no_grad():
                theirs[f"base_model.model.{spec.name.removesuffix('weight')}default.weight"].copy_(values(spec))
    return model


def in_our_names(name: str) -> str:
    for piece, ours in (("base_model.model.", ""), (".default", ""), (".modules_to_save", ""), (".base_layer", "")):
        name = name.replace(piece, ours)
    return name


def plain(recipe: dict[str, Any]) -> Curve:
    """peft in one process, without DeepSpeed or anything of ours but the order of the data and the initial values."""
    from zeropipe.trainer.engine.base import planned_rate
    from zeropipe.trainer.ranks.ranks import Ranks
    from zeropipe.trainer.run.data import RunData

    plan = tiny.plan_of(recipe, tiny.tiny_json(micro=8), 1)
    model, options = peft_model(plan, plain_model(plan)), adapter_of(recipe["adapter"]).options  # type: ignore
    groups: dict[tuple[float, float], list[Any]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            ratio = options.lr_ratio if "lora_B" in name else 1.0
            groups.setdefault((0.1 if p.ndim > 1 else 0.0, ratio), []).append(p)
    optimizer = torch.optim.AdamW(
        [{"params": own, "weight_decay": decay, "ratio": ratio} for (decay, ratio), own in groups.items()],
        lr=1.0,
        betas=(0.9, 0.95),
        eps=1e-8,
    )

    def set_rate(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = planned_rate(plan, step) * group["ratio"]

    with RunData.open(plan).stream(Ranks()) as stream:
        batches = (whole_batch(stream.next_step(), torch.device("cpu")) for _ in range(plan.total_steps))
        curve = train_plainly(model, batches, optimizer, 0.3, set_rate)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    curve.weights = {in_our_names(name): p.detach().numpy() for name, p in trained.items()}
    return curve


def train(variant: str, folder: Path, layout: str, run: str = "run", **sections: Any) -> dict[str, Any]:
    """Trains in fresh processes; every train record by step."""
    world, zero, extra, stages = LAYOUTS[layout]
    recipe = recipe_of(variant, folder, stages, run, **sections)
    run_ranks(world, tiny._train, recipe, tiny.tiny_json(zero, **extra))
    records = [record for record in read_metrics(recipe["output"]) if record["kind"] == "train"]
    return {key: [record[key] for record in records] for key in records[0]}


@pytest.fixture(scope="module")
def truths(tmp_path_factory) -> Callable[[str], Curve]:
    folder, known = tmp_path_factory.mktemp("truth"), {}
    tiny.tiny_store(folder / "store")

    def truth(variant: str) -> Curve:
        if variant not in known:
            known[variant] = plain(recipe_of(variant, folder))
        return known[variant]

    return truth


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_trains_as_peft_does(variant, layout, tmp_path, truths):
    tiny.tiny_store(tmp_path / "store")
    truth, found = truths(variant), train(variant, tmp_path, layout)
    assert found["loss"] == pytest.approx(truth.losses, rel=2e-6)
    assert found["grad_norm"] == pytest.approx(truth.norms, rel=1e-4)
    assert truth.losses[-1] < truth.losses[0] - 0.01
    checkpoint = Checkpoint.open(tmp_path / "run")
    trained = [name for name in checkpoint.names() if "master" != "".join(checkpoint.kinds(name))]
    assert set(trained) == set(truth.weights)
    assert {name.split(".")[-2] for name in set(checkpoint.names()) - set(trained)} <= {"lora_A0", "lora_B0"}
    for name in trained:
        expected = torch.from_numpy(truth.weights[name])
        # of its norm: Adam blows up the rounding noise of single elements
        assert torch.dist(checkpoint.read(name), expected[: len(checkpoint.read(name))]) <= 1e-3 * expected.norm(), name
