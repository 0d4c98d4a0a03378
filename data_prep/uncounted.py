"""Token files whose index leaves the end-of-document tokens out: Megatron-DeepSpeed's `preprocess_data.py --append-eod`
writes the token behind each document and does not count it, so that every document begins one token later than the
index says for each one before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .index import Header, Index

_BLOCK = 4 << 20  # documents looked at together


@dataclass
class CountedIndex:
    """The index as it should be: every document one sequence, with its last token. Arrays as in `IndexFile`."""

    header: Header
    lengths: np.ndarray
    offsets: np.ndarray
    documents: np.ndarray


def leaves_ends_out(index: Index, tokens: int) -> bool:
    """Whether a `.bin` of so many tokens has one more for each document that holds anything than its index tells."""
    documents, sequences = index.documents, index.header.sequences
    if not sequences or not len(documents) or documents[0] != 0 or documents[-1] != sequences:
        return False
    promised = int(index.offsets[-1]) // index.header.dtype.itemsize + int(index.lengths[-1])
    return tokens == promised + np.count_nonzero(np.diff(documents))


def counted(index: Index, tokens: np.ndarray) -> tuple[CountedIndex, int] | None:
    """The index with the ends of the documents counted, and the token that is at each; None where the tokens there are
    not all the same, so that something else is wrong. Empty documents, which have no such token, are left out.
    """
    sums = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])
    lengths = np.diff(sums[np.asarray(index.documents)])
    lengths = lengths[lengths > 0] + 1
    ends = np.cumsum(lengths)
    if not len(ends) or ends[-1] != len(tokens):
        return None
    end = tokens[-1]
    for start in range(0, len(ends), _BLOCK):
        if (tokens[ends[start : start + _BLOCK] - 1] != end).any():
            return None
    header = Header(index.header.dtype, len(lengths), len(lengths) + 1)
    offsets = (ends - lengths) * header.dtype.itemsize
    return CountedIndex(header, lengths.astype(np.int32), offsets, np.arange(len(lengths) + 1)), int(end)
