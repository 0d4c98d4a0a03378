"""A preparation of records from the main process's side: what is settled before the work, and told after it."""

from __future__ import annotations

import datetime
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..corpus.sources import Task
from ..errors import UserError
from ..making.tasks import Job, TaskRecord
from ..manifest import RecordsInfo, file_record
from ..tokenizer import read_tokenizer
from .flags import NO_PREFIX
from .formats import Sample
from .probe import first_sample, require_stop
from .settings import RecordJob, RecordOptions
from .template import TEMPLATE_FILE, read_template, template_digest, template_sources, uses_date
from .vocabulary import GENERATION_CONFIG, generation_stops, require_eos
from .work import CUT, DROPPED, SPECIAL_TEXT


def settle_kind(options: RecordOptions, tasks: Sequence[Task], on_error: str) -> tuple[RecordOptions, Sample | None]:
    """The options with `auto` become sft or dpo, as the first record is; and that record. UserError if it is none."""
    first = first_sample(tasks, options.kind, on_error)
    if options.kind == "auto":
        options = replace(options, kind="dpo" if first and len(first.answers) == 2 else "sft")
    if options.kind == "dpo" and options.train_on != "assistant":
        raise UserError(
            f"--train-on {options.train_on}: of preference pairs (dpo) the answers are learnt, nothing else"
        )
    return options, first


def source_files(tokenizer: Path, options: RecordOptions) -> dict[str, str | None]:
    """Digests of what, beside the tokenizer itself, decides the tokens and flags."""
    names = (TEMPLATE_FILE, "special_tokens_map.json", GENERATION_CONFIG)
    digests = {name: file_record(tokenizer / name).sha256 for name in names if (tokenizer / name).is_file()}
    given = options.chat_template
    return digests | {"chat_template": None if given is None else file_record(given).sha256}


def require_tokenizer(folder: Path) -> None:
    """UserError if a tokenizer.json is there and its folder names no end of text."""
    if (folder / "tokenizer.json").is_file():
        require_eos(folder, read_tokenizer(folder))


def put_template(options: RecordOptions, folder: Path) -> None:
    """Gives a tokenizer's folder the template that the user named, as the one that transformers reads first."""
    if options.chat_template is not None:
        shutil.copyfile(options.chat_template, folder / TEMPLATE_FILE)


def record_job(options: RecordOptions, source: Path, folder: Path, today: str) -> RecordJob:
    """`source`: where the user's tokenizer lies; `folder`: the job's copy of it; `today`: when the job began."""
    asked = uses_date(template_sources(folder))
    if options.date is not None and not asked:
        raise UserError("--template-date: the chat template does not ask for the date")
    return RecordJob(
        kind=options.kind,
        train_on=options.train_on,
        train_trailing=options.train_trailing,
        seq_len=options.seq_len,
        excess=options.excess,
        date=(options.date or today) if asked else None,
        stops=generation_stops(source, folder),
    )


def check_template(job: Job, first: Sample | None) -> None:
    """UserError, before any work is done, if conversations cannot be rendered or a model that learns them not stop."""
    if first is not None and first.conversational:
        assert job.records is not None
        folder = Path(job.tokenizer)
        require_stop(job, read_template(folder, job.records.date))
    if job.records is not None and job.records.train_trailing:
        sources = template_sources(Path(job.tokenizer))
        if sources and read_template(Path(job.tokenizer), job.records.date).marks(None):
            raise UserError("--train-trailing: the chat template says itself, with {% generation %}, what is learnt")


def records_info(job: Job, parts: Sequence[TaskRecord], longest: int) -> RecordsInfo:
    """What the manifest says of the records."""
    records = job.records
    assert records is not None
    settings: dict[str, Any] = {
        key: value for key, value in asdict(records).items() if key not in ("kind", "stops") and value is not None
    }
    settings["chat_template"] = template_digest(Path(job.tokenizer))
    stops = sorted({number for part in parts for number in part.stop_ids})
    return RecordsInfo(records.kind, longest, stops, settings)


def remarks(counts: Counter[str]) -> Iterator[str]:
    """What the user should know of the records that were made."""
    if number := counts[DROPPED]:
        yield f"{number:,} records were dropped: {DROPPED} (--excess truncate would cut them)"
    if number := counts[CUT]:
        yield f"{number:,} records were {CUT}"
    if number := counts[NO_PREFIX]:
        yield (
            f"{number:,} records {NO_PREFIX}: what is learnt begins where the two differ, so the model learns after "
            "another context than it meets in use. A prompt should end where a token ends"
        )
    if number := counts[SPECIAL_TEXT]:
        yield f"{number:,} records {SPECIAL_TEXT}: it was encoded as the special token, as transformers does"


def first_day() -> str:
    """Today, as templates are told it."""
    return datetime.date.today().isoformat()
