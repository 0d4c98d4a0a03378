"""The values that parameters begin with: where they come from, and the part of them that a rank keeps."""

from __future__ import annotations

import functools
import heapq
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...data_prep.errors import UserError
from ..anatomy.buffers import kept_buffers
from ..anatomy.published import Making, as_loaded
from ..anatomy.skeleton import materialise_buffers, skeleton
from ..checkpoint.boxes import pieces
from ..families.specs import ParamSpec, parameter_seed
from ..families.weight_files import WeightFiles
from ..ranks.ranks import Ranks

# the full Hugging Face parameter, unpadded, of any float type: a tensor, or what reads a part of one when it is indexed
Values = Callable[[ParamSpec], Any]


def nothing(spec: ParamSpec) -> Tensor:
    """Zeros that take no memory: for what others fill, or a checkpoint will."""
    return torch.zeros(()).expand(spec.shape)


def all_of(values: Values, spec: ParamSpec) -> Tensor:
    """All of a parameter."""
    return values(spec)[tuple(map(slice, spec.shape))]


def make_buffers(model: nn.Module, values: Values | None, device: torch.device) -> None:
    """Makes the buffers of a model, on every rank, since they are small: as transformers computes them, and those that
    belong to its weights as `values` say.
    """
    materialise_buffers(model, device)
    if values is not None:
        fill_buffers(model, values)


@torch.no_grad()
def fill_buffers(model: nn.Module, values: Values) -> None:
    """Gives those buffers of a model that belong to its weights their values."""
    for name, buffer in kept_buffers(model):
        buffer.copy_(all_of(values, ParamSpec(name, tuple(buffer.shape))))


def put_off(values: Values) -> Values:
    """Values that are made when a part of them is first asked for."""
    return lambda spec: _PutOff(spec, values)


class _PutOff:
    def __init__(self, spec: ParamSpec, values: Values) -> None:
        self.shape, self._make = spec.shape, functools.cache(lambda: values(spec))

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        return self._make()[index]


def piece_of_rank(
    full: Any, spec: ParamSpec, dtype: torch.dtype, ranks: Ranks, ranges: Sequence[tuple[int, int]] | None = None
) -> Tensor:
    """This rank's piece of a parameter, on the device that trains, zero where it is padded.

    Args:
        full: the whole parameter, as `Values` give it.
        ranges: flat ranges of the piece to fill, zeros around them; None: all of it.

    Raises:
        UserError: the shape is not that of the model.
    """
    if tuple(full.shape) != spec.shape:
        raise UserError(f"{spec.name}: expected shape {list(spec.shape)}, found {list(full.shape)}")
    place = ranks.along(spec.axis)[:2]
    data = torch.zeros(spec.local_shape(*place), dtype=dtype, device=ranks.device)
    for start, stop in [(0, data.numel())] if ranges is None else ranges:
        for piece in pieces(spec, *place, start, stop):
            data[piece.local.slices].copy_(full[piece.box.slices])
    return data


def dealt(specs: Iterable[ParamSpec], unit: Callable[[str], str], replicas: int) -> dict[str, int]:
    """Which replica draws each parameter, by name: evenly, and those of one unit together."""
    loads, found, units = [(0, replica) for replica in range(replicas)], dict[str, int](), dict[str, list[ParamSpec]]()
    for spec in specs:
        units.setdefault(unit(spec.name), []).append(spec)
    for own in units.values():
        drawn, replica = loads[0]
        heapq.heapreplace(loads, (drawn + sum(math.prod(spec.shape) for spec in own), replica))
        found |= {spec.name: replica for spec in own}
    return found


@dataclass(frozen=True)
class Cut:
    """How ZeRO-3 cuts parameters over replicas: into equal flat ranges, the last of which are padded.

    `secondary`: over how many ranks a second copy is cut (`zero_hpz_partition_size`); 1: there is none.
    """

    ranks: Ranks
    secondary: int

    @classmethod
    def of(cls, ranks: Ranks, ds_config: Mapping[str, Any]) -> Cut:
        return cls(ranks, ds_config["zero_optimization"].get("zero_hpz_partition_size", 1))

    def share(self, spec: ParamSpec) -> int:
        """Elements of a range of this rank's piece of a parameter, padding counted."""
        return -(-self._numel(spec) // self.ranks.holders(spec.axis)[1])

    def ranges(self, spec: ParamSpec) -> list[tuple[int, int]]:
        """What this rank keeps of its piece of a parameter."""
        place, count, _ = self.ranks.holders(spec.axis)
        numel, share = self._numel(spec), self.share(spec)
        places = [(place, share)]
        if self.secondary > 1:
            places.append((self.ranks.rank % self.secondary, share * count // self.secondary))
        return [(min(place * size, numel), min((place + 1) * size, numel)) for place, size in places]

    def _numel(self, spec: ParamSpec) -> int:
        return math.prod(spec.local_shape(*self.ranks.along(spec.axis)[:2]))


class RandomValues:
    """Initial values of each parameter from (seed, name) alone, as its table row says. Always drawn on the CPU."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def unit(self, name: str) -> str:
        """What is drawn together with a parameter: nothing else."""
        return name

    def __call__(self, spec: ParamSpec) -> Tensor:
        if spec.init in ("ones", "zeros"):
            return torch.ones(spec.shape) if spec.init == "ones" else torch.zeros(spec.shape)
        generator = torch.Generator().manual_seed(parameter_seed(self._seed, spec.name))
        if spec.init == "uniform":
            return (torch.rand(spec.shape, generator=generator) * 2 - 1) * (math.sqrt(3) * spec.std)
        return torch.randn(spec.shape, generator=generator) * spec.std


class FilePart:
    """A tensor in a safetensors file, of which is read what is asked for.

    Raises:
        UserError: it cannot be read.
    """

    def __init__(self, file: Path, name: str) -> None:
        self._file, self._name = file, name
        self._stored = self._attempt(lambda: safe_open(file, "pt").get_slice(name))
        self.shape = tuple(self._stored.get_shape())

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        return self._attempt(lambda: self._stored[index])

    def _attempt(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except (OSError, SafetensorError) as error:
            raise UserError(f"model.init: {self._file}: {self._name} cannot be read: {error}") from None


class FolderValues:
    """Values from the safetensors files of a Hugging Face folder, read part by part, in the form in which transformers
    publishes them.

    Raises:
        UserError: no safetensors there, or a parameter is missing, does not come together or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._files = WeightFiles(folder)
        config = json.loads((folder / "config.json").read_bytes())
        self._makings = as_loaded(skeleton(config), self._files.shapes, f"model.init: {folder}")

    def __call__(self, spec: ParamSpec) -> Any:
        if spec.name not in self._makings:
            raise self._files.lacks(spec.name)
        making, shape = self._makings[spec.name]
        if making.renames:
            return self._part(making.sources[0][1])
        return _MadePart(spec.name, shape, making, self._part)

    def _part(self, key: str) -> FilePart:
        return FilePart(self._files.file_of(key), key)


class _MadePart:
    """A parameter that is made of several tensors in files; of a stack of experts, of those that are asked for."""

    def __init__(self, name: str, shape: tuple[int, ...], making: Making, part: Callable[[str], FilePart]) -> None:
        self._name, self.shape, self._making, self._part = name, shape, making, part
        self._whole = functools.cache(lambda: self._make(slice(None)))

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        if self._making.stacks:
            return self._make(index[0])[(slice(None), *index[1:])]
        return self._whole()[index]

    def _make(self, rows: slice) -> Tensor:
        return self._making.make(self._read, rows)[self._name]

    def _read(self, key: str) -> Tensor:
        part = self._part(key)
        return part[tuple(map(slice, part.shape))]


def merge_slices(pieces: list[Tensor], spec: ParamSpec) -> Tensor:
    """The whole parameter in Hugging Face's shape from every rank's piece: the inverse of `piece_of_rank`."""
    if spec.dim is None:
        return pieces[0]
    full = pieces[0].new_empty(spec.padded_shape)
    for rank, piece in enumerate(pieces):
        offset = 0
        for start, stop in spec.ranges(rank, len(pieces)):
            full.narrow(spec.dim, start, stop - start).copy_(piece.narrow(spec.dim, offset, stop - start))
            offset += stop - start
    return full.narrow(spec.dim, 0, spec.shape[spec.dim])
