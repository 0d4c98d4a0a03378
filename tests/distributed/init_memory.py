"""Host memory of ranks that begin under ZeRO-3 with the weights of a folder of 320 MB."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import NamedTuple

import torch

from tests.distributed.test_checkpoint_memory import _growth as growth
from tests.harness import run_ranks
from tests.tiny import folder_of_zeros, plan_of, tiny_json, tiny_recipe, tiny_store

CONFIG = {
    "model_type": "llama",
    "vocab_size": 16000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
PARAMETER = 4 * 16000 * 1024  # bytes of the largest, in fp32


class Took(NamedTuple):
    """Bytes of a rank: its share of the weights in fp32, the most that it had while the model was built, and then while
    all of the engine was, with gradients and the optimizer's masters."""

    share: int
    model: int
    engine: int


def begun(world: int, folder: Path) -> list[Took]:
    """What each rank took."""
    weights = folder / "weights"
    if not weights.exists():
        folder_of_zeros(weights, CONFIG)
        tiny_store(folder / "store")
    recipe = tiny_recipe(folder / "store", folder / "run", model={"init": str(weights), "config": {}})
    return run_ranks(world, _begin, recipe, tiny_json("zero3"), timeout=600)


def _begin(recipe: dict, ds: dict) -> Took:
    import deepspeed  # noqa: F401 (what importing takes is no part of it)

    from zeropipe.trainer.adapters.merged import initial_values
    from zeropipe.trainer.engine.base import runtime_config
    from zeropipe.trainer.engine.build import build_engine
    from zeropipe.trainer.modeling.build import build_model
    from zeropipe.trainer.ranks.ranks import join_world

    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed goes back at once
    ranks = join_world()
    plan = plan_of(recipe, ds, ranks.world)
    ranks = ranks.lay_out(1, 1, 1)
    values, config, kept = initial_values(plan.recipe.model.init, ranks), runtime_config(plan, ranks), []
    model = growth(lambda: kept.append(build_model(plan.model_config, values, 0, torch.float32, ranks, config)))
    share = 4 * sum(math.prod(p.ds_tensor.shape) for p in kept.pop().parameters())
    return Took(share, model, growth(lambda: kept.append(build_engine(plan, ranks, values))))
