"""Writing checkpoints that know no layout: every rank writes what it holds, and no tensor moves between ranks.

For every Hugging Face parameter a checkpoint holds the fp32 master weight and the optimizer's moments, in boxes
(`boxes.py`) that whoever held them wrote. Training goes on meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
from torch import Tensor

from ...data_prep.errors import UserError, os_problem
from ..ranks.ranks import Ranks
from .boxes import Piece
from .deepspeed_scalars import read_scalars
from .deepspeed_state import Live
from .files import PROBE, STATE, Digest, read_back, write_bytes, write_rank
from .folder import CHECKPOINTS, begin, clear_leftovers, partial_path, prune, publish, surplus
from .index import INDEX, BoxIndex, rows_of_rank
from .safetensors_writer import FileTensor
from .snapshot import HeldRange, Share, Snapshot, live_tensors, shares

_ATTEMPTS = 3  # saves that may fail in a row before the run ends
_PATIENCE = 1.0  # seconds that training may wait for the disk without a word
_DOING = "cannot write the checkpoint (older ones are untouched)"


class CheckpointWriter(Protocol):
    """Puts a run's checkpoints on the disk. All methods but `due` are collective: every rank calls them in one order.

    An implementation decides when a checkpoint is due, how many stay, and whether training waits for the disk. What
    `save` was given may change as soon as it returns.
    """

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after `step` optimizer steps; the same on every rank."""
        ...

    def save(self, live: Live, state: Mapping[str, Any], probe: Mapping[str, Tensor] | None = None) -> None:
        """Saves, or begins to; a checkpoint appears whole or not at all.

        Args:
            live: the engine between two steps; of its parameters those are saved that it names.
            state: JSON of the trainer (rank 0's counts), with `step`.
            probe: tensors of rank 0 to store beside it.

        Raises:
            UserError: on every rank, if one of them could not write and it is not to be tried again.
        """
        ...

    def poll(self) -> list[Path]:
        """The checkpoints that were published since this was last asked, oldest first; never waits for the disk.

        Raises:
            UserError: on every rank, if what was begun has failed meanwhile and is not to be tried again.
        """
        ...

    def wait(self) -> list[Path]:
        """As `poll`, once nothing is under way any more; any failure is then raised. Call it before the run ends."""
        ...


class SnapshotWriter:
    """Copies what is to be saved into host memory, and writes the copy in a thread while training goes on.

    The threads never talk to each other: each does a piece of work on its own rank, and `poll` and `wait`, in the main
    threads and thus in line with training's own collectives, find that all ranks' pieces are done and begin the next:
    write, publish, read back where a removal depends on it, remove. A save that failed is tried again at the next step,
    `_ATTEMPTS` times in all.
    """

    def __init__(
        self,
        output: Path,
        every: int | None,
        keep: int | None,
        total_steps: int,
        milestone: int | None = None,
        background: bool = True,
    ) -> None:
        """Saves every `every` steps (None, 0: never) and after the last.

        Args:
            output: the run directory.
            keep: how many checkpoints stay, None for all.
            milestone: multiples of so many steps are kept for ever beside those.
            background: whether there is memory for a copy; else training waits until all is written.
        """
        self._folder, self._every, self._keep, self._total_steps = output / CHECKPOINTS, every, keep, total_steps
        self._milestone, self._snapshot = milestone, Snapshot() if background else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._stages: Iterator[Future[Any]] | None = None  # of the save under way
        self._work: Future[Any] = Future()
        self._ranks, self._published = Ranks(), list[Path]()
        self._pieces: dict[HeldRange, Sequence[Piece]] = {}
        self._problem: UserError | None = None  # why the last save failed
        self._failures, self._told_slow, self._cleared = 0, False, False
        self._verified: Path | None = None  # the newest that has been read back
        self._told = b""  # where this rank's boxes are in its files; told when it changes, which it does once
        self._rows: dict[int, bytes] = {}  # rank 0: what every rank told

    def due(self, step: int) -> bool:
        again = self._problem is not None
        return again or step == self._total_steps or bool(self._every and step % self._every == 0)

    def save(self, live: Live, state: Mapping[str, Any], probe: Mapping[str, Tensor] | None = None) -> None:
        self._ranks = live.ranks
        self._finish_earlier(int(state["step"]))
        if self._problem is not None:
            self._warn(f"{self._problem}; trying again")
        self._problem, self._stages = None, self._save(live, state, probe)
        self._next_stage()
        if self._snapshot is None:
            self._advance(patient=True)

    def poll(self) -> list[Path]:
        self._advance(patient=False)
        published, self._published = self._published, []
        return published

    def wait(self) -> list[Path]:
        self._advance(patient=True)
        if self._problem is not None:
            raise self._problem
        return self.poll()

    def _finish_earlier(self, step: int) -> None:
        """A disk that is slower than the cadence holds training up: there is memory for one copy."""
        started = time.monotonic()
        self._advance(patient=True)
        waited = time.monotonic() - started
        if waited > _PATIENCE and not self._told_slow:
            self._told_slow = True
            what = f"step {step} waited {waited:.0f} s until the checkpoint before it was written"
            self._warn(f"{what}: the disk is slower than save.every asks; this is said once")

    def _advance(self, patient: bool) -> None:
        """Begins what comes next as often as all ranks are done with what they do. Collective.

        Args:
            patient: whether to wait until nothing is left to do.
        """
        while self._stages is not None:
            if patient:
                futures.wait([self._work])
            if any(self._ranks.all_sum([not self._work.done()])):
                return
            self._next_stage()

    def _next_stage(self) -> None:
        assert self._stages is not None
        try:
            self._work = next(self._stages)
        except StopIteration:
            self._stages, self._failures = None, 0
        except UserError as error:
            self._stages, self._problem = None, error
            self._failures += 1
            if self._ranks.is_main:
                with contextlib.suppress(OSError):  # the first error is the one to tell
                    clear_leftovers(self._folder)
            if self._failures == _ATTEMPTS:
                raise

    def _save(self, live: Live, state: Mapping[str, Any], probe: Mapping[str, Tensor] | None) -> Iterator[Future[Any]]:
        """The stages of a save; each begins when all ranks have ended the one before."""
        ranks, step = live.ranks, int(state["step"])
        # of this moment; the background gets bytes and copies
        record = json.dumps({**state, "engine": read_scalars(live.engine)}, indent=1).encode()
        probe = {name: tensor.clone() for name, tensor in probe.items()} if probe and ranks.is_main else None
        if not self._cleared:  # before any rank writes
            ranks.together(lambda: clear_leftovers(self._folder) if ranks.is_main else None, _DOING, self._folder)
            self._cleared = True
        own = shares(live, self._pieces)
        shapes = {share.holding.name: share.holding.spec.shape for share in own}
        tensors = self._tensors(own)
        yield _done()  # no rank writes, and takes memory bandwidth, while another one copies
        writing = self._thread.submit(self._write, step, tensors, shapes)
        yield writing
        written, rows = ranks.together(writing.result, _DOING, self._folder)
        told = ranks.gather_on_main((written, None if self._told == rows else rows))
        self._told = rows
        files = {name: digest for own, _ in told for name, digest in own.items()}
        self._rows |= {rank: rows for rank, (_, rows) in enumerate(told) if rows is not None}
        publishing = self._on_main(self._publish, step, files, record, probe)
        yield publishing
        path, doomed = ranks.of_main(ranks.together(publishing.result, _DOING, self._folder))
        self._published.append(path)
        if not doomed:
            return
        if self._verified is None or self._verified in doomed:  # else a verified one stays anyway
            reading = self._thread.submit(read_back, path, written)
            yield reading
            ranks.raise_together(ranks.together(reading.result, "cannot be read back", path))
            self._verified = path
        yield self._on_main(self._prune, doomed)

    def _tensors(self, own: Sequence[Share]) -> list[FileTensor] | UserError:
        """What to write. No rank waits for another here: an error is told when all have ended the stage."""
        try:
            return live_tensors(own) if self._snapshot is None else self._snapshot.take(own)
        except UserError as error:
            return error

    def _write(
        self, step: int, tensors: list[FileTensor] | UserError, shapes: Mapping[str, Sequence[int]]
    ) -> tuple[dict[str, Digest], bytes]:
        """Digests of what it writes, and where it all is."""
        if isinstance(tensors, UserError):
            raise tensors
        written = write_rank(begin(self._folder, step), self._ranks.rank, tensors, shapes)
        return written, pickle.dumps(rows_of_rank(self._ranks.rank, tensors, shapes))

    def _on_main(self, work: Any, *arguments: Any) -> Future[Any]:
        """Work that rank 0 does for all."""
        return self._thread.submit(work, *arguments) if self._ranks.is_main else _done()

    def _publish(
        self, step: int, files: dict[str, Digest], record: bytes, probe: Mapping[str, Tensor] | None
    ) -> tuple[Path, list[Path]]:
        """What rank 0 adds when all have written; and which checkpoints are to go now."""
        partial = partial_path(self._folder, step)
        files[STATE] = write_bytes(partial / STATE, record)
        files[INDEX] = BoxIndex.of([pickle.loads(rows) for rows in self._rows.values()]).write(partial / INDEX)
        if probe is not None:
            files[PROBE] = write_bytes(partial / PROBE, safetensors.torch.save(dict(probe)))
        path = publish(self._folder, step, files, milestone=bool(self._milestone and step % self._milestone == 0))
        return path, [] if self._keep is None else surplus(self._folder, self._keep)

    def _prune(self, doomed: Sequence[Path]) -> None:
        """What cannot be removed (a file held open on NFS, say) ends no run whose checkpoint is published."""
        try:
            clear_leftovers(self._folder)  # of a removal that failed
            prune(doomed)
        except OSError as error:
            words, advice = os_problem(error, "cannot remove old checkpoints", self._folder)
            self._warn("; ".join(filter(None, (words, advice))))

    def _warn(self, text: str) -> None:
        if self._ranks.is_main:
            print(f"warning: {text}", file=sys.stderr, flush=True)


def _done() -> Future[Any]:
    """Work of a rank that has none."""
    future: Future[Any] = Future()
    future.set_result(None)
    return future
