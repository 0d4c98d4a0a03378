"""An adapter of one file: the output of one matrix of every block, scaled."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from zeropipe.trainer.adapters.base import Make, Read
from zeropipe.trainer.adapters.registry import ADAPTERS
from zeropipe.trainer.families.specs import ParamSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Scale:
    """`target`: the end of the matrices' names."""

    splits: ClassVar[bool] = False

    def __init__(self, target: str = "mlp.down_proj") -> None:
        self.target = target

    def check(self, table: Sequence[ParamSpec]) -> None:
        assert len(self.rows(table)) > len(table)

    def rows(self, table: Sequence[ParamSpec]) -> list[ParamSpec]:
        return [row for spec in table for row in (replace(spec, trained=False), *self._own(spec))]

    def _own(self, spec: ParamSpec) -> list[ParamSpec]:
        if not spec.name.endswith(f"{self.target}.weight"):
            return []
        name = spec.name.removesuffix("weight") + "scale"
        return [ParamSpec(name, spec.shape[:1], "replicated", init="ones", layer=spec.layer)]

    def packs(self, spec: ParamSpec) -> bool:
        return False

    def convert(self, module: nn.Module, compute: torch.dtype) -> nn.Module:
        return module

    def inject(self, module: nn.Module, make: Make) -> None:
        for linear in module.modules():
            spec: ParamSpec | None = getattr(linear._parameters.get("weight"), "spec", None)
            for own in self._own(spec) if spec is not None else []:
                linear.register_parameter("scale", make(own))
                linear.register_forward_hook(lambda own, _inputs, output: output * own.scale)

    def owns(self, name: str) -> bool:
        return name.endswith(".scale")

    def merge(self, spec: ParamSpec, read: Read, stored: Container[str]) -> Tensor:
        scale = spec.name.removesuffix("weight") + "scale"
        return read(spec.name) * read(scale)[:, None] if scale in stored else read(spec.name)


ADAPTERS.register("scale", Scale)
