"""Bytes as people read and write them."""

from __future__ import annotations


def format_bytes(number: float) -> str:
    """1.5 KiB, 3.0 GiB."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if number >= 1 << power:
            return f"{number / (1 << power):.1f} {unit}"
    return f"{number:.0f} B"
