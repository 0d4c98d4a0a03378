"""Tensor parallelism from outside: Hugging Face's own blocks, split over ranks as the table of parameters says.

Column-parallel linears need no code of their own: their weights are narrower, and so is their output. What changes is
where activations cross the split: norms that feed them (sum the gradient), row-parallel linears and the vocabulary's
embedding (sum the output), the attention's head counts, and its random numbers. The family's record says where.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...data_prep.errors import UserError
from ..families.family import Family, HeadCount
from ..families.specs import ParamSpec
from ..kernels.compiled import uncompiled
from ..kernels.exact_sums import look_up
from ..ranks.ranks import Ranks
from .split_randomness import SplitRandomness


class _Fork(torch.autograd.Function):
    """Identity that sums the gradient: a replicated activation enters a split region."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Reduce(torch.autograd.Function):
    """Sum whose gradient is the identity: partial results leave a split region."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        if not x.is_meta:  # where nothing but shapes is asked for
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


@uncompiled
def fork(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return _Fork.apply(x, group)  # type: ignore[return-value]


@uncompiled
def reduce(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return _Reduce.apply(x, group)  # type: ignore[return-value]


class RowParallelLinear(nn.Module):
    """A linear whose input features are split: each rank adds its part, the bias comes after the sum."""

    def __init__(self, linear: nn.Module, group: dist.ProcessGroup):
        """Takes over the parameters of `linear`, an nn.Linear or a Conv1D (whose weight is [in, out])."""
        super().__init__()
        self.weight: nn.Parameter = linear.weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None = linear.bias  # type: ignore[assignment]
        self.transposed = isinstance(linear, Conv1D)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        part = x @ self.weight if self.transposed else F.linear(x, self.weight)
        total = reduce(part, self.group)
        return total if self.bias is None else total + self.bias


class VocabParallelEmbedding(nn.Module):
    """An embedding of which each rank holds some rows: it looks its own up and the sum fills in the others."""

    def __init__(self, embedding: nn.Embedding, ranks: Ranks):
        super().__init__()
        self.weight = embedding.weight
        self.first, self.last = _spec(embedding).ranges(ranks.tensor, ranks.tensor_size)[0]
        self.padding_idx = embedding.padding_idx  # this row gets no gradient, as in nn.Embedding
        self.group = ranks.tensor_group

    def forward(self, ids: Tensor) -> Tensor:
        elsewhere = (ids < self.first) | (ids >= self.last)
        frozen = elsewhere if self.padding_idx is None else elsewhere | (ids == self.padding_idx)
        rows = look_up((ids - self.first).masked_fill(elsewhere, 0), self.weight)
        if self.padding_idx is not None:
            rows = torch.where(frozen[..., None], rows.detach(), rows)
        return reduce(rows.masked_fill(elsewhere[..., None], 0), self.group)


def parallelise(module: nn.Module, family: Family | None, ranks: Ranks) -> None:
    """Makes the children of `module` compute with their local slices.

    Every parameter holds its slice for this tensor rank already and carries its `spec`; materialising them is another
    step. Marks split parameters (`model_parallel`), so that DeepSpeed counts each once in the gradient's norm. Call it
    once on a model, a block, or a container of one embedding.

    Raises:
        UserError: a parameter of which the family's record does not say what the split makes of its gradient.
    """
    if ranks.tensor_size == 1:
        return
    for parameter in module.parameters():
        _check_accounted(parameter.spec)  # type: ignore[attr-defined]
        mark(parameter, ranks)
    assert family is not None
    blocks = []
    for path, child in list(module.named_modules()):
        spec = getattr(child._parameters.get("weight"), "spec", None)
        if spec is not None:
            _convert(module, path, child, spec, ranks)
            if family.relative(spec) == f"{family.attention.query}.weight":
                blocks.append(path.removesuffix(family.attention.query))
    for block in blocks:
        for name in family.feeds:
            fork_output(module.get_submodule(block + name), ranks)
        _localise_heads(module, block, family, ranks)


def _check_accounted(spec: ParamSpec) -> None:
    if spec.kind == "unknown":
        raise UserError(
            f"{spec.name}: the record of its model family does not say whether it feeds split linears, so its gradient "
            "could be wrong under tensor parallelism; use tensor_parallel.autotp_size 1, or name it in the record"
        )


def fork_output(norm: nn.Module, ranks: Ranks) -> None:
    group = ranks.tensor_group

    def forked(_module: nn.Module, _inputs: Any, output: Any) -> Tensor:
        return fork(output, group)

    norm.register_forward_hook(forked)


def _spec(module: nn.Module) -> ParamSpec:
    return module.weight.spec  # type: ignore[union-attr, return-value]


def _convert(module: nn.Module, path: str, child: nn.Module, spec: ParamSpec, ranks: Ranks) -> None:
    assert ranks.tensor_group is not None
    if spec.kind == "row":
        module.set_submodule(path, RowParallelLinear(child, ranks.tensor_group))
    elif isinstance(child, nn.Embedding) and spec.kind == "vocab":
        module.set_submodule(path, VocabParallelEmbedding(child, ranks))
    elif isinstance(child, Conv1D):
        child.nf = spec.local_shape(ranks.tensor, ranks.tensor_size)[1]
    elif spec.kind == "feeding" and spec.layer is None:  # the last norm feeds the head
        fork_output(child, ranks)


def _localise_heads(module: nn.Module, block: str, family: Family, ranks: Ranks) -> None:
    """Head counts of a block's attention, which Hugging Face takes from the configuration; and its random numbers."""
    names = family.attention
    query, key, value, output = (module.get_submodule(block + name) for name in names.projections)
    attention: Any = module.get_submodule((block + names.query).rpartition(".")[0])

    def width(projection: nn.Module, part: int) -> int:
        first, last = _spec(projection).ranges(ranks.tensor, ranks.tensor_size)[part]
        return last - first

    queries, keys = width(query, 0), width(key, int(names.fused))
    counts: dict[HeadCount, int] = {
        "heads": queries // attention.head_dim,
        "groups": queries // keys,
        "width": queries,
    }
    for attribute, count in names.counts.items():
        setattr(attention, attribute, counts[count])
    if getattr(attention.config, family.dropout["attention"]) > 0:
        SplitRandomness(attention, ranks).between(value, output)


def mark(parameter: nn.Parameter, ranks: Ranks) -> None:
    spec: ParamSpec = parameter.spec  # type: ignore[attr-defined]
    if spec.dim is None:
        return
    copies = spec.copies(ranks.tensor_size)
    # DeepSpeed counts these on every rank in the norm, and unmarked ones on rank 0 only
    parameter.model_parallel = ranks.tensor % copies == 0  # type: ignore[attr-defined]
    if copies > 1:
        parameter.register_hook(partial(_sum_copies, copies=copies, ranks=ranks))


def _sum_copies(gradient: Tensor, copies: int, ranks: Ranks) -> Tensor:
    """Sums the gradients of one key-value head over the ranks that hold a copy of it.

    One all-reduce over the tensor group, with a row for each head: heads are copied only when there are few, and no
    groups of their own are needed.
    """
    rows = gradient.new_zeros(ranks.tensor_size // copies, *gradient.shape)
    row = rows[ranks.tensor // copies]
    row.copy_(gradient)
    dist.all_reduce(rows, group=ranks.tensor_group)
    return row
