"""`zeropipe prepare`: from a corpus to a token store."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import manifest as manifests
from .assemble import Assembly, Totals, assemble
from .documents import BadDocument, read_documents
from .encoding import Reference, choose_encoder
from .errors import UserError
from .index import token_dtype
from .manifest import Manifest, file_record
from .progress import Progress
from .sources import SourceOptions, Task, plan_tasks
from .store import TokenStore
from .tasks import EncodersDiffer, Filters, Job, Record, compile_pattern, finished, task_source
from .tokenizer import adopt_tokenizer, end_of_document, load_tokenizer, train_tokenizer, vocabulary_size
from .workers import run_here, run_processes
from .workspace import Workspace, disk_errors
from .writer import ShardWriter

SAMPLE_DOCUMENTS = 64  # on which the two encoders are compared before a job


@dataclass(frozen=True)
class Options:
    """What the user asked for. Only `workers`, `mpi`, `memory`, `overwrite` and `quiet` leave the output unchanged."""

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
    mpi: bool = False
    memory: int = 1_200_000_000  # bytes, of all workers together, that encoders' caches may grow to
    overwrite: bool = False
    quiet: bool = False


def prepare(options: Options) -> TokenStore:
    """Makes the store, or goes on making it where a killed run stopped. UserError on anything wrong in the input."""
    _refuse_early(options)
    tasks = plan_tasks(options.inputs, options.builtin, options.source)
    work = Workspace(options.output)
    with work.locked(), disk_errors(options.output):
        if options.output.exists() and not options.overwrite:
            raise UserError(f"{options.output}: exists already; choose another --output, or add --overwrite")
        resumed = work.begin(_identity(options, tasks), options.overwrite)
        progress = Progress(sum(task.cost for task in tasks), options.quiet)
        if resumed:
            progress.say(f"going on with the unfinished work in {work.root}")
        _ensure_tokenizer(options, tasks, work, progress)
        records = _run(options, tasks, work, progress)
        progress.finish()
        _write_store(options, tasks, records, work)
        work.publish()
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


def _ensure_tokenizer(options: Options, tasks: Sequence[Task], work: Workspace, progress: Progress) -> None:
    if work.tokenizer.exists():
        return
    making = work.root / "tokenizer.making"
    shutil.rmtree(making, ignore_errors=True)
    if options.tokenizer is not None:
        adopt_tokenizer(options.tokenizer, making, options.eod_token)
    else:
        assert options.train_tokenizer is not None
        progress.say(f"training a tokenizer of {options.train_tokenizer:,} tokens")
        texts = (text.decode() for text in _spread(options, tasks, options.train_bytes))
        train_tokenizer(texts, options.train_tokenizer, making, options.eod_token)
    making.rename(work.tokenizer)


def _spread(options: Options, tasks: Sequence[Task], limit: int) -> Iterator[bytes]:
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


def _run(options: Options, tasks: Sequence[Task], work: Workspace, progress: Progress) -> list[Record]:
    """Has all tasks done, with the fast encoder if it is right for this input, and returns their records in order."""
    try:
        encoder = _chosen_encoder(options, tasks, work, progress)
        return _run_tasks(options, tasks, work, progress, encoder)
    except EncodersDiffer:
        progress.say("gigatoken's tokens differ from Hugging Face's on this input: starting again with the latter")
        shutil.rmtree(work.parts)
        _remember_encoder(work, Reference.name)
        return _run_tasks(options, tasks, work, progress, Reference.name)
    except BadDocument as problem:
        raise UserError(f"{problem} (--on-error skip passes over such documents)") from None


def _chosen_encoder(options: Options, tasks: Sequence[Task], work: Workspace, progress: Progress) -> str:
    """Decided once per job: its parts must all come from one encoder."""
    note = work.root / "encoder"
    if note.exists():
        return note.read_text()
    sample = []
    for document in _spread(options, tasks, 1 << 20):
        sample.append(document)
        if len(sample) == SAMPLE_DOCUMENTS:
            break
    encoder, reason = choose_encoder(work.tokenizer, sample)
    if reason:
        progress.say(f"{reason}: using Hugging Face tokenizers, which is slower")
    _remember_encoder(work, encoder)
    return encoder


def _remember_encoder(work: Workspace, encoder: str) -> None:
    manifests.write_durably(work.root / "encoder", encoder)


def _run_tasks(
    options: Options, tasks: Sequence[Task], work: Workspace, progress: Progress, encoder: str
) -> list[Record]:
    work.parts.mkdir(exist_ok=True)
    records = {task.number: record for task in tasks if (record := finished(work.parts, task))}
    pending = [task for task in tasks if task.number not in records]
    progress.resume(sum(task.cost for task in tasks if task.number in records))
    tokenizer = load_tokenizer(work.tokenizer)
    job = Job(
        parts=str(work.parts),
        tokenizer=str(work.tokenizer),
        encoder=encoder,
        dtype=token_dtype(vocabulary_size(tokenizer)).str,
        eod_id=end_of_document(work.tokenizer, tokenizer, options.eod_token)[1],
        text_key=options.text_key,
        on_error=options.on_error,
        filters=options.filters,
        memory=options.memory // max(1, options.workers),
    )
    cost = {task.number: task.cost for task in tasks}
    for record in _records(options, job, pending, progress):
        records[record.number] = record
        progress.task(cost[record.number])
    return [records[task.number] for task in tasks]


def _records(options: Options, job: Job, tasks: Sequence[Task], progress: Progress) -> Iterator[Record]:
    if options.workers == 0 or not tasks:
        return run_here(job, tasks, progress.batch)
    return run_processes(job, tasks, progress.batch, options.workers, progress.say)


def _write_store(options: Options, tasks: Sequence[Task], records: list[Record], work: Workspace) -> None:
    """Shards, tokenizer and manifest, in the work folder."""
    shutil.rmtree(work.store, ignore_errors=True)
    work.store.mkdir()
    tokenizer = load_tokenizer(work.tokenizer)
    token, number = end_of_document(work.tokenizer, tokenizer, options.eod_token)
    dtype = token_dtype(vocabulary_size(tokenizer))
    with ShardWriter(work.store, dtype, options.shard_bytes) as writer:
        totals = assemble(work.parts, records, options.assembly, writer)
        _refuse_empty(options, records, totals)
    shutil.copytree(work.tokenizer, work.store / "tokenizer")
    Manifest(
        dtype=dtype.name,
        vocab_size=vocabulary_size(tokenizer),
        eod_token=token,
        eod_id=number,
        num_documents=totals.documents,
        num_tokens=totals.tokens,
        text_bytes=totals.text_bytes,
        shards=writer.records,
        tokenizer={path.name: file_record(path) for path in sorted((work.store / "tokenizer").iterdir())},
        counts=_counts(records, totals),
        settings=_settings(options),
        sources=_sources(tasks),
    ).save(work.store)


def _counts(records: list[Record], totals: Totals) -> dict[str, int]:
    counts: Counter[str] = sum((record.counts for record in records), Counter())
    counts["duplicates"] = totals.duplicates
    counts["beyond --limit-documents"] = totals.beyond_limit
    counts["kept"] = totals.documents
    return {name: counts[name] for name in sorted(counts) if counts[name]}


def _sources(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    sizes: Counter[str] = Counter()
    for task in tasks:
        for part in task.slices:
            sizes[part.path] += part.cost
    return [{"path": path, "bytes": size} for path, size in sizes.items()]


def _refuse_empty(options: Options, records: list[Record], totals: Totals) -> None:
    if totals.documents == 0:
        counts = ", ".join(f"{number} {name}" for name, number in _counts(records, totals).items())
        where = options.builtin or ", ".join(options.inputs)
        raise UserError(f"{where}: no document to keep: the corpus is empty ({counts or 'nothing was read'})")
