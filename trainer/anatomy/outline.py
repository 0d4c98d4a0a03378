"""What a base model of transformers does around its blocks: its own forward, with stand-ins for what has weights.

So nothing of a family need be written down: what goes into the first block, which masks, rotary tables and other inputs
every block gets, and what is left to do after the last one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .skeleton import with_parts


@dataclass(frozen=True)
class Call:
    """How a block was called: what came in as hidden states [batch, time, width], and everything else."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder(nn.Module):
    """Stands in for a block: notes its inputs and hands the hidden states on."""

    def __init__(self, block: nn.Module, calls: list[tuple[int, Call]], number: int) -> None:
        super().__init__()
        self._block, self._calls, self._number = [block], calls, number  # in a list: it is no part of this
        self.in_tuple = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rest = dict(kwargs)
        hidden, others = (args[0], args[1:]) if args else (rest.pop("hidden_states"), ())
        self._calls.append((self._number, Call(hidden, others, rest)))
        return (hidden,) if self.in_tuple else hidden


class _StandIn(nn.Module):
    """For a module with weights outside the blocks: hands hidden states on, and looks nothing up."""

    def __init__(self, width: int, looks_up: bool) -> None:
        super().__init__()
        self.width, self.looks_up = width, looks_up
        self.seen: Tensor | None = None  # what came in last

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.seen = x
        looks_up = self.looks_up or not x.is_floating_point()
        return torch.zeros(*x.shape, self.width, device=x.device) if looks_up else x


class Outline:
    """A base model of which nothing with weights is left, but for what `install` puts back."""

    def __init__(self, model: Any, blocks: str, embedding: str, norm: str | None) -> None:
        """Args: names of the list of blocks, the embedding and the last norm in `model`, whose buffers are there."""
        base, prefix = model.base_model, model.base_model_prefix + "."
        weight = model.get_input_embeddings().weight
        self._width = getattr(weight, "ds_shape", weight.shape)[1]  # the whole one's, where ZeRO-3 has cut it
        self._blocks, self._norm = blocks.removeprefix(prefix), (norm or "").removeprefix(prefix)
        self._calls: list[tuple[int, Call]] = []
        real = base.get_submodule(self._blocks)
        self._recorders = [_Recorder(block, self._calls, number) for number, block in enumerate(real)]
        self._stand_ins: dict[str, nn.Module] = {self._blocks: nn.ModuleList(self._recorders)}
        inside = (self._blocks + ".", embedding.removeprefix(prefix) + ".")
        for path, module in base.named_modules():
            has_weights = any(p is not None for p in module._parameters.values())
            if path and has_weights and not f"{path}.".startswith(inside):
                self._stand_ins[path] = _StandIn(self._width, isinstance(module, nn.Embedding))
        self.outside = [prefix + path for path in self._stand_ins if path not in (self._blocks, self._norm)]
        self._prefix, self._base, self._twin = prefix, base, None
        self.ran = False  # whether it could be run

    def install(self, name: str, module: nn.Module) -> None:
        """Puts a module with weights back where `outside` names one."""
        self._stand_ins[name.removeprefix(self._prefix)] = module
        self._twin = None

    def run(
        self, hidden: Tensor, positions: Tensor, mask: Tensor | None = None, training: bool = False
    ) -> tuple[list[Call], Tensor]:
        """The calls of all blocks, in order, and what comes out behind the last.

        Args:
            hidden: [batch, time, width], as if it came from the embedding.
            positions: [batch, time].
            mask: of four dimensions, that is handed on to the blocks as it is; None: transformers makes its own.
            training: whether what is outside the blocks drops.
        """
        if self._twin is None:
            self._twin = with_parts(self._base, self._stand_ins)
        _train(self._twin, training)
        given: dict[str, Any] = {"inputs_embeds": hidden, "position_ids": positions, "use_cache": False}
        if mask is not None:
            given["attention_mask"] = mask
        output = self._output(given)
        calls = [call for _, call in self._calls]
        self._numbers = [number for number, _ in self._calls]
        self._calls.clear()
        return calls, output.last_hidden_state

    def _output(self, given: dict[str, Any]) -> Any:
        """Of the twin, whose blocks return a tensor, or a tuple where its forward wants one."""
        self._calls.clear()
        try:
            output = self._twin(**given)  # type: ignore[misc]
        except Exception:  # whatever a forward of theirs raises of a tensor that it takes for a tuple
            if self.ran:
                raise
            for recorder in self._recorders:
                recorder.in_tuple = not recorder.in_tuple
            self._calls.clear()
            output = self._twin(**given)  # type: ignore[misc]
        self.ran = True
        return output

    def in_the_way(self) -> str | None:
        """Why the blocks of this model cannot be called one by one, in words; None where they can."""
        positions = torch.arange(6).expand(2, -1)
        one, other = torch.randn(2, 2, 6, self._width, generator=torch.Generator().manual_seed(0))
        try:
            calls, last = self.run(one, positions)
            again, _ = self.run(other, positions)
        except Exception as error:  # whatever a forward of theirs raises: it was asked for what it cannot do
            failure = f"its forward fails without its weights ({type(error).__name__}: {error})"
            return failure.splitlines()[0][:160]
        if self._numbers != list(range(len(self._recorders))):
            return "it does not call its blocks once each, in their order"
        if any(call.hidden.shape != one.shape for call in calls):
            return "what goes from block to block is not [batch, time, width]"
        if any(after.hidden is not before.hidden for before, after in itertools.pairwise(calls)):
            return "it does something between its blocks"
        for first, second in zip(calls, again, strict=True):
            if name := _differing(first, second):
                return f"its blocks read more than hidden states and positions: {name}"
        norm = self._stand_ins.get(self._norm)
        if not isinstance(norm, _StandIn) or norm.seen is None or not torch.equal(norm.seen, again[-1].hidden):
            return "the last norm does not follow the last block"
        return None if torch.equal(last, calls[-1].hidden) else "it does something behind its last norm"


def masks_of(calls: list[Call]) -> list[Tensor | None]:
    """The attention mask of every block."""
    four = ([value for value in call.args if isinstance(value, Tensor) and value.ndim == 4] for call in calls)
    return [call.kwargs.get("attention_mask", next(iter(found), None)) for call, found in zip(calls, four, strict=True)]


def _train(twin: Any, training: bool) -> None:
    """Sets the mode of a twin and of what it shares, but not of the blocks, which it does not hold."""
    if twin.training != training or any(module.training != training for module in twin.children()):
        for module in twin.modules():
            module.training = training


def _differing(first: Call, second: Call) -> str | None:
    """An input of a block that depends on hidden states; None where none does."""
    named = [*((f"input {n + 1}", a, b) for n, (a, b) in enumerate(zip(first.args, second.args, strict=True)))]
    named += [(name, first.kwargs[name], second.kwargs[name]) for name in first.kwargs]
    return next((name for name, a, b in named if not _same(a, b)), None)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.is_meta or torch.equal(one, other)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return True
