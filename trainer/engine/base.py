"""What the engines share: one optimizer step over a global batch, whatever the layout. The loop knows only this."""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from ...data_prep.errors import UserError
from ..adapters.base import install
from ..adapters.registry import adapter_of
from ..checkpoint.deepspeed_state import Live
from ..data.batches import Batch, BatchStream, StepBatch
from ..data.ledger import join, split
from ..data.order import key64
from ..families.specs import ParamSpec
from ..modeling.build import RandomValues, make_parameter
from ..objectives.base import LossSum, Objective
from ..objectives.registry import objective_of
from ..optim.groups import RATE, parameter_groups
from ..optim.schedule import learning_rate
from ..plan.plan import Plan
from ..ranks.mpu import Mpu
from ..ranks.ranks import Ranks
from ..run.state import StepOutput


@dataclass(frozen=True)
class EvalSums:
    """What all ranks together found on held-out batches: sums, and the weight to divide them by."""

    loss: float
    weight: float
    tokens: int  # that carry loss
    metrics: dict[str, float]


class Engine(ABC):
    """A model with its optimizer on one layout. All methods but `named_parameters` are collective.

    Attributes:
        module: what DeepSpeed trains.
        deepspeed: its engine.
    """

    module: nn.Module
    deepspeed: Any

    def __init__(self, plan: Plan, ranks: Ranks) -> None:
        self.plan, self.ranks = plan, ranks
        self.objective: Objective = objective_of(plan.recipe.objective)
        # how the head counts: what is added to a token's nats, whether all count alike, whether many carry no label
        self.counting = self.objective.penalty, self.objective.uniform, self.objective.reads != "text"
        self.adapter = adapter_of(plan.recipe.adapter)
        self.dtype: torch.dtype = getattr(torch, plan.precision.weights)

    @abstractmethod
    def _update(self, batch: StepBatch, step: int, weight: float) -> tuple[Tensor, Any]:
        """Forward, backward and update; this rank's sums (`_vector`) and the gradient's norm before clipping."""

    @abstractmethod
    def token_losses(self, micro: Batch) -> Tensor | None:
        """Nats of every label of a micro batch on the CPU [rows, time], without dropout or gradients; None on a
        pipeline stage that does not compute them.
        """

    @abstractmethod
    def logits(self, input_ids: Tensor) -> Tensor:
        """[batch, time] → [batch, time, vocab] in fp32, the same on every rank."""

    def train_step(self, stream: BatchStream, step: int, stop: bool = False) -> StepOutput:
        """One global batch forward and backward, and one update.

        Args:
            step: the step's number, from 0: learning rate and dropout follow from it.
            stop: whether this rank was asked to stop; the output says whether any was.

        Raises:
            UserError: on every rank: data that one of them cannot read, no sample that carries loss, or a loss or
                gradient that is no number, before such weights can be saved over good ones.
        """
        batch, totals = next_batch(stream, self.ranks, self.objective, stop)
        rate = self._set_learning_rate(step)
        sums, norm = self._update(batch, step, totals.weight)
        loss, *metrics = (value / totals.weight for value in self._over_ranks(sums))
        output = totals.output(loss, norm, rate, dict(zip(self.objective.metrics, metrics, strict=True)))
        self._refuse_what_is_no_number(output, step)
        # of finished updates, elsewhere than in AdamW, DeepSpeed's norm says nothing of the gradients
        return output if self.plan.settings.optimizer.elementwise else replace(output, grad_norm=None)

    def evaluate(self, micro_batches: Iterable[Batch]) -> EvalSums:
        """The objective's sums over all ranks' batches, without gradients."""
        sums, weight, tokens = self._vector(None), 0.0, 0
        for micro in micro_batches:
            losses = self.token_losses(micro)
            if losses is not None:
                sums += self._vector(self.objective.loss(micro.to(self.ranks.device), losses))
            weight, tokens = weight + self.objective.weight(micro), tokens + micro.tokens
        loss, *metrics = self._over_ranks(sums)
        mine = [weight, float(tokens)] if self.ranks.reads_samples else [0.0, 0.0]
        weight, all_tokens = self.ranks.all_sum(mine)
        return EvalSums(loss, weight, int(all_tokens), dict(zip(self.objective.metrics, metrics, strict=True)))

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """This rank's parameters by Hugging Face name, sorted, tied ones once; each carries `.spec`."""
        return sorted(((p.spec.name, p) for p in self.module.parameters()), key=lambda pair: pair[0])  # type: ignore[attr-defined]

    def _initialize(self, config: dict[str, Any], mpu: Mpu | None = None) -> Any:
        """DeepSpeed's engine for `module`, with the optimizer that the JSON names; `config` from `runtime_config`."""
        optimizer = self.plan.settings.optimizer
        groups = parameter_groups(self.module, optimizer, self.plan.recipe.optimizer.embedding_rate)
        if optimizer.build is None:
            arguments: dict[str, Any] = {"model_parameters": groups}
        else:
            arguments = {"optimizer": optimizer.build(groups, config.pop("optimizer")["params"])}
            config["zero_allow_untested_optimizer"] = True
        return deepspeed.initialize(model=self.module, config=config, mpu=mpu, **arguments)[0]

    def _convert(self, module: nn.Module) -> nn.Module:
        """What the adapter puts in the place of a module of its base."""
        compute = getattr(torch, self.plan.precision.products)
        return module if self.adapter is None else self.adapter.convert(module, compute)

    def _adapt(self, module: nn.Module) -> None:
        """Installs the recipe's adapter in a model or a block of one; its parameters begin as their specs say."""
        drawn = RandomValues(self.plan.recipe.seed)

        def make(spec: ParamSpec, values: Tensor | None = None) -> nn.Parameter:
            source = drawn if values is None else lambda _: values
            parameter = make_parameter(spec, source, self.dtype, self.ranks)
            parameter.requires_grad = spec.trained
            return parameter

        install(self.adapter, module, make)

    @property
    def live(self) -> Live:
        """What checkpoints read and write: with an adapter, that alone."""
        named, adapter = self.named_parameters(), self.adapter
        kept = named if adapter is None else [(name, p) for name, p in named if adapter.owns(name)]
        return Live(self.deepspeed, kept, self.ranks)

    def _vector(self, loss: LossSum | None) -> Tensor:
        """Loss sum and metric sums in float64, on the device: they are waited for once a step."""
        names = self.objective.metrics
        if loss is None:
            return torch.zeros(1 + len(names), dtype=torch.float64, device=self.ranks.device)
        return torch.stack([loss.sum.detach(), *(loss.metrics[name].detach() for name in names)]).double()

    def _over_ranks(self, sums: Tensor) -> list[float]:
        """Sums over the ranks that saw different samples: those of a tensor or sequence group computed the same."""
        return self.ranks.all_sum((sums * (self.ranks.tensor == self.ranks.sequence == 0)).tolist())

    def _set_learning_rate(self, step: int) -> float:
        """The rate of this step. Where the JSON has a scheduler of its own, that one has set it."""
        groups = self.deepspeed.optimizer.param_groups
        if self.deepspeed.lr_scheduler is not None:
            return groups[0]["lr"]
        rate = planned_rate(self.plan, step)
        for group in groups:
            group["lr"] = rate * group.get(RATE, 1.0)
        return rate

    def _seed(self, step: int, micro: int) -> None:
        """Dropout's randomness follows from where it is drawn, so that there is no generator state to save.

        Ranks of a sequence group and stages of a pipeline must not repeat each other's masks.
        """
        axis = self.ranks.sequence or self.ranks.pipeline  # at most one of the two is in use
        place = step, micro, self.ranks.data, *([axis] if axis else [])
        torch.manual_seed(key64(self.plan.recipe.seed, "forward", *place) >> 1)

    def _refuse_what_is_no_number(self, output: StepOutput, step: int) -> None:
        numbers = {"loss": output.loss}
        if self.plan.precision.name != "fp16" and output.grad_norm is not None:  # fp16 skips such steps
            numbers["gradient norm"] = output.grad_norm
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise UserError(
                    f"step {step + 1}: the {name} is {value} (samples {output.samples[0]} to {output.samples[1] - 1}, "
                    f"lr {output.lr:.3g}); lower optimizer.lr, warm up longer or use bf16 instead of fp16. Checkpoints "
                    f"in {self.plan.recipe.output} are from before"
                )


@dataclass(frozen=True)
class StepTotals:
    """What all ranks together bring to a step, known before it begins; fields as in `StepOutput`."""

    tokens: int
    weight: float  # of the global batch, by the objective
    samples: tuple[int, int]
    ledger: int
    stop: bool
    started: float  # time.perf_counter, before the data were asked for
    data_seconds: float

    def output(self, loss: float, grad_norm: Any, lr: float, metrics: dict[str, float]) -> StepOutput:
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
            metrics=metrics,
        )


def next_batch(stream: BatchStream, ranks: Ranks, objective: Objective, stop: bool) -> tuple[StepBatch, StepTotals]:
    """This rank's part of the next global batch, and what all ranks bring to it: one reduction. Collective.

    Raises:
        UserError: on every rank, where one of them cannot read its data, or no sample carries loss.
    """
    started, batch, problem = time.perf_counter(), None, None
    try:
        batch = stream.next_step()
    except UserError as error:
        problem = str(error)
    waited = time.perf_counter() - started
    mine = [0.0] * 4
    if batch is not None and ranks.reads_samples:
        weight = sum(objective.weight(micro) for micro in batch.micro_batches)
        mine = [weight, float(batch.tokens), *split(batch.ledger)]
    failed, stopped, weight, tokens, low, high = ranks.all_sum([float(batch is None), float(stop), *mine])
    if failed:
        ranks.raise_together(problem)
    assert batch is not None
    samples = batch.first, batch.stop
    if not weight > 0:
        raise UserError(
            f"samples {samples[0]} to {samples[1] - 1} hold nothing to train on: every label is masked; look at them "
            "with `zeropipe inspect`, or use a larger batch.global"
        )
    totals = StepTotals(int(tokens), weight, samples, join([low, high]), stopped > 0, started, waited)
    return batch, totals


def planned_rate(plan: Plan, step: int) -> float:
    """Learning rate of step `step`, counted from 0."""
    schedule = plan.recipe.schedule
    return learning_rate(
        step,
        schedule.type,
        peak=plan.deepspeed["optimizer"]["params"]["lr"],
        floor=schedule.min_lr,
        total=plan.total_steps,
        warmup=plan.warmup_steps,
        decay=plan.decay_steps,
    )


def runtime_config(plan: Plan, ranks: Ranks) -> dict[str, Any]:
    """The resolved JSON as DeepSpeed gets it.

    Tensor and sequence parallelism are ours: DeepSpeed would apply AutoTP, or scale gradients by sequence groups of its
    own. To it, sequence ranks are data-parallel ones.
    """
    config = copy.deepcopy(plan.deepspeed)
    config.setdefault("steps_per_print", 2**31)
    config.pop("tensor_parallel", None)
    if config.pop("sequence_parallel_size", 1) > 1:
        config["train_batch_size"] *= ranks.sequence_size
    optimizer = config["optimizer"]
    optimizer["params"] = plan.settings.optimizer.params_on(ranks.device.type, optimizer["params"])
    if ranks.device.type == "cpu":
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config
