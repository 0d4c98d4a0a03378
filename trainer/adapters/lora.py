"""LoRA (Hu et al., arXiv:2106.09685) in peft's arithmetic, with its options, initial values and names.

The layers are hooks on the model's own linears and not peft's wrappers. Those read the base's weights when they are
made (DoRA, PiSSA), which ZeRO-3 has partitioned by then, and PiSSA changes them; a hook leaves every module and name as
it is, and the linear's weight is there, gathered, when it runs.

PiSSA (arXiv:2404.02948) trains the principal components of each weight from where they are. Its residual is not made:
the frozen initial components `lora_A0`, `lora_B0` are kept beside the trained ones and their product is subtracted, so
that the base stays what it was bit for bit and nothing has to be computed again at a resume.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

from ...data_prep.errors import UserError
from ..families.specs import ParamSpec
from .base import Make, Read
from .options import LoraOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ALL = "all-linear"
HEAD = "lm_head"


class Lora:
    """Options as in `LoraOptions`."""

    splits: ClassVar[bool] = False
    kind: ClassVar[str] = "lora"

    def __init__(
        self,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        targets: str | Sequence[str] = ALL,
        rslora: bool = False,
        dora: bool = False,
        init: str = "default",
        modules_to_save: Sequence[str] = (),
        lr_ratio: float = 1.0,
    ) -> None:
        """Raises UserError: a value that cannot be."""
        self.options = LoraOptions(r, alpha, dropout, targets, rslora, dora, init, modules_to_save, lr_ratio).checked(
            self.kind
        )

    def check(self, table: Sequence[ParamSpec]) -> None:
        linears = [spec for spec in table if spec.linear]
        modules, where = {_module(spec.name) for spec in linears}, f"adapter {self.kind}"
        if not modules:
            raise UserError(f"{where}: the model has no linear in its blocks to adapt")
        for target in self.options.named_targets:
            if not any(_ends(module, target) for module in modules):
                raise UserError(f"{where}: targets: no linear {target!r} in the blocks; there are {_listed(modules)}")
        own = {parent for spec in table for parent in _parents(spec.name)}
        for saved in self.options.modules_to_save:
            if not any(_ends(module, saved) for module in own):
                tied = "" if any(_ends(module, HEAD) for module in own) else " (a tied head is the embedding)"
                raise UserError(f"{where}: modules_to_save: no module {saved!r}{tied}; there are {_listed(own)}")
        if both := sorted(spec.name for spec in linears if self._adapts(spec) and self._trains(spec.name)):
            raise UserError(f"{where}: targets and modules_to_save both name {_module(both[0])}; keep one")
        most = min(min(spec.shape) for spec in linears if self._adapts(spec))
        if self.options.pissa and self.options.r > most:
            raise UserError(
                f"{where}: r {self.options.r} with pissa: a weight has {most} components; use {most} or less"
            )

    def rows(self, table: Sequence[ParamSpec]) -> list[ParamSpec]:
        rows: list[ParamSpec] = []
        for _, group in groupby(table, lambda spec: _module(spec.name)):
            own = [replace(spec, trained=self._trains(spec.name), packed=self.packs(spec)) for spec in group]
            rows += [*own, *(row for spec in own if self._adapts(spec) for row in self._own(spec))]
        return rows

    def packs(self, spec: ParamSpec) -> bool:
        """Whether a parameter of the base is kept in four bits."""
        return False

    def convert(self, module: nn.Module, compute: torch.dtype) -> nn.Module:
        return module

    def _own(self, weight: ParamSpec) -> Iterator[ParamSpec]:
        """The rows beside a linear's weight."""
        out, into = weight.shape[::-1] if weight.conv else weight.shape
        a, b = (self.options.r, into), (out, self.options.r)

        def row(leaf: str, shape: tuple[int, ...], **how: Any) -> ParamSpec:
            return ParamSpec(f"{_module(weight.name)}.{leaf}.weight", shape, "replicated", layer=weight.layer, **how)

        yield row("lora_A", a, init="uniform", std=1 / math.sqrt(3 * into))  # peft's, which is nn.Linear's own
        yield row("lora_B", b, init="zeros", rate=self.options.lr_ratio)
        if self.options.dora:
            yield row("lora_magnitude_vector", (out,), init="ones", rate=self.options.lr_ratio)
        if self.options.pissa:
            yield row("lora_A0", a, init="zeros", trained=False)
            yield row("lora_B0", b, init="zeros", trained=False)

    def inject(self, module: nn.Module, make: Make) -> None:
        parameters: list[Any] = list(module.parameters())
        if hasattr(module, "get_output_embeddings"):  # whole, and perhaps of a family that no plan could look at
            self.check([parameter.spec for parameter in parameters])
        for parameter in parameters:
            if self._trains(parameter.spec.name):
                parameter.requires_grad_(True)
        for child in list(module.modules()):
            spec: ParamSpec | None = getattr(child._parameters.get("weight"), "spec", None)
            if spec is not None and self._adapts(spec):
                self._adapt(child, make)

    def _adapt(self, linear: Any, make: Make) -> None:
        specs = {spec.name.split(".")[-2]: spec for spec in self._own(linear.weight.spec)}
        given = self._given(linear) if self.options.dora or self.options.pissa else {}
        for leaf, spec in specs.items():
            linear.register_parameter(leaf, make(spec, given.get(leaf)))
        linear.register_forward_hook(partial(_forward, self.options))

    def _given(self, linear: Any) -> dict[str, Tensor]:
        """Initial values that come from the weight. Collective under ZeRO-3."""
        import torch

        with torch.no_grad(), _gathered(linear.weight):
            weight = _weight(linear).float()
            given = {}
            if self.options.dora:
                given["lora_magnitude_vector"] = torch.linalg.vector_norm(weight, dim=1)
            if self.options.pissa:
                left, values, right = torch.linalg.svd(weight, full_matrices=False)
                r = self.options.r
                roots = (values[:r] / self.options.scaling).sqrt()
                given["lora_A"] = given["lora_A0"] = roots[:, None] * right[:r]
                given["lora_B"] = given["lora_B0"] = left[:, :r] * roots
            return given

    def owns(self, name: str) -> bool:
        return ".lora_" in name or self._trains(name)

    def merge(self, spec: ParamSpec, read: Read, stored: Container[str]) -> Tensor:
        import torch

        weight, module = self.seen(spec, read(spec.name)), _module(spec.name)
        if not self._adapts(spec):
            return weight
        delta = read(f"{module}.lora_B.weight") @ read(f"{module}.lora_A.weight")
        if self.options.pissa:
            delta -= read(f"{module}.lora_B0.weight") @ read(f"{module}.lora_A0.weight")
        merged = (weight.T if spec.conv else weight) + self.options.scaling * delta
        if self.options.dora:
            norm = torch.linalg.vector_norm(merged, dim=1)
            merged *= (read(f"{module}.lora_magnitude_vector.weight") / norm)[:, None]
        return merged.T.contiguous() if spec.conv else merged

    def seen(self, spec: ParamSpec, weight: Tensor) -> Tensor:
        """A parameter of the base as training computes with it."""
        return weight

    def _adapts(self, spec: ParamSpec) -> bool:
        targets = self.options.named_targets
        return spec.linear and (not targets or any(_ends(_module(spec.name), target) for target in targets))

    def _trains(self, name: str) -> bool:
        """Whether a parameter of the model itself is trained."""
        saved = self.options.modules_to_save
        return ".lora_" not in name and any(_ends(parent, one) for parent in _parents(name) for one in saved)


def _forward(options: LoraOptions, linear: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """What an adapted linear gives, from what it gives without its adapter."""
    import torch
    import torch.nn.functional as F

    from ..kernels.dropout import dropout

    x = inputs[0].to(linear.lora_A.dtype)
    dropped = dropout(x, options.dropout, linear.training)
    low = F.linear(F.linear(dropped, linear.lora_A), linear.lora_B) * options.scaling

    def initial(seen: Tensor) -> Tensor:
        return F.linear(F.linear(seen, linear.lora_A0), linear.lora_B0) * options.scaling

    base = output - initial(x) if options.pissa else output
    if not options.dora:
        return base + low
    with torch.no_grad():  # a constant for the gradient (arXiv:2402.09353, 4.3)
        weight = _weight(linear)
        whole = weight + options.scaling * (linear.lora_B @ linear.lora_A)
        if options.pissa:
            whole -= options.scaling * (linear.lora_B0 @ linear.lora_A0)
        norm = torch.linalg.vector_norm(whole, dim=1)
    factor = linear.lora_magnitude_vector / norm
    if dropped is not x:  # what the magnitude scales is dropped too
        frozen = F.linear(dropped, weight) - (initial(dropped) if options.pissa else 0)
    else:
        frozen = base if linear.bias is None else base - linear.bias
    return base + (factor - 1) * frozen + factor * low


def _weight(linear: Any) -> Tensor:
    """[out, in]."""
    if hasattr(linear, "dense"):
        return linear.dense()
    return linear.weight.T if linear.weight.spec.conv else linear.weight


def _gathered(parameter: Any) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])  # does nothing to what is not partitioned


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _parents(name: str) -> Iterator[str]:
    """The module of a parameter, and all that it is in."""
    while name := _module(name):
        yield name


def _ends(module: str, wanted: str) -> bool:
    """As peft finds modules by their names."""
    return module == wanted or module.endswith(f".{wanted}")


def _listed(modules: Iterable[str]) -> str:
    """Names without the number of the block, each once."""
    short = {module.split(".", 1)[0] if "." not in module else _after_number(module) for module in modules}
    return ", ".join(sorted(short - {""}))


def _after_number(module: str) -> str:
    parts = module.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else module
