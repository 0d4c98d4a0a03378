"""The adapters that a recipe may name under `adapter`; `none` is no adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..recipe.registry import Registry
from .base import Adapter

ADAPTERS: Registry[Any] = Registry("adapter", __package__, {"lora": "lora:Lora", "qlora": "qlora:Qlora"})


def adapter_of(stated: str | Mapping[str, Any]) -> Adapter | None:
    """The adapter that a recipe states: by name, or as a mapping of `type` and options.

    Raises:
        UserError: no such adapter, or an option that it does not take.
    """
    return None if stated == "none" else ADAPTERS.make(stated)
