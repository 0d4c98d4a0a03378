"""Families of every build train on the ZeRO stages as plain transformers does: state-space models whose modules have
parameters and children, mixtures of experts, attention that only the eager implementation can do.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests import tiny
from tests.harness import run_ranks
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.modeling.build import build_model
from zeropipe.trainer.plan.layout import Layout
from zeropipe.trainer.ranks.ranks import Ranks
from zeropipe.trainer.recipe.recipe import Recipe
from zeropipe.trainer.testing.curves import of_layout, one_process
from zeropipe.trainer.testing.parity import Bounds, compare, plan_in

ATTENTION = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
HEADS = {**ATTENTION, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
STATE_SPACE = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
DELTA_NET = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
FAMILIES = {
    "mamba": {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2},
    "falcon_h1": {**ATTENTION, **STATE_SPACE, "num_hidden_layers": 2, "intermediate_size": 64, "mamba_chunk_size": 16},
    "qwen3_next": {
        **HEADS,
        **EXPERTS,
        **DELTA_NET,
        "linear_value_head_dim": 8,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "shared_expert_intermediate_size": 16,
    },
    "gemma2": {**HEADS, "num_hidden_layers": 2, "intermediate_size": 64, "sliding_window": 8},
    "gpt_oss": {
        **HEADS,
        "num_hidden_layers": 2,
        "intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
    },
}
SAMPLE = ("qwen3_next", "falcon_h1")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny.tiny_store(tmp_path_factory.mktemp("families") / "store")


def plan(name: str, store, layout: Layout, steps: int):
    model = {"config": {"model_type": name, **FAMILIES[name]}}
    recipe = Recipe.model_validate(tiny.tiny_recipe(store, store.parent / "run", model=model))
    return plan_in(recipe, tiny.tiny_json(), layout, steps)


@pytest.mark.parametrize("name", FAMILIES)
def test_initial_values_are_spread_as_transformers_spreads_them(name, store):
    """And nothing that a parent is to fill is left as memory was found."""
    config = plan(name, store, Layout(world=1, data=1), 3).model_config
    ours, theirs = build_model(config, None, 1, torch.float32, Ranks()), plain(config)
    for (key, one), (other_key, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        spread, size = other.std() if other.numel() > 1 else torch.tensor(0.0), other.numel()
        assert key == other_key and one.isfinite().all()
        assert abs(one.mean() - other.mean()) <= 6 * spread / size**0.5 + 1e-6, key
        if size >= 64:
            assert abs(one.std() - other.std()) <= 6 * spread / size**0.5 + 1e-6, key
    for (key, one), (_, other) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.equal(one, other), key


def plain(config: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.distributed
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("name", "steps"),
    [(name, 3) for name in SAMPLE] + [pytest.param(name, 20, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_one_rank_and_two_partitioned_ones_follow_plain_transformers(name, steps, store, record_property):
    one, partitioned = Layout(world=1, data=1, zero_stage=1), Layout(world=2, data=2, zero_stage=3)
    [truth] = run_ranks(1, one_process, plan(name, store, one, steps), timeout=600)
    for layout in (one, partitioned):
        planned = plan(name, store, layout, steps)
        found = compare(planned, run_ranks(layout.world, of_layout, planned, timeout=600)[0], truth, Bounds())
        record_property(str(layout), f"loss {found.loss:.1e}, norm {found.norm:.1e}, weights {found.weights:.1e}")
        assert found.difference is None
    assert truth.losses[-1] < truth.losses[0]


@pytest.mark.parametrize("name", ["smollm3", "glm4"])
def test_a_padding_token_of_another_vocabulary_is_none(name, store):
    """Their defaults are tokens above 100,000; torch makes no embedding with a padding row that is not there."""
    config = {"model_type": name, **ATTENTION, "num_hidden_layers": 1, "intermediate_size": 32}
    recipe = tiny.tiny_recipe(store, store.parent / "run", model={"config": config})
    resolved = tiny.plan_of(recipe, tiny.tiny_json(), 1).model_config
    model = build_model(resolved, None, 1, torch.float32, Ranks())
    assert model.get_input_embeddings().padding_idx is None
    assert model.get_input_embeddings().weight[: tiny.VOCAB].abs().sum(1).min() > 0  # no row was blanked
    config["pad_token_id"] = tiny.VOCAB
    with pytest.raises(UserError, match=r"pad_token_id: must be a token below vocab_size 500, or null; got 500"):
        tiny.plan_of(recipe, tiny.tiny_json(), 1)
