"""What plans say of LoRA, without torch; initial values; rates of groups of parameters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import GPT2, LLAMA, NO_DROPOUT, plan_of, tiny_json, tiny_recipe, tiny_store
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.adapters.lora import Lora
from zeropipe.trainer.families.specs import ParamSpec, parameter_table
from zeropipe.trainer.modeling.values import RandomValues

UNTIED = {**LLAMA, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tiny_store(tmp_path_factory.mktemp("lora") / "store", documents=60)


def planned(store: Path, ds: dict[str, Any] | None = None, world: int = 1, **sections: Any) -> Any:
    recipe = tiny_recipe(store, store.parent / "run", **{"model": {"config": UNTIED}, **sections})
    return plan_of(recipe, ds or tiny_json("zero1"), world)


def lora(**options: Any) -> dict[str, Any]:
    return {"adapter": {"type": "lora", **options}}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (lora(r=0), "adapter lora: r must be a positive whole number, got 0"),
        (lora(r=2.0), "adapter lora: r must be a positive whole number, got 2.0"),
        (lora(alpha="16"), "adapter lora: alpha must be a positive number, got '16'"),
        (lora(dropout=1.0), "adapter lora: dropout must be a number from 0 to below 1, got 1.0"),
        (lora(dora=1), "adapter lora: dora must be true or false, got 1"),
        (lora(targets=[]), r"adapter lora: targets must be all-linear, or a list of names of linears, got \[\]"),
        (lora(init="pisa"), "adapter lora: init 'pisa', did you mean 'pissa'"),
        (lora(lr_ratio=0), "adapter lora: lr_ratio must be a positive number, got 0"),
        (lora(rank=8), "adapter lora: unknown option 'rank'; it takes r, alpha, dropout"),
        (
            lora(targets=["query"]),
            r"targets: no linear 'query' in the blocks; there are mlp\.down_proj, mlp\.gate_proj, .*self_attn\.v_proj",
        ),
        (lora(targets="lm_head"), "targets: no linear 'lm_head' in the blocks"),
        (lora(modules_to_save=["head"]), r"modules_to_save: no module 'head'; there are .*lm_head, .*model\.norm"),
        (
            lora(modules_to_save=["mlp"]),
            r"targets and modules_to_save both name model\.layers\.0\.mlp\.down_proj; keep one",
        ),
        (lora(r=65, init="pissa"), "r 65 with pissa: a weight has 32 components; use 32 or less"),
        ({**lora(), "optimizer": {"embedding_lr": 1e-4}}, "embedding_lr: embedding and head are frozen; name them in"),
        ({"optimizer": {"embedding_lr": 0}}, "embedding_lr"),
    ],
)
def test_what_cannot_be_is_refused_by_the_plan(store, sections, said):
    with pytest.raises((UserError, ValueError), match=said):
        planned(store, **sections)


def test_a_tied_head_is_no_module_of_its_own(store):
    tied = {"config": {**LLAMA, "tie_word_embeddings": True}}
    said = r"no module 'lm_head' \(a tied head is the embedding\); there are .*embed_tokens"
    with pytest.raises(UserError, match=said):
        planned(store, model=tied, **lora(modules_to_save=["lm_head"]))


def test_layouts_that_cannot_be_are_refused(store):
    tensor = tiny_json("zero1", tensor_parallel={"autotp_size": 2})
    with pytest.raises(UserError, match=r"adapter .* with tensor parallel 2: not exact when split"):
        planned(store, tensor, 2, **lora())
    scheduler = tiny_json("zero1", scheduler={"type": "WarmupLR", "params": {}})
    for key, sections in (
        ("optimizer.embedding_lr", {"optimizer": {"embedding_lr": 1e-4}}),
        ("adapter lr_ratio", lora(lr_ratio=2.0)),
    ):
        recipe = tiny_recipe(store, store.parent / "run", model={"config": UNTIED}, **sections)
        recipe.pop("schedule")
        with pytest.raises(UserError, match=f"{key} with a scheduler in the DeepSpeed JSON"):
            plan_of(recipe, scheduler, 1)
    four = {**UNTIED, "num_hidden_layers": 4}
    for sections in (lora(modules_to_save=["model.norm"]), {"optimizer": {"embedding_lr": 1e-4}}):
        with pytest.raises(UserError, match=r"pipeline 4: its stages would differ in their groups of parameters"):
            planned(store, None, 4, model={"config": four}, parallel={"pipeline": 4}, **sections)


def test_a_plan_counts_trained_and_frozen_parameters(store):
    whole = planned(store)
    adapted = planned(store, **lora(r=4, targets=["q_proj"]))
    assert adapted.parameters == 2 * 4 * (64 + 64)  # in two blocks A and B of the queries
    assert (whole.frozen, adapted.frozen) == (0, whole.parameters)
    assert adapted.memory.parameters == 4 * (adapted.parameters + adapted.frozen)
    assert adapted.memory.optimizer == 12 * adapted.parameters
    assert planned(store, **lora(r=4, targets=["q_proj"], modules_to_save=["lm_head"])).parameters == 1024 + 512 * 64


@pytest.mark.parametrize("config", [{**GPT2, **NO_DROPOUT}, UNTIED], ids=["gpt2", "llama"])
def test_rows_are_the_parameters_that_are_put_in(config):
    from zeropipe.trainer.adapters.base import install
    from zeropipe.trainer.modeling.build import build_model, make_parameter
    from zeropipe.trainer.ranks.ranks import Ranks

    full = {**config, "vocab_size": 500}
    model, values = build_model(full, None, 0, torch.float32, Ranks()), RandomValues(0)
    adapter = Lora(r=2, dora=True, init="pissa", modules_to_save=["embed_tokens" if config is UNTIED else "wte"])
    made: list[ParamSpec] = []

    def make(spec: ParamSpec, given: torch.Tensor | None = None) -> Any:
        made.append(spec)
        return make_parameter(spec, values if given is None else lambda _: given, torch.float32, Ranks())

    install(adapter, model, make)
    rows = adapter.rows(parameter_table(full))
    assert [p.spec.name for p in model.parameters()] == [spec.name for spec in rows]  # type: ignore[attr-defined]
    assert [tuple(p.shape) for p in model.parameters()] == [spec.padded_shape for spec in rows]
    assert made == [spec for spec in rows if ".lora_" in spec.name]
    own = {p.spec.name: p.requires_grad for p in model.parameters()}  # type: ignore[attr-defined]
    assert all(own[spec.name] == spec.trained for spec in rows if ".lora_" not in spec.name)
    assert any(spec.trained and spec.kind == "vocab" for spec in rows)


def test_initial_values_are_drawn_as_peft_draws_them():
    spec = next(
        spec for spec in Lora(r=64).rows(parameter_table({**UNTIED, "vocab_size": 500})) if "lora_A" in spec.name
    )
    drawn = RandomValues(0)(spec)
    linear = torch.nn.Linear(64, 64)
    torch.nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
    assert drawn.shape == (64, 64) and not torch.equal(drawn, RandomValues(1)(spec))
    assert 0.995 / 8 < drawn.abs().max() <= 1 / 8 and 0.995 / 8 < linear.weight.abs().max() <= 1 / 8
    assert drawn.std().item() == pytest.approx(linear.weight.std().item(), rel=0.03)
    assert abs(drawn.mean().item()) < 0.005
