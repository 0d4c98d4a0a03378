"""Files, names and folders that survive a crash."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from .errors import UserError, as_user_error

_T = TypeVar("_T")
PAUSES = (0.5, 2.0, 5.0)  # seconds before each time that something is tried again


def write_durably(path: Path, content: str | bytes) -> None:
    """Replaces `path` by `content` so that after a crash it is the old or the new content, whole. One writer."""
    temporary = path.with_name(f".{path.name}.partial")  # one name, so that kills leave at most one behind
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
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


def retried(action: Callable[[], _T], failed: Callable[[_T], bool] = lambda _: False) -> _T:
    """Does it again, after a pause, where it raises an OSError or `failed` says so of what it gives; the last outcome
    stands. File servers lose sight of a file for a moment (ESTALE, attributes out of a cache).
    """
    for seconds in PAUSES:
        with suppress(OSError):
            if not failed(found := action()):
                return found
        time.sleep(seconds)
    return action()


def publish_folder(made: Path, target: Path, replaced: Path) -> None:
    """Gives a folder its name when all in it is written (files are on the disk already), in place of what is there.

    Args:
        made, target, replaced: on one file system. A kill in between leaves what was at `target` under `replaced`.

    Raises:
        OSError: the disk is full or not writable; `target` is then as it was, or the new folder.
    """
    for path in (*made.rglob("*"), made):
        if path.is_dir():
            sync_directory(path)
    if target.exists():
        target.rename(replaced)
    try:
        made.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
    sync_directory(target.parent)
    if replaced.is_dir():
        shutil.rmtree(replaced, ignore_errors=True)  # the new one is there: what cannot be removed ends nothing
    else:
        replaced.unlink(missing_ok=True)


@contextmanager
def publishing(target: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name if the block succeeds, and vanishes if it does not.

    Raises:
        UserError: something is there already, and is not to be overwritten; or the block failed with an OSError.
    """
    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: already there; say --overwrite to replace it, or choose another --output")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        publish_folder(partial, target, target.with_name(f".{target.name}.old-{os.getpid()}"))
    except OSError as error:
        raise as_user_error(error, where=target) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_file_name(name: object) -> bool:
    """Whether this names a file of the folder that it is joined to, and no place outside of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name
