"""A replay capsule: what is needed to take a bad step again in one process. Written by the main rank alone, since the
order of the data is a pure function: no rank has to send what it read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...data_prep.durable import write_durably
from ...data_prep.errors import UserError
from ..data.batches import Batch, BatchStream
from ..plan.plan import Plan
from .bad_steps import BadStep

CAPSULES = "capsules"  # folder of a run
MOST_CAPSULES = 50  # of a run: one that skips every third step must not fill the disk
_FACTS, _BATCH = "capsule.json", "batch.safetensors"
_OWN, _EXTRA = ("input_ids", "labels", "position_ids", "noise"), "extras/"


@dataclass(frozen=True)
class Capsule:
    """A bad step."""

    step: int  # from 1
    wrong: str  # in words
    loss: float
    grad_norm: float | None
    samples: tuple[int, int]  # places in the run: first, last + 1
    sample_ids: list[tuple[str, int]]  # of each place: the store, and which of its samples
    checkpoint: str | None  # newest before the step; None: there was none, the run began with its initial values
    seed: int
    micro_batch: int
    data_parallel: int  # with the two above, and the step: the seeds of dropout
    directory: str  # from which the recipe's relative paths count


def write_capsule(folder: Path, bad: BadStep, plan: Plan, stream: BatchStream, checkpoint: Path | None) -> None:
    """For one rank.

    Raises:
        OSError: it cannot be written.
        UserError: a sample cannot be read any more, or there are too many capsules.
    """
    if not folder.exists() and folder.parent.exists() and len(list(folder.parent.iterdir())) >= MOST_CAPSULES:
        raise UserError(f"{folder.parent} holds {MOST_CAPSULES} already; remove some")
    first, stop = bad.output.samples
    facts = Capsule(
        step=bad.step,
        wrong=bad.wrong,
        loss=bad.output.loss,
        grad_norm=bad.output.grad_norm,
        samples=(first, stop),
        sample_ids=[(str(samples.part.store.path), number) for samples, number in stream.named(first, stop)],
        checkpoint=None if checkpoint is None else str(checkpoint.absolute()),
        seed=plan.recipe.seed,
        micro_batch=plan.micro_batch,
        data_parallel=plan.layout.data,
        directory=str(Path.cwd()),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / _BATCH, save(_tensors(stream.of_all_ranks(first, stop))))
    write_durably(folder / _FACTS, json.dumps(dataclasses.asdict(facts), indent=1) + "\n")


def read_capsule(folder: Path) -> tuple[Capsule, list[Batch]]:
    """A capsule, and the global batch in it as micro batches (`BatchStream.of_all_ranks`).

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        with safe_open(folder / _BATCH, "pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no replay capsule ({Path(error.filename or _BATCH).name} is missing)") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: the capsule cannot be read: {error}") from None
    try:
        return Capsule(**facts), _batches(tensors)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder}: not a capsule of this version ({error})") from None


def _tensors(batches: Sequence[Batch]) -> dict[str, Tensor]:
    found: dict[str, Tensor | None] = {}
    for number, batch in enumerate(batches):
        own = {name: getattr(batch, name) for name in _OWN}
        extras = {_EXTRA + name: tensor for name, tensor in batch.extras.items()}
        found |= {f"{number}/{name}": tensor for name, tensor in {**own, **extras}.items()}
    return {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}


def _batches(tensors: Mapping[str, Tensor]) -> list[Batch]:
    count = 1 + max(int(name.partition("/")[0]) for name in tensors)
    found: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in tensors.items():
        number, _, own = name.partition("/")
        found[int(number)][own] = tensor
    return [
        Batch(
            **{name: own.get(name) for name in _OWN},  # type: ignore[arg-type]
            extras={name.removeprefix(_EXTRA): tensor for name, tensor in own.items() if name.startswith(_EXTRA)},
        )
        for own in found
    ]
