"""The record of a run: exact floats, kills, resumes, TensorBoard, the progress line."""

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.tiny import tiny_recipe
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.evaluation.evaluate import EvalResult
from zeropipe.trainer.keeper.wire import LAUNCH_FOLDER
from zeropipe.trainer.metrics.reading import read_lines, read_metrics
from zeropipe.trainer.metrics.record import RunLog
from zeropipe.trainer.plan.layout import Layout
from zeropipe.trainer.ranks.ranks import Ranks
from zeropipe.trainer.recipe.precision import PRECISIONS
from zeropipe.trainer.recipe.recipe import Recipe
from zeropipe.trainer.run.guard import StopRequest
from zeropipe.trainer.run.state import StepOutput, TrainState
from zeropipe.trainer.sinks.console import StepLine, duration


class State(TrainState):
    """After a step of 4 samples of 16 tokens."""

    def __init__(self, step: int) -> None:
        super().__init__(6, step, 4 * step, 64 * step)


def output(loss: float, samples: tuple[int, int]) -> StepOutput:
    return StepOutput(loss, 0.1 + 0.2, 1e-3, 64, 0.25, 0.0, samples, 255, metrics={"extra": 0.5})


def open_log(
    directory: Path, steps: int = 6, every: int = 2, main: bool = True, world: int = 1, **sections: Any
) -> RunLog:
    sections = {"log": {"every": every}, "duration": {"steps": steps}, **sections}
    recipe = Recipe.model_validate(tiny_recipe(Path("none"), directory, **sections))
    shape = {"global_batch": 4, "seq_len": 16, "precision": PRECISIONS["bf16"], "parameters": 1_500_000}
    shape |= {"deepspeed": {}, "positions": steps * 64, "memory": None, "token_flops": None, "sources": ()}
    plan = SimpleNamespace(total_steps=steps, layout=Layout(world=world, data=world), **shape)
    plan.recipe = recipe
    ranks = Ranks() if main else Ranks(rank=1)
    return RunLog(plan, ranks, StopRequest(ranks))  # type: ignore[arg-type]


def take(log: RunLog, first: int, last: int, base: float = 9.0) -> None:
    for step in range(first, last + 1):
        log.step(State(step), output(base + 1 / (3 * step), (4 * step - 4, 4 * step)))


def test_records_hold_floats_bit_for_bit(tmp_path):
    with open_log(tmp_path) as log:
        log.start("start", 0)
        take(log, 1, 6)
        log.eval(6, "valid", EvalResult(1 / 7, 100, 2.5).record(), "")
    train = [record for record in read_metrics(tmp_path) if record["kind"] == "train"]
    assert [record["step"] for record in train] == [1, 2, 3, 4, 5, 6]
    assert [record["loss"].hex() for record in train] == [(9.0 + 1 / (3 * step)).hex() for step in range(1, 7)]
    last = train[-1]
    assert last["grad_norm"].hex() == (0.1 + 0.2).hex() and last["lr"] == 1e-3 and last["tokens"] == 384
    assert last["tokens_per_second"] == 256 and last["step_seconds"] == 0.25
    assert last["extra"] == 0.5  # an objective's own metric
    assert last["samples"] == [20, 24] and last["ledger"] == "00000000000000ff"
    evals = [record for record in read_metrics(tmp_path) if record["kind"] == "eval"]
    assert evals[0]["loss"].hex() == (1 / 7).hex() and evals[0]["split"] == "valid"
    assert evals[0]["perplexity"] == pytest.approx(2.718281828 ** (1 / 7))


def test_a_resume_replaces_the_steps_that_died(tmp_path):
    with open_log(tmp_path) as log:
        log.start("start", 0)
        take(log, 1, 5, base=1.0)
    with open_log(tmp_path) as log:
        log.start("resume", 3)
        take(log, 4, 4, base=2.0)
    assert len([r for r in read_lines(tmp_path) if r["kind"] == "train"]) == 6
    train = [record for record in read_metrics(tmp_path) if record["kind"] == "train"]
    # step 5 of the first run is gone as well: the resumed run has not reached it
    assert [(record["step"], int(record["loss"])) for record in train] == [(1, 1), (2, 1), (3, 1), (4, 2)]
    with open_log(tmp_path) as log:
        log.start("start", 0)
        take(log, 1, 1, base=3.0)
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1]


def test_tensorboard_follows_the_resume(tmp_path):
    with open_log(tmp_path, every=1) as log:
        log.start("start", 0)
        take(log, 1, 5, base=1.0)
    with open_log(tmp_path, every=1) as log:
        log.start("resume", 3)
        take(log, 4, 6, base=2.0)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, int(e.value)) for e in board.Scalars("train/loss")] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 2),
        (5, 2),
        (6, 2),
    ]


def test_a_kill_loses_nothing(tmp_path):
    script = f"""
        from pathlib import Path
        from tests.unit.trainer.metrics.test_record import open_log, take
        log = open_log(Path({str(tmp_path)!r}), steps=100)
        log.__enter__()
        log.start("start", 0)
        take(log, 1, 50)
        print("ready", flush=True)
        import time; time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while process.stdout.readline().strip() != "ready":
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(51))


def test_a_line_cut_short_is_dropped_and_the_run_goes_on(tmp_path):
    with open_log(tmp_path) as log:
        log.start("start", 0)
        take(log, 1, 3)
    path = tmp_path / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - 10)
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2]
    with open_log(tmp_path) as log:
        log.start("resume", 2)
        take(log, 3, 3)
    steps = [record["step"] for record in read_metrics(tmp_path) if record["kind"] == "train"]
    assert steps == [1, 2, 3]


def test_damage_inside_names_the_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train"\n{}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 1"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match="No such file"):
        read_metrics(tmp_path / "nowhere")


def test_other_ranks_write_nothing(tmp_path):
    with open_log(tmp_path, main=False) as log:
        log.start("start", 0)
        take(log, 1, 2)
        log.eval(2, "valid", EvalResult(1.0, 10).record(), "")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_refused_leaves_the_record_as_it_was(tmp_path):
    with open_log(tmp_path) as log:
        log.start("start", 0)
        take(log, 1, 3)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    log = open_log(tmp_path).__enter__()
    log.__exit__(UserError, UserError("another seed"), None)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_a_record_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.* cannot be written"):
        open_log(tmp_path / "file" / "run").start("start", 0)
    log = open_log(tmp_path / "run")
    log.start("start", 0)
    lines = log._sinks["jsonl"]
    lines.close()
    lines._file = open("/dev/full", "w", buffering=1)  # type: ignore[attr-defined]  # noqa: SIM115 (the log closes it)
    log.step(State(1), output(1.0, (0, 4)))  # all ranks must save and stop before it is told
    assert log.stop.asked and log.stop.problem is not None
    assert "JsonLines" in log.stop.problem and "No space left" in log.stop.problem


def test_environment_names_versions_and_command(tmp_path):
    with open_log(tmp_path) as log:
        log.start("start", 0)
        take(log, 1, 1)
    record = json.loads((tmp_path / "environment.json").read_text())
    assert record["versions"]["torch"].startswith("2.") and record["versions"]["deepspeed"]
    assert sys.executable in record["command"] and record["hosts"]
    assert record["run"] == read_metrics(tmp_path)[0]["run"]


def test_progress_lines_are_plain_without_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(LAUNCH_FOLDER, raising=False)
    with open_log(tmp_path, every=2) as log:
        log.start("start", 0)
        take(log, 1, 6)
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step")]
    assert [line.split()[1] for line in steps] == ["1/6", "2/6", "4/6", "6/6"]
    assert "loss 9.0556" in steps[3] and "256 tokens/s" in steps[3] and "grad 0.300" in steps[3]
    assert lines[0] == "tiny: 1.5M parameters, 6 steps of 4 x 16 tokens, bf16, data 1, ZeRO-0"
    assert "\r" not in "".join(lines)
    assert any("zeropipe eval" in line for line in lines) and any("zeropipe export" in line for line in lines)
    assert any(line.endswith("duration.steps=12") for line in lines)


def test_a_run_that_stops_early_says_how_to_go_on(tmp_path, capsys):
    with open_log(tmp_path, world=4) as log:
        log.start("start", 0)
        take(log, 1, 2)
    out = capsys.readouterr().out
    assert "stopped after step 2 of 6" in out and f"zeropipe launch {tmp_path}/recipe.yaml" in out
    assert "--devices 4" in out


@pytest.mark.parametrize(("objective", "verb"), [("causal_lm", "generate"), ("sft", "chat"), ({"type": "dpo"}, "chat")])
def test_the_end_says_how_to_ask_the_model(objective, verb, tmp_path, capsys):
    with open_log(tmp_path, objective=objective) as log:
        log.start("start", 0)
        take(log, 1, 6)
    out = capsys.readouterr().out
    asked = [line.split()[0] for line in out.splitlines() if " zeropipe chat " in line or " zeropipe generate " in line]
    assert asked == [verb] and f"zeropipe {verb} {tmp_path}" in out


def test_a_failure_is_recorded(tmp_path):
    log = open_log(tmp_path).__enter__()
    log.start("start", 0)
    take(log, 1, 2)
    log.__exit__(RuntimeError, RuntimeError("planted"), None)
    last = read_metrics(tmp_path)[-1]
    assert last["event"] == "failed" and "planted" in last["error"] and last["step"] == 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_is_rewritten_on_a_terminal():
    screen = Terminal()
    progress = StepLine(10, stream=screen)
    for step in (1, 2):
        progress.step(step, 100, 1.0)
        progress.line(step, 5.0, 1e-4, None, 2_000_000_000)
    progress.say("saved")
    text = screen.getvalue()
    assert text.count("\r\x1b[K") == 2 and text.endswith("\nsaved\n") and "mem 1.9 GiB" in text and "grad -" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(7, "7s"), (185, "3m05s"), (7620, "2h07m"), (273_600, "3d04h"), (float("nan"), "?")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_run_goes_on_where_its_reader_has_gone():
    """As where an ssh, through which the lines of a rank go, is told to stop before the rank is."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        line = StepLine(10, stream)
        line.say("nobody hears this")
        line.line(1, 2.0, 1e-3, 0.5, 1 << 20)
