"""Trackers without a network, written by runs that are resumed, and read back by the trackers' own libraries."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.harness import run_ranks
from tests.unit.trainer.metrics.test_record import State, open_log, output, take
from zeropipe.trainer.evaluation.evaluate import EvalResult
from zeropipe.trainer.metrics.reading import read_lines

Rows = list[tuple[int, str, str]]  # step, name, the float bit for bit
SECRET = "s3cr3t-0123456789abcdef0123456789abcdef0"
VARIABLES = {
    "WANDB_MODE": "offline",
    "WANDB_API_KEY": SECRET,
    "MLFLOW_TRACKING_TOKEN": SECRET,
    "MLFLOW_TRACKING_PASSWORD": SECRET,
    "TRACKIO_WRITE_TOKEN": SECRET,
    "HF_TOKEN": SECRET,
}


def record(directory: Path, sink: str, event: str, base: int, last: int, nan: bool) -> None:
    """One process group: steps after `base`, an evaluation, perhaps a step that went wrong. In a process of its own."""
    os.environ.update(VARIABLES)
    with open_log(directory, steps=9, log={"every": 3, "sinks": [sink]}, seed=7) as log:
        log.start(event, base)
        take(log, base + 1, last, base=1.0 if event == "start" else 2.0)
        log.eval(last, "valid", EvalResult(1 / 7, 100, 2.5).record(), "")
        if nan:
            log.step(State(last + 1), output(float("nan"), (0, 4)))


def wandb_rows(directory: Path) -> tuple[Rows, set[str]]:
    """From the transaction logs (LevelDB's log format around W&B's own messages), the way `wandb sync` takes them."""
    from wandb.proto import wandb_internal_pb2  # type: ignore[import-not-found]

    rows: Rows = []
    ids = set()
    for path in sorted((directory / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for message in _leveldb(path.read_bytes()):
            found = wandb_internal_pb2.Record.FromString(message)
            if found.WhichOneof("record_type") == "run":
                ids.add(found.run.run_id)
            items = {item.key or "/".join(item.nested_key): _number(item.value_json) for item in found.history.item}
            if "step" in items:
                step = int(items.pop("step"))
                rows += [(step, name, value.hex()) for name, value in items.items() if not name.startswith("_")]
    return rows, ids


def _leveldb(data: bytes) -> list[bytes]:
    """Records of blocks of 32 KiB, each piece behind a checksum, a length and a kind: whole, first, middle, last."""
    assert data[:4] == b":W&B"
    place, found, parts = 7, [], b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            found.append(parts)
            parts = b""
    return found


def _number(text: str) -> float:
    return float(text.strip('"'))


def mlflow_rows(directory: Path) -> tuple[Rows, set[str]]:
    from mlflow import MlflowClient  # type: ignore[import-not-found]

    client = MlflowClient(tracking_uri=f"sqlite:///{directory / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("zeropipe")
    runs = client.search_runs([experiment.experiment_id])
    assert runs[0].data.params["recipe.seed"] == "7" and runs[0].info.status == "FINISHED"
    rows = []
    for name in runs[0].data.metrics:
        rows += [(own.step, name, own.value.hex()) for own in client.get_metric_history(runs[0].info.run_id, name)]
    return rows, {run.info.run_id for run in runs}


def trackio_rows(directory: Path) -> tuple[Rows, set[str]]:
    os.environ["TRACKIO_DIR"] = str(directory / "trackio")
    import trackio  # type: ignore[import-not-found]
    from trackio.sqlite_storage import SQLiteStorage  # type: ignore[import-not-found]

    runs = list(trackio.Api().runs("zeropipe"))
    assert runs[0].config["recipe"]["seed"] == 7
    rows: Rows = []
    for own in SQLiteStorage.get_logs("zeropipe", runs[0].name, run_id=runs[0].id):
        rest = {name: float(value) for name, value in own.items() if name not in ("step", "timestamp")}
        rows += [(own["step"], name, value.hex()) for name, value in rest.items()]
    return rows, {run.name for run in runs}


def of_the_record(directory: Path) -> Rows:
    """What metrics.jsonl says, named by hand."""
    left_out = {"kind", "step", "run", "time", "tokens", "samples", "ledger", "split", "eval_tokens"}
    rows: Rows = []
    for own in read_lines(directory):
        prefix = {"train": "train/", "eval": f"eval/{own.get('split')}_"}.get(own["kind"])
        numbers = {k: v for k, v in own.items() if k not in left_out and isinstance(v, int | float)}
        rows += [(own["step"], prefix + name, float(value).hex()) for name, value in numbers.items()] if prefix else []
    return rows


READERS: dict[str, Callable[[Path], tuple[Rows, set[str]]]] = {
    "wandb": wandb_rows,
    "mlflow": mlflow_rows,
    "trackio": trackio_rows,
}


@pytest.mark.parametrize("sink", ["wandb", pytest.param("mlflow", marks=pytest.mark.slow), "trackio"])
def test_it_holds_the_record_bit_for_bit_in_one_run_across_resumes_and_no_secret(sink, tmp_path):
    """Also what a dead process group recorded beyond the step resumed from: before what replaces it."""
    if find_spec(sink) is None:
        pytest.skip(f"needs {sink}: pip install 'zeropipe[{sink}]'")
    run_ranks(1, record, tmp_path, sink, "start", 0, 5, False)
    run_ranks(1, record, tmp_path, sink, "resume", 3, 8, True)
    ((rows, runs),) = run_ranks(1, READERS[sink], tmp_path)
    expected = of_the_record(tmp_path)
    assert len(expected) > 60 and any(value == "nan" for _, _, value in expected)
    assert sorted(rows) == sorted(expected)
    for name in {name for _, name, _ in expected}:  # the order that shows which is the later one
        assert [row for row in rows if row[1] == name] == [row for row in expected if row[1] == name]
    assert len(runs) == 1
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 4 and [path for path in files if SECRET.encode() in path.read_bytes()] == []
