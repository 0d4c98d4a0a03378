"""What a search found, for people and programs; and the DeepSpeed JSON of the best."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ...data_prep.errors import UserError, as_user_error
from ...data_prep.sizes import format_bytes
from .cost import Cost
from .hardware import Device
from .search import Candidate, Found

PARTS = [field.name for field in fields(Cost)][:8]
_WORDS = {
    "compute": "computes less fast",
    "recompute": "recomputes activations",
    "tensor": "all-reduces activations",
    "sequence": "exchanges attention",
    "pipeline": "waits for other stages",
    "data": "sends gradients and weights",
    "update": "updates more, or on the host",
    "host": "more work for the host",
}


def found_lines(found: Found, device: Device, most: int, measured: Mapping[Candidate, float | str]) -> list[str]:
    """The best `most` that fit, each with what it loses to the first; then the best that do not fit.

    Args:
        measured: seconds of a step of those that were tried, or why they failed.
    """
    best, *_ = found.fitting
    heading = (
        f"{'':>3} {'layout':<62} {'micro':>5} {'again':>5} {'memory':>10} {'step s':>9} {'tokens/s':>11} {'MFU':>6}"
    )
    heading += f" {'measured s':>10}" * bool(measured)
    lines = [f"{heading}  behind the first"]
    for number, one in enumerate(found.fitting[:most], 1):
        lines.append(f"{number:>3} {_row(one, measured)}  {_behind(one, best)}".rstrip())
    faster = [one for one in found.candidates if not one.fits and one.cost.seconds < best.cost.seconds]
    if faster:
        lines.append(f"faster, but more than {format_bytes(device.memory)} of memory:")
        lines += [f"    {_row(one, measured)}".rstrip() for one in faster[:3]]
    refused = sum(found.refused.values())
    lines.append(
        f"{len(found.candidates):,} plans are legal, {len(found.fitting):,} of them fit"
        + (f"; {refused:,} layouts are refused, most for: {_most(found.refused)}" if refused else "")
    )
    return lines


def _row(one: Candidate, measured: Mapping[Candidate, float | str]) -> str:
    cost = one.cost
    text = (
        f"{one.layout!s:<62} {one.micro_batch:>5} {'yes' if one.checkpointing else 'no':>5} "
        f"{format_bytes(one.memory.peak):>10} {cost.seconds:>9.4g} {cost.tokens_per_second:>11,.0f} "
        f"{cost.utilisation:>6.1%}"
    )
    if not measured:
        return text
    seconds = measured.get(one, "")
    return f"{text} {seconds if isinstance(seconds, str) else f'{seconds:.4g}':>10}"


def _behind(one: Candidate, best: Candidate) -> str:
    """What a plan loses most of its time to, against the first."""
    if one is best:
        return ""
    more = {part: getattr(one.cost, part) - getattr(best.cost, part) for part in PARTS}
    part = max(more, key=lambda name: more[name])
    share = one.cost.seconds / best.cost.seconds - 1
    return f"{share:.1%}: {_WORDS[part]}" if share >= 0.0005 else "equal"


def _most(refused: Mapping[str, int]) -> str:
    return max(refused, key=lambda reason: refused[reason])


def found_records(found: Found, most: int, measured: Mapping[Candidate, float | str]) -> list[dict[str, Any]]:
    """The best `most` that fit, for programs."""
    return [
        {
            **asdict(one.layout),
            "micro_batch": one.micro_batch,
            "activation_checkpointing": one.checkpointing,
            "memory_bytes": one.memory.peak,
            "host_bytes": one.memory.host,
            "step_seconds": one.cost.seconds,
            "tokens_per_second": one.cost.tokens_per_second,
            "utilisation": one.cost.utilisation,
            "seconds_of": {part: getattr(one.cost, part) for part in PARTS},
            "measured_seconds": measured.get(one),
            "deepspeed": dict(one.ds),
        }
        for one in found.fitting[:most]
    ]


def write_ds_json(file: Path, ds: Mapping[str, Any]) -> None:
    """Writes a DeepSpeed JSON that is not there yet.

    Raises:
        UserError: the file is there, or cannot be written.
    """
    if file.exists():
        raise UserError(f"--output {file}: is there already; choose another name or remove it")
    try:
        file.write_text(json.dumps(ds, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise as_user_error(error, "cannot write the DeepSpeed JSON", file) from None


def device_line(device: Device, ranks: int) -> str:
    """What a prediction rests on."""
    rates = ", ".join(f"{device.rate(key) / 1e12:.3g} {key}" for key in ("bfloat16", "float32"))
    count = -(-ranks // device.per_node)
    nodes = f"{count} node{'s' if count > 1 else ''} of {min(ranks, device.per_node)}"
    shared = f", {device.crowding:g} ranks share a core" if device.crowding > 1 else ""
    return (
        f"{ranks} x {device.name} ({nodes}{shared}): {rates} TFLOP/s at most, {format_bytes(device.memory)}, "
        f"{device.bandwidth / 1e9:,.0f} GB/s of memory, {device.near.bandwidth / 1e9:,.3g} GB/s within a node, "
        f"{device.far.bandwidth / 1e9:,.3g} between nodes"
    )


def overrides_of(best: Candidate, pipeline: int, global_batch: int | None, stated: Sequence[str]) -> list[str]:
    """`key=value` words of a launch: the user's own for the recipe, and what the recipe must say for this plan.

    Args:
        pipeline: the recipe's, before.
        global_batch: the recipe's, None where only the JSON said it.
        stated: overrides of the command line; those of the JSON are in the written one.
    """
    own = [word for word in stated if not word.startswith(("ds.", "parallel.pipeline="))]
    if best.layout.pipeline != pipeline or any(word.startswith("parallel.pipeline=") for word in stated):
        own.append(f"parallel.pipeline={best.layout.pipeline}")
    if global_batch is None:
        own.append(f"batch.global={best.settings.global_batch}")
    return own
