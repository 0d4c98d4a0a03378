"""What a causal LM of transformers makes of its last hidden states beside head(hidden), asked of its own forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .skeleton import with_parts

_SMALL, _LARGE, _TOLERANCE = 1e-3, 1e12, 1e-6


def logit_shape(model: Any) -> tuple[float, float] | None:
    """Scale and cap: the logits are `scale * head(hidden)`, or `cap * tanh(scale / cap * head(hidden))`; cap 0: none.

    None: they are something else, and only the model itself can make them.
    """
    head = model.get_output_embeddings()
    path = next((name for name, module in model.named_modules() if module is head), None)
    if path is None or not isinstance(head, nn.Linear):
        return None
    hidden = torch.linspace(-3, 3, 2 * head.in_features, dtype=torch.float64).view(1, 2, -1)
    values = torch.cat([torch.tensor([_SMALL, _LARGE], dtype=torch.float64), torch.linspace(-40, 40, 62)])
    stand_in = _Head(values.view(1, 2, 32))
    try:
        twin = with_parts(model, {model.base_model_prefix: _Base(hidden), path: stand_in})
        logits = twin(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False).logits
    except Exception:  # whatever a forward of theirs raises without its parts
        return None
    if stand_in.seen is None or stand_in.seen.shape != hidden.shape or logits.shape != (1, 2, 32):
        return None
    into, out = stand_in.seen.double() / hidden, logits.double().flatten()
    if not _alike(into, into[0, 0, 0]):
        return None
    scale = float(out[0]) / _SMALL
    if _alike(out, scale * values):
        return float(into[0, 0, 0]) * scale, 0.0
    cap = float(out[1])
    scale = float(torch.atanh(out[0] / cap)) * cap / _SMALL
    if _alike(out[2:], cap * torch.tanh(values[2:] * scale / cap)):
        return float(into[0, 0, 0]) * scale, cap
    return None


def _alike(found: Tensor, expected: Any) -> bool:
    return bool(torch.isclose(found, torch.as_tensor(expected).double(), rtol=10 * _TOLERANCE, atol=_TOLERANCE).all())


class _Output(dict):
    """Of a base model; what a family adds to it (router logits, a cache) is not there."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


class _Base(nn.Module):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _Output(last_hidden_state=self.hidden)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return self  # of a decoder in a model


class _Head(nn.Module):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values, self.seen = values, None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return self.values
