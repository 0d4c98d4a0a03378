"""What an optimizer is to the rest: a record that plan, engines, checkpoints and memory ask. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..families.specs import ParamSpec


def every(spec: ParamSpec) -> bool:
    """For a group that takes what is left."""
    return True


def decayed(spec: ParamSpec) -> bool:
    """For a group of what has weight decay: matrices, not norms and biases."""
    return spec.decays


@dataclass(frozen=True)
class Group:
    """Parameters that the optimizer treats alike: those that `takes` says and no earlier group took."""

    takes: Callable[[ParamSpec], bool]  # a function of a module: plans are sent to other processes
    options: Mapping[str, Any] = field(default_factory=dict)  # where they differ from the optimizer's own params
    states: tuple[str, ...] | None = None  # where they differ from the optimizer's own; such a group counts no steps


@dataclass(frozen=True)
class Optimizer:
    """One optimizer. A new one is a file with such a record, and a line in `registry.py`.

    `build`, where DeepSpeed has no such optimizer: (groups for torch, `optimizer.params` of the JSON) → a torch
    optimizer, which DeepSpeed then wraps; None: DeepSpeed builds it from the JSON.
    """

    types: tuple[str, ...]  # spellings of the JSON's optimizer.type, the usual one first; case does not count
    states: tuple[str, ...]  # tensors that it keeps beside each parameter, of its shape and in fp32, by torch's names
    keys: tuple[str, ...]  # of the recipe's `optimizer` that it takes; they fill the same keys of the JSON's params
    options: frozenset[str] = frozenset()  # further keys of the JSON's params
    groups: tuple[Group, ...] = (Group(every),)
    # what is filled in on "cpu", "cuda", …, by what the JSON states
    params_of_device: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = field(default_factory=dict)
    build: Callable[[Sequence[dict[str, Any]], Mapping[str, Any]], Any] | None = None
    elementwise: bool = True  # whether an element's update follows from its own gradients, not those of its matrix
    zero_options: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)  # zero_optimization must say, by stage

    def states_of(self, group: Group) -> tuple[str, ...]:
        """What it keeps beside each parameter of a group."""
        return self.states if group.states is None else group.states

    def state_bytes(self, group: Group) -> int:
        """Bytes of its states per trained element of a group, without the fp32 master weight."""
        return 4 * len(self.states_of(group))

    def params_on(self, device_type: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """`params` of the JSON, with what a kind of device needs and the JSON does not state."""
        fill = self.params_of_device.get(device_type)
        return {**(fill(params) if fill else {}), **params}
