"""The training loop: reads as a table of contents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data_prep.errors import UserError
from .checkpoint.saving import Checkpoint, check_same_run, load, resolve_resume, save
from .data.batches import Batch, BatchShape, BatchStream, Windows, evaluation_batches, open_windows, sample_order
from .engine.zero import Engine, StepOutput, build_engine
from .evaluation.evaluate import evaluate, token_bytes
from .metrics.record import RunLog
from .modeling.build import FolderValues, Values
from .plan.plan import Plan
from .ranks.ranks import Ranks
from .recipe.recipe import Recipe
from .run.directory import is_hf_folder
from .run.environment import describe_host
from .run.guard import exclusive, record_configuration, stop_signals
from .run.identity import run_identity

PROBE_TOKENS = 16


@dataclass
class TrainState:
    """Where a run is: everything that changes from step to step, beside weights and moments."""

    step: int = 0
    samples_consumed: int = 0
    tokens_consumed: int = 0
    stopped: bool = False

    def advance(self, output: StepOutput) -> None:
        self.step += 1
        self.samples_consumed = output.samples[1]
        self.tokens_consumed += output.tokens
        self.stopped = output.stop


def train(recipe: Recipe, plan: Plan, ranks: Ranks) -> TrainState:
    """Trains to the plan's last step, or until a signal asks to stop; resumes where `recipe.resume` says. Collective.

    Raises:
        UserError: on every rank: the run directory is in use or cannot be written, or the checkpoint does not fit the
            recipe.
    """
    with exclusive(recipe.output, ranks), stop_signals() as signals:
        windows, held_out = open_windows(recipe, "train"), open_windows(recipe, "valid")
        engine = build_engine(recipe, plan, ranks, ranks.together(lambda: initial_values(recipe)))
        stream = BatchStream(windows, sample_order(recipe, windows), batch_shape(recipe, plan), ranks)
        with RunLog(recipe.output, plan, recipe, ranks.is_main, ranks.gather_objects(describe_host())) as log:
            state = resume_or_start(engine, stream, recipe, plan, log)
            record_configuration(recipe, plan, ranks)
            lengths = ranks.together(lambda: token_bytes(recipe.tokenizer, held_out, plan.vocab_size))
            while state.step < plan.total_steps and not state.stopped:
                output = engine.train_step(stream, state.step, stop=signals.asked)
                state.advance(output)
                check_finite(output, state, plan)
                signals.attempt(log.step, state, output, data_seconds=output.data_seconds)
                if eval_due(recipe, plan, state, held_out):
                    # read before any rank begins: one that cannot must not leave the others waiting
                    batches = ranks.together(lambda: validation_batches(recipe, plan, ranks, held_out))
                    signals.attempt(log.eval, state, evaluate(engine, batches, lengths))
                if save_due(recipe, plan, state):
                    path = save_run(engine, state, recipe, plan)
                    signals.attempt(log.event, "save", state.step, path=str(path), drawn=stream.drawn())
            stream.close()
            ranks.raise_together(signals.problem)
    return state


def check_finite(output: StepOutput, state: TrainState, plan: Plan) -> None:
    """Stops a run whose loss or gradient is no number, before such weights can be saved over good ones.

    Raises:
        UserError: on every rank; checkpoints are as they were.
    """
    numbers = {"loss": output.loss}
    if (
        plan.precision.name != "fp16" and output.grad_norm is not None
    ):  # fp16 skips such steps and lowers its loss scale
        numbers["gradient norm"] = output.grad_norm
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise UserError(
                f"step {state.step}: the {name} is {value} (samples {output.samples[0]} to {output.samples[1] - 1}, lr "
                f"{output.lr:.3g}); lower optimizer.lr, warm up longer or use bf16 instead of fp16. Checkpoints in "
                f"{plan.recipe.output} are from before"
            )


def eval_due(recipe: Recipe, plan: Plan, state: TrainState, held_out: Sequence[Windows]) -> bool:
    """Every `eval.every` steps and after the last, where there is something to evaluate on."""
    every = recipe.eval.every
    if not every or state.stopped or not any(map(len, held_out)):
        return False
    return state.step % every == 0 or state.step == plan.total_steps


def save_due(recipe: Recipe, plan: Plan, state: TrainState) -> bool:
    """Every `save.every` steps, after the last, and when asked to stop."""
    every = recipe.save.every
    return state.stopped or state.step == plan.total_steps or bool(every and state.step % every == 0)


def batch_shape(recipe: Recipe, plan: Plan) -> BatchShape:
    cut = plan.micro_batch, plan.accumulation, plan.global_batch
    return BatchShape(*cut, plan.seq_len, plan.vocab_size, recipe.data.document_mask)


def validation_batches(recipe: Recipe, plan: Plan, ranks: Ranks, held_out: Sequence[Windows]) -> list[Batch]:
    """This rank's micro batches of one evaluation during training."""
    return list(evaluation_batches(held_out, batch_shape(recipe, plan), ranks, recipe.eval.batches))


def initial_values(recipe: Recipe) -> Values | None:
    """Where the weights of step 0 come from: None (random), a Hugging Face folder, or a run's newest checkpoint."""
    if recipe.model.init == "random":
        return None
    folder = Path(recipe.model.init)
    if is_hf_folder(folder):
        return FolderValues(folder)
    checkpoint = Checkpoint.open(folder)
    return lambda spec: checkpoint.read(spec.name)


def resume_or_start(engine: Engine, stream: BatchStream, recipe: Recipe, plan: Plan, log: RunLog) -> TrainState:
    """Loads the checkpoint that `recipe.resume` names, or starts at step 0. Collective."""
    source = resolve_resume(recipe.output, recipe.resume, engine.ranks)
    if source is None:
        engine.ranks.together(lambda: log.event("start", 0))
        return TrainState()
    saved = Checkpoint.open(source, verify=False).state  # `resolve_resume` has verified it
    check_same_run(saved, **run_identity(recipe, plan))
    load(engine.deepspeed, engine.named_parameters(), engine.ranks, source, verify=False)
    state = TrainState(saved["step"], saved["samples_consumed"], saved["tokens_consumed"])
    stream.samples_consumed = state.samples_consumed
    said = f"resumed from {source} at step {state.step}"
    engine.ranks.together(lambda: log.event("resume", state.step, message=said, path=str(source)))
    return state


def save_run(engine: Engine, state: TrainState, recipe: Recipe, plan: Plan) -> Path:
    """Publishes a checkpoint, with a probe: what the live engine computes, which exports must match. Collective."""
    record = {
        "step": state.step,
        "samples_consumed": state.samples_consumed,
        "tokens_consumed": state.tokens_consumed,
        "precision": plan.precision.name,
        **run_identity(recipe, plan),
    }
    vocab = plan.vocab_size
    ids = (torch.arange(min(PROBE_TOKENS, plan.seq_len))[None] * 7919 + 1) % vocab  # a prime's multiples: many tokens
    probe = {"ids": ids, "logits": engine.logits(ids).cpu().contiguous()}
    parameters = engine.named_parameters()
    return save(engine.deepspeed, parameters, engine.ranks, recipe.output, record, recipe.save.keep, probe)
