"""What a metric sink is: where the record of a run goes.

A sink is one file here and a line in `registry.py`. JSON lines and the console are always there; a recipe's `log.sinks`
names the others, each of which has a thread of its own (`aside.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

PROJECT = "zeropipe"  # in trackers that sort runs by one, unless a variable of theirs names another
# of a train or eval record, what is no measurement
BOOKKEEPING = ("kind", "step", "split", "tokens", "eval_tokens", "samples", "ledger", "run", "time")


@dataclass(frozen=True)
class SinkSettings:
    """What a sink is told when it opens, at the first record of a process group, or of a run that went back."""

    directory: Path  # of the run
    name: str  # the recipe's
    run: str  # the id of these records
    begun: str  # the id of the records that the run was begun with: the same for as long as it is resumed
    configuration: Mapping[str, Any]  # the resolved pair: "recipe" and "deepspeed"
    every: int  # `log.every`: steps between what is shown to people
    total_steps: int
    resumed_from: int  # the last step that counts from before; what dead process groups recorded beyond is void

    def shown(self, step: int) -> bool:
        """Whether a step is one that people see."""
        return step % self.every == 0 or step in (self.resumed_from + 1, self.total_steps)


class Sink(Protocol):
    """Takes the records of one process group, on the main rank. Its constructor takes `SinkSettings`.

    Importing its file must import neither torch nor its own library: a login node plans with it. What a recipe names is
    made, called and closed in one thread, which is not the main one.
    """

    def write(self, record: Mapping[str, Any], message: str | None) -> None:
        """Takes one record of metrics.jsonl, in order.

        Args:
            record: plain JSON values; `kind` is train, eval, task or event.
            message: what a person should read of it, where there is something.

        Raises:
            Exception: it cannot be written. The run goes on without the sink; where metrics.jsonl or the console raises
                an OSError, the run saves and stops.
        """
        ...

    def close(self) -> None: ...


def measurements(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a train or eval record, by name."""
    found = {key: value for key, value in record.items() if key not in BOOKKEEPING}
    return {key: float(value) for key, value in found.items() if isinstance(value, int | float)}


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """The measurements of a record by the names that trackers show: train/loss, eval/valid_loss, task/arc_easy/acc.
    None of an event.
    """
    if record["kind"] == "event":
        return {}
    if record["kind"] == "task":  # by the harness's names: acc,none
        named = ((key.removesuffix(",none").replace(",", "/"), value) for key, value in record.items() if "," in key)
        return {f"task/{record['task']}/{name}": float(value) for name, value in named}
    prefix = "train/" if record["kind"] == "train" else f"eval/{record['split']}_"
    return {prefix + name: value for name, value in measurements(record).items()}


def flattened(value: Any, prefix: str = "") -> dict[str, str]:
    """Dotted keys of nested mappings, with their values as JSON."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: json.dumps(value, ensure_ascii=False, default=str)} if prefix else {}
    found: dict[str, str] = {}
    for key, inner in value.items():
        found |= flattened(inner, f"{prefix}.{key}" if prefix else str(key))
    return found
