"""Tensor parallelism by transformers' own words for it (`base_model_tp_plan`), for families without a record.

Unlike in a record, nobody says which modules feed split linears: whatever goes into one is forked there, once for all
that read it. So every norm computes with whole gradients, but for those that the plan calls summed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...families.derived import COLUMN, COLUMN_WORDS, EXPERTS, GATHERED, LATENT, ROW, ROW_WORDS, SPLIT_ROW, Derived
from ...families.family import Family
from ...kernels.compiled import uncompiled
from ...kernels.exact_sums import ExactEmbedding
from ...ranks.ranks import Ranks
from .. import tensor_parallel
from ..split_randomness import SplitRandomness
from ..tensor_parallel import RowParallelLinear, VocabParallelEmbedding, fork, fork_output, reduce

# attributes in which attention modules keep head counts
_QUERY_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KEY_COUNTS = ("num_key_value_heads", "num_kv_heads")


def split_over_ranks(module: nn.Module, family: Family | Derived | None, ranks: Ranks, name: str = "") -> None:
    """Makes the children of `module` compute with their local slices, by a record or by transformers' plan.

    Args:
        name: Hugging Face's of what `module` holds as its only child; empty: `module` is a whole model.

    Raises:
        UserError: as `parallelise`.
    """
    if not isinstance(family, Derived):
        tensor_parallel.parallelise(module, family, ranks)
    elif ranks.tensor_size > 1:
        _by_words(module, family, ranks, name)


def _by_words(module: nn.Module, record: Derived, ranks: Ranks, name: str) -> None:
    for parameter in module.parameters():
        tensor_parallel.mark(parameter, ranks)
        if parameter.spec.kind == "summed":  # type: ignore[attr-defined]
            parameter.register_hook(lambda gradient: _summed(gradient, ranks))
    memos: dict[str, _Memo] = {}
    parts = [(path, child, _full(path, name)) for path, child in module.named_modules() if path or not name]
    for path, child, full in parts:
        if full == record.embedding:
            _split_embedding(module, path, child, ranks)
        elif full == record.norm or (record.norm is None and full == record.head):
            fork_output(child, ranks) if full == record.norm else _fork_input(child, _Memo(ranks), ranks)
        word = record.word(full)
        parent = path.rpartition(".")[0]
        if word in COLUMN_WORDS:
            if parent not in memos:
                memos[parent] = _Memo(ranks)
                module.get_submodule(parent).register_forward_hook(memos[parent].clear)
            _fork_input(child, memos[parent], ranks)
            if word == GATHERED:
                child.register_forward_hook(lambda _m, _i, output: _gather(output, ranks))
        elif word in ROW_WORDS:
            row = RowParallelLinear(child, ranks.tensor_group)  # type: ignore[arg-type]
            if word == SPLIT_ROW:
                row.register_forward_pre_hook(lambda _m, inputs: (_take(inputs[0], ranks), *inputs[1:]))
            module.set_submodule(path, row)
        elif word == EXPERTS:
            _split_experts(child, ranks)
        elif word == LATENT:
            _fork_rotary(child, module, parent, ranks)
    for _, child, full in parts:
        _localise(child, full, record, ranks)


def _full(path: str, name: str) -> str:
    """Hugging Face's name of what is at `path` of a model, or of a holder of the part `name`, which is its child 0."""
    return ".".join(filter(None, (name, path.removeprefix("0").removeprefix(".")))) if name else path


class _Memo:
    """What was forked last in a module: those that read the same read one fork of it."""

    def __init__(self, ranks: Ranks) -> None:
        self.group, self.x, self.forked = ranks.tensor_group, None, None

    def __call__(self, x: Tensor) -> Tensor:
        if self.x is not x:
            self.x, self.forked = x, fork(x, self.group)
        return self.forked  # type: ignore[return-value]

    def clear(self, *_: Any) -> None:
        self.x = self.forked = None


def _fork_input(child: nn.Module, memo: _Memo, ranks: Ranks) -> None:
    child.register_forward_pre_hook(lambda _m, inputs: (memo(inputs[0]), *inputs[1:]))


def _split_embedding(module: nn.Module, path: str, child: Any, ranks: Ranks) -> None:
    if type(child).forward in (nn.Embedding.forward, ExactEmbedding.forward):
        module.set_submodule(path, VocabParallelEmbedding(child, ranks))
        return
    # one that does more than look up (Gemma scales): its own forward goes on with the rows that are here
    rows, padding = child.weight.spec.ranges(ranks.tensor, ranks.tensor_size)[0], child.padding_idx
    first, last = rows
    child.padding_idx = padding - first if padding is not None and first <= padding < last else None

    def here(ids: Tensor) -> Tensor:
        return (ids >= first) & (ids < last)

    def local(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.where(here(inputs[0]), inputs[0] - first, 0), *inputs[1:])

    def whole(_module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return reduce(output.masked_fill(~child.wanted[..., None], 0), ranks.tensor_group)

    def note(_module: Any, inputs: tuple[Tensor, ...]) -> None:
        child.wanted = here(inputs[0])

    child.register_forward_pre_hook(note)
    child.register_forward_pre_hook(local)
    child.register_forward_hook(whole)


def _split_experts(experts: nn.Module, ranks: Ranks) -> None:
    """Every rank has some of the inner units of every expert: their outputs add up."""

    def forked(_module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return tuple(map(each, args)), {key: each(value) for key, value in kwargs.items()}

    def each(value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return fork(value, ranks.tensor_group) if floats else value

    experts.register_forward_pre_hook(forked, with_kwargs=True)
    experts.register_forward_hook(lambda _m, _i, output: reduce(output, ranks.tensor_group))  # type: ignore[arg-type]


def _fork_rotary(child: nn.Module, module: nn.Module, parent: str, ranks: Ranks) -> None:
    """Of the latent keys and values, the rotary part goes to the heads of every rank without a linear in between."""
    attention: Any = module.get_submodule(parent)
    width = attention.config.qk_rope_head_dim

    def forked(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        rest, rotary = output.split([output.shape[-1] - width, width], -1)
        return torch.cat([rest, fork(rotary, ranks.tensor_group)], -1)

    child.register_forward_hook(forked)


def _localise(attention: Any, full: str, record: Derived, ranks: Ranks) -> None:
    """Head counts that an attention keeps, and its random numbers."""
    own = {leaf: child for leaf, child in attention.named_children() if record.word(f"{full}.{leaf}") == COLUMN}
    outputs = [child for leaf, child in attention.named_children() if record.word(f"{full}.{leaf}") == ROW]
    if not own or not hasattr(attention, "config") or not hasattr(attention, "layer_idx") or not outputs:
        return
    heads, key_heads = record.sizes["num_attention_heads"], record.sizes["num_key_value_heads"]
    if groups := getattr(attention, "num_key_value_groups", 0):  # which can differ by layer
        key_heads = heads // groups
    local = heads // ranks.tensor_size
    local_keys = max(1, key_heads // ranks.tensor_size) if isinstance(key_heads, int) else local
    for names, count in ((_QUERY_COUNTS, local), (_KEY_COUNTS, local_keys)):
        for attribute in names:
            if isinstance(getattr(attention, attribute, None), int):
                setattr(attention, attribute, count)
    if isinstance(getattr(attention, "num_key_value_groups", None), int):
        attention.num_key_value_groups = local // local_keys
    dropout = record.dropout.get("attention")
    if dropout is not None and getattr(attention.config, dropout, 0) > 0:
        randomness = SplitRandomness(attention, ranks)
        for child in own.values():
            randomness.between(child, outputs[0])


@uncompiled
def _gather(x: Tensor, ranks: Ranks) -> Tensor:
    return _Gather.apply(x, ranks)  # type: ignore[return-value]


@uncompiled
def _take(x: Tensor, ranks: Ranks) -> Tensor:
    return _Take.apply(x, ranks)  # type: ignore[return-value]


class _Gather(torch.autograd.Function):
    """All ranks' columns; every rank goes on to compute the same, so that its gradient is this rank's columns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _all_columns(x, ranks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _own_columns(gradients[0], ctx.ranks), None


class _Take(torch.autograd.Function):
    """This rank's columns of what every rank has whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _own_columns(x, ranks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _all_columns(gradients[0], ctx.ranks), None


def _own_columns(x: Tensor, ranks: Ranks) -> Tensor:
    return x.chunk(ranks.tensor_size, -1)[ranks.tensor].contiguous()


def _all_columns(x: Tensor, ranks: Ranks) -> Tensor:
    if x.is_meta:
        return torch.cat([x] * ranks.tensor_size, -1)
    pieces = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks.tensor_size)]
    dist.all_gather(pieces, x.contiguous(), group=ranks.tensor_group)
    return torch.cat(pieces, -1)


def _summed(gradient: Tensor, ranks: Ranks) -> Tensor:
    total = gradient.clone()
    if not total.is_meta:
        dist.all_reduce(total, group=ranks.tensor_group)
    return total
