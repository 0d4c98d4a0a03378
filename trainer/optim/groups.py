"""Parameters in the groups of their optimizer. Needs no torch: the memory plan groups rows of the table alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from ..families.specs import ParamSpec
from ..ranks.expert_parameters import MOE_GROUP
from .base import Group, Optimizer

if TYPE_CHECKING:
    from torch import nn

_T = TypeVar("_T")


RATE = "lr_ratio"  # key of a group: its learning rate over the schedule's; left out where it is 1


def grouped(
    things: Iterable[_T], spec_of: Callable[[_T], ParamSpec], optimizer: Optimizer, embedding_rate: float = 1.0
) -> list[tuple[Group, list[_T]]]:
    """The optimizer's groups that have members, in its order, one for each learning rate, and apart from the others
    those of experts that ranks share; members in the order of `things`.

    Args:
        embedding_rate: learning rate of embedding and head over that of the others.
    """
    members: dict[tuple[int, float, bool], list[_T]] = {}
    for thing in things:
        spec = spec_of(thing)
        number = next(number for number, group in enumerate(optimizer.groups) if group.takes(spec))
        rate = spec.rate * (embedding_rate if spec.kind == "vocab" else 1.0)
        members.setdefault((number, rate, spec.kind == "expert"), []).append(thing)
    return [(_own(optimizer.groups[key[0]], *key[1:]), members[key]) for key in sorted(members)]


def _own(group: Group, rate: float, shared: bool) -> Group:
    more = {**({} if rate == 1 else {RATE: rate}), **(MOE_GROUP if shared else {})}
    return replace(group, options={**group.options, **more}) if more else group


def parameter_groups(module: nn.Module, optimizer: Optimizer, embedding_rate: float = 1.0) -> list[dict[str, Any]]:
    """Groups as torch's optimizers take them, of the parameters that are trained; each carries `.spec`. Those of a
    group with states of its own get `.states`, their names, which checkpoints go by.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = grouped(trained, lambda parameter: parameter.spec, optimizer, embedding_rate)  # type: ignore[attr-defined]
    for group, own in groups:
        for parameter in own if group.states is not None else ():
            parameter.states = group.states  # type: ignore[attr-defined]
    return [{"params": own, **group.options} for group, own in groups]
