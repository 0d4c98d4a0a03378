"""How much of a mixture of experts is at work for a token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..families.family import Family
from ..families.registry import family_of
from ..families.specs import parameter_table


@dataclass(frozen=True)
class Experts:
    """Experts of a layer, those that a token goes to, and parameters of the model, tied ones once."""

    each_layer: int
    layers: int
    chosen: int
    total: int
    active: int  # that compute for a token, embedding and head counted


def experts_of(model: Mapping[str, Any]) -> Experts | None:
    """The experts of a configuration; None where its routers say nothing of them. Imports torch, unless a record says
    that there are none.
    """
    family = family_of(model)
    if family is None or isinstance(family, Family):
        return None
    from ..anatomy.routing import routing_of

    routing = routing_of(model)
    if isinstance(routing, str):
        return None
    table = parameter_table(model)
    around = tuple(f"{path.rpartition('.')[0]}." for path in routing.paths)  # the module that has router and experts
    stacks = (s for s in table if s.name.startswith(around) and len(s.shape) > 2 and s.shape[0] == routing.experts)
    total, stacked = sum(spec.numel for spec in table), sum(spec.numel for spec in stacks)
    active = total - stacked + stacked * routing.chosen // routing.experts
    return Experts(routing.experts, len(routing.paths), routing.chosen, total, active)
