"""What one worker does with records: recognise, render, encode, and flag what is learnt."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

import numpy as np

from ..corpus.documents import read_records
from ..corpus.slices import Spot
from ..corpus.sources import Task
from ..making.tasks import TaskRecord, Worker, describe
from ..store import TRAINED
from .drafts import Draft, Drafter
from .flags import Flagger
from .formats import recognise
from .probe import require_stop
from .settings import BadRecord
from .spans import make_spans, recognising_tokenizer, special_tokens
from .template import ChatTemplate, read_template
from .vocabulary import require_eos

SPECIAL_TEXT = "with a special token in their text"
DROPPED, CUT = "longer than --seq-len", "cut to --seq-len"
_SEPARATOR = "\x1e"  # between the texts of a record, for filters


@dataclass(frozen=True)
class Drafted:
    """A record whose texts are made but not encoded."""

    place: Spot
    drafts: list[Draft]
    size: int  # bytes of all its texts

    def __len__(self) -> int:
        return self.size


class RecordWorker(Worker):
    """Runs tasks whose documents are records."""

    def _open(self) -> None:
        assert self.job.records is not None
        self.records = self.job.records
        folder = Path(self.job.tokenizer)
        tokenizer = recognising_tokenizer(folder)
        special = special_tokens(tokenizer)
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        eos, _ = require_eos(folder, tokenizer)
        self._drafter = Drafter(self.records, eos, special, lambda: self._template)
        self.encoder = make_spans(self.job.encoder, folder, self.job.cache_memory, tokenizer)
        self._flagger = Flagger(self.job, folder, tokenizer)

    @cached_property
    def _template(self) -> ChatTemplate:
        template = read_template(Path(self.job.tokenizer), self.records.date)
        require_stop(self.job, template)
        return template

    def _documents(self, task: Task, record: TaskRecord) -> Iterator[Drafted]:
        counts = record.counts
        for part in task.slices:
            for place, found in read_records(part, partial(self._bad, record)):
                counts["read"] += 1
                try:
                    sample = recognise(found, self.records.kind)
                    drafts = self._drafter.drafts(sample)
                except BadRecord as error:
                    self._bad(record, place.bad(str(error)))
                    continue
                counts[sample.format] += 1
                try:
                    document = _SEPARATOR.join([draft.text for draft in drafts]).encode()
                except UnicodeEncodeError:
                    self._bad(record, place.bad("its text holds half of a surrogate pair, which is no character"))
                    continue
                if self._dropped(document, counts):
                    continue
                if self._special.search("\0".join(sample.contents())):
                    counts[SPECIAL_TEXT] += 1
                yield Drafted(place, drafts, len(document) - len(drafts) + 1)

    def _encode(self, batch: list[Drafted], record: TaskRecord) -> tuple[np.ndarray, np.ndarray]:
        """Flagged tokens of the records that stay, one after the other, and their META."""
        drafts = chain.from_iterable(drafted.drafts for drafted in batch)
        encoded = iter(self.encoder.encode([text for draft in drafts for text in draft.texts]))
        kept, sizes = [], []
        for drafted in batch:
            texts = [[next(encoded) for _ in draft.texts] for draft in drafted.drafts]
            try:
                rows = self._fitted(self._flagger.rows(drafted.drafts, texts, record.counts), record.counts)
            except BadRecord as error:
                self._bad(record, drafted.place.bad(str(error)))
                continue
            if rows:
                kept.append(rows[0] if len(rows) == 1 else np.concatenate(rows))
                sizes.append(drafted.size)
        tokens = np.concatenate(kept) if kept else np.empty(0, self._flagger.dtype)
        learnt = tokens["token"][(tokens["flags"] & TRAINED) != 0]
        record.stop_ids = sorted({*record.stop_ids, *(end for end in self._flagger.ends if (learnt == end).any())})
        return tokens, describe([len(row) for row in kept], sizes, [row.tobytes() for row in kept])

    def _fitted(self, rows: list[np.ndarray], counts: Counter[str]) -> list[np.ndarray]:
        """The texts of a record within `--seq-len`, none if it is dropped. BadRecord if one has nothing to learn."""
        total, limit, excess = sum(map(len, rows)), self.records.seq_len, ""
        if limit is not None and total > limit:
            excess = f": it has {total:,} tokens, more than --seq-len {limit:,}"
            if self.records.excess == "error":
                raise BadRecord(f"too long{excess}")
            counts[CUT if self.records.excess == "truncate" else DROPPED] += 1
            rows = shortened(rows, limit) if self.records.excess == "truncate" else []
        for row in rows:
            if not (row["flags"][1:] & TRAINED).any():  # nothing comes before the first token that could predict it
                raise BadRecord(f"no token of it would be learnt{excess}")
        return rows


def shortened(rows: list[np.ndarray], limit: int) -> list[np.ndarray]:
    """The beginnings of the texts of a record, `limit` tokens together; the longer one is cut first."""
    room, lengths = limit, {}
    for left, number in enumerate(sorted(range(len(rows)), key=lambda number: len(rows[number]))):
        lengths[number] = min(len(rows[number]), room // (len(rows) - left))
        room -= lengths[number]
    return [row[: lengths[number]] for number, row in enumerate(rows)]
