"""Builds a Hugging Face model with every parameter's values given by name, on any ZeRO stage.

The model is laid out on the meta device and materialised module by module; under ZeRO-3 each module is partitioned
before the next is made, so that no rank ever holds more than its share and one module. Initial values are seeded by
(seed, parameter name): they do not depend on the layout.

Values are read and drawn where they are kept (`docs/scale.md`): of replicas that hold a parameter whole, the first
fills it and DeepSpeed sends it to the others; of a parameter that ZeRO-3 cuts, every rank reads its part. What is
drawn, which can only be done whole, one rank draws, by turns, and sends the others their parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..anatomy.buffers import kept_buffers
from ..anatomy.skeleton import filled, materialise_buffers, skeleton, unset
from ..families.registry import FAMILIES, family_of
from ..families.specs import ParamSpec, parameter_seed, parameter_table, trained_vocab
from ..kernels.swap import use_kernels
from ..ranks.expert_parameters import mark_expert
from ..ranks.ranks import Ranks
from .attention import BY_TEXT
from .values import Cut, RandomValues, Values, dealt, make_buffers, piece_of_rank, put_off


def build_model(
    config: Mapping[str, Any],
    values: Values | None,
    seed: int,
    dtype: torch.dtype,
    ranks: Ranks,
    zero3_config: dict | None = None,
    convert: Callable[[nn.Module], nn.Module] = lambda module: module,
    packs: Callable[[ParamSpec], bool] = lambda spec: False,
) -> nn.Module:
    """A causal LM whose parameters carry `.spec` and hold `values` (None: random, by name).

    Args:
        config: transformers' names, with `model_type` and the true `vocab_size`.
        dtype: of the parameters.
        zero3_config: the DeepSpeed JSON when parameters are to be partitioned (stage 3), else None.
        convert: what takes the place of a module when its values are there.
        packs: of which parameters that needs all values on every rank.

    Raises:
        UserError: the family is unknown to transformers, or the configuration is wrong for it.
    """
    model, specs = model_and_specs(config, ranks.tensor_size, ranks.expert_size)
    make_buffers(model, values, ranks.device)
    fill, turns = values, None
    if fill is None:
        drawn = drawn_values(config, seed)
        fill, turns = put_off(drawn), dealt(specs.values(), drawn.unit, ranks.replicas)
    maker = _Maker(dtype, ranks, packs, None if zero3_config is None else Cut.of(ranks, zero3_config))
    made: dict[str, nn.Parameter] = {}
    for prefix, module in list(_named_modules(model)):
        fresh = [specs[f"{prefix}{name}"] for name in module._parameters if f"{prefix}{name}" in specs]
        for spec in fresh:
            parameter = maker.make(spec, fill, None if turns is None else turns[spec.name])
            made[spec.name] = module._parameters[spec.name.removeprefix(prefix)] = parameter
        if not fresh:
            continue
        if (converted := convert(module)) is not module:
            model.set_submodule(prefix.removesuffix("."), converted)
        if zero3_config is not None:
            _partition(converted, zero3_config, ranks)
    _tie(model, made)
    leftover = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not leftover, f"never materialised: {leftover}"
    return model


def model_and_specs(config: Mapping[str, Any], tensor: int, expert: int = 1) -> tuple[Any, dict[str, ParamSpec]]:
    """The model on the meta device, its vocabulary padded where that is possible, and its parameters by name."""
    family, trained = family_of(config), dict(config)
    if family is not None:
        trained["vocab_size"] = trained_vocab(config, tensor)
    model = skeleton(trained, BY_TEXT if family is not None and family.by_text else None)
    use_kernels(model)
    if family is not None:
        specs = {spec.name: spec for spec in parameter_table(config, tensor, expert)}
    else:
        specs = {n: ParamSpec(n, tuple(p.shape), trained=p.requires_grad) for n, p in model.named_parameters()}
        head = model.get_output_embeddings()
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear | Conv1D) and module is not head:
                name = f"{path}.weight"
                specs[name] = replace(specs[name], linear=True, conv=isinstance(module, Conv1D))
    expected = {name for name, _ in model.named_parameters()}
    assert specs.keys() == expected, f"the table and the model differ in {sorted(specs.keys() ^ expected)}"
    return model, specs


def model_specs(config: Mapping[str, Any]) -> dict[str, ParamSpec]:
    """All that a model's weights are by name, tied ones once; of any family that transformers knows."""
    known = family_of(config) is not None
    found = {spec.name: spec for spec in parameter_table(config)} if known else model_and_specs(config, 1)[1]
    return found | buffer_specs(config)


def buffer_specs(config: Mapping[str, Any]) -> dict[str, ParamSpec]:
    """The buffers among a model's weights, which are in fp32 whatever the others are in; no written record has any."""
    if config["model_type"] in FAMILIES:
        return {}
    return {name: ParamSpec(name, tuple(b.shape), trained=False) for name, b in kept_buffers(skeleton(config))}


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module, parents first, with what its parameters' names begin with."""
    for name, module in model.named_modules():
        yield (f"{name}." if name else ""), module


def make_parameter(
    spec: ParamSpec, values: Values, dtype: torch.dtype, ranks: Ranks, everywhere: bool = False
) -> nn.Parameter:
    """This rank's piece of one parameter, on the device that trains.

    Args:
        everywhere: whether every rank fills its piece; else the first of those that hold the same does, from which
            DeepSpeed sends it to the others when its engine is made.
    """
    filled = everywhere or ranks.holders(spec.axis)[0] == 0
    return _parameter(spec, piece_of_rank(values(spec), spec, dtype, ranks, None if filled else []), ranks)


@dataclass(frozen=True)
class _Maker:
    """Makes what this rank keeps of parameters.

    Attributes:
        packs: as `build_model`.
        cut: how ZeRO-3 will cut them, if it does.
    """

    dtype: torch.dtype
    ranks: Ranks
    packs: Callable[[ParamSpec], bool]
    cut: Cut | None

    def make(self, spec: ParamSpec, values: Values, by: int | None) -> nn.Parameter:
        """One parameter; `by`: which replica draws its values, None where they are read. Collective."""
        if self.cut is None or self.packs(spec):
            return make_parameter(spec, values, self.dtype, self.ranks, everywhere=self.packs(spec))
        if by is not None:
            return _drawn_share(spec, values, self.dtype, self.cut, by)
        piece = piece_of_rank(values(spec), spec, self.dtype, self.ranks, self.cut.ranges(spec))
        return _parameter(spec, piece, self.ranks)


def _parameter(spec: ParamSpec, data: Tensor, ranks: Ranks) -> nn.Parameter:
    parameter = nn.Parameter(data, requires_grad=spec.trained)
    parameter.spec = spec  # type: ignore[attr-defined]
    if spec.kind == "expert":
        mark_expert(parameter, ranks)
    return parameter


def _drawn_share(spec: ParamSpec, draw: Values, dtype: torch.dtype, cut: Cut, by: int) -> nn.Parameter:
    """What this rank keeps of a parameter under ZeRO-3, in its place; replica `by` draws it whole. Collective."""
    ranks, draws = cut.ranks, cut.ranks.replica == by
    if ranks.replicas == 1 or cut.secondary > 1:  # with a second copy a rank keeps more than its share
        data = piece_of_rank(draw(spec), spec, dtype, ranks, None if draws else [])
        if ranks.replicas > 1:
            dist.broadcast(data.view(-1).view(torch.uint8), group_src=by, group=ranks.replica_group)
        return _parameter(spec, data, ranks)
    data, parts = piece_of_rank(draw(spec), spec, dtype, ranks, []), None
    own = data.new_empty(cut.share(spec))
    if draws:
        parts = _shares(draw(spec), spec, dtype, ranks, len(own))
    dist.scatter(own.view(torch.uint8), parts, group_src=by, group=ranks.replica_group)
    ((start, stop),) = cut.ranges(spec)
    data.view(-1)[start:stop] = own[: stop - start]
    return _parameter(spec, data, ranks)


def _shares(full: Any, spec: ParamSpec, dtype: torch.dtype, ranks: Ranks, share: int) -> list[Tensor]:
    """What every replica keeps of a parameter, as bytes, in their order; neighbours hold other experts."""
    sharing = ranks.expert_size if spec.axis == "expert" else 1
    of_each = []
    for place in range(sharing):
        there = replace(ranks, data=place, sequence=0) if sharing > 1 else ranks
        piece = piece_of_rank(full, spec, dtype, there).flatten()
        padded = F.pad(piece, (0, share * (ranks.replicas // sharing) - len(piece)))
        of_each.append([part.view(torch.uint8) for part in padded.split(share)])
    return [part for parts in zip(*of_each, strict=True) for part in parts]


def _partition(module: nn.Module, ds_config: dict, ranks: Ranks) -> None:
    """Leaves each rank its share of the parameters that have been made; those of children may be still to come."""
    import deepspeed
    from deepspeed.utils import groups

    from ..ranks.mpu import Mpu

    class Init(deepspeed.zero.Init):
        """DeepSpeed's would send all of rank 0's to all ranks first. The names are not public."""

        def _zero_init_param(self, param: Any) -> None:
            self._convert_to_deepspeed_param(param)
            param.partition()

    Init(
        module=nn.ParameterList(p for p in module.parameters() if not p.is_meta),
        data_parallel_group=ranks.replica_group,
        # of zero_hpz_partition_size: the first call makes the group, and the next would assert that there is none
        zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),
        config_dict_or_path=ds_config,
        mpu=Mpu(ranks) if ranks.tensor_size > 1 else None,
    )


def _tie(model: nn.Module, made: Mapping[str, nn.Parameter]) -> None:
    """Points every tied name (a head that is the embedding) at the one parameter that was made."""
    for target, source in (model.all_tied_weights_keys or {}).items():  # type: ignore[union-attr]
        if source in made:
            owner, _, name = target.rpartition(".")
            model.get_submodule(owner)._parameters[name] = made[source]


class _OwnValues:
    """For a family without a table: what transformers' initialiser draws, seeded by the name of the module.

    It goes block by block, since some modules leave their values to the one that they are in.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self._model, self._seed = model, seed
        self._drawn: dict[str, Tensor] = {}  # of one block

    def __call__(self, spec: ParamSpec) -> Tensor:
        if spec.name not in self._drawn:
            self._drawn = self._draw(*self._block_of(spec.name))
        path, _, leaf = spec.name.rpartition(".")
        return filled(self._drawn.pop(spec.name), self._model.get_submodule(path), leaf, self._model)

    def unit(self, name: str) -> str:
        """What is drawn together with a parameter: its block."""
        return self._block_of(name)[0]

    def _block_of(self, name: str) -> tuple[str, nn.Module]:
        """The outermost module around a parameter that is one of a list or has parameters of its own."""
        path, module, listed = "", self._model, False
        for part in name.split(".")[:-1]:
            if listed or any(p is not None for p in module._parameters.values()):
                break
            listed = isinstance(module, nn.ModuleList | nn.ModuleDict)
            path, module = f"{path}{part}.", module.get_submodule(part)
        return path, module

    @torch.no_grad()
    def _draw(self, path: str, block: nn.Module) -> dict[str, Tensor]:
        """Values of all parameters of a block that are on the meta device yet; the block stays as it is."""
        kept = {name: p for name, p in block.named_parameters() if p.is_meta}
        owners = {name: block.get_submodule(name.rpartition(".")[0]) for name in kept}
        drawn = {name: nn.Parameter(unset(p), requires_grad=False) for name, p in kept.items()}
        try:
            for name, owner in owners.items():
                owner._parameters[name.rpartition(".")[2]] = drawn[name]
            with torch.random.fork_rng(devices=[]):
                self._initialise(path, block, self._model)
        finally:
            for name, owner in owners.items():
                owner._parameters[name.rpartition(".")[2]] = kept[name]
        return {f"{path}{name}": p.detach() for name, p in drawn.items()}

    def _initialise(self, path: str, module: nn.Module, model: Any) -> None:
        """Children first, as transformers does; `model` is the innermost of its models around them."""
        inner = module if isinstance(module, PreTrainedModel) else model
        for name, child in module.named_children():
            self._initialise(f"{path}{name}.", child, inner)
        torch.manual_seed(parameter_seed(self._seed, path))
        inner._init_weights(module)


def drawn_values(config: Mapping[str, Any], seed: int) -> RandomValues | _OwnValues:
    """Initial values that follow from the seed and the names alone: a written record's, or else transformers' own."""
    if config["model_type"] in FAMILIES:
        return RandomValues(seed)
    model = skeleton(config)  # its own: of the true vocabulary, and all of it on the meta device
    materialise_buffers(model, torch.device("cpu"))
    return _OwnValues(model, seed)
