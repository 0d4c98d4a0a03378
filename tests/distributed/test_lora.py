"""LoRA on every kind of layout against peft in a plain loop; what its checkpoints hold, resume, and become."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
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
from zeropipe.trainer.modeling.values import RandomValues
from zeropipe.trainer.testing.curves import plain_model, whole_batch
from zeropipe.trainer.testing.plain import Curve, train_plainly

pytestmark = pytest.mark.distributed

MODELS = {
    "gpt2": {**tiny.GPT2, **tiny.NO_DROPOUT},  # Conv1D, tied
    "llama": {**tiny.LLAMA, "tie_word_embeddings": False},
    "tied": {**tiny.LLAMA, "tie_word_embeddings": True},
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
    "saved": ("llama", {"modules_to_save": ["lm_head", "input_layernorm"]}),
    "saved-tied": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "lora-plus": ("llama", {"lr_ratio": 2.0}),
}


PP2_CHANGES = [("dp2-zero1", "pp2"), ("pp2", "one")]


def some(rows: Collection[Any], columns: Collection[Any]) -> list[Any]:
    """All pairs, each row with one column in turn; the others are for `make verify`."""
    return [
        pytest.param(row, column, marks=() if (r + c) % len(columns) == 0 else pytest.mark.slow)
        for r, row in enumerate(rows)
        for c, column in enumerate(columns)
    ]


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
        ensure_weight_tying="embed_tokens" in options.modules_to_save,
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


def plain(recipe: dict[str, Any], change: Callable[[Any], Any] = lambda model: model) -> Curve:
    """peft in one process, without DeepSpeed or anything of ours but the order of the data and the initial values."""
    from zeropipe.trainer.engine.base import planned_rate
    from zeropipe.trainer.ranks.ranks import Ranks
    from zeropipe.trainer.run.data import RunData

    plan = tiny.plan_of(recipe, tiny.tiny_json(micro=8), 1)
    model, options = peft_model(plan, change(plain_model(plan))), adapter_of(recipe["adapter"]).options  # type: ignore
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


@pytest.mark.parametrize(("variant", "layout"), some(VARIANTS, LAYOUTS))
def test_it_trains_as_peft_does(variant, layout, tmp_path, truths):
    tiny.tiny_store(tmp_path / "store")
    truth, found = truths(variant), train(variant, tmp_path, layout)
    assert found["loss"] == pytest.approx(truth.losses, rel=2e-6)
    assert found["grad_norm"] == pytest.approx(truth.norms, rel=1e-4)
    assert truth.losses[-1] < truth.losses[0] - 0.01
    checkpoint = Checkpoint.open(tmp_path / "run")
    trained = [name for name in checkpoint.names() if checkpoint.kinds(name) != ["master"]]
    assert set(trained) == set(truth.weights)
    assert {name.split(".")[-2] for name in set(checkpoint.names()) - set(trained)} <= {"lora_A0", "lora_B0"}
    for name in trained:
        expected = torch.from_numpy(truth.weights[name])
        # of its norm: Adam blows up the rounding noise of single elements
        assert torch.dist(checkpoint.read(name), expected[: len(checkpoint.read(name))]) <= 1e-3 * expected.norm(), name


CONSTANT = {"schedule": {"type": "constant", "warmup": 0}, "save": {"every": 3}}


@pytest.mark.parametrize(
    ("variant", "layouts"), some(["gpt2", "pissa", "dora", "saved", "saved-tied"], [("one", "dp2-zero3"), *PP2_CHANGES])
)
def test_it_resumes_on_another_layout(variant, layouts, tmp_path, truths):
    before, after = layouts
    tiny.tiny_store(tmp_path / "store")
    whole = train(variant, tmp_path, "one", "whole", duration={"steps": 6}, **CONSTANT)
    train(variant, tmp_path, before, duration={"steps": 3}, **CONSTANT)
    found = train(variant, tmp_path, after, duration={"steps": 6}, **CONSTANT)
    assert found["step"] == list(range(1, 7))
    assert found["loss"] == pytest.approx(whole["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("layout", "variant"), some(["one", "dp2-zero2", "dp2-zero3", "sp2", "pp2"], ["gpt2", "pissa-dora-rslora"])
)
def test_a_resume_on_the_same_layout_is_the_same_bit_for_bit(variant, layout, tmp_path):
    tiny.tiny_store(tmp_path / "store")
    options = {**VARIANTS[variant][1], "type": "lora", "r": 4, "dropout": 0.1, "lr_ratio": 2.0}
    sections = {**CONSTANT, "adapter": options}
    whole = train(variant, tmp_path, layout, "whole", duration={"steps": 6}, **sections)
    train(variant, tmp_path, layout, duration={"steps": 3}, **sections)
    found = train(variant, tmp_path, layout, duration={"steps": 6}, **sections)
    assert found["loss"] == whole["loss"] and found["grad_norm"] == whole["grad_norm"]


def base_bits(recipe: dict[str, Any], ds: dict[str, Any]) -> bool:
    """Whether training left every frozen weight of the base as it was, bit for bit; and moved what it trains."""
    from zeropipe.trainer.engine.build import build_engine
    from zeropipe.trainer.ranks.ranks import join_world
    from zeropipe.trainer.run.data import RunData
    from zeropipe.trainer.run.quiet import quiet
    from zeropipe.trainer.testing.curves import whole_weights

    quiet()
    ranks = join_world()
    plan = tiny.plan_of(recipe, ds, ranks.world)
    ranks = ranks.lay_out(plan.layout.tensor, plan.layout.sequence, plan.layout.pipeline)
    engine, values = build_engine(plan, ranks), RandomValues(plan.recipe.seed)
    before, _ = whole_weights(engine)
    with RunData.open(plan).stream(ranks) as stream:
        for step in range(3):
            engine.train_step(stream, step)
    after, torn = whole_weights(engine)
    rows = {spec.name: spec for spec in engine.adapter.rows(parameter_table(plan.model_config))}  # type: ignore[union-attr]
    exact = all(
        np.array_equal(after[name], values(spec).to(engine.dtype).float().numpy())
        for name, spec in rows.items()
        if not spec.trained and ".lora_" not in name
    )
    same = all(np.array_equal(after[name], before[name]) for name, spec in rows.items() if not spec.trained)
    moved = all(not np.array_equal(after[name], before[name]) for name, spec in rows.items() if spec.trained)
    return exact and same and moved and not torn and before.keys() == rows.keys()


@pytest.mark.parametrize("precision", [{"bf16": {"enabled": True}}, pytest.param({}, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("layout", "variant"), some(["dp2-zero1", "dp2-zero3", "pp2"], ["pissa", "saved-tied"]))
def test_the_base_is_untouched_bit_for_bit(layout, variant, precision, tmp_path):
    tiny.tiny_store(tmp_path / "store")
    world, zero, extra, stages = LAYOUTS[layout]
    recipe = recipe_of(variant, tmp_path, stages)
    assert all(run_ranks(world, base_bits, recipe, tiny.tiny_json(zero, **extra, **precision)))


def saved_base(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A small Hugging Face folder, of transformers' own initial values."""
    from transformers import AutoConfig

    torch.manual_seed(seed)
    built = AutoConfig.for_model(**config, vocab_size=tiny.VOCAB, bos_token_id=0, eos_token_id=0)
    AutoModelForCausalLM.from_config(built).save_pretrained(folder)
    return folder


def probe_logits(model: Any, run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a plain model, and of training."""
    from zeropipe.trainer.export.huggingface import read_probe

    ids, expected = read_probe(Checkpoint.open(run).path)  # type: ignore[misc]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits, expected


EXPORTED = ("gpt2", "pissa", "dora-conv", "saved-tied")  # the other variants in `make verify`


@pytest.mark.parametrize(
    "variant", [pytest.param(own, marks=() if own in EXPORTED else pytest.mark.slow) for own in VARIANTS]
)
def test_exports_compute_what_training_does(variant, tmp_path):
    tiny.tiny_store(tmp_path / "store")
    base = saved_base(tmp_path / "base", MODELS[VARIANTS[variant][0]])
    bits = {file: file.read_bytes() for file in base.iterdir()}
    run = tmp_path / "run"
    train(variant, tmp_path, "dp2-zero2", model={"init": str(base), "config": {}}, duration={"steps": 4})
    checkpoint = Checkpoint.open(run)
    rows = adapter_of(checkpoint.state["adapter"]).rows(parameter_table(checkpoint.state["model_config"]))  # type: ignore
    assert set(checkpoint.names()) == {spec.name for spec in rows if spec.trained or ".lora_" in spec.name}

    done = export(run)
    assert done.deviation is not None and done.deviation < 1e-5
    merged, expected = probe_logits(AutoModelForCausalLM.from_pretrained(done.folder), run)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(probe_logits(load_model(run)[0], run)[0], expected, rtol=0, atol=1e-5)
    again = MergedWeights(checkpoint)
    values = initial_values(str(run))
    assert values is not None
    for spec in parameter_table(checkpoint.state["model_config"]):
        assert torch.equal(values(spec), again.read(spec.name))

    done = export_adapter(run, tmp_path / "adapter")
    assert done.deviation is not None and done.deviation < 1e-5
    before, _ = probe_logits(AutoModelForCausalLM.from_pretrained(base), run)
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
    found, expected = probe_logits(by_peft, run)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (before - expected).abs().max() > 1e-2  # it has learnt something
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", base.name)
    assert f"An adapter for `{base.name}` (`{checkpoint.state['model_config']['model_type']}`)" in card.text
    assert "step 4, 1,024 tokens with a loss" in card.text and "| train | `store` |" in card.text
    assert {file: file.read_bytes() for file in base.iterdir()} == bits


def test_a_random_base_of_a_derived_family_is_made_again(tmp_path):
    tiny.tiny_store(tmp_path / "store")
    run, config = tmp_path / "run", {**tiny.LLAMA, "model_type": "qwen3", "head_dim": 16}
    train("llama", tmp_path, "one", model={"config": config}, duration={"steps": 4})
    done = export(run)
    assert done.deviation is not None and done.deviation < 1e-5
    merged, expected = probe_logits(AutoModelForCausalLM.from_pretrained(done.folder), run)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    done = export_adapter(run, tmp_path / "adapter")
    assert done.deviation is not None and done.deviation < 1e-5


def test_an_adapter_meets_its_own_base_only(tmp_path):
    tiny.tiny_store(tmp_path / "store")
    base, run = saved_base(tmp_path / "base", MODELS["gpt2"]), tmp_path / "run"
    init = {"init": str(base), "config": {}}
    train("gpt2", tmp_path, "one", model=init, duration={"steps": 2}, **CONSTANT)
    weights = load_model(run)[0].state_dict()
    other = saved_base(tmp_path / "other", MODELS["gpt2"], seed=1)
    with pytest.raises(Exception, match=r"resume: its adapter was trained on another base: .*/base \(digest .*/other"):
        train("gpt2", tmp_path, "dp2-zero1", model={**init, "init": str(other)}, duration={"steps": 4}, **CONSTANT)
    shutil.move(base, tmp_path / "moved")
    with pytest.raises(UserError, match=r"base of its adapter is not at .*/base; say --base FOLDER where it is now"):
        export(run)
    with pytest.raises(UserError, match=r"trained on another base"):
        load_model(run, base=other)
    moved = load_model(run, base=tmp_path / "moved")[0].state_dict()
    assert all(torch.equal(moved[name], weight) for name, weight in weights.items())
    train("gpt2", tmp_path, "one", model={**init, "init": str(tmp_path / "moved")}, duration={"steps": 4}, **CONSTANT)


def test_an_adapter_goes_on_top_of_a_run_with_an_adapter(tmp_path):
    tiny.tiny_store(tmp_path / "store")
    train("llama", tmp_path, "one", "first", duration={"steps": 3})
    train("dora", tmp_path, "dp2-zero1", "second", model={"init": str(tmp_path / "first"), "config": {}})
    done = export(tmp_path / "second")
    assert done.deviation is not None and done.deviation < 1e-5
    assert Checkpoint.open(tmp_path / "second").state["base"]["init"].endswith("first/checkpoints/step-00000003")
