"""Model families by transformers' `model_type`: those that are written down, and what is derived of the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..recipe.registry import Registry
from .derived import Derived
from .deriving import derived
from .family import Family

FAMILIES: Registry[Family] = Registry(
    "model family", __name__.rpartition(".")[0], {"gpt2": "gpt2:GPT2", "llama": "llama:LLAMA"}
)


def family_of(config: Mapping[str, Any]) -> Family | Derived | None:
    """The record of a configuration's family; None where transformers, which all but a few are derived from, is not
    installed or builds no causal LM from it. The first derivation in a process imports torch.
    """
    return FAMILIES.get(config.get("model_type")) or derived(config)
