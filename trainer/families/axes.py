"""On which axes the blocks of a model that nobody has written down have a layout, asked of the model itself.

Needs torch, which is imported when it is asked.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from .derived import DISPATCHED, STACKED, Axis, starred, word_for

_DISPATCH = ("hidden_states", "top_k_index", "top_k_weights")


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


def shared_experts(model: Any, own: Any, refusals: dict[Axis, str]) -> tuple[frozenset[str], int]:
    """Modules of experts that ranks can share, numbers as *, and the experts in each; none, with the reason.

    Transformers says which they are (`base_model_ep_plan`). They are called with tokens, the experts that these go to
    and their weights, and hold nothing but stacks.
    """
    plan = {
        f"{model.base_model_prefix}.{name}": word
        for name, word in (getattr(own, "base_model_ep_plan", None) or {}).items()
    }
    found = {path: module for path, module in model.named_modules() if word_for(plan, path) == DISPATCHED}
    if not found:
        refusals.setdefault(
            "expert", "transformers declares no experts of it that ranks can share (base_model_ep_plan)"
        )
        return frozenset(), 0
    counts: set[Any] = {getattr(module, "num_experts", None) for module in found.values()}
    held = {f"{path}.{name}": p for path, module in found.items() for name, p in module.named_parameters()}
    odd = sorted(starred(name) for name, p in held.items() if word_for(plan, name) != STACKED or {p.shape[0]} != counts)
    called = {tuple(inspect.signature(module.forward).parameters)[:3] for module in found.values()}
    reason = None
    if odd or any(next(module.buffers(), None) is not None for module in found.values()):
        reason = f"its experts hold more than stacks of one size ({', '.join(dict.fromkeys(odd)) or 'buffers'})"
    elif called != {_DISPATCH}:
        reason = f"its experts are not called with {', '.join(_DISPATCH)}"
    if reason is not None:
        refusals.setdefault("expert", reason)
        return frozenset(), 0
    return frozenset(map(starred, found)), counts.pop()


def _attends(module: Any) -> bool:
    """Whether a module's own forward asks transformers for an attention by its name."""
    if not (hasattr(module, "is_causal") and hasattr(module, "config") and hasattr(module, "layer_idx")):
        return False
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(module).forward).__code__.co_names
