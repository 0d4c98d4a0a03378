"""Linears whose weight is kept in four bits: bitsandbytes' NF4 with double quantisation (arXiv:2305.14314).

The module is ours and not `bnb.nn.Linear4bit`: that one repacks its weight in evaluation on some CPUs and rounds its
bias in place, so that a base would not stay what it was. Where gradients are needed both compute the same: a dense
weight is made for the product, and again for the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data_prep.errors import UserError


class _Product(torch.autograd.Function):
    """x @ weight.T, keeping the packed weight alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, linear: QuantisedLinear) -> Tensor:
        ctx.linear = linear
        return F.linear(x, linear.dense().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] @ ctx.linear.dense().to(gradients[0].dtype), None, None


class QuantisedLinear(nn.Module):
    """What takes the place of an nn.Linear or a Conv1D.

    Attributes:
        weight: packed, uint8; carries the `.spec` of the dense one.
    """

    def __init__(self, linear: nn.Module, compute: torch.dtype) -> None:
        super().__init__()
        dense: Any = linear.weight
        packed, self.state = _quantise(dense.detach().T.contiguous() if dense.spec.conv else dense.detach())
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.weight.spec = dense.spec  # type: ignore[attr-defined]
        self.bias: nn.Parameter | None = linear.bias  # type: ignore[assignment]
        self.compute = compute

    def dense(self) -> Tensor:
        """[out, in], in fp32."""
        return _functional().dequantize_4bit(self.weight.data.view(-1, 1), self.state)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            product: Any = _Product.apply(x.to(self.compute), self.weight, self)
            return product if self.bias is None else product + self.bias.to(self.compute)


def round_trip(weight: Tensor) -> Tensor:
    """A dense weight [out, in] as it is after quantisation."""
    return _functional().dequantize_4bit(*_quantise(weight)).to(weight.dtype)


def _quantise(weight: Tensor) -> tuple[Tensor, Any]:
    return _functional().quantize_4bit(weight.float(), blocksize=64, compress_statistics=True, quant_type="nf4")


def _functional() -> Any:
    """Raises UserError where bitsandbytes is not installed."""
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise UserError(
            f"adapter qlora: bitsandbytes cannot be imported ({error}); pip install 'zeropipe[qlora]'"
        ) from error
    return functional
