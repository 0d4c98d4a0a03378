"""Engines: one optimizer step over a global batch, whatever the layout. The loop knows only the protocol."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...data_prep.errors import UserError
from ..data.batches import Batch, BatchStream, StepBatch
from ..data.ledger import join, split
from ..data.order import key64
from ..modeling.build import Values, build_model
from ..objectives.causal_lm import CausalLM
from ..optim.groups import parameter_groups
from ..optim.schedule import learning_rate
from ..plan.plan import Plan
from ..ranks.mpu import Mpu
from ..ranks.ranks import Ranks, accelerator
from ..recipe.recipe import Recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "bf16_autocast": torch.float32}


@dataclass(frozen=True)
class StepOutput:
    """What one optimizer step reports, over all ranks."""

    loss: float  # mean over the unmasked tokens of the global batch
    grad_norm: float | None  # before clipping
    lr: float
    tokens: int  # unmasked, of the global batch
    seconds: float
    data_seconds: float  # of them, this rank waited for data
    samples: tuple[int, int]  # first global sample index, last + 1
    ledger: int  # digest of the samples that all ranks consumed
    stop: bool  # some rank was asked to stop


class Engine(Protocol):
    """A model with its optimizer on one layout."""

    module: nn.Module
    ranks: Ranks
    deepspeed: Any  # deepspeed.DeepSpeedEngine

    def train_step(self, stream: BatchStream, step: int, stop: bool = False) -> StepOutput:
        """One global batch forward and backward, and one update. Collective.

        Args:
            step: the step's number, from 0: learning rate and dropout follow from it.
            stop: whether this rank was asked to stop; the output says whether any was.
        """
        ...

    def eval_loss(self, micro_batches: Iterable[Batch]) -> tuple[float, int]:
        """Loss sum and token count over all ranks, without gradients. Collective."""
        ...

    def logits(self, input_ids: Tensor) -> Tensor:
        """[batch, time] → [batch, time, vocab] in fp32, the same on every rank. Collective."""
        ...

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """This rank's parameters by Hugging Face name, sorted, tied ones once; each carries `.spec`."""
        ...


def build_engine(recipe: Recipe, plan: Plan, ranks: Ranks, values: Values | None = None) -> Engine:
    """The engine of a plan. Collective.

    Args:
        values: initial values of the parameters; None: random, by name.

    Raises:
        UserError: on every rank: the accelerator cannot compute in the plan's precision.
    """
    able = {"fp16": accelerator().is_fp16_supported, "bf16": accelerator().is_bf16_supported}.get(plan.precision.name)
    if able is not None and not able():
        device, instead = accelerator().device_name(), "bf16" if plan.precision.name == "fp16" else "neither, for fp32"
        raise UserError(f"{plan.precision}: the accelerator ({device}) cannot train in it; enable {instead}")
    if plan.layout.pipeline > 1:
        from .pipeline import PipeEngine

        return PipeEngine(recipe, plan, ranks, values)
    return ZeroEngine(recipe, plan, ranks, values)


class ZeroEngine:
    """DeepSpeed's engine on any ZeRO stage, offload included, without pipeline stages."""

    def __init__(self, recipe: Recipe, plan: Plan, ranks: Ranks, values: Values | None = None) -> None:
        import deepspeed

        from ..modeling.tensor_parallel import parallelise

        self.ranks, self._recipe, self._plan = ranks, recipe, plan
        config = runtime_config(plan.deepspeed, ranks)
        zero3 = config if plan.layout.zero_stage == 3 else None
        model = build_model(plan.model_config, values, recipe.seed, DTYPES[plan.precision.name], ranks, zero3)
        parallelise(model, ranks)
        if "activation_checkpointing" in config:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        self.module: nn.Module = CausalLM(model, plan.vocab_size, ranks).train()
        if ranks.sequence_size > 1:
            from ..modeling.sequence_parallel import SequenceParallel

            self.module = SequenceParallel(self.module, ranks).train()
        self.deepspeed: Any = deepspeed.initialize(
            model=self.module,
            model_parameters=parameter_groups(self.module, plan.settings.optimizer),  # type: ignore[arg-type]
            config=config,
            mpu=Mpu(ranks) if ranks.tensor_size > 1 else None,
        )[0]

    def train_step(self, stream: BatchStream, step: int, stop: bool = False) -> StepOutput:
        batch, totals = next_batch(stream, self.ranks, stop)
        self._set_learning_rate(step)
        losses = []
        for number, micro in enumerate(batch.micro_batches):
            self._seed(step, number)
            loss = self._forward(micro)
            # DeepSpeed averages gradients over the replicas; the loss is a mean over all tokens
            self.deepspeed.backward(loss * (self.ranks.replicas / totals.tokens), scale_wrt_gas=False)
            norm = self._unpartitioned_norm() if number + 1 == len(batch.micro_batches) else None
            lr = self.deepspeed.optimizer.param_groups[0]["lr"]
            self.deepspeed.step()
            losses.append(loss.detach())
        (loss_sum,) = self._replica_sum([float(torch.stack(losses).double().sum())])
        if norm is None:
            norm = self.deepspeed.get_global_grad_norm()
        return totals.output(loss_sum / totals.tokens, norm, lr)

    def eval_loss(self, micro_batches: Iterable[Batch]) -> tuple[float, int]:
        self.deepspeed.eval()
        loss_sum, tokens = 0.0, 0
        with torch.no_grad():
            for micro in micro_batches:
                loss_sum += float(self._forward(micro))
                tokens += micro.tokens
        self.deepspeed.train()
        (loss_sum,), (total,) = self._replica_sum([loss_sum]), self._data_sum([float(tokens)])
        return loss_sum, int(total)

    def logits(self, input_ids: Tensor) -> Tensor:
        self.deepspeed.eval()
        with torch.no_grad():
            logits = self.deepspeed(input_ids.to(self.ranks.device))
        self.deepspeed.train()
        return logits

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return sorted(((p.spec.name, p) for p in self.module.parameters()), key=lambda pair: pair[0])  # type: ignore[attr-defined]

    def _forward(self, micro: Batch) -> Tensor:
        micro = micro.to(self.ranks.device)
        return self.deepspeed(micro.input_ids, micro.labels, micro.position_ids)

    def _data_sum(self, values: list[float]) -> list[float]:
        """Sums over the data-parallel ranks: those of a tensor- or sequence-parallel group read the same samples."""
        return self._replica_sum(values if self.ranks.sequence == 0 else [0.0] * len(values))

    def _replica_sum(self, values: list[float]) -> list[float]:
        """Sums over ranks that saw different tokens: the ranks of a tensor-parallel group all computed the same."""
        counted = self.ranks.tensor == 0
        return self.ranks.all_sum([value if counted else 0.0 for value in values])

    def _set_learning_rate(self, step: int) -> None:
        """Unless the JSON has a scheduler of its own, which then steps by itself."""
        if self.deepspeed.lr_scheduler is not None:
            return
        rate = planned_rate(self._recipe, self._plan, step)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = rate

    def _seed(self, step: int, micro: int) -> None:
        """Dropout's randomness follows from where it is drawn, so that there is no generator state to save."""
        place = step, micro, self.ranks.data, *([self.ranks.sequence] if self.ranks.sequence else [])
        torch.manual_seed(key64(self._recipe.seed, "forward", *place) >> 1)

    def _unpartitioned_norm(self) -> Tensor | None:
        """Norm of the reduced gradients at stage 0 in fp32, where DeepSpeed does not keep it."""
        if self._plan.layout.zero_stage > 0 or self._plan.precision.name not in ("fp32", "bf16_autocast"):
            return None
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        if self.ranks.tensor_size == 1:
            return torch.nn.utils.get_total_norm([p.grad for p in parameters])  # type: ignore[misc]
        counted = [p.grad for p in parameters if getattr(p, "model_parallel", False) or self.ranks.tensor == 0]
        square = torch.nn.utils.get_total_norm(counted).square()  # type: ignore[arg-type]
        torch.distributed.all_reduce(square, group=self.ranks.tensor_group)
        return square.sqrt()


@dataclass(frozen=True)
class StepTotals:
    """What all ranks together bring to a step, known before it begins; fields as in `StepOutput`."""

    tokens: int
    samples: tuple[int, int]
    ledger: int
    stop: bool
    started: float  # time.perf_counter, before the data were asked for
    data_seconds: float

    def output(self, loss: float, grad_norm: Any, lr: float) -> StepOutput:
        """The step's report at its end."""
        return StepOutput(
            loss=loss,
            grad_norm=None if grad_norm is None else float(grad_norm),
            lr=lr,
            tokens=self.tokens,
            seconds=time.perf_counter() - self.started,
            data_seconds=self.data_seconds,
            samples=self.samples,
            ledger=self.ledger,
            stop=self.stop,
        )


def next_batch(stream: BatchStream, ranks: Ranks, stop: bool) -> tuple[StepBatch, StepTotals]:
    """This rank's part of the next global batch, and what all ranks bring to it: one reduction. Collective.

    Raises:
        UserError: on every rank, where one of them cannot read its data.
    """
    started, batch, problem = time.perf_counter(), None, None
    try:
        batch = stream.next_step()
    except UserError as error:
        problem = str(error)
    waited = time.perf_counter() - started
    # the other ranks of a tensor, sequence or pipeline group read the same samples
    counted = ranks.tensor == ranks.sequence == ranks.pipeline == 0
    mine = [float(batch.tokens), *split(batch.ledger)] if batch is not None and counted else [0.0, 0.0, 0.0]
    failed, stopped, tokens, low, high = ranks.all_sum([float(batch is None), float(stop), *mine])
    if failed:
        ranks.raise_together(problem)
    assert batch is not None
    samples = batch.first, batch.stop
    return batch, StepTotals(int(tokens), samples, join([low, high]), stopped > 0, started, waited)


def planned_rate(recipe: Recipe, plan: Plan, step: int) -> float:
    """Learning rate of step `step`, counted from 0."""
    schedule = recipe.schedule
    return learning_rate(
        step,
        schedule.type,
        peak=plan.deepspeed["optimizer"]["params"]["lr"],
        floor=schedule.min_lr,
        total=plan.total_steps,
        warmup=plan.warmup_steps,
        decay=plan.decay_steps,
    )


def runtime_config(resolved: dict, ranks: Ranks) -> dict:
    """The resolved JSON as DeepSpeed gets it.

    A CPU takes torch's Adam, which needs no compiler. Tensor and sequence parallelism are ours: DeepSpeed would apply
    AutoTP, or scale gradients by sequence groups of its own. To it, sequence ranks are data-parallel ones.
    """
    config = copy.deepcopy(resolved)
    config.setdefault("steps_per_print", 2**31)
    config.pop("tensor_parallel", None)
    if config.pop("sequence_parallel_size", 1) > 1:
        config["train_batch_size"] *= ranks.sequence_size
    if ranks.device.type == "cpu":
        if config["optimizer"]["type"].lower() in ("adam", "adamw"):
            config["optimizer"]["params"].setdefault("torch_adam", True)
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config
