"""The engine of a pipeline: DeepSpeed's 1F1B schedule for training, a relay from stage to stage for everything else."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data.batches import Batch, BatchStream
from ..data.order import key64
from ..modeling.build import Values
from ..modeling.cross_entropy import loss_sum, whole_logits
from ..optim.groups import parameter_groups
from ..plan.plan import Plan
from ..ranks.ranks import Ranks
from ..recipe.recipe import Recipe
from ..run.quiet import hushed
from .zero import DTYPES, StepOutput, next_batch, planned_rate, runtime_config


class PipeEngine:
    """DeepSpeed's PipelineEngine behind the engines' protocol, with tensor and data parallelism inside the stages."""

    def __init__(self, recipe: Recipe, plan: Plan, ranks: Ranks, values: Values | None = None) -> None:
        import deepspeed

        from ..modeling.layer_costs import layer_seconds, step_seconds
        from ..modeling.partition import stage_costs
        from ..modeling.pipeline import Builder, Stages

        self.ranks, self._recipe, self._plan = ranks, recipe, plan
        config = runtime_config(plan.deepspeed, ranks)
        # at stage 0 in fp32 DeepSpeed clips by the norm of the first stage alone; stage 1 computes the same update
        config["zero_optimization"]["stage"] = max(1, plan.layout.zero_stage)
        # blocks checkpoint their own activations; DeepSpeed's way fails on the embedding's integer input
        config.get("pipeline", {}).pop("activation_checkpoint_interval", None)
        arguments = (
            plan.model_config,
            values,
            recipe.seed,
            DTYPES[plan.precision.name],
            ranks,
            plan.activation_checkpointing,
        )
        self._vocab_size, self._step, self._steps_run = plan.vocab_size, 0, 0
        with hushed():
            builder, method = Builder(*arguments), recipe.parallel.partition
            costs = layer_seconds(builder, plan.micro_batch, plan.seq_len) if method == "measured" else None
            self._stages: Any = Stages(builder, method, costs, plan.precision.autocast)
            self._stages.before_forward = self._seed
            self.module: nn.Module = self._stages
            self.deepspeed: Any = deepspeed.initialize(
                model=self._stages,
                model_parameters=parameter_groups(self._stages, plan.settings.optimizer),  # type: ignore[arg-type]
                config=config,
            )[0]
        # of a step, by the measured costs of the layers; None unless they were measured
        self.predicted_seconds = None
        if costs is not None:
            self.predicted_seconds = step_seconds(stage_costs(costs, self._stages.bounds), plan.accumulation)

    def train_step(self, stream: BatchStream, step: int, stop: bool = False) -> StepOutput:
        batch, totals = next_batch(stream, self.ranks, stop)
        self._stages.loss_fn.scale = len(batch.micro_batches) * self.ranks.data_size / totals.tokens
        self._step, self._stages.micro = step, 0
        self._set_learning_rate(step)
        lr = self.deepspeed.optimizer.param_groups[0]["lr"]
        micro_batches = iter([((b.input_ids, _positions(b)), b.labels) for b in batch.micro_batches])
        loss = float(self.deepspeed.train_batch(micro_batches))
        norm = self.deepspeed.get_global_grad_norm()
        output = totals.output(loss, norm, lr)
        self._compare_prediction(output.seconds - output.data_seconds)
        return output

    def eval_loss(self, micro_batches: Iterable[Batch]) -> tuple[float, int]:
        total, tokens = 0.0, 0
        for micro in micro_batches:
            logits = self._relay(micro)
            if logits is not None:
                labels = micro.labels.to(self.ranks.device)
                total += float(loss_sum(logits, labels, self._vocab_size, self.ranks))
                tokens += micro.tokens
        if self.ranks.tensor > 0:  # they computed the same
            total, tokens = 0.0, 0
        loss, count = self.ranks.all_sum([total, float(tokens)])
        return loss, int(count)

    def logits(self, input_ids: Tensor) -> Tensor:
        local = self._relay(Batch(input_ids, input_ids))
        if local is None:
            whole = torch.empty(*input_ids.shape, self._vocab_size, device=self.ranks.device)
        else:
            whole = whole_logits(local, self._vocab_size, self.ranks).contiguous()
        last = self.ranks.rank + self._stride * (self.ranks.pipeline_size - 1 - self.ranks.pipeline)
        dist.broadcast(whole, last, group=self.ranks.pipeline_group)
        return whole

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return sorted(((p.spec.name, p) for p in self.module.parameters()), key=lambda pair: pair[0])  # type: ignore[attr-defined]

    @property
    def _stride(self) -> int:
        """Ranks from one stage to the next."""
        return self.ranks.world // self.ranks.pipeline_size

    @torch.no_grad()
    def _relay(self, micro: Batch) -> Tensor | None:
        """Forward through the stages; logits (this tensor rank's columns) on the last stage, None on the others.

        Stages that are done with a micro batch take the next one, so that several in a row fill the pipeline.
        """
        stages, device = self._stages, self.ranks.device
        positions = _positions(micro).to(device)
        if stages.is_first:
            inputs: Any = micro.input_ids.to(device), positions
        else:
            width = self._width
            hidden = torch.empty(*micro.input_ids.shape, width, dtype=DTYPES[self._plan.precision.name], device=device)
            dist.recv(hidden, self.ranks.rank - self._stride)
            inputs = (hidden, positions) if stages.takes_positions else hidden
        stages.eval()
        autocast = self._plan.precision.autocast
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            for layer in [*stages.forward_funcs, *([stages.loss_fn.head] if stages.is_last else [])]:
                inputs = layer(inputs)
        stages.train()
        if stages.is_last:
            return inputs
        hidden = inputs[0] if isinstance(inputs, tuple) else inputs
        dist.send(hidden.to(DTYPES[self._plan.precision.name]).contiguous(), self.ranks.rank + self._stride)
        return None

    @property
    def _width(self) -> int:
        config = self._plan.model_config
        return config["n_embd"] if config["model_type"] == "gpt2" else config["hidden_size"]

    def _set_learning_rate(self, step: int) -> None:
        if self.deepspeed.lr_scheduler is None:
            for group in self.deepspeed.optimizer.param_groups:
                group["lr"] = planned_rate(self._recipe, self._plan, step)

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

    def _seed(self, micro: int) -> None:
        """As without a pipeline: from where the randomness is drawn. Stages must not repeat each other's masks."""
        place = self._step, micro, self.ranks.data, *([self.ranks.pipeline] if self.ranks.pipeline else [])
        torch.manual_seed(key64(self._recipe.seed, "forward", *place) >> 1)


def _positions(micro: Batch) -> Tensor:
    if micro.position_ids is not None:
        return micro.position_ids
    return torch.arange(micro.input_ids.shape[1]).expand(micro.input_ids.shape).contiguous()
