"""The routers of a mixture of experts: where they are, by transformers' own word (`_can_record_outputs`), and what they
give, which one of them is asked.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import OutputRecorder

from .buffers import kept_buffers
from .skeleton import skeleton

BIAS = "e_score_correction_bias"  # transformers' name of what is added to the scores when experts are chosen
_TOKENS = 64  # that a router is asked about


@dataclass(frozen=True)
class Routing:
    """The routers of one configuration. Each gives a tuple: logits [tokens, experts], and the experts chosen."""

    paths: tuple[str, ...]  # of the routers, in the order of the layers
    biases: tuple[str, ...]  # the buffer of each that shifts the choice, or none at all
    experts: int
    chosen: int  # experts of a token
    logits: int  # place in a router's tuple
    choice: int  # as well: [tokens, chosen] integers
    scores: Literal["softmax", "sigmoid"]  # what the logits become


def routing_of(config: Mapping[str, Any]) -> Routing | str:
    """The routers of a configuration, or why there is nothing to say of them.

    Raises:
        UserError: transformers cannot build a model from it.
    """
    return _routing(json.dumps(dict(config), sort_keys=True, default=str))


@lru_cache(maxsize=32)
def _routing(stated: str) -> Routing | str:
    model = skeleton(json.loads(stated))
    found = {path: module for path, module in model.named_modules() if _recorded(model, path, module) is not None}
    if not found:
        return "it has no router that transformers names (_can_record_outputs)"
    asked = [(_recorded(model, path, module), _ask(module)) for path, module in found.items()]
    answers = {_answer(place, output) for place, output in asked}
    if len(answers) > 1 or None in answers:
        return (
            "its routers, asked by themselves, do not all give logits of the same experts and a choice by their "
            "softmax or sigmoid"
        )
    (answer,) = answers
    assert answer is not None
    named = dict(kept_buffers(model))
    biases = [name for path in found for name in named if _is_bias_of(path, name)]
    complete = len(biases) == len(found) and all(named[name].numel() == answer[0] for name in biases)
    return Routing(tuple(found), tuple(biases) if complete else (), *answer)


def _recorded(model: Any, path: str, module: nn.Module) -> int | None:
    """Where in a module's output transformers finds router logits; None: nowhere."""
    for owner in (model, model.base_model):
        stated = (getattr(owner, "_can_record_outputs", None) or {}).get("router_logits")
        for recorder in stated if isinstance(stated, list) else [stated]:
            if isinstance(recorder, OutputRecorder) and isinstance(module, recorder.target_class):
                return recorder.index if (recorder.layer_name or "") in path else None
    return None


def _is_bias_of(path: str, name: str) -> bool:
    """Whether a buffer shifts the choice of a router: it is the router's, or beside it."""
    owner, _, leaf = name.rpartition(".")
    return leaf == BIAS and owner in (path, path.rpartition(".")[0])


@torch.no_grad()
def _ask(router: nn.Module) -> Any:
    """What a router with random weights says of random tokens; None: it cannot be asked."""
    twin = copy.deepcopy(router).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in twin.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    for buffer in twin.buffers():
        buffer.zero_()
    widths = [p.shape[-1] for p in twin.parameters() if p.ndim == 2]
    try:
        return twin(torch.randn(_TOKENS, widths[0], generator=generator))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return None


def _answer(place: int | None, output: Any) -> tuple[int, int, int, int, Literal["softmax", "sigmoid"]] | None:
    """Experts, chosen, place of the logits, place of the choice, scores; None: it gives something else."""
    if not isinstance(output, tuple) or place is None or place >= len(output) or not isinstance(output[place], Tensor):
        return None
    logits, whole = output[place], [(at, one) for at, one in enumerate(output) if isinstance(one, Tensor)]
    choices = [(at, one) for at, one in whole if not one.is_floating_point() and one.shape[:-1] == (_TOKENS,)]
    if logits.shape[:-1] != (_TOKENS,) or len(choices) != 1:
        return None
    at, choice = choices[0]
    weights = [one for other, one in whole if one.is_floating_point() and other != place]
    for scores in ("softmax", "sigmoid"):
        expected = _relative(getattr(logits, scores)(*([-1] if scores == "softmax" else [])).gather(1, choice))
        if any(_same(expected, one if one.shape == choice.shape else _picked(one, choice)) for one in weights):
            return logits.shape[-1], choice.shape[-1], place, at, scores
    return None


def _picked(weights: Tensor, choice: Tensor) -> Tensor | None:
    full = weights.shape[:-1] == choice.shape[:-1] and weights.shape[-1] > int(choice.max())
    return weights.gather(1, choice) if full else None


def _same(expected: Tensor, weights: Tensor | None) -> bool:
    return weights is not None and torch.allclose(expected, _relative(weights), atol=1e-5)


def _relative(scores: Tensor) -> Tensor:
    return scores / scores.sum(-1, keepdim=True)
