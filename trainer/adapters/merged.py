"""The weights of a folder, a run or a checkpoint as a plain model has them: what a run begins with, or exports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...data_prep.errors import UserError
from ..checkpoint.loader import newest_shared
from ..checkpoint.reader import Checkpoint
from ..modeling.build import buffer_specs, drawn_values, model_specs
from ..modeling.values import FolderValues, Values, all_of
from ..ranks.ranks import Ranks
from .base import Adapter
from .bases import Base, locate
from .qlora import Onto, Qlora
from .registry import adapter_of


class MergedWeights:
    """A checkpoint's parameters with its adapter folded into its base, one at a time.

    Attributes:
        buffers: names of those that stay in fp32 whatever a model is in.
    """

    def __init__(self, checkpoint: Checkpoint, base: str | Path | None = None, merge_onto: Onto | None = None) -> None:
        """
        Args:
            base: where the base of the adapter is now, if it has moved.
            merge_onto: of an adapter on a quantised base; None: what was trained on.

        Raises:
            UserError: the base is not there, or is another; or it was not quantised, and `merge_onto` is stated.
        """
        self._checkpoint = checkpoint
        self._adapter: Adapter | None = adapter_of(checkpoint.state.get("adapter", "none"))
        self._stored = frozenset(checkpoint.names())
        self.buffers = frozenset(buffer_specs(checkpoint.state["model_config"]))
        if merge_onto is not None:
            if not isinstance(self._adapter, Qlora):
                raise UserError(f"{checkpoint.path}: its base was not quantised, so there is one base to merge onto")
            self._adapter.merge_onto = merge_onto
        if self._adapter is not None:
            self._specs = model_specs(checkpoint.state["model_config"])
            self._base = base_values(checkpoint, base)

    def names(self) -> list[str]:
        """Hugging Face's parameter names, tied ones once, sorted."""
        return sorted(self._stored if self._adapter is None else self._specs)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(name) if self._adapter is None else self._specs[name].shape

    def read(self, name: str) -> Tensor:
        """The whole fp32 tensor, on the CPU."""
        if self._adapter is None:
            return self._checkpoint.read(name)
        return self._adapter.merge(self._specs[name], self._read, self._stored)

    def part(self, name: str) -> Any:
        """The tensor, of which is read what it is asked for by an index, where no adapter is folded into it."""
        return self._checkpoint.part(name) if self._adapter is None else self.read(name)

    def lost(self) -> float | None:
        """Norm of what quantisation takes from the weights that it packs, over their norm; None where there is none."""
        if not isinstance(self._adapter, Qlora):
            return None
        gone = whole = 0.0
        for spec in filter(self._adapter.packs, self._specs.values()):
            weight = all_of(self._base, spec).float()
            gone += float((self._adapter.quantised(spec, weight) - weight).square().sum())
            whole += float(weight.square().sum())
        return (gone / whole) ** 0.5

    def _read(self, name: str) -> Tensor:
        return self._checkpoint.read(name) if name in self._stored else all_of(self._base, self._specs[name]).float()


def base_values(checkpoint: Checkpoint, moved: str | Path | None = None) -> Values:
    """The values of the base of a checkpoint's adapter.

    Raises:
        UserError: the base is not there, or is another.
    """
    recorded = Base(**checkpoint.state["base"])
    init = locate(recorded, moved, f"{checkpoint.path}: ")
    return first_values(init, checkpoint.state["model_config"], checkpoint.state["seed"])


def first_values(init: str, config: Mapping[str, Any], seed: int) -> Values:
    """What a run begins with: `initial_values`, or what is drawn where `model.init` is random."""
    return initial_values(init) or drawn_values(config, seed)


def initial_values(init: str, ranks: Ranks | None = None) -> Values | None:
    """The values of `model.init`: None (random), a Hugging Face folder's, or those of a run's newest checkpoint.
    Collective where `ranks` are given, which share the reading that verifies a checkpoint.

    Raises:
        UserError: nothing there to read, or it is damaged.
    """
    if init == "random":
        return None
    folder, ranks = Path(init), ranks or Ranks()
    if ranks.together(lambda: (folder / "config.json").is_file()):
        return ranks.together(lambda: FolderValues(folder))
    checkpoint = newest_shared(folder, ranks, "model.init: ")
    weights = ranks.together(lambda: MergedWeights(checkpoint))
    return lambda spec: weights.part(spec.name)
