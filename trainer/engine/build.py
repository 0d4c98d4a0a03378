"""The engine of a plan."""

from __future__ import annotations

import torch

from ...data_prep.errors import UserError
from ..adapters.merged import initial_values
from ..kernels.compiled import check_compiler
from ..modeling.values import Values, nothing
from ..objectives.registry import objective_of
from ..plan.plan import Plan
from ..ranks.ranks import Ranks, accelerator
from .base import Engine
from .masters import fill_masters


def build_engine(plan: Plan, ranks: Ranks, values: Values | None = None, resumes: bool = False) -> Engine:
    """The engine of a plan. Collective.

    Args:
        values: initial values of the parameters; None: those of `model.init`.
        resumes: whether a checkpoint will be loaded: what that holds is not read or drawn before.

    Raises:
        UserError: on every rank: the accelerator cannot compute in the plan's precision, or the initial values cannot
            be read.
    """
    able = {"fp16": accelerator().is_fp16_supported, "bf16": accelerator().is_bf16_supported}.get(plan.precision.name)
    if able is not None and not able():
        device, instead = accelerator().device_name(), "bf16" if plan.precision.name == "fp16" else "neither, for fp32"
        raise UserError(f"{plan.precision}: the accelerator ({device}) cannot train in it; enable {instead}")
    if plan.recipe.compile == "blocks":
        ranks.together(lambda: check_compiler(ranks.device.type))
    # a checkpoint holds everything but the base of an adapter, and what preferences are compared with
    if resumes and plan.recipe.adapter == "none" and not objective_of(plan.recipe.objective).reference:
        values = nothing
    values = values or initial_values(plan.recipe.model.init, ranks)
    if plan.layout.pipeline > 1:
        from .pipeline import PipelineEngine

        engine: Engine = PipelineEngine(plan, ranks, values)
    else:
        from .zero import ZeroEngine

        engine = ZeroEngine(plan, ranks, values)
    if values is not None and engine.dtype != torch.float32:
        ranks.together(lambda: fill_masters(engine, values))
    return engine
