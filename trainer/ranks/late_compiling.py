"""Compiles DeepSpeed's Muon when it is used, not in every run that does not use it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def compile_when_called() -> None:
    """Makes what DeepSpeed's `compiler.compile()` decorates load torch's compiler at its first call.

    Its one use is `zero/muon/original_muon.py`, which every ZeRO engine imports to see whether its optimizer is a Muon:
    0.8 s of every start. Calling this again is harmless.
    """
    from deepspeed.runtime import compiler

    if not isinstance(compiler.compile, LateCompile):
        compiler.compile = LateCompile(compiler.compile)  # type: ignore[assignment]


class LateCompile:
    """In the place of `compiler.compile`, a function without arguments that makes a decorator."""

    def __init__(self, make: Callable[[], Callable[[Callable], Callable]]) -> None:
        self._make = make

    def __call__(self) -> Callable[[Callable], Callable]:
        return self._decorate

    def _decorate(self, function: Callable) -> Callable:
        compiled = functools.cache(lambda: self._make()(function))

        @functools.wraps(function)
        def late(*arguments: Any, **options: Any) -> Any:
            return compiled()(*arguments, **options)

        late.uncompiled = function  # type: ignore[attr-defined]
        return late
