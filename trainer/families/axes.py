"""On which axes the blocks of a model that nobody has written down have a layout, asked of the model itself.

Needs torch, which is imported when it is asked.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from .derived import Axis


def check_blocks(model: Any, blocks: str | None, embedding: str, norm: str | None, refusals: dict[Axis, str]) -> None:
    """Whether the blocks can be called one by one; masks over whole sequences come from the same calls."""
    import torch

    from ..anatomy.outline import Outline
    from ..anatomy.skeleton import materialise_buffers

    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        for axis in ("pipeline", "sequence"):
            refusals.setdefault(axis, "it takes no position_ids")
        return
    if blocks is None or not blocks.startswith(f"{model.base_model_prefix}."):
        for axis in ("pipeline", "sequence"):
            refusals.setdefault(axis, "its blocks are in no list of its own")
        return
    materialise_buffers(model, torch.device("cpu"))
    outline = Outline(model, blocks, embedding, norm)
    if reason := outline.in_the_way():
        refusals.setdefault("pipeline", reason)
    if not outline.ran:  # it makes the masks of whole sequences
        refusals.setdefault("sequence", str(reason))


def check_sequence(model: Any, blocks: str | None, refusals: dict[Axis, str]) -> None:
    """Sequence parallelism exchanges what goes through transformers' attention interface, and nothing else."""
    if "sequence" in refusals:
        return
    mixing = sorted(
        {
            type(module).__name__
            for module in model.modules()
            if re.search(
                r"Conv1d|Mamba|GatedDelta|ShortConv|LinearAttention|Mixer|Rwkv|RecurrentBlock|Lightning|Indexer",
                type(module).__name__,
            )
        }
    )
    if mixing:
        refusals["sequence"] = f"{', '.join(mixing)} would mix tokens of other ranks"
    elif not any(_attends(module) for module in model.modules()):
        refusals["sequence"] = "its attention does not go through transformers' interface"
    elif any("sinks" in module._parameters for module in model.modules()):
        refusals["sequence"] = "the sinks of its attention belong to heads, which move"


def _attends(module: Any) -> bool:
    """Whether a module's own forward asks transformers for an attention by its name."""
    if not (hasattr(module, "is_causal") and hasattr(module, "config") and hasattr(module, "layer_idx")):
        return False
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(module).forward).__code__.co_names
