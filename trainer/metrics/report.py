"""`zeropipe report`: a run's record on one screen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ...data_prep.sizes import format_bytes
from ..sinks.console import duration
from .reading import read_lines, read_metrics

POINTS = 10
BARS = "▁▂▃▄▅▆▇█"
CURVE = 60  # characters

_LOADS = {"router/load_entropy": ".3f", "router/load_max": ".2f"}

_Record = dict[str, Any]


def report(run: str | Path) -> str:
    """Loss curve, throughput, evaluations, resumes of a run directory, as text.

    Raises:
        UserError: there is no record.
    """
    records = read_metrics(run)
    train = [record for record in records if record["kind"] == "train"]
    sections = [_heading(run, records, train)]
    if train:
        sections += [curve(train), table(train), throughput(train)]
    if any("router/load" in record for record in train):
        sections.append(experts(train))
    evals = [record for record in records if record["kind"] == "eval"]
    if evals:
        sections.append(evaluations(evals))
    tasks = [record for record in records if record["kind"] == "task"]
    if tasks:
        sections.append(reached(tasks))
    profiles = [record for record in records if record.get("event") == "profile"]
    if profiles:
        sections.append(instruments(profiles[-1]))
    sections.append(history(run))
    return "\n\n".join(sections)


def _heading(run: str | Path, records: Sequence[_Record], train: Sequence[_Record]) -> str:
    totals = [record["total_steps"] for record in records if "total_steps" in record]
    step = train[-1]["step"] if train else 0
    of = f" of {totals[-1]}" if totals else ""
    tokens = f", {train[-1]['tokens']:,} tokens" if train else ""
    return f"{Path(run)}: step {step}{of}{tokens}"


def curve(train: Sequence[_Record]) -> str:
    """The loss as one line of bars, the means of equal stretches of steps."""
    losses = [record["loss"] for record in train]
    groups = [losses[len(losses) * i // CURVE : len(losses) * (i + 1) // CURVE] for i in range(CURVE)]
    means = [sum(group) / len(group) for group in groups if group]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)

    def bar(mean: float) -> str:
        if not math.isfinite(mean):
            return "!"
        return BARS[round((mean - low) / (high - low) * (len(BARS) - 1))] if high > low else BARS[0]

    return f"loss {high:.3f} to {low:.3f}  {''.join(map(bar, means))}"


def table(train: Sequence[_Record]) -> str:
    """A line for each of some steps, evenly over the run."""
    lines = [f"{'step':>10} {'loss':>10} {'lr':>10} {'grad norm':>10} {'tokens/s':>10}"]
    for record in evenly(train, POINTS):
        norm = "-" if record["grad_norm"] is None else f"{record['grad_norm']:.3f}"
        rate = "-" if record["tokens_per_second"] is None else f"{record['tokens_per_second']:,.0f}"
        lines.append(f"{record['step']:>10} {record['loss']:>10.4f} {record['lr']:>10.2e} {norm:>10} {rate:>10}")
    return "\n".join(lines)


def throughput(train: Sequence[_Record]) -> str:
    """Medians over the steps, and the share of the time that data was waited for."""
    seconds = [record["step_seconds"] for record in train]
    rates = [record["tokens_per_second"] for record in train if record["tokens_per_second"] is not None]
    text = f"throughput: median {median(rates):,.0f} tokens/s, {median(seconds):.3f} s a step" if rates else ""
    waited = sum(record.get("data_seconds", 0.0) for record in train)
    if rates and "data_seconds" in train[0]:
        text += f", {100 * waited / sum(seconds):.1f} % of it waiting for data"
    return f"{text}; {duration(sum(seconds))} in steps"


def experts(train: Sequence[_Record]) -> str:
    """Where the tokens of a mixture went: at the first and the last step, and in the last record of all loads a bar for
    each expert.
    """
    first, last = (next(record for record in order if "router/load_max" in record) for order in (train, train[::-1]))
    loads = next(record["router/load"] for record in reversed(train) if "router/load" in record)
    entropy, most = (f"{first[key]:{form}} to {last[key]:{form}}" for key, form in _LOADS.items())
    unused = f"{last['router/unused']} of {sum(map(len, loads))} unused"
    lines = [f"experts: load entropy {entropy} of 1, largest load {most} of the mean, {unused}"]
    highest = max(max(shares) * len(shares) for shares in loads)
    for number, shares in enumerate(loads):
        times = [share * len(shares) for share in shares]
        bars = "".join(BARS[round(load / highest * (len(BARS) - 1))] for load in times)
        lines.append(f"  router {number}: {bars}  {min(times):.2f} to {max(times):.2f} of the mean")
    return "\n".join(lines)


def evaluations(evals: Sequence[_Record]) -> str:
    """Each split's best loss, and some of its losses over the run."""
    lines = []
    for split in dict.fromkeys(record["split"] for record in evals):
        of_split = [record for record in evals if record["split"] == split]
        best = min(of_split, key=lambda record: record["loss"])
        perplexity = f"perplexity {best['perplexity']:.2f}"
        lines.append(f"{split}: best loss {best['loss']:.4f} ({perplexity}) at step {best['step']}")
        shown = (f"{record['step']}: {record['loss']:.4f}" for record in evenly(of_split, POINTS))
        lines.append("  " + "  ".join(shown))
    return "\n".join(lines)


def reached(tasks: Sequence[_Record]) -> str:
    """What `zeropipe eval --tasks` found, in the order in which it was asked."""
    return "\n".join(
        f"{record['task']} at step {record['step']}: "
        + ", ".join(f"{name.partition(',')[0]} {value:.4f}" for name, value in record.items() if "," in name)
        for record in tasks
    )


def instruments(profile: _Record) -> str:
    """What DeepSpeed's own instruments measured on the main rank of the last process group that had them on."""
    lines = []
    if spent := profile.get("milliseconds"):
        lines.append("wall clock of a step: " + ", ".join(f"{name} {value:.1f} ms" for name, value in spent.items()))
    for operation, sums in sorted(profile.get("communication", {}).items()):
        size = format_bytes(int(sums["bytes"]))
        lines.append(f"communication: {operation} {sums['calls']:,} calls, {size}, {sums['seconds']:.2f} s")
    if flops := profile.get("flops"):
        rate = flops["forward_flops"] / flops["forward_seconds"] / 1e9 if flops["forward_seconds"] else 0.0
        lines.append(f"flops profiler: forward {flops['forward_flops'] / 1e9:,.2f} GFLOP, {rate:,.1f} GFLOP/s")
    return "\n".join(lines)


def history(run: str | Path) -> str:
    """Every process group that worked on the run: what it started from, on what, and how far it came."""
    groups: dict[str, list[_Record]] = {}
    for record in read_lines(run):
        groups.setdefault(record["run"], []).append(record)
    lines = ["process groups:"]
    for records in groups.values():
        first, last = records[0], records[-1]
        layout = first.get("layout", {})
        hosts = len({host.get("host") for host in first.get("hosts", [])}) or 1
        what = first.get("event", "start")
        where = f"{layout.get('world', '?')} ranks on {hosts} host{'s' if hosts > 1 else ''}"
        failed = f", failed: {last['error']}" if last.get("event") == "failed" else ""
        steps = f"{what} at step {first['step']}, to step {last['step']}"
        lines.append(f"  {steps}, {where}, ZeRO-{layout.get('zero_stage', '?')}{failed}")
    return "\n".join(lines)


def evenly(records: Sequence[_Record], points: int) -> list[_Record]:
    """At most `points` of the records, evenly spread, the first and the last among them."""
    if len(records) <= points:
        return list(records)
    return [records[round(i * (len(records) - 1) / (points - 1))] for i in range(points)]
