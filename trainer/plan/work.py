"""The arithmetic of a model, counted from its table of parameters: matrix products, attention, head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..families.derived import Derived
from ..families.family import Family
from ..families.registry import family_of
from ..families.specs import ParamSpec, parameter_table, trained_vocab


def known_family(model: Mapping[str, Any]) -> Family | Derived:
    """The record of a model's family, where it is known that there is one."""
    family = family_of(model)
    assert family is not None
    return family


def uncounted(model: Mapping[str, Any]) -> str | None:
    """Why the work of a model cannot be counted from its table, in words; None where it can: where its blocks are
    linears and attention. Attention that looks back no further than a window is counted as if it did.
    """
    family = family_of(model)
    if family is None:
        return "nothing is known of it without torch and transformers"
    if not isinstance(family, Derived):
        return None
    if family.stateful:
        return "it carries a state from token to token"
    more = next((spec.name for spec in family.rows if spec.layer is not None and len(spec.shape) > 2), None)
    return None if more is None else f"{more} is no linear: experts, or a convolution"


@dataclass(frozen=True)
class Product:
    """One matrix product of a forward pass: tokens x inner → tokens x outer, on one rank."""

    inner: int
    outer: int
    trained: bool = True

    @property
    def flops(self) -> int:
        """Of one token."""
        return 2 * self.inner * self.outer


def products_of(specs: Sequence[ParamSpec], tensor: int = 1) -> list[Product]:
    """The products of the linears among parameters of blocks, as a tensor-parallel rank computes them."""
    found = []
    for spec in specs:
        if spec.layer is None or len(spec.shape) != 2:
            continue
        rows, columns = spec.local_shape(0, tensor)
        inner, outer = (rows, columns) if spec.conv else (columns, rows)
        found.append(Product(inner, outer, spec.trained))
    return found


def head_product(model: Mapping[str, Any], tensor: int = 1) -> Product:
    """The product of the output embedding."""
    family = known_family(model)
    return Product(family.value(model, "hidden_size"), trained_vocab(model, tensor) // tensor)


def attention_flops(model: Mapping[str, Any], seq_len: int) -> int:
    """Of one token and block in a forward pass: scores and their use, every token with every other."""
    family = known_family(model)
    width = family.value(model, "num_attention_heads") * family.head_size(model)
    return 4 * width * seq_len


def model_flops(model: Mapping[str, Any], seq_len: int) -> float:
    """Floating-point operations of training on one token, by the convention that published utilisation goes by.

    Three times the forward pass, nothing computed twice, attention not halved for being causal (Chowdhery et al.,
    PaLM, arXiv:2204.02311, appendix B): 6 N + 12 L H Q T, N without embeddings that are only looked up.
    """
    family = known_family(model)
    layers = family.value(model, "num_hidden_layers")
    linears = sum(product.flops for product in products_of(parameter_table(model)))
    return 3.0 * (linears + head_product(model).flops + layers * attention_flops(model, seq_len))


@dataclass(frozen=True)
class StageWork:
    """What one rank of a pipeline stage works on."""

    blocks: int
    products: tuple[Product, ...]  # of one block
    parameters: int  # of one block: tensors
    trained: int  # elements, of the whole stage
    frozen: int
    sizes: tuple[int, ...]  # elements of each whole parameter


def stage_work(specs: Sequence[ParamSpec], blocks: int, tensor: int) -> StageWork:
    """The part of the stage that these parameters make up."""
    first = min((spec.layer for spec in specs if spec.layer is not None), default=None)
    block = [spec for spec in specs if spec.layer is not None and spec.layer == first]
    sizes = [(spec.trained, math.prod(spec.local_shape(0, tensor))) for spec in specs]
    trained = sum(size for trains, size in sizes if trains)
    frozen = sum(size for trains, size in sizes if not trains)
    whole = tuple(spec.numel for spec in specs)
    return StageWork(blocks, tuple(products_of(block, tensor)), len(block), trained, frozen, whole)
