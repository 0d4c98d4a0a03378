"""Parameters in the groups of their optimizer. Needs no torch: the memory plan groups rows of the table alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from ..families.specs import ParamSpec
from .base import Group, Optimizer

if TYPE_CHECKING:
    from torch import nn

_T = TypeVar("_T")


def grouped(
    things: Iterable[_T], spec_of: Callable[[_T], ParamSpec], optimizer: Optimizer
) -> list[tuple[Group, list[_T]]]:
    """The optimizer's groups that have members, in its order; members in the order of `things`."""
    members: list[list[_T]] = [[] for _ in optimizer.groups]
    for thing in things:
        spec = spec_of(thing)
        members[next(number for number, group in enumerate(optimizer.groups) if group.takes(spec))].append(thing)
    return [(group, own) for group, own in zip(optimizer.groups, members, strict=True) if own]


def parameter_groups(module: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """Groups as torch's optimizers take them, of the parameters that are trained; each carries `.spec`."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = grouped(trained, lambda parameter: parameter.spec, optimizer)  # type: ignore[attr-defined]
    return [{"params": own, **group.options} for group, own in groups]
