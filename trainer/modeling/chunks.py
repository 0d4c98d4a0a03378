"""Of how many tokens the head computes logits at once. Needs no torch, so that plans can tell."""

from __future__ import annotations

CHUNK_BYTES = 64 << 20  # of one chunk's fp32 logits
CACHED_BYTES = 12 << 20  # on a CPU, whose caches a chunk should not leave: measured 1.4 times as fast as 64 MiB


def chunk_rows(columns: int, on_cpu: bool = False) -> int:
    """Tokens of one chunk, where all tensor ranks together have `columns` logits of each."""
    return max(1, (CACHED_BYTES if on_cpu else CHUNK_BYTES) // (4 * columns))
