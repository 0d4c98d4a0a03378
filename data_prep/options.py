"""What the user asks of a preparation, and what of it decides the bytes of the store."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .assemble import Assembly
from .errors import UserError
from .manifest import file_record
from .sources import SourceOptions, Task
from .tasks import Filters, compile_pattern, task_source


@dataclass(frozen=True)
class Options:
    """What the user asked for. Only `workers`, `cache_memory`, `overwrite` and `quiet` leave the output unchanged."""

    output: Path
    inputs: tuple[str, ...] = ()
    builtin: str | None = None
    source: SourceOptions = field(default_factory=SourceOptions)
    text_key: str = "text"
    on_error: str = "stop"
    filters: Filters = field(default_factory=Filters)
    tokenizer: Path | None = None
    train_tokenizer: int | None = None
    train_bytes: int = 32 << 20  # of text that a new tokenizer is trained on
    eod_token: str | None = None
    assembly: Assembly = field(default_factory=Assembly)
    shard_bytes: int = 4 << 30
    workers: int = 1  # 0: in this process
    cache_memory: int = 100_000_000  # bytes that a worker may grow by, before its encoder's caches are emptied
    overwrite: bool = False
    quiet: bool = False


def default_workers() -> int:
    """One per core that this process may use."""
    return len(os.sched_getaffinity(0))


def refuse_early(options: Options) -> None:
    """UserError on options that cannot work, before anything is read."""
    compile_pattern("--keep-regex", options.filters.keep)
    compile_pattern("--drop-regex", options.filters.drop)
    if bool(options.inputs) == bool(options.builtin):
        raise UserError("give either --input or --builtin")
    if (options.tokenizer is None) == (options.train_tokenizer is None):
        raise UserError("give either --tokenizer FOLDER or --train-tokenizer N")
    if options.train_tokenizer is not None and options.train_tokenizer < 257:
        raise UserError(f"--train-tokenizer {options.train_tokenizer}: a byte-level vocabulary needs 257 or more")


def identity(options: Options, tasks: Sequence[Task]) -> dict[str, Any]:
    """What makes a job the same job, so that its finished parts can be used again. Each part knows its own input."""
    same = {
        key: value for key, value in settings(options).items() if key not in ("on_error", "assembly", "shard_bytes")
    }
    if options.tokenizer is not None:
        folder = options.tokenizer if options.tokenizer.is_dir() else options.tokenizer.parent
        names = [folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")]
        return same | {"tokenizer": [file_record(name).sha256 for name in names if name.is_file()]}
    sources = hashlib.sha256("".join(map(task_source, tasks)).encode())  # all of it may be in the training sample
    return same | {"files": sources.hexdigest()}


def settings(options: Options) -> dict[str, Any]:
    """The options that decide the output, as the manifest records them."""
    return {
        "inputs": list(options.inputs),
        "builtin": options.builtin,
        "source": asdict(options.source),
        "text_key": options.text_key,
        "on_error": options.on_error,
        "filters": asdict(options.filters),
        "train_tokenizer": options.train_tokenizer,
        "train_bytes": options.train_bytes,
        "eod_token": options.eod_token,
        "assembly": asdict(options.assembly),
        "shard_bytes": options.shard_bytes,
    }
