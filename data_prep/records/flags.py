"""Encoded drafts to flagged tokens: what each token is to the loss."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..index import flagged
from ..making.tasks import Job
from ..store import BEGINS, TRAINED
from .drafts import Draft
from .spans import Encoded, special_tokens, surroundings
from .vocabulary import require_eos

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NO_PREFIX = "with a prompt that is no beginning of the whole"


class Flagger:
    """Knows of one tokenizer what the flags depend on."""

    def __init__(self, job: Job, folder: Path, tokenizer: Tokenizer) -> None:
        assert job.records is not None
        self.dtype = flagged(np.dtype(job.dtype))
        self.ends = sorted({*job.records.stops, require_eos(folder, tokenizer)[1]})
        self._trailing = job.records.train_trailing
        self._head, self._tail = (np.array(ids, np.int64) for ids in surroundings(tokenizer))
        self._special = np.zeros(max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1, bool)
        self._special[[*map(tokenizer.token_to_id, special_tokens(tokenizer)), *self.ends]] = True

    def rows(self, drafts: list[Draft], encoded: list[list[Encoded]], counts: Counter[str]) -> list[np.ndarray]:
        """The texts of a record as flagged tokens; `encoded`: of each draft its `texts`."""
        ids = [[self._whole(text.ids, draft) for text in texts] for draft, texts in zip(drafts, encoded, strict=True)]
        shared = [common(*own) for own in ids if len(own) == 2]
        if any(length < len(own[1]) for length, own in zip(shared, ids, strict=bool(shared))):
            counts[NO_PREFIX] += 1
        rows = []
        for draft, own, texts in zip(drafts, ids, encoded, strict=True):
            row = np.zeros(len(own[0]), self.dtype)
            row["token"] = own[0]
            if draft.spans is not None:
                self._mark(row, draft, texts[0])
            else:
                row["flags"][min(shared, default=0) :] = TRAINED
            row["flags"][:1] |= BEGINS
            rows.append(row)
        return rows

    def _whole(self, ids: np.ndarray, draft: Draft) -> np.ndarray:
        return np.concatenate([self._head, ids, self._tail]) if draft.added else ids

    def _mark(self, row: np.ndarray, draft: Draft, encoded: Encoded) -> None:
        """Flags the tokens of the spans as transformers does; those found by comparison end in a special token."""
        for start, stop in draft.spans or ():
            first, last = encoded.token_at(start), encoded.token_at(stop - 1)
            if first is None:
                return
            end = last + 1 if last else len(row)
            if not (draft.exact or self._trailing):
                special = np.flatnonzero(self._special[row["token"][first:end]])
                end = first + int(special[-1]) + 1 if len(special) else end
            row["flags"][first:end] = TRAINED


def common(ids: np.ndarray, others: np.ndarray) -> int:
    """Number of tokens with which both begin."""
    length = min(len(ids), len(others))
    different = np.flatnonzero(ids[:length] != others[:length])
    return int(different[0]) if len(different) else length
