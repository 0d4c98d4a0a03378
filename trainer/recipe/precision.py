"""What a run computes in: one record says the data types of weights and of matrix products, and their bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Precision:
    """torch dtypes by name: of the weights that a run computes with, and of its matrix products."""

    name: str
    weights: str
    products: str

    @property
    def width(self) -> int:
        """Bytes of a weight: autocast keeps weights in fp32."""
        return _BYTES[self.weights]

    @property
    def stream(self) -> int:
        """Bytes of a number of the residual stream and of the inputs of norms."""
        return _BYTES[self.weights]

    @property
    def compute(self) -> int:
        """Bytes of what matrix products read and write."""
        return _BYTES[self.products]

    @property
    def autocast(self) -> bool:
        """Whether products are computed in another type than the weights have."""
        return self.weights != self.products

    def __str__(self) -> str:
        return self.name


PRECISIONS: Mapping[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision("fp32", "float32", "float32"),
        Precision("bf16", "bfloat16", "bfloat16"),
        Precision("fp16", "float16", "float16"),
        Precision("bf16_autocast", "float32", "bfloat16"),
    )
}
