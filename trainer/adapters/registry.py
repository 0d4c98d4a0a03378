"""The adapters, by the names that a recipe gives them."""

from __future__ import annotations

from typing import Any

from ..recipe.registry import Registry

ADAPTERS: Registry[Any] = Registry("adapter", __package__, {})
