"""The options of LoRA. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...data_prep.errors import UserError, did_you_mean

INITS = ("default", "pissa")


@dataclass(frozen=True)
class LoraOptions:
    """As a recipe states them; `checked` makes sure of them."""

    r: int  # rank
    alpha: float  # the update is scaled by alpha / r
    dropout: float  # of the adapter's input
    targets: str | Sequence[str]  # ends of the names of linears in the blocks, or all-linear
    rslora: bool  # alpha / sqrt(r) instead (arXiv:2312.03732)
    dora: bool  # a trained magnitude for every output (arXiv:2402.09353)
    init: str  # default: A uniform, B zero; pissa: the principal components of the weight
    modules_to_save: Sequence[str]  # modules that are trained whole
    lr_ratio: float  # learning rate of B and of magnitudes over that of A (LoRA+, arXiv:2402.12354)

    @property
    def scaling(self) -> float:
        """What B A x is multiplied with."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    @property
    def pissa(self) -> bool:
        """Whether A and B begin as the base's principal components, which leave the base."""
        return self.init == "pissa"

    @property
    def named_targets(self) -> tuple[str, ...]:
        """None: all linears of the blocks."""
        return () if self.targets == "all-linear" else tuple(self.targets)

    def checked(self, kind: str) -> LoraOptions:
        """Itself, a single target as a list.

        Raises:
            UserError: a value that cannot be, for an adapter of this kind.
        """
        one = isinstance(self.targets, str) and self.targets != "all-linear"
        options = replace(self, targets=(self.targets,) if one else self.targets)
        for key, (fits, words) in _RULES.items():
            value = getattr(options, key)
            if not fits(value):
                raise UserError(f"adapter {kind}: {key} must be {words}, got {value!r}")
        if self.init not in INITS:
            hint = did_you_mean(str(self.init), INITS)
            raise UserError(f"adapter {kind}: init {self.init!r}{hint}; there are {', '.join(INITS)}")
        if self.pissa and kind == "qlora":
            raise UserError("adapter qlora: init pissa would have to quantise what PiSSA leaves over; use init default")
        return options


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) and name for name in value)


_SWITCH = (lambda value: isinstance(value, bool)), "true or false"
_POSITIVE = (lambda value: _is_number(value) and value > 0), "a positive number"
_RULES = {
    "r": ((lambda value: type(value) is int and value > 0), "a positive whole number"),
    "alpha": _POSITIVE,
    "dropout": ((lambda value: _is_number(value) and 0 <= value < 1), "a number from 0 to below 1"),
    "targets": (
        (lambda value: value == "all-linear" or (_is_names(value) and len(value) > 0)),
        "all-linear, or a list of names of linears",
    ),
    "rslora": _SWITCH,
    "dora": _SWITCH,
    "modules_to_save": (_is_names, "a list of names of modules"),
    "lr_ratio": _POSITIVE,
}
