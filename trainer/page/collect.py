"""What the page shows of a run, read from the files in its directory alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..metrics.reading import counting, read_lines
from ..sinks.base import flattened
from .decimate import rounded
from .facts import facts_of
from .figures import STARTS, figures_of

_Record = dict[str, Any]
MARKS = ("resume", "rewind", "skip", "save", "failed")
CLOCK_POINTS = 400  # of the table by which steps become tokens and hours
MOST_MARKS = 400  # of a kind
MOST_ANSWERS = 60
MOST_TASKS = 400  # rows


def collect(run: str | Path, points: int, lines: Sequence[_Record] | None = None) -> dict[str, Any]:
    """A run as plain JSON values; each figure has at most about `points` points.

    Args:
        lines: all that it recorded, where that has been read.

    Raises:
        UserError: there is no record, or it is damaged.
    """
    run = Path(run)
    lines = list(read_lines(run)) if lines is None else lines
    records = counting(lines)
    train = [record for record in records if record["kind"] == "train"]
    starts = [record for record in records if record.get("event") in STARTS]
    return {
        "name": run.resolve().name,
        "path": str(run),
        "clock": _clock(train),
        "figures": figures_of(records, points),
        "marks": _marks(lines),
        "facts": facts_of(run, train, starts),
        "tasks": _tasks(records),
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


def _marks(lines: Sequence[_Record]) -> dict[str, list[_Record]]:
    """Of everything that ever happened, that of dead process groups included, since the run was last begun afresh."""
    found: dict[str, list[_Record]] = {}
    for record in lines:
        event = record.get("event")
        if event == "start":
            found = {}
        elif event in MARKS:
            said = record.get("error") or record.get("path") or ""
            if samples := record.get("samples"):
                said = f"samples {samples[0]} to {samples[1] - 1}"
            found.setdefault(event, []).append({"step": record["step"], "said": str(said)[:300]})
    return {event: marks[-MOST_MARKS:] for event, marks in found.items()}


def _tasks(records: Sequence[_Record]) -> list[list[str]]:
    """Rows of step, task, metric, value, samples; the newest first."""
    rows = []
    for record in records:
        if record["kind"] != "task":
            continue
        for key, value in record.items():
            name, _, kept = key.partition(",")
            if kept and not name.endswith("_stderr"):
                error = record.get(f"{name}_stderr,{kept}")
                said = f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
                metric = name if kept == "none" else f"{name}, {kept}"
                rows.append([f"{record['step']:,}", record["task"], metric, said, f"{record['samples']:,}"])
    return rows[::-1][:MOST_TASKS]


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
