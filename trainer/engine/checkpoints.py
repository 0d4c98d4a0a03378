"""The checkpoints of a run: when it saves, what it records beside the tensors, and how it comes back."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch

from ...data_prep.errors import UserError
from ..adapters.bases import Base, base_of, check_base
from ..checkpoint.folder import check_same_run, step_name
from ..checkpoint.loader import load
from ..checkpoint.reader import Checkpoint
from ..checkpoint.writer import CheckpointWriter, SnapshotWriter
from ..data.batches import BatchStream
from ..metrics.reading import skipped_samples
from ..metrics.record import RunLog
from ..ranks.ranks import same_on_all_ranks
from ..run.data import RunData
from ..run.guard import check_claim
from ..run.state import TrainState
from .base import Engine

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
        self._begun: dict[str, tuple[int, dict[str, int]]] = {}  # by a checkpoint's name: its step, what was drawn

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
        saved, source = load(self.engine.live, checkpoint), checkpoint.path
        state.step, state.samples_consumed = saved["step"], saved["samples_consumed"]
        state.tokens_consumed = saved["tokens_consumed"]
        state.skipped = [(first, stop) for first, stop in saved.get("skipped", [])]
        self.engine.bad_steps.remember(self._skipped_before(state))
        self.stream.samples_consumed = state.samples_consumed
        self.log.start("resume", state.step, f"resumed from {source} at step {state.step}", path=str(source))
        return state

    def _skipped_before(self, state: TrainState) -> list[tuple[int, int]]:
        """What the checkpoint holds, and what the run's record tells of steps beyond it. Collective."""
        found: list[tuple[int, int]] = []
        if self.ranks.is_main and self.engine.bad_steps.skips:
            found = skipped_samples(self.recipe.output)
        return [*state.skipped, *self.ranks.of_main(found)]

    def save_if_due(self, state: TrainState) -> None:
        """Saves where a checkpoint is due, and records those that were published meanwhile. Collective.

        Raises:
            UserError: on every rank, if one of them cannot write; older checkpoints are as they were.
        """
        if state.stopped or self.writer.due(state.step):
            self.save(state)
        self._record(self.writer.wait() if state.done else self.writer.poll())

    def save(self, state: TrainState) -> None:
        """Begins to save this state, if the run directory is still this run's. Collective; raises as `save_if_due`."""
        self.ranks.together(
            lambda: check_claim(self.recipe.output, self.log.run) if self.ranks.is_main else None, _CANNOT_SAVE
        )
        self._begun[step_name(state.step)] = state.step, self.stream.drawn()
        record = {
            "step": state.step,
            "samples_consumed": state.samples_consumed,
            "tokens_consumed": state.tokens_consumed,
            "precision": self.plan.precision.name,
            "stop_ids": self.stop_ids,
            "skipped": [list(samples) for samples in state.skipped],
            **self.identity,
            **({} if self.base is None else {"base": self.base.record()}),
        }
        self.writer.save(self.engine.live, record, self._probe())

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """What all ranks end for alike (a loss that is no number, say) costs no checkpoint that was begun before it."""
        if self._begun and isinstance(error, UserError) and same_on_all_ranks(str(error), occasion="checkpoints"):
            with contextlib.suppress(UserError):  # the first error is the one to tell
                self._record(self.writer.wait())

    def _record(self, published: Sequence[Path]) -> None:
        for path in published:
            step, drawn = self._begun.pop(path.name)
            self.log.event("save", step, path=str(path), drawn=drawn)

    def _probe(self) -> dict[str, torch.Tensor]:
        """What the live engine computes, which exports must match."""
        vocab = self.plan.vocab_size
        ids = (torch.arange(min(PROBE_TOKENS, self.plan.seq_len))[None] * 7919 + 1) % vocab  # many different tokens
        return {"ids": ids, "logits": self.engine.logits(ids).cpu().contiguous()}
