"""QLoRA (arXiv:2305.14314): LoRA on linears whose frozen weights are kept in four bits.

The linears of the blocks are quantised as they are built, from the exact values of the base, so that a resume comes to
the same bits. Everything else stays in fp32, as peft's `prepare_model_for_kbit_training` leaves it; plans refuse
precisions in which DeepSpeed would cast it. Options are LoRA's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from ..families.specs import ParamSpec
from .lora import Lora

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Onto = Literal["dequantized", "original"]


class Qlora(Lora):
    """`merge_onto`: which base `merge` folds the adapter into: what was trained on, or what it was made from."""

    kind: ClassVar[str] = "qlora"
    merge_onto: Onto = "dequantized"

    def convert(self, module: nn.Module, compute: torch.dtype) -> nn.Module:
        spec = getattr(module._parameters.get("weight"), "spec", None)
        if spec is None or not self.packs(spec):
            return module
        from .quantised import QuantisedLinear

        return QuantisedLinear(module, compute)

    def packs(self, spec: ParamSpec) -> bool:
        """Whether the base keeps this weight in four bits."""
        return spec.linear and not self._trains(spec.name)

    def seen(self, spec: ParamSpec, weight: Tensor) -> Tensor:
        """A weight of the base as the adapter is merged onto it."""
        return self.quantised(spec, weight) if self.merge_onto == "dequantized" and self.packs(spec) else weight

    def quantised(self, spec: ParamSpec, weight: Tensor) -> Tensor:
        """A weight that is packed, after its round trip."""
        from .quantised import round_trip

        return round_trip(weight.T.contiguous()).T.contiguous() if spec.conv else round_trip(weight)
