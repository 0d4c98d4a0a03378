"""What an adapter is: a few trained parameters in a model whose own are frozen.

An adapter is one file here and a line in `registry.py`. Checkpoints hold its parameters and say which base they belong
to; exports and whoever reads the weights as a plain model's get them folded in.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..families.specs import ParamSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Read = Callable[[str], Any]  # a whole fp32 tensor by name: the checkpoint's where it holds one, else the base's


class Make(Protocol):
    """How an adapter gets its parameters: a call for each."""

    def __call__(self, spec: ParamSpec, values: Tensor | None = None) -> Any:
        """An nn.Parameter, trained or not as its spec says, that begins with `values` or else as its spec says."""
        ...


class Adapter(Protocol):
    """Options of the recipe's mapping are arguments of its constructor; importing its file must not import torch."""

    splits: ClassVar[bool]  # whether it is exact where tensor parallelism splits the linears; plans refuse it otherwise

    def check(self, table: Sequence[ParamSpec]) -> None:
        """Refuses a whole model (rows of its parameters) that it does not fit.

        Raises:
            UserError: names what there is instead.
        """
        ...

    def rows(self, table: Sequence[ParamSpec]) -> list[ParamSpec]:
        """The rows of a model, or of a part of one, with its own beside them, and which of all are trained."""
        ...

    def convert(self, module: nn.Module, compute: torch.dtype) -> nn.Module:
        """What takes the place of a module of the base, whose parameters carry `.spec`, before the next is made: mostly
        the module itself. `compute`: the type of matrix products.
        """
        ...

    def packs(self, spec: ParamSpec) -> bool:
        """Whether `convert` makes something else of a parameter, so that every rank needs all of its values."""
        ...

    def inject(self, module: nn.Module, make: Make) -> None:
        """Puts its parameters into a model or a part of one, whose own are frozen and carry `.spec`.

        Their names are those of Hugging Face's modules with a last part of the adapter's own; one parameter or more in
        every block, or a stage of a pipeline would have nothing to train. What it trains of the model's own it sets to
        require a gradient.

        Raises:
            UserError: as `check`, for a whole model of a family without a table.
        """
        ...

    def owns(self, name: str) -> bool:
        """Whether checkpoints hold a parameter: it is the adapter's, or the model's and trained."""
        ...

    def merge(self, spec: ParamSpec, read: Read, stored: Container[str]) -> Tensor:
        """A parameter of the model, whole and in fp32, with the adapter folded in. `stored`: what checkpoints hold."""
        ...


def rows_of(adapter: Adapter | None) -> Callable[[Sequence[ParamSpec]], list[ParamSpec]]:
    """The rows of a model or a part of one, with those of an adapter, if any."""
    return list if adapter is None else adapter.rows


def install(adapter: Adapter | None, module: nn.Module, make: Make) -> None:
    """Freezes what a built module holds, and injects; without an adapter everything is trained."""
    if adapter is not None:
        module.requires_grad_(False)
        adapter.inject(module, make)
