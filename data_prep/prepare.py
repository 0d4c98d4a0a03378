"""`zeropipe prepare`: from a corpus to a token store."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import manifest as manifests
from .assemble import Assembler, Assembly
from .documents import BadDocument, read_documents
from .encoding import EncodersDiffer, Fast, Reference
from .errors import UserError
from .index import token_dtype
from .manifest import Manifest, file_record
from .progress import Progress
from .sources import SourceOptions, Task, plan_tasks
from .store import TokenStore
from .tasks import Filters, Job, Record, compile_pattern, finished, task_source
from .tokenizer import Vocabulary, adopt_tokenizer, train_tokenizer
from .workers import run_executor, run_here, run_processes
from .workspace import Workspace, disk_errors
from .writer import ShardWriter


@dataclass(frozen=True)
class Options:
    """What the user asked for. Only `workers`, `worker_memory`, `overwrite` and `quiet` leave the output unchanged."""

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
    worker_memory: int = 500_000_000  # bytes that a worker may grow to by its encoder's caches
    overwrite: bool = False
    quiet: bool = False


def prepare(options: Options, executor: Executor | None = None) -> TokenStore:
    """Makes the store, or goes on making it where a killed run stopped. UserError on anything wrong in the input.

    `executor`: does the tasks instead of `options.workers` processes, on other hosts for instance.
    """
    _refuse_early(options)
    tasks = plan_tasks(options.inputs, options.builtin, options.source)
    work = Workspace(options.output)
    with work.locked(), disk_errors(options.output):
        if work.was_published(_settings(options)):
            shutil.rmtree(work.root)
            return TokenStore.open(options.output)
        if options.output.exists() and not options.overwrite:
            raise UserError(f"{options.output}: exists already; choose another --output, or add --overwrite")
        resumed = work.begin(_identity(options, tasks), options.overwrite)
        progress = Progress(sum(task.cost for task in tasks), options.quiet)
        if resumed:
            progress.inform(f"going on with the unfinished work in {work.root}")
        vocabulary = _ensure_tokenizer(options, tasks, work, progress)
        job = Job(
            parts=str(work.parts),
            tokenizer=str(work.tokenizer),
            encoder=work.encoder or Fast.name,
            dtype=token_dtype(vocabulary.size).str,
            eod_id=vocabulary.eod_id,
            text_key=options.text_key,
            on_error=options.on_error,
            filters=options.filters,
            memory=options.worker_memory,
        )
        try:
            assembler = _run(options, job, tasks, work, progress, executor)
        except EncodersDiffer as reason:
            progress.say(f"{reason}: starting again with Hugging Face tokenizers, which is slower")
            shutil.rmtree(work.parts)
            work.encoder = Reference.name
            assembler = _run(options, replace(job, encoder=Reference.name), tasks, work, progress, executor)
        progress.finish()
        _warn_of_invalid(assembler, progress)
        if assembler.totals.documents == 0:
            work.clear()
            raise UserError(_empty(options, assembler))
        _complete_store(options, tasks, vocabulary, assembler, work)
        work.publish(Manifest.load(work.store).fingerprint)
    return TokenStore.open(options.output)


def default_workers() -> int:
    """One per core that this process may use."""
    return len(os.sched_getaffinity(0))


def _refuse_early(options: Options) -> None:
    compile_pattern("--keep-regex", options.filters.keep)
    compile_pattern("--drop-regex", options.filters.drop)
    if bool(options.inputs) == bool(options.builtin):
        raise UserError("give either --input or --builtin")
    if (options.tokenizer is None) == (options.train_tokenizer is None):
        raise UserError("give either --tokenizer FOLDER or --train-tokenizer N")
    if options.train_tokenizer is not None and options.train_tokenizer < 257:
        raise UserError(f"--train-tokenizer {options.train_tokenizer}: a byte-level vocabulary needs 257 or more")


def _identity(options: Options, tasks: Sequence[Task]) -> dict[str, Any]:
    """What makes a job the same job, so that its finished parts can be used again. Each part knows its own input."""
    identity = {
        key: value for key, value in _settings(options).items() if key not in ("on_error", "assembly", "shard_bytes")
    }
    if options.tokenizer is not None:
        folder = options.tokenizer if options.tokenizer.is_dir() else options.tokenizer.parent
        names = [folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")]
        return identity | {"tokenizer": [file_record(name).sha256 for name in names if name.is_file()]}
    sources = hashlib.sha256("".join(map(task_source, tasks)).encode())  # all of it may be in the training sample
    return identity | {"files": sources.hexdigest()}


def _settings(options: Options) -> dict[str, Any]:
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


def _ensure_tokenizer(options: Options, tasks: Sequence[Task], work: Workspace, progress: Progress) -> Vocabulary:
    note = work.root / "vocabulary.json"
    if work.tokenizer.exists():
        return Vocabulary(**json.loads(note.read_text("utf-8")))
    making = work.root / "tokenizer.making"
    shutil.rmtree(making, ignore_errors=True)
    if options.tokenizer is not None:
        vocabulary = adopt_tokenizer(options.tokenizer, making, options.eod_token)
    else:
        assert options.train_tokenizer is not None
        progress.inform(f"training a tokenizer of {options.train_tokenizer:,} tokens")
        texts = (text.decode() for text in _sample(options, tasks, options.train_bytes))
        vocabulary = train_tokenizer(texts, options.train_tokenizer, making, options.eod_token)
    manifests.write_durably(note, json.dumps(asdict(vocabulary)))
    making.rename(work.tokenizer)
    return vocabulary


def _sample(options: Options, tasks: Sequence[Task], limit: int) -> Iterator[bytes]:
    """Documents from evenly spread tasks, `limit` bytes in all or a little more; what is no document is passed over."""
    chosen = [tasks[len(tasks) * i // 16] for i in range(16)] if len(tasks) > 16 else tasks
    share = limit // max(1, len(chosen))

    def bad(problem: BadDocument) -> None:
        if options.on_error == "stop":
            raise problem

    for task in chosen:
        left = share
        for part in task.slices:
            for document in read_documents(part, options.text_key, bad):
                yield document
                left -= len(document)
                if left <= 0:
                    break
            if left <= 0:
                break


def _run(
    options: Options, job: Job, tasks: Sequence[Task], work: Workspace, progress: Progress, executor: Executor | None
) -> Assembler:
    """Has the tasks done that are not done yet, and writes the shards from their parts meanwhile."""
    work.parts.mkdir(exist_ok=True)
    shutil.rmtree(work.store, ignore_errors=True)
    work.store.mkdir()
    costs = {task.number: task.cost for task in tasks}
    pending = []
    with ShardWriter(work.store, np.dtype(job.dtype), options.shard_bytes) as writer:
        assembler = Assembler(work.parts, options.assembly, writer)
        for task in tasks:
            if record := finished(work.parts, task):
                progress.resume(task.cost)
                assembler.add(record)
            else:
                pending.append(task)
        records = _records(options, job, pending, progress, executor)
        try:
            while not assembler.enough and (record := next(records, None)):
                assembler.add(record)
                progress.task(costs[record.number])
        finally:
            records.close()
        assembler.finish()
    return assembler


def _records(
    options: Options, job: Job, tasks: Sequence[Task], progress: Progress, executor: Executor | None
) -> Generator[Record]:
    if executor is not None:
        return run_executor(job, tasks, progress.batch, executor)
    if options.workers == 0 or not tasks:
        return run_here(job, tasks, progress.batch)
    return run_processes(job, tasks, progress.batch, options.workers, progress.say)


def _complete_store(
    options: Options, tasks: Sequence[Task], vocabulary: Vocabulary, assembler: Assembler, work: Workspace
) -> None:
    """Adds the tokenizer and the manifest to the shards in the work folder."""
    shutil.copytree(work.tokenizer, work.store / "tokenizer")
    totals = assembler.totals
    Manifest(
        dtype=assembler.writer.dtype.name,
        vocab_size=vocabulary.size,
        eod_token=vocabulary.eod_token,
        eod_id=vocabulary.eod_id,
        num_documents=totals.documents,
        num_tokens=totals.tokens,
        text_bytes=totals.text_bytes,
        shards=assembler.writer.records,
        tokenizer={path.name: file_record(path) for path in sorted((work.store / "tokenizer").iterdir())},
        counts=_counts(assembler),
        settings=_settings(options),
        sources=_sources(tasks),
    ).save(work.store)


def _counts(assembler: Assembler) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for record in assembler.records:
        counts += record.counts
    counts["duplicates"] = assembler.totals.duplicates
    counts["beyond --limit-documents"] = assembler.totals.beyond_limit
    counts["kept"] = assembler.totals.documents
    return {name: counts[name] for name in sorted(counts) if counts[name]}


def _sources(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    sizes: Counter[str] = Counter()
    for task in tasks:
        for part in task.slices:
            sizes[part.path] += part.cost
    return [{"path": path, "bytes": size} for path, size in sizes.items()]


def _warn_of_invalid(assembler: Assembler, progress: Progress) -> None:
    invalid = sum(record.counts["invalid"] for record in assembler.records)
    if invalid:
        examples = [example for record in assembler.records for example in record.examples]
        progress.say(f"{invalid:,} invalid documents were passed over, such as {'; '.join(examples[:3])}")


def _empty(options: Options, assembler: Assembler) -> str:
    counts = ", ".join(f"{number} {name}" for name, number in _counts(assembler).items())
    where = options.builtin or ", ".join(options.inputs)
    return f"{where}: no document to keep: the corpus is empty ({counts or 'nothing was read'})"
