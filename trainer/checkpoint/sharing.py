"""Comparing a checkpoint with its manifest, byte for byte, by one reader or shared out among many. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...data_prep.durable import retried
from .files import HASH, CheckpointManifest, DamagedError, Digest, digest_problems, size_problems


def problems_of(path: Path) -> list[str]:
    """What is wrong with one checkpoint, all of it read.

    Raises:
        UserError: a newer version of zeropipe wrote it.
    """
    (own,) = reading_shares(path, 1)
    return own.problems()


@dataclass(frozen=True)
class ReadingShare:
    """What one of several readers compares of a checkpoint with its manifest, or what was seen without reading.

    What is missing is looked for again: passing over a checkpoint rolls a run back.
    """

    path: Path
    files: Mapping[str, Digest]
    hash: str = HASH
    seen: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        """What is wrong; reads the files."""
        if not self.seen:
            retried(lambda: size_problems(self.path, self.files), failed=bool)
        return list(self.seen) or digest_problems(self.path, self.files, self.hash)


def reading_shares(path: Path, readers: int) -> list[ReadingShare]:
    """A checkpoint dealt out to readers, after a look at all of its files.

    Raises:
        UserError: a newer version of zeropipe wrote it.
    """
    return retried(lambda: _dealt(path, readers), failed=lambda shares: bool(shares[0].seen))


def _dealt(path: Path, readers: int) -> list[ReadingShare]:
    try:
        manifest = CheckpointManifest.read(path)
    except DamagedError as error:
        return [ReadingShare(path, {}, seen=(str(error),))] * readers
    if seen := tuple(size_problems(path, manifest.files)):
        return [ReadingShare(path, {}, seen=seen)] * readers
    # the largest are dealt out first
    names = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
    dealt = [{name: manifest.files[name] for name in names[reader::readers]} for reader in range(readers)]
    return [ReadingShare(path, files, manifest.hash) for files in dealt]
