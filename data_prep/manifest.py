"""The manifest of a token store: what it holds, the digests of its files, and the fingerprint of its content."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .durable import is_file_name, write_durably
from .errors import UserError

STORE_MANIFEST = "manifest.json"
_FORMAT = "zeropipe token store"
_VERSION = 1


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardRecord:
    """One `.bin/.idx` pair: what it holds, and its files; with a `.mask` where the documents are records."""

    name: str
    documents: int
    tokens: int
    bin: FileRecord
    idx: FileRecord
    mask: FileRecord | None = None

    def files(self) -> dict[str, FileRecord]:
        """The shard's files by their names."""
        found = {"bin": self.bin, "idx": self.idx, "mask": self.mask}
        return {f"{self.name}.{suffix}": record for suffix, record in found.items() if record is not None}

    def content(self) -> dict[str, Any]:
        """As JSON; a shard of plain text says nothing of a mask."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class RecordsInfo:
    """What the documents of a store are if they are records to learn from, not text."""

    kind: str  # sft: one text a record; dpo: two, the chosen one and the rejected one
    longest: int  # tokens of the longest record, all its texts together
    stop_ids: list[int]  # tokens that end what is trained
    settings: dict[str, Any] = field(default_factory=dict)  # how they were made from the input


@dataclass(frozen=True)
class Manifest:
    """Holds no time, host or worker count: the same corpus and settings give the same bytes."""

    dtype: str
    vocab_size: int | None
    eod_token: str | None
    eod_id: int | None
    num_documents: int
    num_tokens: int
    text_bytes: int | None  # UTF-8 bytes of the documents' text
    shards: list[ShardRecord]
    tokenizer: dict[str, FileRecord] = field(default_factory=dict)  # files of the folder tokenizer/
    counts: dict[str, int] = field(default_factory=dict)  # documents read, dropped and why
    settings: dict[str, Any] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    records: RecordsInfo | None = None

    @property
    def fingerprint(self) -> str:
        """Hex digest of what the tokens are: type, vocabulary, shards and tokenizer; not of where they came from."""
        content = {
            "dtype": self.dtype,
            "vocab_size": self.vocab_size,
            "eod_id": self.eod_id,
            "shards": [shard.content() for shard in self.shards],
            "tokenizer": {name: record.sha256 for name, record in self.tokenizer.items()},
        }
        if self.records is not None:
            content["records"] = self.records.kind
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def save(self, directory: Path) -> None:
        content = asdict(self) | {"shards": [shard.content() for shard in self.shards]}
        if self.records is None:
            del content["records"]
        payload = {"format": _FORMAT, "version": _VERSION, **content, "fingerprint": self.fingerprint}
        write_durably(directory / STORE_MANIFEST, json.dumps(payload, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Reads it back. UserError if it is missing, damaged, changed by hand, or of another version."""
        path = directory / STORE_MANIFEST
        try:
            payload = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot read the store's manifest: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error}); the store is damaged, prepare it again") from None
        if not isinstance(payload, dict) or payload.pop("format", None) != _FORMAT:
            raise UserError(f"{path}: not the manifest of a token store")
        if (version := payload.pop("version", None)) != _VERSION:
            raise UserError(f"{path}: version {version} of the store format, this program reads version {_VERSION}")
        stated = payload.pop("fingerprint", None)
        try:
            manifest = cls._from_payload(payload)
        except (TypeError, KeyError) as error:
            raise UserError(f"{path}: damaged manifest: {error}") from None
        for name in [*(shard.name for shard in manifest.shards), *manifest.tokenizer]:
            if not is_file_name(name):
                raise UserError(f"{path}: {name!r} is not the name of a file in the store; the manifest is damaged")
        if stated != manifest.fingerprint:
            raise UserError(f"{path}: fingerprint {stated} does not fit its content: the manifest was changed by hand")
        return manifest

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> Manifest:
        shards = [
            ShardRecord(**shard | {key: FileRecord(**shard[key]) for key in ("bin", "idx", "mask") if key in shard})
            for shard in payload.pop("shards")
        ]
        tokenizer = {name: FileRecord(**record) for name, record in payload.pop("tokenizer").items()}
        records = payload.pop("records", None)
        return cls(
            shards=shards, tokenizer=tokenizer, records=None if records is None else RecordsInfo(**records), **payload
        )


def file_record(path: Path) -> FileRecord:
    """Size and SHA-256 of a file, read in bounded memory."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(os.fstat(file.fileno()).st_size, digest.hexdigest())
