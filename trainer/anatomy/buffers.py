"""Buffers that belong to a model's weights: what balances the experts of a mixture, say. Nothing trains them, so that a
run goes on with what `model.init` holds, and checkpoints and exports hold it too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...data_prep.errors import UserError


def name_buffers(model: nn.Module) -> None:
    """Notes in every module what Hugging Face calls its buffers that `state_dict` has, wherever the module goes.

    Raises:
        UserError: one is not in fp32, which checkpoints have no place for.
    """
    for path, module in model.named_modules():
        kept = {
            leaf: f"{path}.{leaf}" if path else leaf
            for leaf, buffer in module._buffers.items()
            if buffer is not None and leaf not in module._non_persistent_buffers_set
        }
        for leaf, name in kept.items():
            if module._buffers[leaf].dtype != torch.float32:  # type: ignore[union-attr]
                dtype = str(module._buffers[leaf].dtype).removeprefix("torch.")  # type: ignore[union-attr]
                raise UserError(f"model.config: {type(model).__name__}'s weights have {name} of {dtype}: not done here")
        if kept:
            module.kept_buffers = kept  # type: ignore[assignment]


def kept_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those buffers of a model, or a part of one, by Hugging Face name."""
    for module in model.modules():
        for leaf, name in getattr(module, "kept_buffers", {}).items():
            yield name, module._buffers[leaf]  # type: ignore[misc]
