"""What the page shows of a run, read from the files in its directory alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..families.registry import FAMILIES
from ..metrics.reading import read_lines, read_metrics
from ..sinks.base import flattened
from ..tune.hardware import DEVICES, GIB
from ..tune.work import model_flops
from .decimate import kept, rounded

_Record = dict[str, Any]
MARKS = ("resume", "rewind", "skip", "save", "failed")
CLOCK_POINTS = 400  # of the table by which steps become tokens and hours
MOST_MARKS = 400  # of a kind
MOST_ANSWERS = 60
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


def collect(run: str | Path, points: int, records: Sequence[_Record] | None = None) -> dict[str, Any]:
    """A run as plain JSON values; each line of a figure has at most `points` points.

    Args:
        records: those that count, where they have been read.

    Raises:
        UserError: there is no record, or it is damaged.
    """
    run = Path(run)
    records = read_metrics(run) if records is None else records
    train = [record for record in records if record["kind"] == "train"]
    starts = [record for record in records if record.get("event") in ("start", "resume", "rewind")]
    return {
        "name": run.resolve().name,
        "path": str(run),
        "clock": _clock(train),
        "figures": [*_losses(records, train, points), *_figures(train, points), *_mixture(records)],
        "marks": _marks(run),
        "facts": _facts(train, starts),
        "answers": _answers(records),
        "recipe": flattened(_yaml(run / "recipe.yaml")),
        "deepspeed": flattened(_yaml(run / "deepspeed.json")),
        "environment": _environment(run),
    }


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, yaml.YAMLError):  # the page shows what is there
        return {}


def _line(
    label: str, steps: Iterable[float], values: Iterable[float | None], points: int, dots: bool = False
) -> _Record:
    x, y = np.array(list(steps), float), np.array([np.nan if v is None else v for v in values], float)
    chosen = kept(y, points)
    return {"label": label, "x": [int(step) for step in x[chosen]], "y": rounded(y[chosen]), "dots": dots}


def _figure(key: str, title: str, unit: str, lines: list[_Record]) -> list[_Record]:
    shown = [line for line in lines if any(value is not None for value in line["y"])]
    return [{"key": key, "title": title, "unit": unit, "lines": shown}] if shown else []


def _losses(records: Sequence[_Record], train: Sequence[_Record], points: int) -> list[_Record]:
    steps = [record["step"] for record in train]
    losses = [_line("train", steps, (record["loss"] for record in train), points)]
    evals: dict[str, list[_Record]] = {}
    for record in records:
        if record["kind"] == "eval":
            evals.setdefault(record["split"], []).append(record)
    perplexities = []
    for split, own in evals.items():
        at = [record["step"] for record in own]
        losses.append(_line(split, at, (record["loss"] for record in own), points, dots=True))
        perplexities.append(_line(split, at, (record.get("perplexity") for record in own), points, dots=True))
    figures = _figure("loss", "Loss", "", losses) + _figure("perplexity", "Perplexity", "", perplexities)
    names = dict.fromkeys(
        key for record in (*train[:1], *train[-1:]) for key, value in record.items()
        if key not in _KNOWN and isinstance(value, int | float)
    )  # fmt: skip
    groups: dict[str, list[_Record]] = {}
    for name in names:
        group = groups.setdefault(name.partition("/")[0], [])
        group.append(_line(name, steps, (record.get(name) for record in train), points))
        for split, own in evals.items():
            at = [record["step"] for record in own]
            group.append(_line(f"{name}, {split}", at, (record.get(name) for record in own), points, dots=True))
    for group, lines in groups.items():
        whose = "of a mixture's experts" if group == "router" else "of the objective"
        figures += _figure(f"metric-{group}", group[:1].upper() + group[1:], whose, lines)
    return figures


def _figures(train: Sequence[_Record], points: int) -> list[_Record]:
    found = []
    for key, (title, unit, columns) in FIGURES.items():
        lines = []
        for column, label in columns.items():
            own = [(record["step"], value) for record in train if (value := _value(record, column)) is not None]
            if own:
                steps, values = zip(*own, strict=True)
                lines.append(_line(label, steps, values, points))
        found += _figure(key, title, unit, lines)
    return found


def _value(record: _Record, column: str) -> float | None:
    if column == "data_share":
        return 100 * record["data_seconds"] / record["step_seconds"] if record.get("step_seconds") else None
    if column == "host_memory":
        hosts = record.get("hosts")
        return max(host["host_memory"] for host in hosts.values()) / GIB if hosts else None
    value = record.get(column)
    return value / GIB if value is not None and column == "most_memory" else value


def _mixture(records: Sequence[_Record]) -> list[_Record]:
    """Shares of the sources in what was consumed up to each checkpoint."""
    saves = [record for record in records if record.get("event") == "save" and len(record.get("drawn", {})) > 1]
    stores = list(dict.fromkeys(store for record in saves for store in record["drawn"]))
    lines = []
    for store in stores:
        shares = [100 * r["drawn"].get(store, 0) / max(1, sum(r["drawn"].values())) for r in saves]
        lines.append(_line(Path(store).name, (r["step"] for r in saves), shares, 10**6, dots=True))
    return _figure("mixture", "Shares of the mixture", "% of the samples so far", lines)


def _clock(train: Sequence[_Record]) -> dict[str, list[float | None]]:
    """By step: tokens, and hours spent in steps."""
    chosen = np.unique(np.linspace(0, len(train) - 1, min(len(train), CLOCK_POINTS)).astype(int)) if train else []
    hours = np.cumsum([record["step_seconds"] for record in train]) / 3600
    picked = [train[int(i)] for i in chosen]
    return {
        "step": [0, *(record["step"] for record in picked)],
        "tokens": [0, *(record["tokens"] for record in picked)],
        "hours": [0.0, *rounded(np.array([hours[int(i)] for i in chosen]), 7)],
    }


def _marks(run: Path) -> dict[str, list[_Record]]:
    """Of everything that ever happened, that of dead process groups included, since the run was last begun afresh."""
    found: dict[str, list[_Record]] = {}
    for record in read_lines(run):
        event = record.get("event")
        if event == "start":
            found = {}
        elif event in MARKS:
            said = record.get("error") or record.get("path") or ""
            if samples := record.get("samples"):
                said = f"samples {samples[0]} to {samples[1] - 1}"
            found.setdefault(event, []).append({"step": record["step"], "said": str(said)[:300]})
    return {event: marks[-MOST_MARKS:] for event, marks in found.items()}


def _answers(records: Sequence[_Record]) -> list[_Record]:
    prompts: dict[str, list[_Record]] = {}
    for record in records:
        if record.get("event") == "answer":
            prompts.setdefault(record["prompt"], []).append({"step": record["step"], "answer": record["answer"]})
    found = []
    for prompt, answers in prompts.items():
        step = max(1, -(-len(answers) // MOST_ANSWERS))
        found.append({"prompt": prompt, "answers": [*answers[:-1:step], answers[-1]]})
    return found


def _facts(train: Sequence[_Record], starts: Sequence[_Record]) -> list[list[str]]:
    """Rows of plan against measured: what, planned, measured."""
    start = starts[-1] if starts else {}
    planned, total = start.get("planned", {}), start.get("total_steps")
    rows = [["steps", _number(total), _number(train[-1]["step"] if train else 0)]]
    if not train:
        return rows
    rates = [record["tokens_per_second"] for record in train if record["tokens_per_second"]]
    seconds = [record["step_seconds"] for record in train]
    middle = float(np.median(seconds))
    whole = f"{total * middle / 3600:.3g}" if total else ""
    rows += [
        ["tokens (planned: places; measured: those that carry loss)", _number(planned.get("positions")),
         _number(train[-1]["tokens"])],
        ["hours in steps (planned: all steps at the median's pace)", whole, f"{sum(seconds) / 3600:.3g}"],
        ["seconds of a step, median", "", f"{middle:.3g}"],
        ["tokens a second, median", "", f"{np.median(rates):,.0f}" if rates else ""],
    ]  # fmt: skip
    memory = [record["most_memory"] for record in train if "most_memory" in record]
    if memory or planned.get("memory"):
        plan = f"{planned['memory'] / GIB:.2f}" if planned.get("memory") else ""
        rows.append(["GiB of the largest rank", plan, f"{max(memory) / GIB:.2f}" if memory else ""])
    return rows + (_utilisation(start, planned, float(np.median(rates))) if rates else [])


def _utilisation(start: _Record, planned: _Record, rate: float) -> list[list[str]]:
    """What a rank's arithmetic came to, where the model's is known; of the device's peak, where that one is."""
    model, ranks = planned.get("model_config") or {}, (start.get("layout") or {}).get("world")
    if model.get("model_type") not in FAMILIES or not ranks:
        return []
    reached = model_flops(model, planned["seq_len"]) * rate / ranks
    rows = [["TFLOP/s of a rank, of the model's own arithmetic", "", f"{reached / 1e12:.3g}"]]
    name = str((start.get("hosts") or [{}])[0].get("device_name", "")).lower()
    for key, device in DEVICES.items():
        if key.split("-")[0] in name and (peak := device.peak.get(planned.get("computes_in", ""))):
            return [*rows, [f"MFU, % of the peak of {device.name}", "", f"{100 * reached / peak:.1f}"]]
    return rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}"


def _environment(run: Path) -> dict[str, str]:
    environment = _yaml(run / "environment.json")
    hosts = environment.get("hosts") or []
    names: dict[str, int] = {}
    for host in hosts:
        label = f"{host.get('host')}: {host.get('device_name', '')}"
        names[label] = names.get(label, 0) + 1
    found = {key: str(environment[key]) for key in ("command", "git", "python", "platform") if environment.get(key)}
    found |= {f"{name} (version)": version for name, version in (environment.get("versions") or {}).items()}
    return found | {f"host {label}": f"{count} ranks" for label, count in names.items()}
