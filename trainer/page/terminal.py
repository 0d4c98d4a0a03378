"""`zeropipe watch --tui`: runs as they are now, in a terminal."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live as Screen
from rich.table import Table
from rich.text import Text

from ..metrics.report import BARS
from .live import LiveRuns

_WIDTH = 24  # characters of a curve
_COLOURS = {"training": "green", "finished": "cyan", "failed": "red", "silent": "red"}


def draw(live: LiveRuns) -> None:
    """Draws until Ctrl-C; once, where the output is no terminal."""
    console = Console()
    if not console.is_terminal:
        console.print(runs_table(live.runs()))
        return
    with Screen(console=console, auto_refresh=False) as screen:
        while True:
            screen.update(Group(runs_table(live.runs()), Text("Ctrl-C ends", style="dim")), refresh=True)
            time.sleep(1.0)


def runs_table(runs: list[dict[str, Any]]) -> Table:
    """A line for each run."""
    whole = Table("run", "state", "loss", "", "eval", "tokens/s", expand=False)
    for run in runs:
        figures = {figure["key"]: figure["lines"] for figure in run["figures"]}
        train, *evals = figures.get("loss", [{"y": []}])
        speed = figures.get("speed", [{"y": []}])[0]["y"]
        state = run["state"]
        whole.add_row(
            Text(run["name"]),
            Text(state["said"], style=_COLOURS[state["kind"]]),
            _last(train["y"], ".4f"),
            curve_of(train["y"]),
            Text("\n".join(f"{line['label']} {_last(line['y'], '.4f')}" for line in evals)),
            _last(speed, ",.0f"),
        )
    return whole


def curve_of(values: list[float | None], width: int = _WIDTH) -> str:
    """Means of equal stretches as bars."""
    finite = [value for value in values if value is not None]
    groups = [finite[len(finite) * i // width : len(finite) * (i + 1) // width] for i in range(width)]
    means = [sum(group) / len(group) for group in groups if group]
    if not means or max(means) == min(means):
        return BARS[0] * len(means)
    low, high = min(means), max(means)
    return "".join(BARS[round((mean - low) / (high - low) * (len(BARS) - 1))] for mean in means)


def _last(values: list[float | None], form: str) -> str:
    return "" if not values else "no number" if values[-1] is None else format(values[-1], form)
