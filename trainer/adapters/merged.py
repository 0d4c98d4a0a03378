"""The weights of a checkpoint as a plain model has them."""

from __future__ import annotations

from torch import Tensor

from ..checkpoint.reader import Checkpoint
from .base import Adapter
from .registry import adapter_of


class MergedWeights:
    """A checkpoint's parameters with its adapter folded in, one at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._adapter: Adapter | None = adapter_of(checkpoint.state.get("adapter", "none"))

    def names(self) -> list[str]:
        """Hugging Face's parameter names, tied ones once, sorted."""
        adapter = self._adapter
        return [name for name in self._checkpoint.names() if adapter is None or not adapter.owns(name)]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(name)

    def read(self, name: str) -> Tensor:
        """The whole fp32 tensor, on the CPU."""
        read = self._checkpoint.read
        return read(name) if self._adapter is None else self._adapter.merge(name, read)
