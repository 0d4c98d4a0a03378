"""The folder of checkpoints of a run: publishing, finding, listing, verifying and pruning. No torch.

A checkpoint is written as `.step-00001000.partial` and renamed to `step-00001000` when all of it is on the disk, so
that a folder under that name is whole, or has been damaged since.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data_prep.durable import publish_folder, retried, write_durably
from ...data_prep.errors import UserError
from ...data_prep.making.bars import Told, untold
from .files import (
    MANIFEST,
    STATE,
    CheckpointManifest,
    Digest,
    size_problems,
)
from .sharing import problems_of

CHECKPOINTS = "checkpoints"
LATEST = "latest"
_STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Listing:
    """One checkpoint as `zeropipe ckpt ls` shows it. `problem` is None, or what can be seen without reading it."""

    path: Path
    step: int
    sequence: int | None
    nbytes: int
    problem: str | None
    milestone: bool = False


def step_name(step: int) -> str:
    """Name of the folder of a checkpoint."""
    return f"step-{step:08d}"


def partial_path(folder: Path, step: int) -> Path:
    """Where a checkpoint grows before it is published."""
    return folder / f".{step_name(step)}.partial"


def _replaced_path(folder: Path, name: str) -> Path:
    return folder / f".{name}.replaced"


def clear_leftovers(folder: Path) -> None:
    """Removes what dead runs left half-written, as far as it can be, and puts back what should have been replaced."""
    for left in folder.glob(".step-*.replaced"):
        name = left.name.removeprefix(".").removesuffix(".replaced")
        if (folder / name).exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.rename(folder / name)
    for left in folder.glob(".step-*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def begin(folder: Path, step: int) -> Path:
    """Makes the folder to write a checkpoint into, unless another rank has. What dead runs left must be gone."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = partial_path(folder, step)
    partial.mkdir(exist_ok=True)
    return partial


def publish(folder: Path, step: int, files: Mapping[str, Digest], milestone: bool = False) -> Path:
    """Gives a completely written checkpoint its name, and points `latest` at it. For one rank, after all have written.

    Args:
        milestone: whether it is never `surplus`.

    Raises:
        OSError: the disk is full or the folder cannot be written; then nothing has been published.
        UserError: a rank's file is not here, because the ranks do not share the folder.
    """
    partial, path = partial_path(folder, step), folder / step_name(step)
    missing = size_problems(partial, files)
    if missing:
        raise UserError(
            f"{folder}: rank 0 does not see what other ranks wrote ({missing[0]}): "
            "the output folder must be shared by all hosts"
        )
    sequence = 1 + max((_sequence(step) or 0 for step in step_folders(folder)), default=0)
    CheckpointManifest(step, sequence, files, milestone).write(partial)
    publish_folder(partial, path, _replaced_path(folder, path.name))  # what is there: of a run resumed from before
    write_durably(folder / LATEST, f"{path.name}\n")
    return path


def step_folders(path: str | Path) -> list[Path]:
    """The checkpoints at a run directory, its `checkpoints/`, or a checkpoint itself; newest first.

    Newest is what was published last, which is not the highest step in a run that went back to an earlier one.
    """
    path = Path(path)
    if path.is_dir() and (_STEP.fullmatch(path.name) or _is_renamed(path)):
        return [path]
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _STEP.fullmatch(p.name) and p.is_dir()]

    def age(step: Path) -> tuple[float, str]:
        sequence = _sequence(step)
        # one without a readable manifest counts as newest, so that it is reported and not skipped in silence
        return (sequence if sequence is not None else float("inf"), step.name)

    return sorted(found, key=age, reverse=True)


def _sequence(step: Path) -> int | None:
    """As its manifest says; None where that cannot be read."""
    try:
        return CheckpointManifest.read(step).sequence
    except UserError:
        return None


def _is_renamed(path: Path) -> bool:
    """Whether this is a checkpoint that someone has copied to another name."""
    return (path / MANIFEST).is_file() and (path / STATE).is_file()


def inspect(path: Path) -> Listing:
    """Looks at a checkpoint without reading its tensors."""
    try:
        manifest = CheckpointManifest.read(path)
    except UserError as error:
        named = _STEP.fullmatch(path.name)
        return Listing(path, int(named[1]) if named else -1, None, 0, str(error))
    problems = size_problems(path, manifest.files)
    problem = problems[0] if problems else None
    return Listing(path, manifest.step, manifest.sequence, manifest.nbytes, problem, manifest.milestone)


def ls(path: str | Path) -> list[Listing]:
    """All checkpoints there, oldest first."""
    return [inspect(p) for p in reversed(step_folders(path))]


def verify_checkpoints(path: str | Path, told: Told = untold) -> dict[Path, list[str]]:
    """Reads every checkpoint there and compares it with its manifest; what is wrong, by checkpoint (empty: whole).
    `told`: how many bytes have been read.
    """
    listed, done, found = ls(path), 0, dict[Path, list[str]]()
    total = sum(item.nbytes for item in listed)
    told(0, total)
    for item in listed:
        found[item.path] = problems_of(item.path)
        done += item.nbytes
        told(done, total)
    return found


def steps_in_sight(path: Path) -> list[Path]:
    """`step_folders`, looked for again where `latest` names one that is not among them."""
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path

    def lost(found: list[Path]) -> bool:
        try:
            return (folder / LATEST).read_text(encoding="utf-8").strip() not in {step.name for step in found}
        except OSError:  # nothing is named
            return False

    return retried(lambda: step_folders(path), lost)


def newest_checkpoint(path: str | Path, read: bool = False) -> Path:
    """The newest whole checkpoint of a run directory, of `checkpoints/`, or the one given, as far as names and sizes
    tell; with `read`, as far as every byte tells, and what is damaged and passed over is told on stderr.

    Raises:
        UserError: there is none, or none is whole.
    """
    steps = steps_in_sight(Path(path)) if read else step_folders(path)
    if not steps:
        raise UserError(f"{path}: no checkpoint here (expected a run directory, its checkpoints/, or a step-… folder)")
    damaged: list[str] = []
    for step in steps:
        problems = problems_of(step) if read else list(filter(None, [inspect(step).problem]))
        if not problems:
            for line in damaged if read else []:
                print(f"warning: damaged checkpoint: {line}; taking {step.name}", file=sys.stderr, flush=True)
            return step
        damaged.append("; ".join(problems))
    raise UserError(f"{path}: no whole checkpoint here: {'; '.join(damaged)}")


def surplus(path: str | Path, keep: int) -> list[Path]:
    """All whole checkpoints but the newest `keep` and milestones, oldest first.

    Damaged ones are neither counted nor named: they may be all that is left of a run.

    Raises:
        UserError: keep is less than one.
    """
    if keep < 1:
        raise UserError(f"keep: {keep} would remove the last checkpoint; expected at least 1")
    whole = [item for item in ls(path) if item.problem is None]
    return [item.path for item in whole[:-keep] if not item.milestone]


def prune(doomed: Iterable[Path]) -> None:
    """Removes these checkpoints.

    Raises:
        OSError: one could not be removed; those after it are still there.
    """
    for step in doomed:
        # half a deletion must not look like a damaged checkpoint
        aside = step.with_name(f".{step.name}.partial")
        step.rename(aside)
        shutil.rmtree(aside)


# what checkpoints did not say before there was a choice
_UNSAID = {"objective": "causal_lm", "adapter": "none"}


def check_same_run(state: dict[str, Any], **expected: Any) -> None:
    """Refuses to resume a run on other data, another seed, sequence length, model, ….

    Args:
        state: as loaded from a checkpoint.
        expected: what this run says of the same keys.

    Raises:
        UserError: lists every difference.
    """
    saved = {**_UNSAID, **state}
    differences = [
        f"{key} was {_short(saved.get(key))}, this run says {_short(value)}"
        for key, value in expected.items()
        if saved.get(key) != json.loads(json.dumps(value))
    ]
    if differences:
        raise UserError(
            f"resume: the checkpoint at step {state.get('step')} belongs to another run: {'; '.join(differences)}. "
            "Restore the recipe, or start afresh with resume: never and another output"
        )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:197] + "..."
