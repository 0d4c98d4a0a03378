"""The model before training, as preferences compare with it: the log-probability that it gives each text.

Computed once by the engine itself, before the first step, of the texts that the run will read, and kept in the run
directory; so no layout holds a second model, and a resumed run goes on with the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from ...data_prep.durable import retried, write_durably
from ...data_prep.errors import UserError
from ..adapters.bases import base_of
from ..data.batches import batches_of
from ..data.samples import Packs, Samples, sample_order
from ..objectives.dpo import text_sums
from ..plan.plan import Plan
from ..ranks.ranks import Ranks
from ..run.data import RunData
from .base import Engine

FILE = "reference.safetensors"  # by fingerprint of the samples: fp32 [records, 2], NaN where nothing was asked for
AT_ONCE = 1 << 18  # samples of the order looked at together
BATCHES = 16  # global batches held at a time
_DOING = "the log-probabilities before training cannot be kept"


def with_reference(data: RunData, engine: Engine) -> RunData:
    """The data with the log-probabilities that an engine which was not trained yet gives, if its objective wants them.

    Collective.

    Raises:
        UserError: on every rank, where a file or the data cannot be read or written.
    """
    if not engine.objective.reference:
        return data
    ranks, file, initial = engine.ranks, engine.plan.recipe.output / FILE, _identity(engine.plan, engine.ranks)
    known, more = ranks.together(lambda: _read(file, initial), _DOING, file), dict[str, np.ndarray]()
    wanted = ranks.together(lambda: _rows_to_read(data))
    for packs, rows in wanted:
        array = known.get(packs.fingerprint, np.full((len(packs.lengths), 2), np.nan, np.float32))
        if lacking := _lacking(packs, rows, array):
            more[packs.fingerprint] = _complete(array, lacking, data, engine)
    if more:
        content = safetensors.numpy.save({**known, **more}, {"initial": initial}) if ranks.is_main else b""
        ranks.together(lambda: write_durably(file, content) if ranks.is_main else None, _DOING, file)
        known = ranks.together(lambda: _read_all(file, initial, wanted), _DOING, file)
    return data.with_samples(lambda samples: _attached(samples, known))


def _lacking(packs: Packs, rows: np.ndarray, array: np.ndarray) -> list[tuple[Packs, int]]:
    """The rows of which not all log-probabilities are known."""
    return [(packs, int(row)) for row in rows if np.isnan(array[packs.rows[row]]).any()]


def _read_all(file: Path, initial: str, wanted: Sequence[tuple[Packs, np.ndarray]]) -> dict[str, np.ndarray]:
    """What rank 0 has just written, which a file server may not show yet."""

    def lacks(found: dict[str, np.ndarray]) -> bool:
        return any(p.fingerprint not in found or _lacking(p, rows, found[p.fingerprint]) for p, rows in wanted)

    if lacks(found := retried(lambda: _read(file, initial), lacks)):
        raise UserError(f"{file}: is not what rank 0 has just written; all hosts must see the same run directory")
    return found


def _identity(plan: Plan, ranks: Ranks) -> str:
    """What the log-probabilities follow from, beside the texts. Collective."""
    base = base_of(plan.recipe.model.init, plan.recipe.seed, ranks)
    return json.dumps([base.digest, plan.model_config, plan.precision.name], sort_keys=True)


def _read(file: Path, initial: str) -> dict[str, np.ndarray]:
    """What an earlier process of the run has left; nothing if it began from other weights."""
    if not file.exists():
        return {}
    try:
        with safe_open(file, "np") as content:
            if content.metadata().get("initial") != initial:
                return {}
            return {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise UserError(f"{file}: damaged ({error}); remove it, and it is computed again") from None


def _rows_to_read(data: RunData) -> list[tuple[Packs, np.ndarray]]:
    """The rows of each part that the run trains on or is evaluated on, ascending, each part once."""
    plan, order = data.plan, sample_order(data.plan.recipe, data.train)
    total = plan.total_steps * plan.global_batch
    drawn = [np.zeros(len(samples), bool) for samples in data.train]
    for first in range(0, total, AT_ONCE):
        sources, rows = order.sample(np.arange(first, min(first + AT_ONCE, total)))
        for own, mark in enumerate(drawn):
            mark[rows[sources == own]] = True
    wanted = [(samples, np.flatnonzero(mark)) for samples, mark in zip(data.train, drawn, strict=True)]
    if plan.recipe.eval.every:
        for held_out in data.held_out.values():
            left = plan.recipe.eval.batches * plan.global_batch
            for samples in held_out:
                wanted.append((samples, np.arange(min(left, len(samples)))))
                left = max(0, left - len(samples))
    found: dict[str, tuple[Packs, np.ndarray]] = {}  # what is trained on may be evaluated as well
    for samples, rows in wanted:
        if isinstance(samples, Packs):
            before = found.get(samples.fingerprint, (samples, rows))[1]
            found[samples.fingerprint] = samples, np.union1d(before, rows)
    return list(found.values())


def _complete(array: np.ndarray, lacking: Sequence[tuple[Packs, int]], data: RunData, engine: Engine) -> np.ndarray:
    """A part's log-probabilities, with those of some rows added on rank 0. Collective."""
    ranks, several = engine.ranks, BATCHES * data.plan.global_batch
    numbers, values = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    for first in range(0, len(lacking), several):
        rows = lacking[first : first + several]
        # read before any rank begins: one that cannot must not leave the others waiting
        for batch in ranks.together(lambda rows=rows: list(batches_of(rows, data.shape, ranks))):
            losses = engine.token_losses(batch)
            engine.pulse.beat()
            if (
                losses is not None and ranks.tensor == ranks.sequence == 0
            ):  # the others of their groups compute the same
                sums = text_sums(batch.to(ranks.device), -losses)
                numbers.append(batch.extras["numbers"].numpy())
                values.append(sums.float().cpu().numpy())
    array = array.copy()
    for others, theirs in ranks.gather_on_main((np.concatenate(numbers), np.concatenate(values))):
        array[others // 2, others % 2] = theirs
    return array


def _attached(samples: Samples, found: dict[str, np.ndarray]) -> Samples:
    """Held-out samples that are never evaluated have none."""
    return replace(samples, reference=found.get(samples.fingerprint)) if isinstance(samples, Packs) else samples
