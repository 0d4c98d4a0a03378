"""What the user asks of a preparation, and what of it decides the bytes of the store."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..corpus.sources import SourceOptions, Task
from ..errors import UserError
from ..manifest import file_record
from ..records.settings import RecordOptions
from .assemble import Assembly
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
    records: RecordOptions | None = None  # the input holds examples to learn from, not text
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
    if options.records is not None:
        _refuse_for_records(options, options.records)


def _refuse_for_records(options: Options, records: RecordOptions) -> None:
    """UserError on what has no meaning for records, so that nothing is ignored."""
    kind = records.kind
    if options.builtin:
        raise UserError(f"--format {kind} needs records: --builtin is text, give --input")
    if options.tokenizer is None:
        raise UserError(f"--format {kind} needs the model's own tokenizer: give --tokenizer, not --train-tokenizer")
    if options.eod_token is not None:
        raise UserError(f"--eod-token: records (--format {kind}) end as the chat template or the eos token ends them")
    if options.text_key != "text" or options.source.text_unit != "text":
        raise UserError(f"--text-key and --text-unit are for text: records (--format {kind}) are known by their keys")
    if records.chat_template is not None and not records.chat_template.is_file():
        raise UserError(f"{records.chat_template}: no such file: --chat-template takes a jinja2 template")


def identity(options: Options, tasks: Sequence[Task]) -> dict[str, Any]:
    """What makes a job the same job, so that its finished parts can be used again. Each part knows its own input."""
    same = {
        key: value for key, value in settings(options).items() if key not in ("on_error", "assembly", "shard_bytes")
    }
    if options.tokenizer is not None:
        folder = options.tokenizer if options.tokenizer.is_dir() else options.tokenizer.parent
        names = [folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")]
        if options.records is not None:
            from ..records.start import source_files

            same |= source_files(folder, options.records)
        return same | {"tokenizer": [file_record(name).sha256 for name in names if name.is_file()]}
    sources = hashlib.sha256("".join(map(task_source, tasks)).encode())  # all of it may be in the training sample
    return same | {"files": sources.hexdigest()}


def settings(options: Options) -> dict[str, Any]:
    """The options that decide the output, as the manifest records them."""
    records = {} if options.records is None else {"records": options.records.content()}
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
        **records,
    }
