"""Tasks of EleutherAI's lm-evaluation-harness (the extra `tasks`) on a plain Hugging Face model, in one process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from ...data_prep.errors import UserError
from ...data_prep.lock import LockedError, lock_file
from ..metrics.reading import read_lines
from ..sinks.jsonl import METRICS, open_for_append

TASK = "task"  # kind of a record in metrics.jsonl


@dataclass(frozen=True)
class TaskResult:
    """What a model reached at one task."""

    task: str
    samples: int
    shots: int
    metrics: Mapping[str, float]  # by the harness's names: "acc,none", "acc_stderr,none"

    def record(self) -> dict[str, Any]:
        """The fields of a record, beside its kind and step."""
        return {"task": self.task, "samples": self.samples, "shots": self.shots, **self.metrics}

    def __str__(self) -> str:
        found = []
        for name, value in self.metrics.items():
            metric, _, kept = name.partition(",")
            if not metric.endswith("_stderr"):
                error = self.metrics.get(f"{metric}_stderr,{kept}")
                found.append(f"{metric} {value:.4f}{'' if error is None else f' ± {error:.4f}'}")
        return f"{self.task}: {', '.join(found)} ({self.samples:,} samples, {self.shots} shots)"


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> list[TaskResult]:
    """Evaluates a model, on the device that it is on, and in its dtype.

    Args:
        tasks: names of the harness's own, or task files (YAML), which work without a network.
        shots: examples before each question; None: as each task says.
        limit: samples of each task, at most.

    Raises:
        UserError: the harness is missing, or a task is not known or cannot be loaded.
    """
    if tokenizer is None:
        raise UserError("--tasks: are texts, and no tokenizer was found for this model")
    own = part("models.huggingface", "--tasks").HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    return ask_tasks(own, tasks, "--tasks", shots, limit)


def part(name: str, said: str) -> Any:
    """A module of the harness. UserError where it is not installed. `said`: by what the user asked for it."""
    try:
        return import_module(f"lm_eval.{name}")
    except ImportError:
        raise UserError(f"{said}: needs lm-evaluation-harness: pip install 'zeropipe[tasks]'") from None


def ask_tasks(
    own: Any, tasks: Sequence[str], said: str, shots: int | None = None, limit: int | None = None, draws: int = 100_000
) -> list[TaskResult]:
    """Evaluates one of the harness's own kind of models. Other arguments and errors: as `run_tasks`.

    Args:
        said: by what the user asked for it.
        draws: of a bootstrap, by which standard errors are found that no formula gives.
    """
    with asking(tasks, said) as (named, manager):
        found: Any = part("evaluator", said).simple_evaluate(
            own,
            tasks=named,
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=draws,
        )
    return [_result(name, values, found) for name, values in sorted(found["results"].items())]


def load_tasks(tasks: Sequence[str], said: str) -> None:
    """Loads the tasks, their data too.

    Raises:
        UserError: as `run_tasks`; or one of them generates text.
    """
    with asking(tasks, said) as (named, manager):
        found = part("tasks", said).get_task_dict(named, manager)
    for name, task in _leaves(found):
        if task.OUTPUT_TYPE == "generate_until":
            raise UserError(
                f"{said}: {name} generates text, of which each token is a forward pass of all ranks; ask it of the run "
                f"afterwards: zeropipe eval RUN --tasks {name}"
            )


def _leaves(found: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The tasks in what may be groups of groups of them."""
    for name, task in found.items():
        if isinstance(task, Mapping):
            yield from _leaves(task)
        else:
            yield str(name), task


@contextlib.contextmanager
def asking(tasks: Sequence[str], said: str) -> Iterator[tuple[list[str | dict[str, Any]], Any]]:
    """Tasks as the harness takes them, and its manager; what it says against them is a UserError. Its bars are shown
    on a terminal alone.
    """
    files = [task for task in tasks if is_file(task)]
    manager = part("tasks", said).TaskManager(include_defaults=len(files) < len(tasks))
    named: list[str | dict[str, Any]] = [read_task(Path(task), said) if task in files else task for task in tasks]
    hidden = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    with offline(len(files) == len(tasks)):
        try:
            with hidden:
                yield named, manager
        except (KeyError, ValueError, TypeError, OSError, TemplateError) as error:
            raise UserError(f"{said} {' '.join(tasks)}: the harness says: {error}") from error


def is_file(task: str) -> bool:
    """Whether a task is named by its file."""
    return task.endswith((".yaml", ".yml"))


def read_task(path: Path, said: str) -> dict[str, Any]:
    """A task file as the harness takes it; files of data that it names by relative paths are looked for beside it.

    Raises:
        UserError: it cannot be read, or says no task.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    if not path.is_file():
        raise UserError(f"{said} {path}: no such file")
    try:
        config = load_yaml(path)
    except Exception as error:  # yaml's, and those of what it includes
        raise UserError(f"{path}: cannot be read as a task: {error}") from None
    if not isinstance(config, dict) or "task" not in config:
        raise UserError(f"{path}: no task: it has no key `task`, its name")
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if files is not None:
        config["dataset_kwargs"]["data_files"] = _beside(files, path.parent)
    return config


def _beside(files: Any, folder: Path) -> Any:
    if isinstance(files, Mapping):
        return {key: _beside(value, folder) for key, value in files.items()}
    if isinstance(files, list):
        return [_beside(value, folder) for value in files]
    return str(folder.absolute() / files) if (folder / files).exists() else files


@contextlib.contextmanager
def offline(yes: bool) -> Iterator[None]:
    """Data sets are looked for on this machine only."""
    datasets: Any = import_module("datasets")
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or yes
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _result(name: str, values: Mapping[str, Any], found: Mapping[str, Any]) -> TaskResult:
    metrics = {key: float(value) for key, value in values.items() if isinstance(value, int | float) and "," in key}
    samples = found.get("n-samples", {}).get(name, {}).get("effective", 0)
    return TaskResult(name, samples, found.get("n-shot", {}).get(name) or 0, metrics)


def record_tasks(run: Path, step: int, results: Sequence[TaskResult]) -> None:
    """Appends results to a run's metrics.jsonl, as of the process group that took the step last.

    Raises:
        UserError: there is no record, it is damaged, or the run is under way and writes it.
        OSError: it cannot be written.
    """
    last = None
    for record in read_lines(run):
        last = record
    if last is None:
        raise UserError(f"{run / METRICS}: is empty, so there is no run to record results of")
    try:
        lock = lock_file(run / ".lock")
    except LockedError as error:
        raise UserError(f"{run} is in use by {error.holder}, so the results were not recorded there") from None
    with lock, open_for_append(run / METRICS) as file:
        for result in results:
            stamped = {"kind": TASK, "step": step, **result.record(), "run": last["run"], "time": time.time()}
            file.write(json.dumps(stamped) + "\n")
        file.flush()
        os.fsync(file.fileno())
