"""`zeropipe prepare`: from a corpus to a token store."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..corpus.documents import read_documents
from ..corpus.slices import BadDocument
from ..corpus.sources import Task, plan_tasks
from ..durable import write_durably
from ..errors import UserError
from ..index import flagged, token_dtype
from ..manifest import Manifest, file_record
from ..store import TokenStore
from ..tokenizer import Vocabulary, adopt_tokenizer, train_tokenizer
from ..writer import ShardWriter
from .assemble import Assembler
from .encoding import EncodersDiffer, Fast, Reference
from .options import Options, identity, refuse_early, settings
from .progress import ProgressLine
from .tasks import Job, TaskRecord, finished
from .workers import run_executor, run_here, run_processes
from .workspace import Workspace, disk_errors

if TYPE_CHECKING:
    from ..records.formats import Sample


def prepare(options: Options, executor: Executor | None = None) -> TokenStore:
    """Makes the store, or goes on making it where a killed run stopped. UserError on anything wrong in the input.

    `executor`: does the tasks instead of `options.workers` processes, on other hosts for instance.
    """
    refuse_early(options)
    tasks = plan_tasks(options.inputs, options.builtin, options.source)
    options, first = _settled(options, tasks)
    work = Workspace(options.output)
    total = sum(task.cost for task in tasks)
    with work.locked(), disk_errors(options.output), ProgressLine(total, options.quiet) as progress:
        if work.was_published(settings(options)):
            work.discard()
            return TokenStore.open(options.output)
        if options.output.exists() and not options.overwrite:
            raise UserError(f"{options.output}: exists already; choose another --output, or add --overwrite")
        resumed = work.begin(identity(options, tasks), options.overwrite)
        if resumed:
            progress.inform(f"going on with the unfinished work in {work.root}")
        vocabulary = _ensure_tokenizer(options, tasks, work, progress)
        job = _job(options, vocabulary, work, first)
        try:
            assembler = _run(options, job, tasks, work, progress, executor)
        except EncodersDiffer as reason:
            progress.say(f"{reason}: starting again with Hugging Face tokenizers, which is slower")
            shutil.rmtree(work.parts)
            work.encoder = Reference.name
            assembler = _run(options, replace(job, encoder=Reference.name), tasks, work, progress, executor)
        progress.finish()
        _tell(job, assembler, progress)
        if assembler.totals.documents == 0:
            work.clear()
            raise UserError(_empty(options, assembler))
        _complete_store(options, tasks, vocabulary, job, assembler, work)
        work.publish(Manifest.load(work.store).fingerprint)
    return TokenStore.open(options.output)


def _settled(options: Options, tasks: Sequence[Task]) -> tuple[Options, Sample | None]:
    """For records: the options with their kind settled, and the first record, if there is one."""
    if options.records is None:
        return options, None
    from ..records.start import settle_kind

    records, first = settle_kind(options.records, tasks, options.on_error)
    return replace(options, records=records), first


def _job(options: Options, vocabulary: Vocabulary, work: Workspace, first: Sample | None) -> Job:
    job = Job(
        parts=str(work.parts),
        tokenizer=str(work.tokenizer),
        encoder=work.encoder or Fast.name,
        dtype=token_dtype(vocabulary.size).str,
        eod_id=vocabulary.eod_id,
        text_key=options.text_key,
        on_error=options.on_error,
        filters=options.filters,
        cache_memory=options.cache_memory,
    )
    if options.records is None:
        return job
    from ..records.start import check_template, first_day, record_job

    assert options.tokenizer is not None
    source = options.tokenizer if options.tokenizer.is_dir() else options.tokenizer.parent
    today = work.remembered("date", first_day())
    job = replace(job, eod_id=None, records=record_job(options.records, source, work.tokenizer, today))
    check_template(job, first)
    return job


def _ensure_tokenizer(options: Options, tasks: Sequence[Task], work: Workspace, progress: ProgressLine) -> Vocabulary:
    note = work.root / "vocabulary.json"
    if work.tokenizer.exists():
        return Vocabulary(**json.loads(note.read_text("utf-8")))
    making = work.root / "tokenizer.making"
    shutil.rmtree(making, ignore_errors=True)
    if options.tokenizer is not None:
        vocabulary = _adopted(options, options.tokenizer, making)
    else:
        assert options.train_tokenizer is not None
        progress.inform(f"training a tokenizer of {options.train_tokenizer:,} tokens")
        texts = (text.decode() for text in _sample(options, tasks, options.train_bytes))
        vocabulary = train_tokenizer(texts, options.train_tokenizer, making, options.eod_token)
    write_durably(note, json.dumps(asdict(vocabulary)))
    making.rename(work.tokenizer)
    return vocabulary


def _adopted(options: Options, source: Path, making: Path) -> Vocabulary:
    """The user's tokenizer; for records with the chat template that is used, and refused if it ends no text."""
    if options.records is None:
        return adopt_tokenizer(source, making, options.eod_token)
    from ..records.start import put_template, require_tokenizer

    require_tokenizer(source if source.is_dir() else source.parent)
    vocabulary = adopt_tokenizer(source, making, None)
    put_template(options.records, making)
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
    options: Options,
    job: Job,
    tasks: Sequence[Task],
    work: Workspace,
    progress: ProgressLine,
    executor: Executor | None,
) -> Assembler:
    """Has the tasks done that are not done yet, and writes the shards from their parts meanwhile."""
    work.parts.mkdir(exist_ok=True)
    shutil.rmtree(work.store, ignore_errors=True)
    work.store.mkdir()
    costs = {task.number: task.cost for task in tasks}
    pending = []
    dtype = np.dtype(job.dtype) if job.records is None else flagged(np.dtype(job.dtype))
    with ShardWriter(work.store, dtype, options.shard_bytes) as writer:
        assembler = Assembler(work.parts, options.assembly, writer)
        for task in tasks:
            record = finished(work.parts, task)
            if record and not (job.on_error == "stop" and record.counts["invalid"]):
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
    options: Options, job: Job, tasks: Sequence[Task], progress: ProgressLine, executor: Executor | None
) -> Generator[TaskRecord]:
    if executor is not None:
        return run_executor(job, tasks, progress.batch, executor)
    if options.workers == 0 or not tasks:
        return run_here(job, tasks, progress.batch)
    return run_processes(job, tasks, progress.batch, options.workers, progress.say)


def _complete_store(
    options: Options, tasks: Sequence[Task], vocabulary: Vocabulary, job: Job, assembler: Assembler, work: Workspace
) -> None:
    """Adds the tokenizer and the manifest to the shards in the work folder."""
    shutil.copytree(work.tokenizer, work.store / "tokenizer")
    totals, records = assembler.totals, None
    if job.records is not None:
        from ..records.start import records_info

        records = records_info(job, assembler.records, totals.longest)
    Manifest(
        dtype=np.dtype(job.dtype).name,
        vocab_size=vocabulary.size,
        eod_token=None if records else vocabulary.eod_token,
        eod_id=job.eod_id,
        num_documents=totals.documents,
        num_tokens=totals.tokens,
        text_bytes=totals.text_bytes,
        shards=assembler.writer.records,
        tokenizer={path.name: file_record(path) for path in sorted((work.store / "tokenizer").iterdir())},
        counts=_counts(assembler),
        settings=settings(options),
        sources=_sources(tasks),
        records=records,
    ).save(work.store)


def _counts(assembler: Assembler) -> dict[str, int]:
    counts = _counted(assembler)
    counts["duplicates"] = assembler.totals.duplicates
    counts["beyond --limit-documents"] = assembler.totals.beyond_limit
    counts["kept"] = assembler.totals.documents
    return {name: counts[name] for name in sorted(counts) if counts[name]}


def _counted(assembler: Assembler) -> Counter[str]:
    """What the tasks counted, all together."""
    return sum((record.counts for record in assembler.records), start=Counter())


def _sources(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    sizes: Counter[str] = Counter()
    for task in tasks:
        for part in task.slices:
            sizes[part.path] += part.cost
    return [{"path": path, "bytes": size} for path, size in sizes.items()]


def _tell(job: Job, assembler: Assembler, progress: ProgressLine) -> None:
    """Says what the user should know of the documents that were read."""
    counts = _counted(assembler)
    if job.records is not None:
        from ..records.start import remarks

        for remark in remarks(counts):
            progress.say(remark)
    if invalid := counts["invalid"]:
        examples = [example for record in assembler.records for example in record.examples]
        progress.say(f"{invalid:,} invalid documents were passed over, such as {'; '.join(examples[:3])}")


def _empty(options: Options, assembler: Assembler) -> str:
    counts = ", ".join(f"{number} {name}" for name, number in _counts(assembler).items())
    where = options.builtin or ", ".join(options.inputs)
    return f"{where}: no document to keep: the corpus is empty ({counts or 'nothing was read'})"
