"""The run's record: metrics.jsonl, TensorBoard, environment.json and the progress line."""

from __future__ import annotations

import json
import math
import os
import secrets
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol, TextIO

from ...data_prep.durable import write_durably
from ...data_prep.errors import UserError
from ..run.environment import environment
from ..run.exit_notes import LAUNCH_FOLDER
from .console import Progress, duration

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from ..evaluation.evaluate import EvalResult
    from ..plan.plan import Plan
    from ..recipe.recipe import Recipe


class StateLike(Protocol):
    """The counters of a run after a step."""

    @property
    def step(self) -> int: ...
    @property
    def samples_consumed(self) -> int: ...
    @property
    def tokens_consumed(self) -> int: ...


class OutputLike(Protocol):
    """What one optimizer step reports, over all ranks."""

    @property
    def loss(self) -> float: ...  # mean over the unmasked tokens of the global batch
    @property
    def grad_norm(self) -> float | None: ...  # before clipping
    @property
    def lr(self) -> float: ...
    @property
    def tokens(self) -> int: ...  # of the global batch
    @property
    def seconds(self) -> float: ...
    @property
    def samples(self) -> tuple[int, int]: ...  # first global sample index, last + 1
    @property
    def ledger(self) -> int: ...  # ledger.digest of the samples consumed by all ranks


class RunLog:
    """Writes the record of one process group; on every rank but the main one it does nothing.

    Every step is a line of metrics.jsonl, flushed before `step` returns, so that a kill loses nothing and a record is
    on disk before a checkpoint of its step can be. TensorBoard and the progress line follow `log.every`. A resumed run
    appends; each line carries the id of its process group (`run`), by which `read_metrics` leaves out what a dead
    run did beyond the step that was resumed from. So the first record must be the event "start" or "resume"; nothing is
    written before it, for a run that is refused must leave the record of an earlier one as it was.
    """

    def __init__(
        self,
        run_directory: Path,
        plan: Plan,
        recipe: Recipe,
        is_main: bool,
        hosts: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Opens nothing yet. `hosts` is `environment.describe_host()` of every rank."""
        self.directory, self.plan, self.recipe = run_directory, plan, recipe
        self.is_main, self.hosts = is_main, list(hosts)
        self.run = secrets.token_hex(4)
        self.progress = Progress(plan.total_steps)
        self._file: TextIO | None = None
        self._board: SummaryWriter | None = None
        self._last_step = 0

    def __enter__(self) -> RunLog:
        return self

    def step(self, state: StateLike, output: OutputLike, **extra: Any) -> None:
        """Records one step; `extra` goes into the record as it is (plain JSON values).

        Raises:
            UserError: the run directory cannot be written, on the main rank.
        """
        if not self.is_main:
            return
        self._write(
            {
                "kind": "train",
                "step": state.step,
                "loss": output.loss,
                "lr": output.lr,
                "grad_norm": output.grad_norm,
                "tokens": state.tokens_consumed,
                "tokens_per_second": output.tokens / output.seconds if output.seconds else None,
                "step_seconds": output.seconds,
                "samples": list(output.samples),
                "ledger": f"{output.ledger:016x}",
                **extra,
            }
        )
        self.progress.step(state.step, output.tokens, output.seconds)
        first = self.progress.steps == 1  # a sign of life, however long `log.every` is
        if first or state.step % self.recipe.log.every == 0 or state.step == self.plan.total_steps:
            self._report(state, output)

    def eval(self, state: StateLike, result: EvalResult, split: str = "valid") -> None:
        if not self.is_main:
            return
        self._write({"kind": "eval", "step": state.step, "split": split, **result.record()})
        self._scalar(f"eval/{split}_loss", result.loss, state.step)
        self.progress.say(f"eval at step {state.step}, {split}: {result}")

    def event(self, event: str, step: int, message: str | None = None, **fields: Any) -> None:
        """Records something that is not a step (start, resume, save, stop …) and prints `message` where there is one.

        What has been written so far is forced to disk.
        """
        if not self.is_main:
            return
        if event in ("start", "resume"):
            if LAUNCH_FOLDER not in os.environ:  # `zeropipe launch` has said so already
                self.progress.say(heading(self.recipe, self.plan))
            fields |= {"total_steps": self.plan.total_steps, "layout": vars(self.plan.layout), "hosts": self.hosts}
        file = self._write({"kind": "event", "event": event, "step": step, **fields})
        os.fsync(file.fileno())
        if message:
            self.progress.say(message)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._file is None:
            return
        if error is not None:
            self._write({"kind": "event", "event": "failed", "step": self._last_step, "error": f"{error!r}"})
        self._file.close()
        self._file = None
        if self._board is not None:
            self._board.close()
        if error is None:
            hosts = len({host["host"] for host in self.hosts})
            step, started = self._last_step, self.progress.clock
            self.progress.say(closing(self.directory, step, self.plan, self.recipe, hosts, started))

    def _write(self, record: dict[str, Any]) -> TextIO:
        path = self.directory / "metrics.jsonl"
        try:
            file = self._file or self._open(path, record)
            # json writes floats with repr, which reads back bit for bit; one write per line, so lines never mix
            file.write(json.dumps({**record, "run": self.run, "time": time.time()}) + "\n")
        except OSError as error:
            where = error.filename or path
            raise UserError(f"{where}: the run's record cannot be written: {error.strerror}") from error
        self._last_step = record["step"]
        return file

    def _open(self, path: Path, first: Mapping[str, Any]) -> TextIO:
        from torch.utils.tensorboard import SummaryWriter

        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_for_append(path)
        write_durably(
            self.directory / "environment.json", json.dumps(environment(self.run, self.hosts), indent=2) + "\n"
        )
        self._board = SummaryWriter(str(self.directory / "tensorboard"), purge_step=_resumed_from(first) + 1)
        return self._file

    def _report(self, state: StateLike, output: OutputLike) -> None:
        rate = output.tokens / output.seconds if output.seconds else math.nan
        for tag, value in (("loss", output.loss), ("lr", output.lr), ("tokens_per_second", rate)):
            self._scalar(f"train/{tag}", value, state.step)
        if output.grad_norm is not None:
            self._scalar("train/grad_norm", output.grad_norm, state.step)
        self.progress.line(state.step, output.loss, output.lr, output.grad_norm, peak_memory())

    def _scalar(self, tag: str, value: float, step: int) -> None:
        assert self._board is not None
        self._board.add_scalar(tag, value, step)


def peak_memory() -> int:
    """Bytes: the accelerator's peak on this rank; on a CPU the peak of the resident set that DeepSpeed has seen."""
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    return accelerator.max_memory_allocated()


def open_for_append(path: Path) -> TextIO:
    """Opens metrics.jsonl line-buffered; a line that a kill cut short is taken off first."""
    if path.exists():
        with path.open("rb+") as file:
            content_end = _end_of_last_line(file)
            file.truncate(content_end)
    return path.open("a", buffering=1)


def _end_of_last_line(file: IO[bytes], block: int = 1 << 16) -> int:
    """Offset behind the last newline: the file is read backwards, since it may be large."""
    position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - block)
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        position = start
    return 0


def read_lines(run_directory: str | Path) -> Iterator[dict[str, Any]]:
    """Every record of metrics.jsonl as it was written, those of dead runs too; a line cut short at the end is skipped.

    Raises:
        UserError: there is no metrics.jsonl, or a line inside it is not JSON.
    """
    path = Path(run_directory) / "metrics.jsonl"
    try:
        file = path.open()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected the record of a run here") from error
    with file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON, the file is damaged ({error})") from error


def read_metrics(run_directory: str | Path) -> list[dict[str, Any]]:
    """The records that count, in order: for each step those of the last process group that took it.

    Where a run was resumed from step S, what earlier process groups recorded beyond S is left out, as are all earlier
    records where it was started afresh.
    """
    kept: list[dict[str, Any]] = []
    run = None
    for record in read_lines(run_directory):
        if record["run"] != run:
            run = record["run"]
            base = _resumed_from(record)
            fresh = record.get("event") == "start"
            kept = [] if fresh else [earlier for earlier in kept if earlier["step"] <= base]
        kept.append(record)
    return kept


def _resumed_from(first: Mapping[str, Any]) -> int:
    """The step before a process group's first record: an event names the step it starts from, a step comes after."""
    return first["step"] - (first["kind"] == "train")


def heading(recipe: Recipe, plan: Plan) -> str:
    size = f"{plan.parameters / 1e6:,.1f}M parameters, " if plan.parameters else ""
    batch = f"{plan.total_steps:,} steps of {plan.global_batch} x {plan.seq_len} tokens"
    return f"{recipe.name}: {size}{batch}, {plan.precision}, {plan.layout}"


def closing(directory: Path, step: int, plan: Plan, recipe: Recipe, hosts: int, started: float) -> str:
    """What to do with a run that has ended: commands to copy."""
    run = shlex.quote(str(directory))
    took = duration(time.monotonic() - started)
    where = " --hostfile HOSTFILE" if hosts > 1 else f" --devices {plan.layout.world}" if plan.layout.world > 1 else ""
    launch = f"zeropipe launch {run}/recipe.yaml --deepspeed_config {run}/deepspeed.json{where}"
    if step < plan.total_steps:
        return f"stopped after step {step} of {plan.total_steps} ({took}). Go on with:\n  {launch}"
    (key, amount), *_ = recipe.duration.model_dump(exclude_none=True).items()
    return (
        f"finished: {step} steps in {took}. What now?\n"
        f"  evaluate  zeropipe eval {run}\n"
        f"  generate  zeropipe generate {run} --prompt 'Once upon a time'\n"
        f"  export    zeropipe export {run}\n"
        f"  train on  {launch} duration.{key}={2 * amount}"
    )
