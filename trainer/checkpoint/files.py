"""The files of a checkpoint: boxes streamed into safetensors while they are hashed, and the manifest that vouches for
every byte of them. No engine, no process group; torch only through the tensors that it is handed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from ...data_prep.durable import is_file_name, retried
from ...data_prep.errors import UserError
from .boxes import Box
from .safetensors_writer import FileTensor, in_groups, write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

_FORMAT = 2  # 1: SHA-256 alone, no milestones
# Guards the files against damage, not against attackers: whoever can write a run directory can write its manifest too,
# and nothing that is read from a checkpoint is executed. 128 bits miss damage once in 10^38.
HASH = "xxh3_128"
_HASHES: dict[str, Callable[[], Any]] = {HASH: xxhash.xxh3_128, "sha256": hashlib.sha256}
MANIFEST = "manifest.json"
STATE = "state.json"
PROBE = "probe.safetensors"
_FILE_LIMIT = 4 << 30  # bytes; larger files are unhandy to copy, and a rank with little memory maps them badly
_CHUNK = 8 << 20  # bytes that are hashed and written while they are in the processor's cache
_SYNC_EVERY = 16 << 20  # bytes; the disk works while the rest is written


@dataclass(frozen=True)
class Digest:
    """What the manifest says of one file; `value` in hexadecimal digits."""

    size: int
    value: str


def box_tensor(kind: str, name: str, box: Box, read: Callable[[], Tensor]) -> FileTensor:
    """The entry of a rank's file for a box of parameter `name`; `read` gives its values on the CPU, written as fp32."""
    return FileTensor(f"{kind}/{name}/{','.join(map(str, box.offset))}", box.shape, "float32", read)


def parse_key(key: str) -> tuple[str, str, tuple[int, ...]]:
    """Kind, parameter name and offset of a stored box."""
    kind, rest = key.split("/", 1)
    name, offset = rest.rsplit("/", 1)
    return kind, name, tuple(int(o) for o in offset.split(",")) if offset else ()


class HashedFile:
    """A file that is written and hashed at the same time, and on the disk when it is closed without an error."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._hash = _HASHES[HASH]()
        self._syncing = ThreadPoolExecutor(1)
        self._synced: Future[None] | None = None
        self._size = self._asked = 0

    def write(self, data: bytes | memoryview) -> None:
        """What is written is pushed to the disk meanwhile, so that little is left to wait for at the end."""
        for start in range(0, len(data), _CHUNK):
            chunk = data[start : start + _CHUNK]
            self._hash.update(chunk)
            self._file.write(chunk)
            self._size += len(chunk)
            if self._size - self._asked >= _SYNC_EVERY and (self._synced is None or self._synced.done()):
                self._file.flush()
                self._synced, self._asked = self._syncing.submit(os.fdatasync, self._file.fileno()), self._size

    def finish(self) -> Digest:
        """Forces the bytes to the disk, of which most are there already."""
        self._file.flush()
        if self._synced is not None:
            self._synced.result()  # a disk that failed says so once
        os.fsync(self._file.fileno())
        return Digest(self._size, self._hash.hexdigest())

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._syncing.shutdown()
        self._file.close()


def write_bytes(path: Path, data: bytes) -> Digest:
    """Writes a small file, forced to the disk."""
    with HashedFile(path) as file:
        file.write(data)
        return file.finish()


def write_json(path: Path, value: object) -> Digest:
    return write_bytes(path, json.dumps(value, indent=1).encode())  # no last line end: every byte counts


def write_rank(
    folder: Path, rank: int, tensors: Sequence[FileTensor], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Digest]:
    """Writes a rank's boxes into `rank-NNNNN.safetensors` (and `-1`, `-2`, … beyond 4 GiB each).

    Args:
        shapes: full shape of every parameter that the rank holds, for the reader.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    files = {}
    for part, (group, metadata) in enumerate(tensor_groups(tensors, shapes)):
        with HashedFile(folder / rank_file(rank, part)) as file:
            write_safetensors(file, group, metadata)
            files[rank_file(rank, part)] = file.finish()
    return files


def tensor_groups(
    tensors: Sequence[FileTensor], shapes: Mapping[str, Sequence[int]]
) -> Iterator[tuple[Sequence[FileTensor], dict[str, str]]]:
    """A rank's boxes file by file, each with its metadata."""
    for group in in_groups(tensors, _FILE_LIMIT):
        names = dict.fromkeys(parse_key(tensor.key)[1] for tensor in group)
        yield group, {"shapes": json.dumps({name: list(shapes[name]) for name in names})}


def rank_file(rank: int, part: int) -> str:
    """Name of a rank's file number `part`."""
    return f"rank-{rank:05d}{f'-{part}' if part else ''}.safetensors"


def rank_of_file(name: str) -> tuple[int, int]:
    """Rank and part of a name that `rank_file` gave."""
    rank, _, part = name.removeprefix("rank-").removesuffix(".safetensors").partition("-")
    return int(rank), int(part or 0)


@dataclass(frozen=True)
class CheckpointManifest:
    """What a whole checkpoint consists of. `sequence` counts the checkpoints of a run directory: newest is highest."""

    step: int
    sequence: int
    files: Mapping[str, Digest]
    milestone: bool = False  # kept for ever
    hash: str = HASH  # which digests these are

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files.values())

    @property
    def rank_files(self) -> list[str]:
        """The files that hold tensors, sorted."""
        return [name for name in sorted(self.files) if name.startswith("rank-")]

    def write(self, folder: Path) -> None:
        """Writes it, with a digest of itself, forced to the disk."""
        files = {name: {"size": digest.size, self.hash: digest.value} for name, digest in sorted(self.files.items())}
        head = {"format": _FORMAT, "step": self.step, "sequence": self.sequence, "milestone": self.milestone}
        body = head | {"hash": self.hash, "files": files}
        write_json(folder / MANIFEST, body | {"self": _digest_of(body)})

    @classmethod
    def read(cls, folder: Path) -> CheckpointManifest:
        """Raises `DamagedError` if it is not there or not as written, `UserError` if a newer version wrote it.

        Every format keeps the key `self` as it is, so that damage is never taken for the future.
        """
        path = folder / MANIFEST
        try:
            body = json.loads(path.read_bytes())
            found = body.pop("self", None)
        except OSError as error:
            raise DamagedError(_unreadable(path, error)) from None
        except (ValueError, AttributeError, TypeError):
            raise DamagedError(f"{path}: not a JSON object") from None
        if found != _digest_of(body):
            raise DamagedError(f"{path}: does not match its own digest")
        if body["format"] > _FORMAT:
            raise UserError(
                f"{path}: checkpoint format {body['format']} is newer than this version of zeropipe reads "
                f"({_FORMAT}): upgrade zeropipe"
            )
        if outside := [name for name in body["files"] if not is_file_name(name)]:
            raise DamagedError(f"{path}: {outside[0]!r} is not the name of a file in the checkpoint")
        kind = body.get("hash", "sha256")
        files = {name: Digest(entry["size"], entry[kind]) for name, entry in body["files"].items()}
        return cls(body["step"], body["sequence"], files, body.get("milestone", False), kind)


class DamagedError(UserError):
    """A checkpoint is not what was written."""


def _digest_of(body: object) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def size_problems(folder: Path, files: Mapping[str, Digest]) -> list[str]:
    """Files that are missing, out of reach or of another size: what can be seen without reading them."""
    problems = []
    for name, digest in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
        except OSError as error:
            problems.append(_unreadable(path, error))
            continue
        if size != digest.size:
            problems.append(f"{path}: {size} bytes, the manifest says {digest.size}")
    return problems


def digest_problems(folder: Path, files: Mapping[str, Digest], kind: str = HASH) -> list[str]:
    """Files that are not, byte for byte, what the manifest says. Reads them.

    Args:
        kind: which digests these are, as the manifest says.
    """
    problems = size_problems(folder, files)
    if problems:
        return problems
    for name, digest in files.items():
        try:
            found = retried(partial(_digest_of_file, folder / name, kind))
        except OSError as error:
            return [*problems, _unreadable(folder / name, error)]  # a bad disk: the rest would take its time, too
        if found != digest.value:
            problems.append(f"{folder / name}: {kind} is {found}, the manifest says {digest.value}")
    return problems


def _digest_of_file(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _HASHES[kind]).hexdigest()


def _unreadable(path: Path, error: OSError) -> str:
    """A block that cannot be read is damage like any other: there may be an older checkpoint."""
    return f"{path}: " + ("missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}")


def read_back(folder: Path, files: Mapping[str, Digest]) -> str | None:
    """What is wrong with files that have just been written; None if nothing is. Read from the disk, not from memory."""
    for name in files:
        with (folder / name).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    problems = digest_problems(folder, files)
    return f"what has just been written is damaged: {'; '.join(problems)}. Look at the disk" if problems else None
