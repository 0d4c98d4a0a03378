"""A model's weights in the form in which transformers publishes them: what `save_pretrained` would write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..adapters.merged import MergedWeights
from ..anatomy.published import Making, as_saved
from ..anatomy.skeleton import skeleton


class PublishedWeights:
    """Merged weights under their published names, one source at a time: a stack of experts is read once, while what is
    made of it is read in the order of `names`.

    Attributes:
        buffers: names of those that stay in fp32 whatever a model is in.
    """

    def __init__(self, weights: MergedWeights, config: Mapping[str, Any]) -> None:
        self._weights = weights
        self._makings = as_saved(skeleton(config), {name: weights.shape(name) for name in weights.names()})
        self.buffers = frozenset(
            name for name, (making, _) in self._makings.items() if {key for _, key in making.sources} <= weights.buffers
        )
        self._names = sorted(
            self._makings, key=lambda name: (min(key for _, key in self._makings[name][0].sources), name)
        )
        self._last: tuple[Making, dict[str, Tensor]] | None = None

    def names(self) -> list[str]:
        """Published names: by the parameters that they are made of, sorted."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._makings[name][1]

    def read(self, name: str) -> Tensor:
        """The whole fp32 tensor, on the CPU."""
        making = self._makings[name][0]
        if self._last is None or self._last[0] is not making:
            self._last = None  # before the next one is read
            self._last = making, making.make(self._weights.read)
        return self._last[1][name]
