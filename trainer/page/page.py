"""`zeropipe report RUN [RUN …] --html FILE`: one page that opens anywhere, without a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from ...data_prep.durable import write_durably
from ...data_prep.errors import UserError, as_user_error
from .collect import collect

FIGURE_POINTS = 4500  # of a figure of one run
ALL_POINTS = 9000  # of a figure of all runs together
MOST_RUNS = 20


def write_page(runs: Sequence[str | Path], file: Path) -> int:
    """Writes the page; returns its size in bytes.

    Raises:
        UserError: a run has no record, or the file cannot be written.
    """
    if len(runs) > MOST_RUNS:
        raise UserError(f"{len(runs)} runs on one page: {MOST_RUNS} at most, or nobody can tell them apart")
    found = [collect(run, points_of(len(runs))) for run in runs]
    page = page_of(found).encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_durably(file, page)
    except OSError as error:
        raise as_user_error(error, "the page cannot be written", file) from error
    return len(page)


def points_of(runs: int) -> int:
    """Of a figure, for each of so many runs."""
    return min(FIGURE_POINTS, ALL_POINTS // max(1, runs))


def page_of(runs: Sequence[object], live: bool = False) -> str:
    """The page with its data inside; `live`: it takes more from where it came from."""
    # in a script element only "</" and "<!--" could end or open something
    data = {"runs": runs, "live": live}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    text = text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    page = _asset("page.html")
    parts = {
        "/*LIVE*/": "; connect-src 'self'" if live else "",
        "/*UPLOT_CSS*/": _asset("vendor/uPlot.min.css"),
        "/*PAGE_CSS*/": _asset("page.css"),
        "/*UPLOT_JS*/": _asset("vendor/uPlot.iife.min.js"),
        "/*PAGE_JS*/": _asset("page.js"),
        "/*DATA*/": text,
    }
    for mark, content in parts.items():
        before, _, after = page.partition(mark)
        page = before + content + after
    return page


def _asset(name: str) -> str:
    return resources.files(__package__ or "").joinpath(name).read_text(encoding="utf-8")
