"""The objectives, by the names that a recipe gives them."""

from __future__ import annotations

from typing import Any

from ..recipe.registry import Registry

OBJECTIVES: Registry[Any] = Registry("objective", __package__, {"causal_lm": "causal_lm:CausalLM"})
