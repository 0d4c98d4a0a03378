"""Of how many tokens the head computes logits at once. Needs no torch, so that plans can tell."""

from __future__ import annotations

CHUNK_BYTES = 64 << 20  # of one chunk's fp32 logits; larger logits are computed chunk by chunk, twice


def chunk_rows(columns: int) -> int:
    """Tokens of one chunk, where all tensor ranks together have `columns` logits of each."""
    return max(1, CHUNK_BYTES // (4 * columns))
