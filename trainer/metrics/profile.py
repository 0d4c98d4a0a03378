"""What DeepSpeed's own instruments measured in a run, as one event at its end: `wall_clock_breakdown`, `comms_logger`,
`flops_profiler`. Its own tables go to its log, which is quiet. Figures are those of the main rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..plan.plan import Plan
from ..run.state import TrainState
from .record import RunLog

FLOPS_FILE = "flops_profile.txt"
EVENT = "profile"


class Profile:
    """Asks DeepSpeed's engine after every step, where the JSON has switched something on."""

    def __init__(self, plan: Plan, deepspeed_engine: Any, log: RunLog) -> None:
        self._engine, self._log, self._on = deepspeed_engine, log, _switched_on(plan.deepspeed)
        self._milliseconds: Counter[str] = Counter()
        self._steps, self._flops = 0, {}
        if "flops_profiler" in self._on and log.ranks.is_main:
            self._take_flops(plan.deepspeed["flops_profiler"].get("output_file"))

    def after_step(self, state: TrainState) -> None:
        """Sums up a step; after the last, records it all."""
        if not self._on:
            return
        self._steps += 1
        self._milliseconds.update(self._engine.get_wall_clock_timers())
        if not state.done:
            return
        found: dict[str, Any] = {}
        if "wall_clock_breakdown" in self._on and self._steps:
            whole = {name: total for name, total in self._milliseconds.items() if not name.endswith("_microstep")}
            found["milliseconds"] = {name: total / self._steps for name, total in whole.items()}
        if "comms_logger" in self._on:
            found["communication"] = _communication()
        if self._flops:
            found["flops"] = self._flops
        self._log.event(EVENT, state.step, **found)

    def _take_flops(self, output_file: str | None) -> None:
        """The profiler forgets its figures as soon as it has printed them."""
        profiler = self._engine.flops_profiler
        write = profiler.print_model_profile

        def taken(**arguments: Any) -> None:
            self._flops = {
                "parameters": profiler.get_total_params(),
                "forward_flops": profiler.get_total_flops(),
                "forward_seconds": profiler.get_total_duration(),
                "step": arguments.get("profile_step"),
            }
            write(**{**arguments, "output_file": output_file or str(self._log.directory / FLOPS_FILE)})

        profiler.print_model_profile = taken


def _switched_on(ds: Mapping[str, Any]) -> set[str]:
    sections = {key for key in ("flops_profiler", "comms_logger") if (ds.get(key) or {}).get("enabled")}
    return sections | ({"wall_clock_breakdown"} if ds.get("wall_clock_breakdown") else set())


def _communication() -> dict[str, dict[str, float]]:
    """By operation: how many calls, the bytes that one rank gave to them, and the seconds that they took."""
    from deepspeed.comm import comm

    found = {}
    for operation, sizes in comm.comms_logger.get_raw_data().items():
        calls = sum(entry[0] for entry in sizes.values())
        nbytes = sum(size * entry[0] for size, entry in sizes.items())
        found[operation] = {"calls": calls, "bytes": nbytes, "seconds": sum(sum(e[1]) for e in sizes.values()) / 1e3}
    return found
