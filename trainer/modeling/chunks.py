"""Of how many tokens the head computes logits at once. Needs no torch, so that plans can tell."""

from __future__ import annotations

CHUNK_BYTES = 64 << 20  # of one chunk's fp32 logits
CACHED_BYTES = 4 << 20  # of what is looked at several times in a row, on a CPU
# Tokens for which a GPU computes as long as it reads the head's weight, several times over. Of a chunk of R tokens each
# of the three products does 2 R V w operations, and reads V w numbers of two bytes, the last one also writes as many:
# R and R / 2 operations a byte. An H100 does 295 of them in bf16 in the time in which it reads a byte (989 TFLOP/s,
# 3.35 TB/s), an A100 153 (312, 2.04), a B200 281 (2,250, 8).
BUSY_ROWS = 1024


def chunk_rows(columns: int, device: str = "") -> int:
    """Tokens of one chunk, where all tensor ranks together have `columns` logits of each.

    Args:
        device: the kind of it; unknown: of those there are, the one that takes most.
    """
    rows = max(1, CHUNK_BYTES // (4 * columns))
    return rows if device == "cpu" else max(rows, BUSY_ROWS)


def cached_rows(columns: int, device: str) -> int:
    """Tokens whose fp32 logits stay in the caches of a kind of device while they are worked on."""
    return max(1, CACHED_BYTES // (4 * columns)) if device == "cpu" else chunk_rows(columns, device)
