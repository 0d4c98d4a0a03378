"""What an adapter is: a few trained parameters in a model whose own are frozen.

An adapter is one file here and a line in `registry.py`. Checkpoints hold its parameters beside the model's; exports and
whoever reads the weights as a plain model's get them folded in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..families.specs import ParamSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

Make = Callable[[ParamSpec], Any]  # an nn.Parameter with its initial values, type and device
Read = Callable[[str], Any]  # a whole fp32 tensor of a checkpoint, by name


class Adapter(Protocol):
    """Options of the recipe's mapping are arguments of its constructor; importing its file must not import torch."""

    splits: ClassVar[bool]  # whether it is exact where tensor parallelism splits the linears; plans refuse it otherwise

    def inject(self, module: nn.Module, make: Make) -> None:
        """Puts its parameters into a model or a part of one, whose own are frozen and carry `.spec`.

        Their names are those of Hugging Face's modules with a last part of the adapter's own; one parameter or more in
        every block, or a stage of a pipeline would have nothing to train.
        """
        ...

    def owns(self, name: str) -> bool:
        """Whether a parameter is the adapter's, not the model's."""
        ...

    def merge(self, name: str, read: Read) -> Tensor:
        """A parameter of the model, whole and in fp32, with the adapter folded in."""
        ...


def install(adapter: Adapter | None, module: nn.Module, make: Make) -> None:
    """Freezes what a built module holds, and injects; without an adapter everything is trained."""
    if adapter is not None:
        module.requires_grad_(False)
        adapter.inject(module, make)
