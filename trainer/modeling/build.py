"""Builds a Hugging Face model with every parameter's values given by name, on any ZeRO stage.

The model is laid out on the meta device and materialised module by module; under ZeRO-3 each module is partitioned
before the next is made, so that no rank ever holds more than its share and one module. Initial values are seeded by
(seed, parameter name): they do not depend on the layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...data_prep.errors import UserError
from ..anatomy.skeleton import filled, materialise_buffers, skeleton, unset
from ..families.registry import FAMILIES, family_of
from ..families.specs import ParamSpec, parameter_seed, parameter_table, trained_vocab
from ..families.weight_files import WeightFiles
from ..kernels.swap import use_kernels
from ..ranks.ranks import Ranks
from .attention import BY_TEXT
from .slices import local_slice

Values = Callable[[ParamSpec], Tensor]  # the full Hugging Face parameter, unpadded, any float type


def build_model(
    config: Mapping[str, Any],
    values: Values | None,
    seed: int,
    dtype: torch.dtype,
    ranks: Ranks,
    zero3_config: dict | None = None,
    convert: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> nn.Module:
    """A causal LM whose parameters carry `.spec` and hold `values` (None: random, by name).

    Args:
        config: transformers' names, with `model_type` and the true `vocab_size`.
        dtype: of the parameters.
        zero3_config: the DeepSpeed JSON when parameters are to be partitioned (stage 3), else None.
        convert: what takes the place of a module when its values are there.

    Raises:
        UserError: the family is unknown to transformers, or the configuration is wrong for it.
    """
    model, specs = model_and_specs(config, ranks.tensor_size)
    materialise_buffers(model, ranks.device)
    fill = values or drawn_values(config, seed)
    made: dict[str, nn.Parameter] = {}
    for prefix, module in list(_named_modules(model)):
        fresh = [name for name in module._parameters if f"{prefix}{name}" in specs]
        for name in fresh:
            spec = specs[f"{prefix}{name}"]
            made[spec.name] = module._parameters[name] = make_parameter(spec, fill, dtype, ranks)
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


def model_and_specs(config: Mapping[str, Any], tensor: int) -> tuple[Any, dict[str, ParamSpec]]:
    """The model on the meta device, its vocabulary padded where that is possible, and its parameters by name."""
    family, trained = family_of(config), dict(config)
    if family is not None:
        trained["vocab_size"] = trained_vocab(config, tensor)
    model = skeleton(trained, BY_TEXT if family is not None and family.by_text else None)
    use_kernels(model)
    if family is not None:
        specs = {spec.name: spec for spec in parameter_table(config, tensor)}
    else:
        specs = {name: ParamSpec(name, tuple(p.shape)) for name, p in model.named_parameters()}
        head = model.get_output_embeddings()
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear | Conv1D) and module is not head:
                name = f"{path}.weight"
                specs[name] = replace(specs[name], linear=True, conv=isinstance(module, Conv1D))
    expected = {name for name, _ in model.named_parameters()}
    assert specs.keys() == expected, f"the table and the model differ in {sorted(specs.keys() ^ expected)}"
    return model, specs


def model_specs(config: Mapping[str, Any]) -> dict[str, ParamSpec]:
    """Every parameter of a model by name, tied ones once; of any family that transformers knows."""
    return {spec.name: spec for spec in parameter_table(config)} if family_of(config) else model_and_specs(config, 1)[1]


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module, parents first, with what its parameters' names begin with."""
    for name, module in model.named_modules():
        yield (f"{name}." if name else ""), module


def make_parameter(spec: ParamSpec, values: Values, dtype: torch.dtype, ranks: Ranks) -> nn.Parameter:
    """This rank's piece of one parameter, on the device that trains."""
    full = values(spec)
    if tuple(full.shape) != spec.shape:
        raise UserError(f"{spec.name}: expected shape {list(spec.shape)}, found {list(full.shape)}")
    piece = local_slice(full, spec, ranks.tensor, ranks.tensor_size)
    # a copy: never a view of what the values' source holds
    piece = piece.to(device=ranks.device, dtype=dtype, copy=True, memory_format=torch.contiguous_format)
    parameter = nn.Parameter(piece)
    parameter.spec = spec  # type: ignore[attr-defined]
    return parameter


def _partition(module: nn.Module, ds_config: dict, ranks: Ranks) -> None:
    """Leaves each rank its share of the parameters that have been made; those of children may be still to come."""
    import deepspeed
    from deepspeed.utils import groups

    from ..ranks.mpu import Mpu

    deepspeed.zero.Init(
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


class RandomValues:
    """Initial values of each parameter from (seed, name) alone, as its table row says. Always drawn on the CPU."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, spec: ParamSpec) -> Tensor:
        if spec.init in ("ones", "zeros"):
            return torch.ones(spec.shape) if spec.init == "ones" else torch.zeros(spec.shape)
        generator = torch.Generator().manual_seed(parameter_seed(self._seed, spec.name))
        if spec.init == "uniform":
            return (torch.rand(spec.shape, generator=generator) * 2 - 1) * (math.sqrt(3) * spec.std)
        return torch.randn(spec.shape, generator=generator) * spec.std


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
        return filled(self._drawn.pop(spec.name), spec.name, self._model)

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


def drawn_values(config: Mapping[str, Any], seed: int) -> Values:
    """Initial values that follow from the seed and the names alone: a written record's, or else transformers' own."""
    if config["model_type"] in FAMILIES:
        return RandomValues(seed)
    model = skeleton(config)  # its own: of the true vocabulary, and all of it on the meta device
    materialise_buffers(model, torch.device("cpu"))
    return _OwnValues(model, seed)


class FolderValues:
    """Values from the safetensors files of a Hugging Face folder, one parameter at a time.

    Raises:
        UserError: no safetensors there, or a parameter is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._files = WeightFiles(folder)

    def __call__(self, spec: ParamSpec) -> Tensor:
        file, key = self._files.find(spec.name)
        try:
            with safe_open(file, "pt") as handle:
                return handle.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise UserError(f"model.init: {file}: {key} cannot be read: {error}") from None
