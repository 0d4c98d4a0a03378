"""`torch.compile` of a model's blocks, one by one: they are alike, so that one is compiled however many there are."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import nn

from ...data_prep.errors import UserError

_F = TypeVar("_F", bound=Callable)


def uncompiled(function: _F) -> _F:
    """A function that compiled code calls as it is: for collectives, and random numbers of its own."""
    return torch.compiler.disable(function)  # type: ignore[return-value]


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compiles modules in place, at their first forward. What was compiled before, in another run too, is reused."""
    for block in blocks:
        block.compile()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a Hugging Face model: the modules that it names as not to be split."""
    names: set[str] = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def check_compiler(device_type: str) -> None:
    """Refuses what would fail at the first step.

    Raises:
        UserError: what torch.compile generates code with is not there.
    """
    if device_type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise UserError(f"compile: blocks needs a C++ compiler, and there is no {compiler}; install g++ or set CXX")
    elif importlib.util.find_spec("triton") is None:
        raise UserError("compile: blocks needs Triton, which is not installed; pip install triton")
