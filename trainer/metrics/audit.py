"""The audit of a run's token ledger: recomputes from the data order alone which samples each step had to consume.

It proves, from metrics.jsonl, that over all kills, resumes and changes of world size the steps that count consumed
every sample index once and in order, and at each index the sample that the order has there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...data_prep.errors import UserError
from ..checkpoint.reader import Checkpoint
from ..data import ledger
from ..data.order import SampleOrder
from ..run.directory import load_run_recipe
from .reading import read_metrics

CHUNK = 1 << 18  # samples recomputed at a time
SHOWN = 5  # defects named in full


@dataclass(frozen=True)
class Audit:
    """What was found."""

    steps: int
    total_steps: int | None
    samples: int
    per_source: list[int]
    process_groups: int  # that took steps which count
    resumes: int
    worlds: list[int]
    defects: list[str]


def audit(run: str | Path) -> Audit:
    """Audits a run directory.

    Raises:
        UserError: no record, or the stores are not those that the run was trained on.
    """
    from ..data.samples import open_samples, sample_order

    run = Path(run)
    records = read_metrics(run)
    recipe = load_run_recipe(run)
    samples = open_samples(recipe, "train")
    order = sample_order(recipe, samples)
    found = check_records(records, order)
    return found if not found.steps else _against_checkpoints(found, run, records, [own.fingerprint for own in samples])


def check_records(records: Sequence[dict[str, Any]], order: SampleOrder) -> Audit:
    """Checks the records that count (`read_metrics`) against the order."""
    train = [record for record in records if record["kind"] == "train"]
    starts = [record for record in records if record.get("event") in ("start", "resume")]
    samples = train[-1]["samples"][1] if train else 0
    return Audit(
        steps=train[-1]["step"] if train else 0,
        total_steps=starts[-1]["total_steps"] if starts else None,
        samples=samples,
        per_source=order.counts(samples),
        process_groups=len({record["run"] for record in train}),
        resumes=sum(record["event"] == "resume" for record in starts),
        worlds=sorted({record["layout"]["world"] for record in starts}),
        defects=[*_gaps(train), *_wrong_samples(train, order)],
    )


def _gaps(train: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Steps and sample ranges that do not follow each other from zero."""
    step = stop = 0
    for record in train:
        first, last = record["samples"]
        if record["step"] != step + 1:
            yield f"step {record['step']} follows step {step}"
        if first != stop:
            what = "skipped" if first > stop else "consumed twice"
            yield f"step {record['step']} begins at sample {first}, expected {stop}: {abs(first - stop)} {what}"
        if last <= first:
            yield f"step {record['step']} consumed no sample: [{first}, {last})"
        step, stop = record["step"], last


def _wrong_samples(train: Sequence[dict[str, Any]], order: SampleOrder) -> Iterator[str]:
    """Steps whose ledger is not the digest of the samples that the order has for their range."""
    for chunk in _chunks(train):
        lengths = np.array([record["samples"][1] - record["samples"][0] for record in chunk])
        positions = np.concatenate([np.arange(*record["samples"]) for record in chunk])
        mixed = ledger.hashes(positions, ledger.sample_ids(*order.sample(positions)))
        sums = np.add.reduceat(mixed, np.cumsum(lengths) - lengths, dtype=np.uint64)
        for record, expected in zip(chunk, sums, strict=True):
            if int(record["ledger"], 16) != int(expected):
                first, last = record["samples"]
                yield (
                    f"step {record['step']}: ledger {record['ledger']}, but samples [{first}, {last}) give "
                    f"{int(expected):016x}: other samples were consumed"
                )


def _chunks(train: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    size = 0
    for record in train:
        first, last = record["samples"]
        if last <= first:  # named as a gap
            continue
        chunk.append(record)
        size += last - first
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _against_checkpoints(
    found: Audit, run: Path, records: Sequence[dict[str, Any]], fingerprints: Sequence[str]
) -> Audit:
    """Compares the record and the stores with what the newest checkpoint says."""
    try:
        checkpoint = Checkpoint.open(run, verify=False)
    except UserError:  # pruned or never saved: the ledger stands for itself
        return found
    state = checkpoint.state
    if state["data"] != list(fingerprints):
        raise UserError(f"{run}: the stores have changed since training, so the order cannot be recomputed from them")
    consumed = {record["step"]: record["samples"][1] for record in records if record["kind"] == "train"}
    if consumed.get(state["step"]) == state["samples_consumed"]:
        return found
    defect = (
        f"{checkpoint.path.name} says {state['samples_consumed']} samples at step {state['step']}, "
        f"the record {consumed.get(state['step'], 'has no such step')}"
    )
    return Audit(**{**vars(found), "defects": [*found.defects, defect]})


def audit_text(found: Audit) -> str:
    """A few lines for people.

    Raises:
        UserError: the run did not consume every sample once and in order.
    """
    if found.defects:
        more = f"; and {len(found.defects) - SHOWN} more" if len(found.defects) > SHOWN else ""
        raise UserError(f"the ledger does not hold: {'; '.join(found.defects[:SHOWN])}{more}")
    if not found.steps:
        raise UserError("the run has no step on record: there is nothing to audit")
    finished = found.steps == found.total_steps
    worlds = ", ".join(map(str, found.worlds))
    lines = [
        f"{'finished' if finished else 'not finished'}: {found.steps} of {found.total_steps} steps, "
        f"{found.process_groups} process group(s), {found.resumes} resume(s), world sizes {worlds}",
        f"samples 0 to {found.samples - 1}: each consumed exactly once, in order, and the one that belongs there",
    ]
    if len(found.per_source) > 1:
        lines.append(f"by source: {', '.join(map(str, found.per_source))}")
    return "\n".join(lines)
