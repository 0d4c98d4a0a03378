"""One parameter: its name, its shape, and how it is cut. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

# vocab, column, row: cut over tensor ranks; expert: a stack [experts, …], over expert ranks; the others are whole on
# every rank:
# feeding: of a norm whose output enters a split region, where its gradient must be summed
# replicated: computes with the whole residual stream, so that its gradient is whole too (row biases, positions)
# summed: computes with split activations (a norm of each head), so that its gradients on the ranks must be summed
# unknown: nothing is said of it, which is an error under tensor parallelism
Kind = Literal["vocab", "column", "row", "expert", "feeding", "replicated", "summed", "unknown"]
Init = Literal["normal", "uniform", "ones", "zeros"]  # uniform: about zero, with the same `std`


@dataclass(frozen=True)
class Split:
    """How an axis of ranks cuts a parameter: along `dim`, in units of `grain` (the head size, where heads must stay
    whole), separately in each of `parts` (fused Q, K, V). With fewer units than ranks, neighbours hold copies of one.
    """

    dim: int
    parts: tuple[int, ...] | None = None
    grain: int = 1


@dataclass(frozen=True)
class ParamSpec:
    """One parameter as Hugging Face names and shapes it, and how the ranks of one axis share it.

    `dim`, `parts`, `ranges`, `local_shape` and `copies` speak of the ranks of `axis`.
    """

    name: str
    shape: tuple[int, ...]  # of the Hugging Face parameter: no padding
    kind: Kind = "unknown"
    split: Split | None = None
    init: Init = "normal"
    std: float = 0.02
    padded_rows: int | None = None  # rows of a vocabulary parameter as trained; the rows beyond `shape` are zero
    layer: int | None = None  # the block that holds it
    linear: bool = False  # whether it is the weight of a linear in the blocks: [out, in]
    conv: bool = False  # and that of a Conv1D: [in, out]
    packed: bool = False  # whether it is kept in four bits
    trained: bool = True
    rate: float = 1.0  # learning rate, relative to the optimizer's

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """Shape as trained: `shape`, with the vocabulary padded."""
        return self.shape if self.padded_rows is None else (self.padded_rows, *self.shape[1:])

    @property
    def numel(self) -> int:
        return math.prod(self.padded_shape)

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, not to norms and biases."""
        return len(self.shape) > 1

    @property
    def axis(self) -> Literal["tensor", "expert"]:
        """Whose ranks share it; tensor ranks, too, where each of them holds the whole."""
        return "expert" if self.kind == "expert" else "tensor"

    @property
    def dim(self) -> int | None:
        """Dimension that the ranks share; None: each holds the whole."""
        return None if self.split is None else self.split.dim

    @property
    def parts(self) -> tuple[int, ...]:
        """Extents along `dim` that are cut one by one."""
        assert self.split is not None, f"{self.name} is not split"
        return self.split.parts or (self.padded_shape[self.split.dim],)

    def ranges(self, rank: int, size: int) -> list[tuple[int, int]]:
        """Half-open ranges along `dim` of the (padded) whole that `rank` of `size` holds, in order."""
        ranges, start = [], 0
        for part in self.parts:
            units = part // self._grain
            first = units * rank // size
            last = units * (rank + 1) // size if units >= size else first + 1
            ranges.append((start + first * self._grain, start + last * self._grain))
            start += part
        return ranges

    def local_shape(self, rank: int, size: int) -> tuple[int, ...]:
        """Shape of what `rank` of `size` holds."""
        if self.dim is None or size == 1:
            return self.padded_shape
        width = sum(stop - start for start, stop in self.ranges(rank, size))
        return (*self.padded_shape[: self.dim], width, *self.padded_shape[self.dim + 1 :])

    def copies(self, size: int) -> int:
        """How many of `size` ranks hold the same."""
        if self.dim is None:
            return size
        units = self.parts[0] // self._grain
        return 1 if units >= size else size // units

    @property
    def _grain(self) -> int:
        return 1 if self.split is None else self.split.grain


def linear(
    name: str, into: int, out: int, bias: bool = False, std: float = 0.02, conv: bool = False
) -> list[ParamSpec]:
    """Rows of a linear layer; `conv`: a Conv1D, whose weight is [in, out]."""
    rows = [ParamSpec(f"{name}.weight", (into, out) if conv else (out, into), std=std, linear=True, conv=conv)]
    return [*rows, ParamSpec(f"{name}.bias", (out,), init="zeros")] if bias else rows


def norm(name: str, width: int, bias: bool = False) -> list[ParamSpec]:
    """Rows of a norm."""
    rows = [ParamSpec(f"{name}.weight", (width,), init="ones")]
    return [*rows, ParamSpec(f"{name}.bias", (width,), init="zeros")] if bias else rows
