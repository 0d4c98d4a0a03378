"""Small files and names that survive a crash."""

from __future__ import annotations

import os
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """Replaces `path` by `text` so that after a crash it is the old or the new content, whole. One writer."""
    temporary = path.with_name(f".{path.name}.partial")  # one name, so that kills leave at most one behind
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Forces a folder's entries (names, renames) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
