"""A bad step taken again in one process, watching what every module computes."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...data_prep.errors import UserError
from ..adapters.merged import initial_values
from ..checkpoint.folder import CHECKPOINTS
from ..checkpoint.loader import load, resolve_resume
from ..data.batches import Batch, BatchStream, StepBatch
from ..data.order import key64
from ..modeling.values import Values
from ..plan.deepspeed_json import load_pair
from ..plan.plan import Plan, make_plan
from ..ranks.ranks import Ranks
from ..recipe.bad_step import OnBadStep
from ..run.data import RunData
from .capsule import Capsule
from .reference import FILE, with_reference
from .zero import ZeroEngine

_OF_LAYOUTS = ("tensor_parallel", "sequence_parallel_size", "gradient_accumulation_steps", "pipeline")


class ReplayEngine(ZeroEngine):
    """Takes the micro batches of all data-parallel ranks one after the other, with the dropout that each had."""

    def __init__(self, plan: Plan, ranks: Ranks, values: Values | None, data_parallel: int) -> None:
        super().__init__(plan, ranks, values)
        self._data_parallel = data_parallel

    def _seed(self, step: int, micro: int) -> None:
        torch.manual_seed(key64(self.plan.recipe.seed, "forward", step, *divmod(micro, self._data_parallel)) >> 1)

    def take(self, micro_batches: Sequence[Batch], step: int, first: int, stop: int) -> tuple[float, float | None]:
        """Loss and gradient norm of a step of these, `step` from 0."""
        weight = sum(map(self.objective.weight, micro_batches))
        self._set_learning_rate(step)
        sums, norm = self._update(StepBatch(tuple(micro_batches), first, stop, 0), step, weight)
        return float(sums[0]) / weight, None if norm is None else float(norm)


def open_replay(capsule: Capsule, run: Path, ranks: Ranks, output: Path) -> tuple[ReplayEngine, BatchStream, int]:
    """The engine and the data as they were after the checkpoint that was the newest before the bad step.

    Args:
        run: the run directory that the capsule is of; nothing is written there.
        output: an empty folder.

    Returns:
        The engine, the stream, and how many steps have been taken.

    Raises:
        UserError: the run's files or the checkpoint are gone, or do not go into one process.
    """
    plan = _plan(run, output)
    if (plan.micro_batch, plan.recipe.seed) != (capsule.micro_batch, capsule.seed):
        raise UserError(f"{run}: its recipe or JSON has changed since the bad step: another micro batch or seed")
    engine = ReplayEngine(plan, ranks, initial_values(plan.recipe.model.init, ranks), capsule.data_parallel)
    if (run / FILE).exists():  # of preferences: what the model gave before training
        shutil.copy(run / FILE, output / FILE)
    stream = with_reference(RunData.open(plan), engine).stream(ranks)
    if capsule.checkpoint is None:
        return engine, stream, 0
    path = run / CHECKPOINTS / Path(capsule.checkpoint).name
    checkpoint = resolve_resume(output, str(path if path.is_dir() else capsule.checkpoint), ranks)
    assert checkpoint is not None
    state = load(engine.live, checkpoint)
    engine.bad_steps.remember(state.get("skipped", ()))
    stream.samples_consumed = state["samples_consumed"]
    return engine, stream, state["step"]


def _plan(run: Path, output: Path) -> Plan:
    """The run on one rank: the micro batches are the same, there are more of them."""
    recipe, ds = load_pair(str(run / "recipe.yaml"), str(run / "deepspeed.json"), [])
    ds = {key: value for key, value in ds.items() if key not in _OF_LAYOUTS}
    zero = {key: value for key, value in ds.get("zero_optimization", {}).items() if key != "zero_hpz_partition_size"}
    if recipe.parallel.pipeline > 1:  # whose engine runs stage 0 as stage 1
        zero["stage"] = max(1, zero.get("stage", 0))
    changes: dict[str, Any] = {
        "output": output,
        "parallel": recipe.parallel.model_copy(update={"pipeline": 1}),
        "on_bad_step": OnBadStep(type="skip"),
        "check_replicas": 0,
    }
    return make_plan(recipe.model_copy(update=changes), {**ds, "zero_optimization": zero}, 1)


class Finder:
    """Watches what every module of a model gives and gets, forward and backward, for the first that is no number.

    Attributes:
        found: in words, the module first; None as long as all is finite.
        micro, rows: the micro batch and its rows in which it was.
    """

    def __init__(self, module: nn.Module) -> None:
        self.found: str | None = None
        self.micro, self.rows = -1, list[int]()
        self._weights: dict[str, list[str]] = {}  # by module: those of its own that are no numbers
        module.register_forward_pre_hook(self._next_micro)
        for name, own in module.named_modules():
            called = name.removeprefix("model.") or "the whole model"
            own.register_forward_pre_hook(self._entering(called))
            own.register_forward_hook(self._leaving(called))
        for _, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._of_parameter(parameter))

    def _next_micro(self, *_: object) -> None:
        self.micro += self.found is None

    def _entering(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            # now, for ZeRO-3 has taken them away again when the module is left
            wrong = [key for key, p in module.named_parameters(recurse=False) if not bool(p.isfinite().all())]
            if wrong:
                self._weights[name] = wrong
            self._note(inputs[0] if inputs else None, name, "what enters it, computed by the module around it")

        return look

    def _leaving(self, name: str) -> Callable[..., None]:
        def look(_module: nn.Module, _inputs: object, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) and output else output
            weights = " and ".join(self._weights.get(name, ()))
            why = f"; its own {weights} is no number" if weights else "; what enters it is finite"
            self._note(tensor, name, "its output", why)
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda grad: self._note(grad, name, "the gradient that comes back to its output"))

        return look

    def _of_parameter(self, parameter: nn.Parameter) -> Callable[[Tensor], None]:
        name, _, own = parameter.spec.name.rpartition(".")  # type: ignore[attr-defined]
        return lambda grad: self._note(grad, name, f"the gradient of its {own}")

    def _note(self, tensor: Any, name: str, what: str, why: str = "") -> None:
        if self.found is not None or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return
        wrong = ~tensor.detach().isfinite()
        if not bool(wrong.any()):
            return
        kind = "nan" if bool(tensor.detach().isnan().any()) else "infinite"
        self.found = f"{name}: {what} is {kind} in {int(wrong.sum()):,} of {wrong.numel():,} places{why}"
        if wrong.ndim > 2:
            self.rows = wrong.flatten(1).any(1).nonzero().flatten().tolist()


def replay(
    capsule: Capsule, micro_batches: Sequence[Batch], run: Path, ranks: Ranks, say: Callable[[str], None]
) -> str:
    """Takes the steps from the checkpoint to the bad one, and that one watched; what was found, in lines.

    Raises:
        UserError: as `open_replay`.
    """
    with tempfile.TemporaryDirectory() as output, contextlib.ExitStack() as stack:
        engine, stream, step = open_replay(capsule, run, ranks, Path(output))
        stack.enter_context(stream)
        say(f"from step {step}, {capsule.checkpoint or 'the initial values'}")
        for number in range(step, capsule.step - 1):
            say(f"step {number + 1}: loss {engine.train_step(stream, number).loss:.4f}")
        finder = Finder(engine.module)
        loss, norm = engine.take(micro_batches, capsule.step - 1, *capsule.samples)
    lines = [f"step {capsule.step}: loss {loss}, gradient norm {norm}; in the run {capsule.loss}, {capsule.grad_norm}"]
    if finder.found is None:
        return "\n".join([*lines, f"all is finite here; in the run {capsule.wrong}: look at its ranks and hosts"])
    micro, data = divmod(finder.micro, capsule.data_parallel)
    lines += [f"first: {finder.found}", f"in micro batch {micro} of data-parallel rank {data}"]
    for row in finder.rows:
        store, sample = capsule.sample_ids[finder.micro * capsule.micro_batch + row]
        lines.append(f"  row {row}: sample {sample} of {store}")
    return "\n".join(lines)
