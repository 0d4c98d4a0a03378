"""What to read: turns inputs (files, globs, folders, saved data sets) into slices, and slices into tasks.

Slices and tasks depend on the input alone, never on the number of workers.
"""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UserError
from .slices import Slice

COMPRESSIONS = {".gz": "gz", ".xz": "xz", ".zst": "zst", ".bz2": "bz2"}
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
TASK_BYTES = 32 << 20
SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules"})


@dataclass(frozen=True)
class Task:
    """A piece of work that one worker does at one go; its number is its place in the corpus."""

    number: int
    slices: tuple[Slice, ...]

    @property
    def cost(self) -> int:
        """Bytes on disk that it reads."""
        return sum(part.cost for part in self.slices)


@dataclass(frozen=True)
class SourceOptions:
    """What the user said of the input."""

    format: str | None = None  # overrides the file names' suffixes
    text_unit: str = "text"  # what a document is in a text file: text (the whole file) | paragraphs | lines
    limit_bytes: int | None = None
    task_bytes: int = TASK_BYTES


def plan_tasks(inputs: Sequence[str], builtin: str | None, options: SourceOptions) -> list[Task]:
    """The whole corpus as tasks, in order. UserError if an input is missing or nothing is found."""
    files = list(builtin_files(builtin)) if builtin else list(expand(inputs, options))
    if not files:
        raise UserError(f"nothing to read in {', '.join(inputs)}: no file there")
    slices = (part for file in files for part in cut(file, options.task_bytes))
    if options.limit_bytes is not None:
        slices = _limited(slices, options.limit_bytes)
    return list(_pack(slices, options.task_bytes))


def expand(inputs: Sequence[str], options: SourceOptions) -> Iterator[Slice]:
    """Whole files, in the order of the inputs, those of a glob or a folder sorted by name."""
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            yield from _folder(path, options)
        elif path.exists():
            yield whole_file(path, options)
        elif glob.has_magic(name):
            matches = sorted(glob.glob(name, recursive=True))
            if not matches:
                raise UserError(f"{name}: no file matches this pattern")
            for match in matches:
                if Path(match).is_file():
                    yield whole_file(Path(match), options)
        else:
            raise UserError(f"{name}: no such file or folder")


def whole_file(path: Path, options: SourceOptions) -> Slice:
    """A file as one slice, its format by suffix. UserError if it cannot be read in pieces."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    inner = path.with_suffix("") if compression else path
    format = options.format or FORMATS.get(inner.suffix.lower(), "text")
    if format == "text":
        format = options.text_unit
    if compression and format in ("parquet", "arrow"):
        raise UserError(f"{path}: a compressed {format} file cannot be read in pieces; decompress it first")
    return Slice(str(path), format, compression, cost=path.stat().st_size)


def _folder(path: Path, options: SourceOptions) -> Iterator[Slice]:
    if (path / "dataset_dict.json").exists():
        splits = sorted(child.name for child in path.iterdir() if (child / "dataset_info.json").exists())
        raise UserError(
            f"{path}: holds several data sets, name one of them: {', '.join(f'{path}/{s}' for s in splits)}"
        )
    if (path / "dataset_info.json").exists():
        yield from saved_dataset(path)
        return
    found = False
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path).parts
        if any(part.startswith(".") or part in SKIPPED_FOLDERS for part in relative) or not file.is_file():
            continue
        found = True
        yield whole_file(file, options)
    if not found:
        raise UserError(f"{path}: the folder holds no file")


def saved_dataset(path: Path) -> Iterator[Slice]:
    """The Arrow files of a data set saved by Hugging Face `datasets` (`save_to_disk`), in its own order."""
    import json

    state = path / "state.json"
    if not state.exists():
        raise UserError(f"{path}: no state.json: the saved data set is incomplete, save it again")
    for entry in json.loads(state.read_text("utf-8"))["_data_files"]:
        file = path / entry["filename"]
        if not file.exists():
            raise UserError(f"{file}: listed in {state}, but missing")
        yield Slice(str(file), "arrow", cost=file.stat().st_size)


def builtin_files(name: str) -> Iterator[Slice]:
    """`stdlib`: the source code of the running Python's standard library, without its tests.

    In an order made from the names' hashes, so that the first or last few per cent are like the rest.
    """
    if name != "stdlib":
        raise UserError(f"--builtin {name}: unknown; there is `stdlib`")
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [file for file in root.rglob("*.py") if not left_out & set(file.relative_to(root).parts)]
    if not files:
        raise UserError(f"{root}: this Python has no source code of its standard library; give --input instead")
    files.sort(key=lambda file: hashlib.sha256(file.relative_to(root).as_posix().encode()).digest())
    for file in files:
        yield Slice(str(file), "text", cost=file.stat().st_size)


def cut(file: Slice, task_bytes: int) -> Iterator[Slice]:
    """Cuts a large file where it can be read from the middle: lines of plain text, row groups of parquet."""
    if file.format == "parquet":
        from .columns import split_parquet

        yield from split_parquet(file, task_bytes)
    elif file.format in ("jsonl", "lines") and file.compression is None:
        for start in range(0, max(1, file.cost), task_bytes):
            stop = min(start + task_bytes, file.cost)
            yield replace(file, start=start, stop=stop, cost=stop - start)
    else:
        yield file


def _limited(slices: Iterable[Slice], limit: int) -> Iterator[Slice]:
    """The first slices, up to `limit` bytes on disk; at least one, the last one cut short if it can be."""
    left = limit
    for part in slices:
        if part.cost > left and part.format in ("jsonl", "lines") and part.compression is None:
            part = replace(part, stop=part.start + max(1, left), cost=left)
        yield part
        left -= part.cost
        if left <= 0:
            return


def _pack(slices: Iterable[Slice], task_bytes: int) -> Iterator[Task]:
    number, pending, cost = 0, [], 0
    for part in slices:
        if pending and cost + part.cost > task_bytes:
            yield Task(number, tuple(pending))
            number, pending, cost = number + 1, [], 0
        pending.append(part)
        cost += part.cost
    if pending:
        yield Task(number, tuple(pending))
