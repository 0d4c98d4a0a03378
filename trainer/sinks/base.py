"""What a metric sink is: where the record of a run goes.

A sink is one file here and a line in `registry.py`. JSON lines and the console are always there; a recipe's `log.sinks`
names the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

# of a train or eval record, what is no measurement
BOOKKEEPING = ("kind", "step", "split", "tokens", "eval_tokens", "samples", "ledger", "run", "time")


@dataclass(frozen=True)
class SinkSettings:
    """What a sink is told when it opens, at the first record of a process group."""

    directory: Path  # of the run
    every: int  # `log.every`: steps between what is shown to people
    total_steps: int
    resumed_from: int  # the last step that counts from before; what dead process groups recorded beyond is void

    def shown(self, step: int) -> bool:
        """Whether a step is one that people see."""
        return step % self.every == 0 or step in (self.resumed_from + 1, self.total_steps)


class Sink(Protocol):
    """Takes the records of one process group, on the main rank. Its constructor takes `SinkSettings`.

    Importing its file must import neither torch nor its own library: a login node plans with it.
    """

    def write(self, record: Mapping[str, Any], message: str | None) -> None:
        """Takes one record of metrics.jsonl, in order.

        Args:
            record: plain JSON values; `kind` is train, eval or event.
            message: what a person should read of it, where there is something.

        Raises:
            Exception: it cannot be written. The run goes on without the sink; where metrics.jsonl or the console raises
                an OSError, it saves and stops.
        """
        ...

    def close(self) -> None: ...


def measurements(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a train or eval record, by name."""
    found = {key: value for key, value in record.items() if key not in BOOKKEEPING}
    return {key: float(value) for key, value in found.items() if isinstance(value, int | float)}
