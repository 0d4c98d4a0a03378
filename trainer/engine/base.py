"""What the engines share: one optimizer step over a global batch, whatever the layout. The loop knows only this."""

from __future__ import annotations

import copy
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from ..adapters.base import install
from ..adapters.registry import adapter_of
from ..anatomy.buffers import kept_buffers
from ..checkpoint.deepspeed_state import Live
from ..data.batches import Batch, BatchStream, StepBatch
from ..data.order import key64
from ..families.registry import family_of
from ..families.specs import ParamSpec
from ..keeper.pulse import Pulse
from ..modeling.build import make_parameter
from ..modeling.mixtures.routers import Routers, told
from ..modeling.tiles import tile_mlps
from ..modeling.values import RandomValues
from ..objectives.base import LossSum, Objective
from ..objectives.registry import objective_of
from ..optim.groups import RATE, parameter_groups
from ..optim.schedule import learning_rate
from ..plan.plan import Plan
from ..ranks.mpu import Mpu
from ..ranks.ranks import Ranks
from ..run.state import EvalSums, StepOutput
from .bad_steps import BadSteps
from .coming import Agreed, Coming
from .pace import Pace


class Engine(ABC):
    """A model with its optimizer on one layout. All methods but `named_parameters` are collective.

    Attributes:
        module: what DeepSpeed trains.
        deepspeed: its engine.
        pulse: where this rank is, for who looks after it.
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
        self.routers: Routers | None = None  # of a mixture of experts, where its layout listens to them
        self._agreed: Agreed | None = None  # the next step's batch
        self.bad_steps, self.pace, self.pulse = BadSteps(plan), Pace(plan, ranks), Pulse.of_this_rank()

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

    def train_step(self, stream: BatchStream, step: int, stop: bool = False, save: bool = False) -> StepOutput:
        """One global batch forward and backward, and one update.

        Args:
            step: the step's number, from 0: learning rate and dropout follow from it.
            stop, save: whether this rank was asked to stop, or to save; the output says whether any was.

        Raises:
            UserError: on every rank: data that one of them cannot read, no sample that carries loss, or a loss or
                gradient that is no number, before such weights can be saved over good ones.
        """
        started, agreed = time.perf_counter(), self._agreed
        self.pace.begin(step)
        if agreed is None or agreed.coming.first != stream.samples_consumed:  # the first step of this process
            coming = Coming.of(stream, self.ranks, self.objective, len(self.plan.sources))
            agreed = Agreed(coming, self.ranks.all_sum(coming.numbers))
        waited = time.perf_counter() - started
        batch, totals = agreed.take(stream, self.ranks)
        rate, known = self._set_learning_rate(step), batch.first in self.bad_steps.known
        sums, norm = self._without_update() if known else self._update(batch, step, totals.weight)
        applied = not known and self._applied()
        heard = () if self.routers is None else self.routers.take()
        sums, coming, more = self._own(sums), None, 0.0
        if step + 1 < self.plan.total_steps:
            before = time.perf_counter()
            coming = Coming.of(stream, self.ranks, self.objective, len(self.plan.sources))
            more = time.perf_counter() - before
        numbers = () if coming is None else coming.numbers
        found = self.ranks.all_sum(sums, heard, [stop, save, *numbers])
        (loss, *more_sums), routed, (stopped, saving, *rest) = stretches(found, len(sums), len(heard))
        metrics, of_sources = stretches(more_sums, len(self.objective.metrics))
        self._agreed = None if coming is None else Agreed(coming, rest)
        loss += 0.0 if self.routers is None else self.routers.cost(routed)
        loss, norm = loss / totals.weight, None if norm is None else float(norm)
        output = StepOutput(
            loss=loss,
            # of finished updates, elsewhere than in AdamW, DeepSpeed's norm says nothing of the gradients
            grad_norm=norm if self.plan.settings.optimizer.elementwise else None,
            lr=rate,
            tokens=totals.tokens,
            seconds=time.perf_counter() - started,
            data_seconds=waited + more,
            samples=(batch.first, batch.stop),
            ledger=totals.ledger,
            stop=stopped > 0,
            save=saving > 0,
            applied=applied,
            bad=known or self.bad_steps.left_out(loss, norm, applied),
            loss_scale=float(self.deepspeed.optimizer.loss_scale) if self.plan.precision.name == "fp16" else None,
            metrics={name: m / totals.weight for name, m in zip(self.objective.metrics, metrics, strict=True)},
            sources=totals.by_source(self.plan.sources, of_sources),
            routed={} if self.routers is None or known else self._routed(routed, totals.tokens, applied),
            fared=self.pace.told(step, waited + more),
        )
        return replace(output, rewind=True) if self.bad_steps.judge(output, step) else output

    def _routed(self, sums: list[float], tokens: int, applied: bool) -> dict[str, Any]:
        """What the step says of the routers, whose biases follow from it."""
        assert self.routers is not None
        routing, weights = self.routers.routing, self.routers.weights
        if applied and weights.bias_update:
            self.routers.shift(torch.tensor(sums[2:]).view(-1, routing.experts))
        return told(sums, routing, tokens)

    def evaluate(self, micro_batches: Iterable[Batch]) -> EvalSums:
        """The objective's sums over all ranks' batches, without gradients."""
        sums, weight, tokens = self._vector(None), 0.0, 0
        names = self.objective.metrics
        for micro in micro_batches:
            losses = self.token_losses(micro)
            self.pulse.beat()
            if losses is not None:
                sums += self._vector(self.objective.loss(micro.to(self.ranks.device), losses))
            weight, tokens = weight + self.objective.weight(micro), tokens + micro.tokens
        mine = [weight, float(tokens)] if self.ranks.reads_samples else [0.0, 0.0]
        found = self.ranks.all_sum(self._own(sums), mine)
        (loss, *metrics), _, (weight, all_tokens) = stretches(found, 1 + len(names), len(self.plan.sources))
        return EvalSums(loss, weight, int(all_tokens), dict(zip(names, metrics, strict=True)))

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """This rank's parameters by Hugging Face name, sorted, tied ones once; each carries `.spec`."""
        return sorted(((p.spec.name, p) for p in self.module.parameters()), key=lambda pair: pair[0])  # type: ignore[attr-defined]

    def _initialize(self, config: dict[str, Any], mpu: Mpu | None = None) -> Any:
        """DeepSpeed's engine for `module`, with the optimizer that the JSON names; `config` from `runtime_config`."""
        optimizer = self.plan.settings.optimizer
        self.pace.watch(self.module)
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

    def _packs(self, spec: ParamSpec) -> bool:
        """Whether that needs all of a parameter's values."""
        return self.adapter is not None and self.adapter.packs(spec)

    def _furnish(self, module: nn.Module) -> None:
        """Puts into a model, or a block of one, what the recipe adds to it: tiles in its MLPs, and its adapter, whose
        parameters begin as their specs say."""
        if self.plan.recipe.mlp_tile:
            tile_mlps(module, family_of(self.plan.model_config), self.plan.recipe.mlp_tile)
        drawn = RandomValues(self.plan.recipe.seed)

        def make(spec: ParamSpec, values: Tensor | None = None) -> nn.Parameter:
            source = drawn if values is None else lambda _: values
            parameter = make_parameter(spec, source, self.dtype, self.ranks, everywhere=True)
            parameter.requires_grad, parameter.injected = spec.trained, True  # type: ignore[attr-defined]
            return parameter

        install(self.adapter, module, make)

    @property
    def live(self) -> Live:
        """What checkpoints read and write: with an adapter, that alone."""
        named, adapter = self.named_parameters(), self.adapter
        if adapter is None:
            return Live(self.deepspeed, named, self.ranks, list(kept_buffers(self.module)))
        return Live(self.deepspeed, [(name, p) for name, p in named if adapter.owns(name)], self.ranks)

    def _loss(self, batch: Batch, token_losses: Tensor) -> LossSum:
        """The objective's, of a micro batch in training; with what each source of a mixture adds."""
        loss = self.objective.loss(batch, token_losses)
        if not self.plan.sources:
            return loss
        return replace(loss, sources=batch.by_source(token_losses.detach(), len(self.plan.sources)))

    def _vector(self, loss: LossSum | None) -> Tensor:
        """Sums of loss, metrics and sources in float64, on the device: they are waited for once a step."""
        names = self.objective.metrics
        sums = torch.zeros(1 + len(names) + len(self.plan.sources), dtype=torch.float64, device=self.ranks.device)
        if loss is not None:
            own = torch.stack([loss.sum.detach(), *(loss.metrics[name].detach() for name in names)]).double()
            sums[: len(own)] = own
            if loss.sources is not None:
                sums[len(own) :] = loss.sources
        return sums

    def _own(self, sums: Tensor) -> Tensor:
        """What this rank adds to the sums over all ranks: those of a tensor or sequence group computed the same."""
        return sums * (self.ranks.tensor == self.ranks.sequence == 0)

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

    def _applied(self) -> bool:
        """Whether the step that has just been taken changed the weights; DeepSpeed knows without asking the device."""
        return self.deepspeed.was_step_applied()

    def _without_update(self) -> tuple[Tensor, None]:
        """A step that was bad the first time, counted as DeepSpeed counted it then."""
        engine = self.deepspeed
        engine.global_steps, engine.skipped_steps = engine.global_steps + 1, engine.skipped_steps + 1
        engine.global_samples += engine.train_batch_size()
        return self._vector(None).fill_(float("nan")), None


def stretches(values: list[float], *lengths: int) -> list[list[float]]:
    """Stretches of such lengths, and what is left."""
    ends = [*itertools.accumulate(lengths, initial=0), len(values)]
    return [values[first:last] for first, last in itertools.pairwise(ends)]


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

    Tensor, sequence and expert parallelism are ours: DeepSpeed would apply AutoTP, scale gradients by sequence groups
    of its own, or put layers of its own in the place of a mixture's. To it, sequence ranks are data-parallel ones.
    """
    config = copy.deepcopy(plan.deepspeed)
    config.setdefault("steps_per_print", 2**31)
    # else DeepSpeed waits for the device twice in every micro batch
    config.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
    config.pop("tensor_parallel", None)
    config.pop("expert_parallel", None)
    if config.pop("sequence_parallel_size", 1) > 1:
        config["train_batch_size"] *= ranks.sequence_size
    optimizer = config["optimizer"]
    optimizer["params"] = plan.settings.optimizer.params_on(ranks.device.type, optimizer["params"])
    if ranks.device.type == "cpu":
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config
