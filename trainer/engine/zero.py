"""The engine without pipeline stages: DeepSpeed's, on any ZeRO stage, offload included."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy.routing import routing_of
from ..data.batches import Batch, StepBatch
from ..data.noise import noisy
from ..families.derived import Derived
from ..families.registry import FAMILIES, family_of
from ..kernels.compiled import blocks_of, compile_blocks
from ..modeling.build import build_model
from ..modeling.causal import CausalLM
from ..modeling.derived.words import split_over_ranks
from ..modeling.mixtures.routers import Routers
from ..modeling.values import Values
from ..objectives.base import LossSum
from ..plan.plan import Plan
from ..ranks.mpu import Mpu
from ..ranks.ranks import Ranks
from .base import Engine, runtime_config


class ZeroEngine(Engine):
    """Data, tensor and sequence parallel on ZeRO 0 to 3."""

    def __init__(self, plan: Plan, ranks: Ranks, values: Values | None = None) -> None:
        super().__init__(plan, ranks)
        config = runtime_config(plan, ranks)
        self._spoilt = False  # a gradient that is no number was taken away at stage 0
        zero3 = config if plan.layout.zero_stage == 3 else None
        how = self.dtype, ranks, zero3, self._convert, self._packs
        model = build_model(plan.model_config, values, plan.recipe.seed, *how)
        family = family_of(plan.model_config)
        split_over_ranks(model, family, ranks)
        if ranks.expert_size > 1:
            from ..modeling.mixtures.dispatch import share_experts

            assert isinstance(family, Derived)
            share_experts(model, family, ranks)
        self._furnish(model)
        self._embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        if plan.settings.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        if plan.recipe.compile == "blocks":
            compile_blocks(blocks_of(model))
        self.routers = _routers(plan, model, ranks)
        self.module: nn.Module = CausalLM(
            model, plan.vocab_size, ranks, *self.counting, family=family, routers=self.routers
        ).train()
        if ranks.sequence_size > 1:
            from ..modeling.sequence_parallel import SequenceParallel

            self.module = SequenceParallel(self.module, ranks).train()
        self.deepspeed = self._initialize(config, Mpu(ranks) if ranks.tensor_size > 1 else None)

    def _update(self, batch: StepBatch, step: int, weight: float) -> tuple[Tensor, Any]:
        norm, sums, self._spoilt = None, self._vector(None), False
        for number, micro in enumerate(batch.micro_batches):
            self._seed(step, number)
            loss = self._forward(micro)
            # DeepSpeed averages gradients over the replicas; the loss is a mean over the whole global batch
            trained = loss.sum if self.routers is None else loss.sum + self.routers.loss
            self.deepspeed.backward(trained * (self.ranks.replicas / weight), scale_wrt_gas=False)
            if number + 1 == len(batch.micro_batches):
                norm = self._unpartitioned_norm()
                # without ZeRO it is torch's own optimizer, which would go on with it
                self._spoilt = norm is not None and self.bad_steps.skips and not bool(norm.isfinite())
            with holding_still(self.deepspeed.optimizer) if self._spoilt else nullcontext():
                self.deepspeed.step()
            sums += self._vector(loss)
            self.pulse.beat()
        return sums, self.deepspeed.get_global_grad_norm() if norm is None else norm

    def _applied(self) -> bool:
        return super()._applied() and not self._spoilt

    def token_losses(self, micro: Batch) -> Tensor:
        return self._evaluated(micro.input_ids.to(self.ranks.device), micro.labels, micro.position_ids)

    def logits(self, input_ids: Tensor) -> Tensor:
        return self._evaluated(input_ids.to(self.ranks.device))

    @torch.no_grad()
    def _evaluated(self, *inputs: Tensor | None) -> Tensor:
        self.deepspeed.eval()
        output = self.deepspeed(*inputs)
        self.deepspeed.train()
        return output

    def _forward(self, micro: Batch) -> LossSum:
        moved, ranks = micro.to(self.ranks.device), self.ranks
        noise = None if moved.noise is None else moved.noise.chunk(ranks.sequence_size, 1)[ranks.sequence]
        with noisy(self._embedding, noise):
            # labels and positions as they are on the host: what the model looks up in them, it need not wait for
            losses = self.deepspeed(moved.input_ids, micro.labels, micro.position_ids)
        return self._loss(moved, losses)

    def _unpartitioned_norm(self) -> Tensor | None:
        """Norm of the reduced gradients at stage 0 in fp32, where DeepSpeed does not keep it."""
        if self.plan.layout.zero_stage > 0 or self.plan.precision.width < 4:
            return None
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        if self.ranks.tensor_size == 1:
            return torch.nn.utils.get_total_norm([p.grad for p in parameters])  # type: ignore[misc]
        counted = [p.grad for p in parameters if getattr(p, "model_parallel", False) or self.ranks.tensor == 0]
        square = torch.nn.utils.get_total_norm(counted).square()  # type: ignore[arg-type]
        torch.distributed.all_reduce(square, group=self.ranks.tensor_group)
        return square.sqrt()


def _routers(plan: Plan, model: nn.Module, ranks: Ranks) -> Routers | None:
    """Those of a mixture of experts, where they can be listened to."""
    if plan.model_config["model_type"] in FAMILIES or plan.recipe.compile != "none":
        return None
    routing = routing_of(plan.model_config)
    return None if isinstance(routing, str) else Routers(model, routing, plan.recipe.model.router, ranks)


@contextmanager
def holding_still(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The optimizer's step does nothing inside; DeepSpeed counts and clears as after any step."""
    before = vars(optimizer).get("step")  # a scheduler's, if it is there
    optimizer.step = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del optimizer.step
        if before is not None:
            optimizer.step = before
