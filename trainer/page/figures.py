"""The figures of a page: lines of what a run recorded, made short without losing what stands out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..metrics.reading import SOURCE
from ..tune.hardware import GIB
from .decimate import kept, rounded
from .facts import peak_of, rank_flops

_Record = dict[str, Any]
_Figure = tuple[str, str, str, "Sequence[_Line]"]  # key, title, unit, lines
LEAST = 60  # points of a line, however many share a figure
HELD_OUT = ("loss", "perplexity")
STARTS = ("start", "resume", "rewind")  # events that begin a process group, or go back
# figures of what training steps record: title, unit, and the lines in it
FIGURES: dict[str, tuple[str, str, dict[str, str]]] = {
    "lr": ("Learning rate", "", {"lr": "learning rate"}),
    "grad_norm": ("Gradient norm", "before clipping", {"grad_norm": "gradient norm"}),
    "speed": ("Throughput", "tokens a second", {"tokens_per_second": "tokens/s"}),
    "time": (
        "Where a step's time goes",
        "seconds",
        {
            "step_seconds": "the step",
            "slowest_forward_seconds": "forward, slowest rank",
            "median_forward_seconds": "forward, median rank",
            "most_data_seconds": "waiting for data, longest",
        },
    ),
    "memory": ("Memory", "GiB", {"most_memory": "largest rank, peak", "host_memory": "fullest host, in use"}),
    "wait": ("Waiting for data", "% of the step, main rank", {"data_share": "waiting for data"}),
    "scale": ("Loss scale", "fp16", {"loss_scale": "loss scale"}),
}
_KNOWN = {
    "kind", "step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "step_seconds", "samples", "ledger",
    "data_seconds", "run", "time", "applied", "loss_scale", "hosts", "slowest_rank", "slowest_forward_seconds",
    "median_forward_seconds", "most_data_seconds", "most_memory",
}  # fmt: skip


class _Line(NamedTuple):
    """As recorded, whole; where a step has no such value, None."""

    label: str
    steps: Sequence[int]
    values: Sequence[float | None]
    dots: bool = False


def figures_of(records: Sequence[_Record], points: int) -> list[_Record]:
    """All figures of the records that count, as plain JSON values; each has at most about `points` points."""
    train = [record for record in records if record["kind"] == "train"]
    starts = [record for record in records if record.get("event") in STARTS]
    evals: dict[str, list[_Record]] = {}
    for record in records:
        if record["kind"] == "eval":
            evals.setdefault(record["split"], []).append(record)
    found = [
        *_losses(train, evals),
        _sources(train, starts),
        *_metrics(train, evals),
        *_of_steps(train),
        _utilisation(train, starts),
        _mixture(records),
        _tasks(records),
    ]
    return [drawn for figure in found if (drawn := _drawn(*figure, points))]


def _drawn(key: str, title: str, unit: str, lines: Sequence[_Line], points: int) -> _Record | None:
    """A figure with its lines made short; None of one without a number."""
    shown = [line for line in lines if line.values.count(None) < len(line.values)]
    share = max(LEAST, points // max(1, len(shown)))
    return (
        {"key": key, "title": title, "unit": unit, "lines": [_short(line, share) for line in shown]} if shown else None
    )


def _short(line: _Line, points: int) -> _Record:
    steps, values = line.steps, line.values
    if None in values:
        there = [place for place, value in enumerate(values) if value is not None]
        steps, values = [steps[place] for place in there], [values[place] for place in there]
    y = np.array(values, float)
    chosen = kept(y, points)
    x = [steps[place] for place in chosen.tolist()]
    return {"label": line.label, "x": x, "y": rounded(y[chosen]), "dots": line.dots}


def _column(label: str, records: Sequence[_Record], name: str, dots: bool = False) -> _Line:
    if derive := _DERIVED.get(name):
        return _Line(label, _steps(records), [derive(record) for record in records], dots)
    return _Line(label, _steps(records), [record.get(name) for record in records], dots)


def _steps(records: Sequence[_Record]) -> list[int]:
    return [record["step"] for record in records]


def _losses(train: Sequence[_Record], evals: Mapping[str, Sequence[_Record]]) -> list[_Figure]:
    held_out = {name: [_column(split, own, name, True) for split, own in evals.items()] for name in HELD_OUT}
    return [
        ("loss", "Loss", "", [_column("train", train, "loss"), *held_out["loss"]]),
        ("perplexity", "Perplexity", "", held_out["perplexity"]),
    ]


def _sources(train: Sequence[_Record], starts: Sequence[_Record]) -> _Figure:
    """Of a step that has nothing of a source, its line says nothing."""
    names = dict.fromkeys(name for start in starts for name in start.get("sources", ()))
    lines = [_column(name, train, f"{SOURCE}{name}/loss") for name in names]
    return "sources", "Loss by source", "of the mixture, nats a token", lines


def _utilisation(train: Sequence[_Record], starts: Sequence[_Record]) -> _Figure:
    """Only where the device is known; what is not known is said beside the plan."""
    shares: dict[str, float] = {}  # by process group: % of the peak for a token a second
    for start in starts:
        if (flops := rank_flops(start)) and (peak := peak_of(start)):
            shares[start["run"]] = 100 * flops / peak
    values = [
        None if record["tokens_per_second"] is None or record["run"] not in shares
        else shares[record["run"]] * record["tokens_per_second"]
        for record in train
    ]  # fmt: skip
    return "mfu", "MFU", "% of the peak of the device", [_Line("MFU", _steps(train), values)]


def _metrics(train: Sequence[_Record], evals: Mapping[str, Sequence[_Record]]) -> list[_Figure]:
    """What the objective, or the routers of a mixture of experts, added to the records."""
    names = dict.fromkeys(
        key for record in (*train[:1], *train[-1:]) for key, value in record.items()
        if key not in _KNOWN and not key.startswith(SOURCE) and isinstance(value, int | float)
    )  # fmt: skip
    groups: dict[str, list[_Line]] = {}
    for name in names:
        group = groups.setdefault(name.partition("/")[0], [])
        group.append(_column(name, train, name))
        group += [_column(f"{name}, {split}", own, name, True) for split, own in evals.items()]
    whose = {"router": "of a mixture's experts"}
    return [
        (f"metric-{group}", group[:1].upper() + group[1:], whose.get(group, "of the objective"), lines)
        for group, lines in groups.items()
    ]


def _of_steps(train: Sequence[_Record]) -> list[_Figure]:
    return [
        (key, title, unit, [_column(label, train, column) for column, label in columns.items()])
        for key, (title, unit, columns) in FIGURES.items()
    ]


def _data_share(record: _Record) -> float | None:
    return 100 * record["data_seconds"] / record["step_seconds"] if record.get("step_seconds") else None


def _host_memory(record: _Record) -> float | None:
    hosts = record.get("hosts")
    return max(host["host_memory"] for host in hosts.values()) / GIB if hosts else None


def _most_memory(record: _Record) -> float | None:
    return record["most_memory"] / GIB if "most_memory" in record else None


_DERIVED = {"data_share": _data_share, "host_memory": _host_memory, "most_memory": _most_memory}


def _tasks(records: Sequence[_Record]) -> _Figure:
    """What was reached at tasks, where they were asked more than once; the table has all of it."""
    by_task: dict[str, list[_Record]] = {}
    for record in records:
        if record["kind"] == "task":
            by_task.setdefault(record["task"], []).append(record)
    lines = []
    for task, own in by_task.items():
        names = dict.fromkeys(key for record in own for key in record if "," in key and "_stderr" not in key)
        if len({record["step"] for record in own}) > 1:
            lines += [_column(f"{task} {name.removesuffix(',none')}", own, name, True) for name in names]
    return "tasks", "Tasks", "lm-evaluation-harness", lines


def _mixture(records: Sequence[_Record]) -> _Figure:
    """Shares of the sources in what was consumed up to each checkpoint."""
    saves = [record for record in records if record.get("event") == "save" and len(record.get("drawn", {})) > 1]
    stores = list(dict.fromkeys(store for record in saves for store in record["drawn"]))
    lines = []
    for store in stores:
        shares = [100 * r["drawn"].get(store, 0) / max(1, sum(r["drawn"].values())) for r in saves]
        lines.append(_Line(Path(store).name, _steps(saves), shares, True))
    return "mixture", "Shares of the mixture", "% of the samples so far", lines
