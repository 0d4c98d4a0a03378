"""In which types of numbers a run keeps its weights and computes its products. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Precision:
    """A precision by name; the types are torch's names."""

    name: str
    weights: str  # type of the parameters that compute
    products: str  # type of matrix products

    def __str__(self) -> str:
        return self.name

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return _BYTES[self.weights]

    @property
    def autocast(self) -> bool:
        """Whether weights and residual stream stay in a wider type than the products."""
        return self.weights != self.products

    @property
    def stream(self) -> int:
        """Bytes of a number of the residual stream."""
        return self.width

    @property
    def compute(self) -> int:
        """Bytes of a number that matrix products read and write."""
        return _BYTES[self.products]


PRECISIONS: Mapping[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision("fp32", "float32", "float32"),
        Precision("bf16", "bfloat16", "bfloat16"),
        Precision("fp16", "float16", "float16"),
        Precision("bf16_autocast", "float32", "bfloat16"),
    )
}
