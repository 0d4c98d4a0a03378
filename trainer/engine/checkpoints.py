"""The checkpoints of a run: when it saves, what it records beside the tensors, and how it comes back."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ...data_prep.errors import UserError
from ..adapters.bases import Base, base_of, check_base
from ..checkpoint.folder import CHECKPOINTS, check_same_run, step_name
from ..checkpoint.loader import load, resolve_resume
from ..checkpoint.reader import Checkpoint
from ..checkpoint.writer import CheckpointWriter, SnapshotWriter
from ..data.batches import BatchStream
from ..keeper.pulse import SAVING, SET_UP
from ..metrics.reading import REWIND, skipped_samples
from ..metrics.record import RunLog
from ..ranks.last_words import same_on_all_ranks
from ..run.data import RunData
from ..run.guard import check_claim
from ..run.state import StepOutput, TrainState
from .bad_steps import BadStep
from .base import Engine
from .capsule import CAPSULES, write_capsule

PROBE_TOKENS = 16
_CANNOT_SAVE = "cannot write the checkpoint (older ones are untouched)"


class Checkpoints:
    """Saves every `save.every` steps, after the last, and when asked to stop."""

    def __init__(self, engine: Engine, data: RunData, stream: BatchStream, log: RunLog) -> None:
        self.engine, self.stream, self.log = engine, stream, log
        self.plan, self.recipe, self.ranks = engine.plan, engine.plan.recipe, engine.ranks
        self.identity = data.identity()
        self.stop_ids = sorted({token for samples in data.train for token in samples.part.store.stop_ids})
        self.base = None if engine.adapter is None else base_of(self.recipe.model.init, self.recipe.seed, self.ranks)
        save = self.recipe.save
        self.writer: CheckpointWriter = SnapshotWriter(
            self.recipe.output, save.every, save.keep, self.plan.total_steps, save.milestone, save.background
        )
        self._begun: dict[str, tuple[int, dict[str, int], float]] = {}  # by name: step, what was drawn, since when
        self._newest: Path | None = None  # of this run: what it was resumed from, or has published since
        engine.bad_steps.witness = self._keep_capsule

    def resume_or_start(self, checkpoint: Checkpoint | None) -> TrainState:
        """Loads the checkpoint to resume from, or starts at step 0. Collective.

        Raises:
            UserError: on every rank: it is one of another run.
        """
        state = TrainState(self.plan.total_steps)
        if checkpoint is None:
            self.log.start("start", 0)
            return state
        check_same_run(checkpoint.state, **self.identity)
        if self.base is not None:
            check_base(Base(**checkpoint.state["base"]), self.base, "resume: ")
        self._load(checkpoint, state)
        self.engine.bad_steps.remember(self._skipped_before(state))
        source = checkpoint.path
        self.log.start("resume", state.step, f"resumed from {source} at step {state.step}", path=str(source))
        return state

    def rewind(self, bad: StepOutput) -> TrainState:
        """Goes back to the newest checkpoint; the samples of a bad step are left out from then on. Collective.

        Raises:
            UserError: on every rank: there is no whole one, or the run went back to this one too often.
        """
        with contextlib.suppress(UserError):  # one that cannot be written is none to go back to
            self._record(self._wait())
        if self._newest is None:
            raise UserError(
                f"samples {bad.samples[0]} to {bad.samples[1] - 1}: a bad step (loss {bad.loss}) before the first "
                "checkpoint: there is none to rewind to; lower optimizer.lr, warm up longer or save sooner"
            )
        checkpoint = resolve_resume(self.recipe.output, str(self._newest), self.ranks)
        assert checkpoint is not None
        self._check_claim()
        state = TrainState(self.plan.total_steps, save_asked=bad.save)
        with self.engine.pulse.during(SET_UP):
            self._load(checkpoint, state)
        left_out = self.engine.bad_steps.goes_back(bad, state.step)
        said = (
            f"back to step {state.step}: loss {bad.loss}; samples {left_out[0]} to {left_out[1] - 1} will be left out"
        )
        facts = {"samples": list(left_out), "loss": bad.loss, "grad_norm": bad.grad_norm}
        self.log.start(REWIND, state.step, said, path=str(checkpoint.path), **facts)
        return state

    def _load(self, checkpoint: Checkpoint, state: TrainState) -> None:
        """Puts a checkpoint into the engine, and where it is into `state` and the stream. Collective."""
        saved = load(self.engine.live, checkpoint)
        state.step, state.samples_consumed = saved["step"], saved["samples_consumed"]
        state.tokens_consumed = saved["tokens_consumed"]
        state.skipped = [(first, stop) for first, stop in saved.get("skipped", [])]
        self.engine.bad_steps.restore(saved)
        self.stream.samples_consumed = state.samples_consumed
        self._newest = checkpoint.path

    def _keep_capsule(self, bad: BadStep) -> str:
        """Keeps what `zeropipe replay` needs of a bad step; says where."""
        folder = self.recipe.output / CAPSULES / step_name(bad.step)
        if self.ranks.is_main:
            try:
                begun = [self.recipe.output / CHECKPOINTS / name for name in self._begun]  # whole by the run's end
                write_capsule(folder, bad, self.plan, self.stream, begun[-1] if begun else self._newest)
            except (OSError, UserError) as error:  # the bad step is what the run ends or goes on by, not this
                print(f"warning: {folder} cannot be written: {error}", file=sys.stderr, flush=True)
        return f"; zeropipe replay {shlex.quote(str(folder))} looks for what came first"

    def _skipped_before(self, state: TrainState) -> list[tuple[int, int]]:
        """What the checkpoint holds, and what the run's record tells of steps beyond it. Collective."""
        found: list[tuple[int, int]] = []
        if self.ranks.is_main and self.engine.bad_steps.leaves_out:
            found = skipped_samples(self.recipe.output)
        return [*state.skipped, *self.ranks.of_main(found)]

    def save_if_due(self, state: TrainState) -> None:
        """Saves where a checkpoint is due, and records those that were published meanwhile. Collective.

        Raises:
            UserError: on every rank, if one of them cannot write; older checkpoints are as they were.
        """
        if state.stopped or state.save_asked or self.writer.due(state.step):
            self.save(state)
            state.save_asked = False
        self._record(self._wait() if state.done else self.writer.poll())

    def _wait(self) -> list[Path]:
        with self.engine.pulse.during(SAVING, learn=False):
            return self.writer.wait()

    def save(self, state: TrainState) -> None:
        """Begins to save this state, if the run directory is still this run's. Collective; raises as `save_if_due`."""
        with self.engine.pulse.during(SAVING, learn=False):  # it takes until it is published
            self._save(state)

    def _save(self, state: TrainState) -> None:
        self._check_claim()
        self._begun[step_name(state.step)] = state.step, self.stream.drawn(), time.monotonic()
        record = {
            "step": state.step,
            "samples_consumed": state.samples_consumed,
            "tokens_consumed": state.tokens_consumed,
            "precision": self.plan.precision.name,
            "stop_ids": self.stop_ids,
            "skipped": [list(samples) for samples in state.skipped],
            **self.engine.bad_steps.record(),
            **self.identity,
            **({} if self.base is None else {"base": self.base.record()}),
        }
        self.writer.save(self.engine.live, record, self._probe())

    def _check_claim(self) -> None:
        self.ranks.together(
            lambda: check_claim(self.recipe.output, self.log.run) if self.ranks.is_main else None, _CANNOT_SAVE
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """What all ranks end for alike (a loss that is no number, say) costs no checkpoint that was begun before it."""
        if self._begun and isinstance(error, UserError) and same_on_all_ranks(str(error), occasion="checkpoints"):
            with contextlib.suppress(UserError):  # the first error is the one to tell
                self._record(self._wait())

    def _record(self, published: Sequence[Path]) -> None:
        for path in published:
            self._newest, (step, drawn, begun) = path, self._begun.pop(path.name)
            self.engine.pulse.learn(SAVING, time.monotonic() - begun)
            self.log.event("save", step, path=str(path), drawn=drawn)

    def _probe(self) -> dict[str, torch.Tensor]:
        """What the live engine computes, which exports must match."""
        vocab = self.plan.vocab_size
        ids = (torch.arange(min(PROBE_TOKENS, self.plan.seq_len))[None] * 7919 + 1) % vocab  # many different tokens
        return {"ids": ids, "logits": self.engine.logits(ids).cpu().contiguous()}
