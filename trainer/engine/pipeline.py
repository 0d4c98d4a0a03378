"""The engine of a pipeline: DeepSpeed's 1F1B schedule for training, a relay from stage to stage for everything else."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data.batches import Batch, StepBatch
from ..kernels.compiled import compile_blocks
from ..modeling.cross_entropy import whole_logits
from ..modeling.layer_costs import layer_seconds, step_seconds
from ..modeling.partition import stage_costs
from ..modeling.pipeline import Block, Builder, StageLoss, Stages
from ..modeling.values import Values
from ..plan.plan import Plan
from ..ranks.ranks import Ranks
from ..run.quiet import hushed
from .base import Engine, runtime_config


class PipelineEngine(Engine):
    """DeepSpeed's PipelineEngine, with tensor and data parallelism inside the stages."""

    def __init__(self, plan: Plan, ranks: Ranks, values: Values | None = None) -> None:
        super().__init__(plan, ranks)
        config = runtime_config(plan, ranks)
        # at stage 0 in fp32 DeepSpeed clips by the norm of the first stage alone; stage 1 computes the same update
        config["zero_optimization"]["stage"] = max(1, plan.layout.zero_stage)
        # blocks checkpoint their own activations; DeepSpeed's way fails on the embedding's integer input
        config.get("pipeline", {}).pop("activation_checkpoint_interval", None)
        recomputes, method = plan.settings.activation_checkpointing, plan.recipe.parallel.partition
        arguments = (
            plan.model_config,
            values,
            plan.recipe.seed,
            self.dtype,
            ranks,
            recomputes,
            self._furnish,
            self._convert,
            self._packs,
        )
        self._step, self._steps_run = 0, 0
        self._sums, self._extras = self._vector(None), ()  # of the step; names of the batches' extras
        with hushed():
            builder = Builder(*arguments)
            self._width = builder.width
            costs = layer_seconds(builder, plan.micro_batch, plan.seq_len) if method == "measured" else None
            self._head = StageLoss(builder, self._add_loss, plan.precision.autocast, *self.counting)
            self._stages = Stages(builder, self._head, method, costs)
            self._stages.before_forward = lambda micro: self._seed(self._step, micro)
            if plan.recipe.compile == "blocks":
                compile_blocks(layer.block for layer in self._stages.forward_funcs if isinstance(layer, Block))
            self.module: nn.Module = self._stages
            self.deepspeed = self._initialize(config)
        # of a step, by the measured costs of the layers; None unless they were measured
        self.predicted_seconds = None
        if costs is not None:
            self.predicted_seconds = step_seconds(stage_costs(costs, self._stages.bounds), plan.accumulation)

    def _update(self, batch: StepBatch, step: int, weight: float) -> tuple[Tensor, Any]:
        self._head.scale = len(batch.micro_batches) * self.ranks.data_size / weight
        self._step, self._stages.micro, self._sums = step, 0, self._vector(None)
        self._extras = tuple(batch.micro_batches[0].extras)
        inputs = [
            (
                (micro.input_ids, _positions(micro), *(() if micro.noise is None else [micro.noise])),
                (micro.labels, *micro.extras.values()),
            )
            for micro in batch.micro_batches
        ]
        self.deepspeed.train_batch(iter(inputs))
        return self._sums, self.deepspeed.get_global_grad_norm()

    def train_step(self, *arguments: Any, **options: Any) -> Any:
        output = super().train_step(*arguments, **options)
        self._compare_prediction(output.seconds - output.data_seconds)
        return output

    def _add_loss(self, tensors: Sequence[Tensor], token_losses: Tensor) -> Tensor:
        """The objective's loss of a micro batch in training, on the last stage; its sums are kept."""
        labels, *extras = tensors  # the inputs went to the first stage
        batch = Batch(labels, labels, None, dict(zip(self._extras, extras, strict=True)))
        loss = self._loss(batch, token_losses)
        self._sums += self._vector(loss)
        return loss.sum

    @torch.no_grad()
    def token_losses(self, micro: Batch) -> Tensor | None:
        hidden = self._relay(micro)
        return None if hidden is None else self._head.token_losses(hidden, micro.labels.to(self.ranks.device))

    def logits(self, input_ids: Tensor) -> Tensor:
        hidden = self._relay(Batch(input_ids, input_ids))
        if hidden is None:
            whole = torch.empty(*input_ids.shape, self.plan.vocab_size, device=self.ranks.device)
        else:
            whole = whole_logits(self._head.logits(hidden), self.plan.vocab_size, self.ranks).contiguous()
        last = self.ranks.rank + self._stride * (self.ranks.pipeline_size - 1 - self.ranks.pipeline)
        dist.broadcast(whole, last, group=self.ranks.pipeline_group)
        return whole

    @property
    def _stride(self) -> int:
        """Ranks from one stage to the next."""
        return self.ranks.world // self.ranks.pipeline_size

    @torch.no_grad()
    def _relay(self, micro: Batch) -> Tensor | None:
        """Forward through the stages; what the head reads on the last stage, None on the others.

        Stages that are done with a micro batch take the next one, so that several in a row fill the pipeline.
        """
        stages, device = self._stages, self.ranks.device
        positions = _positions(micro).to(device)
        if stages.is_first:
            inputs: Any = micro.input_ids.to(device), positions
        else:
            hidden = torch.empty(*micro.input_ids.shape, self._width, dtype=self.dtype, device=device)
            dist.recv(hidden, self.ranks.rank - self._stride)
            inputs = (hidden, positions) if stages.takes_positions else hidden
        stages.eval()
        autocast = self.plan.precision.autocast
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            for layer in stages.forward_funcs:
                inputs = layer(inputs)
        stages.train()
        if stages.is_last:
            return inputs
        hidden = inputs[0] if isinstance(inputs, tuple) else inputs
        dist.send(hidden.to(self.dtype).contiguous(), self.ranks.rank + self._stride)
        return None

    def _compare_prediction(self, seconds: float) -> None:
        """Says once, at the third step of this process, what the measured partition promised and what came."""
        self._steps_run += 1
        if self.predicted_seconds is not None and self._steps_run == 3 and self.ranks.is_main:
            layers = ", ".join(f"{start}-{stop - 1}" for start, stop in pairwise(self._stages.bounds))
            print(
                f"pipeline: layers {layers}; a step was predicted to take {self.predicted_seconds:.3g} s by "
                f"its measured layers and took {seconds:.3g} s",
                flush=True,
            )


def _positions(micro: Batch) -> Tensor:
    if micro.position_ids is not None:
        return micro.position_ids
    return torch.arange(micro.input_ids.shape[1]).expand(micro.input_ids.shape).contiguous()
