"""Of how many tokens the head computes logits at once. Needs no torch, so that plans can tell."""

from __future__ import annotations

CHUNK_BYTES = 64 << 20  # of one chunk's fp32 logits
CACHED_BYTES = 4 << 20  # of what is looked at several times in a row, on a CPU


def chunk_rows(columns: int) -> int:
    """Tokens of one chunk, where all tensor ranks together have `columns` logits of each."""
    return max(1, CHUNK_BYTES // (4 * columns))


def cached_rows(columns: int, device: str) -> int:
    """Tokens whose fp32 logits stay in the caches of a kind of device while they are worked on."""
    return max(1, CACHED_BYTES // (4 * columns)) if device == "cpu" else chunk_rows(columns)
