"""The objectives that a recipe may name under `objective`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..recipe.registry import Registry
from .base import Objective

_FILES = {"causal_lm": "causal_lm:CausalLMLoss", "sft": "sft:SFT", "dpo": "dpo:DPO"}
OBJECTIVES: Registry[Any] = Registry("objective", __package__, _FILES)


def objective_of(stated: str | Mapping[str, Any]) -> Objective:
    """The objective that a recipe states: by name, or as a mapping of `type` and options.

    Raises:
        UserError: no such objective, or an option that it does not take.
    """
    return OBJECTIVES.make(stated)
