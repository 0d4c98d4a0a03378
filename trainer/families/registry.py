"""Model families by transformers' `model_type`. A family without a record trains on the ZeRO stages alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..recipe.registry import Registry
from .family import Family

FAMILIES: Registry[Family] = Registry(
    "model family", __name__.rpartition(".")[0], {"gpt2": "gpt2:GPT2", "llama": "llama:LLAMA"}
)


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The record of a configuration's family, if there is one."""
    return FAMILIES.get(config.get("model_type"))
