"""The run's record: what it ran on and as what, and every step, evaluation and event, to all sinks."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from ...data_prep.durable import write_durably
from ...data_prep.errors import UserError
from ..keeper.wire import LAUNCH_FOLDER
from ..objectives.registry import objective_of
from ..plan.plan import Plan
from ..ranks.ranks import Ranks
from ..run.environment import describe_host, environment
from ..run.guard import StopRequest, claim, record_configuration
from ..run.state import StepOutput, TrainState
from ..sinks.aside import Aside, close_all
from ..sinks.base import Sink, SinkSettings
from ..sinks.console import duration
from ..sinks.registry import ALWAYS, SINKS
from .fared import by_host
from .reading import SOURCE, begun_as, resumed_from

_DOING = "the run's record cannot be written"


class RunLog:
    """Writes the record of one process group, on the main rank.

    A resumed run appends; each record carries the id of its process group (`run`), by which `read_metrics` leaves out
    what a dead run did beyond the step that was resumed from. So `start` comes first; nothing is written before it, for
    a run that is refused must leave the record of an earlier one as it was. A record that cannot be written later asks
    all ranks to save and stop; a sink that the recipe has added costs the run nothing, whatever becomes of it.
    """

    def __init__(self, plan: Plan, ranks: Ranks, stop: StopRequest) -> None:
        """Opens nothing yet. Collective."""
        self.plan, self.ranks, self.stop = plan, ranks, stop
        self.directory, self.run = plan.recipe.output, secrets.token_hex(4)
        self.hosts = ranks.gather_on_main(describe_host())  # by rank, on the main one
        self._sinks: dict[str, Sink] = {}  # the record itself; of a run that has started
        self._asides: dict[str, Aside] = {}  # what the recipe has added
        self._settings: SinkSettings | None = None
        self._last_step, self._clock = 0, time.monotonic()
        self._warmth: list[float] = []  # seconds of the first steps, where something is compiled

    def __enter__(self) -> RunLog:
        return self

    def start(self, event: str, step: int, message: str | None = None, **fields: Any) -> None:
        """Records "start", "resume" or "rewind", and with it the configuration and the environment. Collective.

        Raises:
            UserError: on every rank, if the run directory cannot be written.
        """
        if self._sinks:  # a run that went back: what comes now takes the place of what it did beyond `step`
            self._close()
            self.run, self._last_step = secrets.token_hex(4), step
        self.ranks.together(
            lambda: self._start(event, step, message, fields) if self.ranks.is_main else None, _DOING, self.directory
        )

    def step(self, state: TrainState, output: StepOutput) -> None:
        record = {
            "loss": output.loss,
            "lr": output.lr,
            "grad_norm": output.grad_norm,
            "tokens": state.tokens_consumed,
            "tokens_per_second": output.tokens / output.seconds if output.seconds else None,
            "step_seconds": output.seconds,
            "samples": list(output.samples),
            "ledger": f"{output.ledger:016x}",
            "data_seconds": output.data_seconds,
            **(by_host(output.fared, [host["host"] for host in self.hosts]) if self.ranks.is_main else {}),
            **({} if output.applied else {"applied": False}),
            **({} if output.loss_scale is None else {"loss_scale": output.loss_scale}),
            **output.metrics,
            **{
                f"{SOURCE}{name}/{key}": value
                for name, own in output.sources.items()
                for key, value in zip(("loss", "tokens"), own, strict=True)
            },
            **{name: value for name, value in output.routed.items() if self._shows(state.step, value)},
        }
        self._attempt({"kind": "train", "step": state.step, **record})
        if self.plan.recipe.compile != "none" and len(self._warmth) < 2:
            self._report_compilation(state.step, output.seconds)
        if output.bad:
            first, stop = output.samples
            said = f"step {state.step}: loss {output.loss}, no update; samples {first} to {stop - 1} are left out"
            self.event("skip", state.step, said, samples=list(output.samples))

    def _shows(self, step: int, value: Any) -> bool:
        """Whether a step's record has a value: the loads of all experts are many, and people are shown some steps."""
        return not isinstance(value, list) or (self._settings is not None and self._settings.shown(step))

    def eval(self, step: int, split: str, measured: Mapping[str, Any], message: str) -> None:
        """Records an evaluation; `measured` goes into the record as it is (plain JSON values)."""
        self._attempt({"kind": "eval", "step": step, "split": split, **measured}, message)

    def task(self, step: int, measured: Mapping[str, Any], message: str) -> None:
        """Records what the model reached at a task; `measured` as of `eval`."""
        self._attempt({"kind": "task", "step": step, **measured}, message)

    def event(self, event: str, step: int, message: str | None = None, **fields: Any) -> None:
        """Records something that is not a step (save, stop …); what has been written so far is forced to disk."""
        self._attempt({"kind": "event", "event": event, "step": step, **fields}, message)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self._sinks:
            return
        if error is not None:
            self._attempt({"kind": "event", "event": "failed", "step": self._last_step, "error": f"{error!r}"})
        self._close()
        close_all(self._asides.values())
        if error is None:
            hosts = len({host["host"] for host in self.hosts})
            print(closing(self.plan, self._last_step, hosts, self._clock), flush=True)

    def _report_compilation(self, step: int, seconds: float) -> None:
        self._warmth.append(seconds)
        if len(self._warmth) == 2:
            first, second = self._warmth
            told = f"compiled blocks: the first step took {first:.1f} s, the second {second:.1f} s"
            self.event("compiled", step, told, first_step_seconds=first, second_step_seconds=second)

    def _start(self, event: str, step: int, message: str | None, fields: Mapping[str, Any]) -> None:
        plan = self.plan
        facts = {"total_steps": plan.total_steps, "layout": vars(plan.layout), "hosts": self.hosts}
        facts |= {"sources": list(plan.sources)} if plan.sources else {}
        planned = {
            "positions": plan.positions,
            "memory": None if plan.memory is None else plan.memory.peak,
            "token_flops": plan.token_flops,
            "computes_in": plan.precision.products,
        }
        record = {"kind": "event", "event": event, "step": step, **fields, **facts, "planned": planned}
        self.directory.mkdir(parents=True, exist_ok=True)
        claim(self.directory, self.run)
        record_configuration(plan)
        text = json.dumps(environment(self.run, self.hosts), indent=2)
        write_durably(self.directory / "environment.json", text + "\n")
        self._open(record)
        said = [heading(plan)] if LAUNCH_FOLDER not in os.environ else []  # `zeropipe launch` has said so already
        self._write(record, "\n".join([*said, *([message] if message else [])]) or None)

    def _attempt(self, record: dict[str, Any], message: str | None = None) -> None:
        if not self._sinks:
            return
        try:
            self._write(record, message)
        except UserError as error:
            self.stop.because(str(error))

    def _open(self, first: Mapping[str, Any]) -> None:
        plan = self.plan
        settings = self._settings = SinkSettings(
            directory=self.directory,
            name=plan.recipe.name,
            run=self.run,
            begun=self.run if first["event"] == "start" else begun_as(self.directory) or self.run,
            configuration={"recipe": plan.recipe.model_dump(mode="json"), "deepspeed": plan.deepspeed},
            every=plan.recipe.log.every,
            total_steps=plan.total_steps,
            resumed_from=resumed_from(first),
        )
        self._sinks = {name: SINKS[name](settings) for name in ALWAYS}
        for name in plan.recipe.log.sinks:
            if name in self._asides:
                self._asides[name].reopen(settings)
            else:
                self._asides[name] = Aside(name, settings)

    def _write(self, record: dict[str, Any], message: str | None) -> None:
        self._last_step = max(self._last_step, record["step"])  # a checkpoint is recorded when it has been published
        stamped = {**record, "run": self.run, "time": time.time()}
        for sink in self._sinks.values():
            try:
                sink.write(stamped, message)
            except OSError as error:
                where = error.filename or f"{self.directory} ({type(sink).__name__})"
                raise UserError(f"{where}: {_DOING}: {error.strerror}") from error
        for aside in self._asides.values():
            aside.write(stamped, message)

    def _close(self) -> None:
        for sink in self._sinks.values():
            with contextlib.suppress(OSError):  # what matters of metrics.jsonl was flushed with its record
                sink.close()
        self._sinks = {}


def heading(plan: Plan) -> str:
    """The run in one line."""
    size = f"{plan.parameters / 1e6:,.1f}M parameters, " if plan.parameters else ""
    batch = f"{plan.total_steps:,} steps of {plan.global_batch} x {plan.seq_len} tokens"
    return f"{plan.recipe.name}: {size}{batch}, {plan.precision}, {plan.layout}"


def closing(plan: Plan, step: int, hosts: int, started: float) -> str:
    """What to do with a run that has ended: commands to copy. `started` by time.monotonic."""
    run, world = shlex.quote(str(plan.recipe.output)), plan.layout.world
    took = duration(time.monotonic() - started)
    where = " --hostfile HOSTFILE" if hosts > 1 else f" --devices {world}" if world > 1 else ""
    launch = f"zeropipe launch {run}/recipe.yaml --deepspeed_config {run}/deepspeed.json{where}"
    if step < plan.total_steps:
        return f"stopped after step {step} of {plan.total_steps} ({took}). Go on with:\n  {launch}"
    (key, amount), *_ = plan.recipe.duration.model_dump(exclude_none=True).items()
    ask = f"  generate  zeropipe generate {run} --prompt 'Once upon a time'"
    if objective_of(plan.recipe.objective).reads != "text":
        ask = f"  chat      zeropipe chat {run}"
    return (
        f"finished: {step} steps in {took}. What now?\n"
        f"  evaluate  zeropipe eval {run}\n"
        f"{ask}\n"
        f"  export    zeropipe export {run}\n"
        f"  train on  {launch} duration.{key}={2 * amount}"
    )
