"""Which routers a family has, and what they give: asked of the routers themselves."""

import pytest

from zeropipe.trainer.anatomy.routing import routing_of
from zeropipe.trainer.plan.experts import Experts, experts_of

SIZES = {
    "vocab_size": 100,
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "first_k_dense_replace": 1}


@pytest.mark.parametrize(
    ("name", "own", "first", "routers", "experts", "chosen", "scores", "biases"),
    [
        ("mixtral", {"num_local_experts": 6}, "model.layers.0.mlp.gate", 3, 6, 2, "softmax", False),
        ("glm4_moe", ROUTED, "model.layers.1.mlp.gate", 2, 8, 3, "sigmoid", True),
        ("gpt_oss", {"head_dim": 8, "num_local_experts": 4}, "model.layers.0.mlp.router", 3, 4, 4, "softmax", False),
        ("jamba", {}, "model.layers.1.feed_forward.router", 1, 16, 2, "softmax", False),
    ],
)
def test_routers_are_where_transformers_records_them(name, own, first, routers, experts, chosen, scores, biases):
    found = routing_of({"model_type": name, **SIZES, **own})
    assert not isinstance(found, str)
    assert found.paths[0] == first and len(found.paths) == routers
    assert (found.experts, found.chosen, found.scores, bool(found.biases)) == (experts, chosen, scores, biases)


@pytest.mark.parametrize(("name", "told"), [("qwen3", "it has no router"), ("phimoe", "choice by their softmax")])
def test_what_is_no_such_router_is_said(name, told):
    assert told in routing_of({"model_type": name, **SIZES})


def test_what_of_a_mixture_is_at_work():
    """By hand: a layer has `num_experts` times three matrices, of which a token meets `chosen`; the rest is dense."""
    config = {"model_type": "glm4_moe", **SIZES, **ROUTED, "n_shared_experts": 1}
    one = 3 * 32 * 16
    found = experts_of(config)
    assert isinstance(found, Experts) and (found.each_layer, found.layers, found.chosen) == (8, 2, 3)
    assert found.total - found.active == 2 * (8 - 3) * one
    assert experts_of({"model_type": "qwen3", **SIZES}) is None
    assert experts_of({"model_type": "llama", **SIZES}) is None
