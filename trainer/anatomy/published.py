"""What a model's weights are called and shaped where they are published, by transformers' own tables (its
`conversion_mapping`): they stack what is published expert by expert, rename, join and split.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from ...data_prep.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Making:
    """Tensors that transformers makes of others, all at once."""

    transform: Any  # of a table; a copy collects what it converts
    whole: str  # transformers' name for what it makes
    sources: tuple[tuple[str, str], ...]  # the table's pattern and the tensor's name, in transformers' order
    renamings: list[Any]  # of what is made
    model: Any

    @property
    def renames(self) -> bool:
        """Whether one tensor gets another name, or its own, and nothing else happens."""
        return isinstance(self.transform, WeightRenaming)

    @property
    def stacks(self) -> bool:
        """Whether row i of all that is made comes from the i-th source of every pattern."""
        first, *others = getattr(self.transform, "operations", [None])
        inside = all(isinstance(op, Concatenate | Chunk) and op.dim > 0 for op in others)
        return isinstance(first, MergeModulelist) and first.dim == 0 and inside

    def make(self, read: Callable[[str], Tensor], rows: slice = slice(None)) -> dict[str, Tensor]:
        """What is made, by name.

        Args:
            read: gives a source by its name.
            rows: of what `stacks`, those to make.
        """
        transform = copy.deepcopy(self.transform)
        for pattern, group in itertools.groupby(sorted(self.sources, key=lambda pair: pair[0]), lambda pair: pair[0]):
            for _, name in list(group)[rows]:
                transform.add_tensor(self.whole, name, pattern, read(name))
        made = transform.convert(self.whole, model=self.model, config=self.model.config)
        found = ((name, value[0] if isinstance(value, list) else value) for name, value in made.items())
        return {apply_renamings(name, self.renamings): value for name, value in found}

    def shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what is made of sources of such shapes.

        Raises:
            ValueError: nothing can be made of these.
        """
        try:
            made = self.make(lambda name: torch.empty(shapes[name], device="meta"))
        except (RuntimeError, ValueError, AttributeError) as error:
            counts = Counter(pattern for pattern, _ in self.sources)
            found = " and ".join(f"{count} of {pattern}" for pattern, count in counts.items())
            raise ValueError(f"{self.whole} cannot be made of {found}: {str(error).splitlines()[0]}") from error
        return {name: tuple(value.shape) for name, value in made.items()}


Makings = dict[str, tuple[Making, tuple[int, ...]]]  # with its shape, by the name of what is made


def as_loaded(model: Any, shapes: Shapes, where: str) -> Makings:
    """How the parameters and kept buffers of a model come from published tensors; those of other models are left out.

    Args:
        model: on the meta device.
        shapes: of the tensors in the files.
        where: the files, for messages.

    Raises:
        UserError: what belongs together does not fit together.
    """
    renamings, converters = _parts(get_model_conversion_mapping(model))
    own, prefix = model.state_dict(), model.base_model_prefix
    gathered: _Gathered = {}
    for key in sorted(shapes, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key in own:
            name, pattern = rename_source_key(key, [], [], prefix, own)
        if name in own:
            _gather(gathered, name, key, pattern, converters)
    try:
        return _makings(gathered, [], model, shapes)
    except ValueError as error:
        raise UserError(f"{where}: {error}; is a file missing, or its config.json another's?") from error


def as_saved(model: Any, shapes: Shapes) -> Makings:
    """How what transformers' `save_pretrained` writes comes from a model's parameters.

    Args:
        model: on the meta device.
        shapes: of its parameters and kept buffers, tied ones once.
    """
    # as its `revert_weight_conversion` for a model that was not loaded: no names of old, no prefixes of larger models
    table = get_model_conversion_mapping(model, add_legacy=False)
    own = [entry.reverse_transform() for entry in reversed(table) if not isinstance(entry, PrefixChange)]
    renamings, converters = _parts(own)
    gathered: _Gathered = {}
    for key in sorted(shapes, key=dot_natural_key):
        name, pattern = apply_converters(key, converters)
        _gather(gathered, name if pattern else apply_renamings(key, renamings), key, pattern, converters)
    return _makings(gathered, renamings, model, shapes)


_Gathered = dict[str, tuple[Any, list[tuple[str, str]]]]  # transform and sources, by transformers' name for the whole


def _parts(table: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    return renamings, [entry for entry in table if isinstance(entry, WeightConverter)]


def _gather(gathered: _Gathered, name: str, key: str, pattern: str | None, converters: Sequence[Any]) -> None:
    """Adds a tensor to what is made of it."""
    if pattern is None:
        gathered.setdefault(name, (WeightRenaming(key, name), [(key, key)]))
        return
    # where two entries have one pattern, transformers takes the last
    transform = next(entry for entry in reversed(converters) if pattern in entry.source_patterns)
    gathered.setdefault(name, (transform, []))[1].append((pattern, key))


def _makings(gathered: _Gathered, renamings: list[Any], model: Any, shapes: Shapes) -> Makings:
    found: Makings = {}
    for whole, (transform, sources) in gathered.items():
        later = renamings if isinstance(transform, WeightConverter) else []
        making = Making(transform, whole, tuple(sources), later, model)
        found |= {name: (making, shape) for name, shape in making.shapes(shapes).items()}
    return found
