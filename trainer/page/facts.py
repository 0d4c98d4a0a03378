"""Plan against measured: rows of a table, and what of a device's peak was reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...data_prep.errors import UserError
from ..plan.deepspeed_json import load_pair
from ..plan.plan import make_plan
from ..tune.hardware import DEVICES, GIB, Device
from ..tune.search import predicted_seconds

_Record = dict[str, Any]
_NO_PEAK = "not known: the peak of {} is not among those of zeropipe tune"
_NO_FLOPS = "not known: this model's arithmetic cannot be counted from its table of parameters"


def facts_of(run: Path, train: Sequence[_Record], starts: Sequence[_Record]) -> list[list[str]]:
    """Rows of what, planned, measured.

    Args:
        train, starts: the records that count: of steps, and of the process groups that took them.
    """
    start = starts[-1] if starts else {}
    planned, total = start.get("planned", {}), start.get("total_steps")
    rows = [["steps", _number(total), _number(train[-1]["step"] if train else 0)]]
    if not train:
        return rows
    rates = [record["tokens_per_second"] for record in train if record["tokens_per_second"]]
    seconds = [record["step_seconds"] for record in train]
    middle = float(np.median(seconds))
    predicted = _predicted(run, start)
    whole = f"{total * (predicted or middle) / 3600:.3g}" if total else ""
    pace = "as planned" if predicted else "at the median's pace"
    rows += [
        ["tokens (planned: places; measured: those that carry loss)", _number(planned.get("positions")),
         _number(train[-1]["tokens"])],
        [f"hours in steps (planned: all steps {pace})", whole, f"{sum(seconds) / 3600:.3g}"],
        ["seconds of a step, median", f"{predicted:.3g}" if predicted else "not known", f"{middle:.3g}"],
        ["tokens a second, median", "", f"{np.median(rates):,.0f}" if rates else ""],
    ]  # fmt: skip
    memory = [record["most_memory"] for record in train if "most_memory" in record]
    if memory or planned.get("memory"):
        plan = f"{planned['memory'] / GIB:.2f}" if planned.get("memory") else ""
        rows.append(["GiB of the largest rank", plan, f"{max(memory) / GIB:.2f}" if memory else ""])
    return rows + (_utilisation(start, float(np.median(rates))) if rates else [])


def _utilisation(start: _Record, rate: float) -> list[list[str]]:
    """What a rank's arithmetic came to, and that of its device's peak; or why that is not known."""
    rank, mfu = "TFLOP/s of a rank, of the model's own arithmetic", "MFU, % of the peak"
    if (flops := rank_flops(start)) is None:
        return [[rank, "", _NO_FLOPS], [mfu, "", _NO_FLOPS]]
    rows = [[rank, "", f"{flops * rate / 1e12:.3g}"]]
    if (device := _device(start)) is None or (peak := peak_of(start)) is None:
        return [*rows, [mfu, "", _NO_PEAK.format(_device_name(start) or "this device")]]
    return [*rows, [f"{mfu} of {device.name}", "", f"{100 * flops * rate / peak:.1f}"]]


def rank_flops(start: _Record) -> float | None:
    """Floating-point operations that each rank takes for a token of the whole run; None where they are not known."""
    flops, ranks = start.get("planned", {}).get("token_flops"), (start.get("layout") or {}).get("world")
    return flops / ranks if flops and ranks else None


def peak_of(start: _Record) -> float | None:
    """Of a rank's device, operations a second; None where it is not known."""
    device = _device(start)
    return None if device is None else device.peak.get(start.get("planned", {}).get("computes_in", ""))


def _device(start: Mapping[str, Any]) -> Device | None:
    """What a process group ran on, if it is in the table."""
    name = _device_name(start).lower()
    return next((device for key, device in DEVICES.items() if name and key.split("-")[0] in name), None)


def _device_name(start: Mapping[str, Any]) -> str:
    return str((start.get("hosts") or [{}])[0].get("device_name", ""))


def _predicted(run: Path, start: _Record) -> float | None:
    """Seconds of a step as `zeropipe tune` predicts them; None where it cannot: another device, data that is gone."""
    device, world = _device(start), (start.get("layout") or {}).get("world")
    if device is None or not world:
        return None
    try:
        pair = load_pair(str(run / "recipe.yaml"), str(run / "deepspeed.json"))
        return predicted_seconds(make_plan(*pair, world), device)
    except UserError:  # the page shows what is there
        return None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}"
