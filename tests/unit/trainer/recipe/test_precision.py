"""The record of a precision, against torch's own types."""

import pytest
import torch

from zeropipe.trainer.recipe.precision import PRECISIONS


@pytest.mark.parametrize(
    ("name", "width", "stream", "compute", "autocast"),
    [
        ("fp32", 4, 4, 4, False),
        ("bf16", 2, 2, 2, False),
        ("fp16", 2, 2, 2, False),
        ("bf16_autocast", 4, 4, 2, True),
    ],
)
def test_precisions(name: str, width: int, stream: int, compute: int, autocast: bool):
    precision = PRECISIONS[name]
    assert str(precision) == precision.name == name
    assert (precision.width, precision.stream, precision.compute, precision.autocast) == (
        width, stream, compute, autocast,
    )  # fmt: skip
    assert getattr(torch, precision.weights).itemsize == width
    assert getattr(torch, precision.products).itemsize == compute
