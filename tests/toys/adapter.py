"""An adapter of one file: the output of one matrix of every block, scaled."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from zeropipe.trainer.adapters.base import Make, Read
from zeropipe.trainer.adapters.registry import ADAPTERS
from zeropipe.trainer.families.specs import ParamSpec

if TYPE_CHECKING:
    from torch import Tensor, nn


class Scale:
    """`target`: the end of the matrices' names."""

    splits: ClassVar[bool] = False

    def __init__(self, target: str = "mlp.down_proj") -> None:
        self.target = target

    def inject(self, module: nn.Module, make: Make) -> None:
        for linear in module.modules():
            spec: ParamSpec | None = getattr(linear._parameters.get("weight"), "spec", None)
            if spec is not None and spec.name.endswith(f"{self.target}.weight"):
                name = spec.name.removesuffix("weight") + "scale"
                linear.register_parameter("scale", make(ParamSpec(name, spec.shape[:1], "replicated", init="ones")))
                linear.register_forward_hook(lambda own, _inputs, output: output * own.scale)

    def owns(self, name: str) -> bool:
        return name.endswith(".scale")

    def merge(self, name: str, read: Read) -> Tensor:
        weight = read(name)
        if name.endswith(f"{self.target}.weight"):
            return weight * read(name.removesuffix("weight") + "scale")[:, None]
        return weight


ADAPTERS.register("scale", Scale)
