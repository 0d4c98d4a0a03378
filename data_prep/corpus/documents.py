"""Reads slices of a corpus as documents: the UTF-8 bytes of their text, one after the other."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import orjson

from ..errors import UserError
from .slices import BadDocument, Slice, Spot

_BUFFER = 1 << 20
_BOM = b"\xef\xbb\xbf"


def read_documents(part: Slice, text_key: str, bad: Callable[[BadDocument], None]) -> Iterator[bytes]:
    """The documents of a slice. What is no document goes to `bad`, which raises it or notes it and returns.

    A file that cannot be read at all (missing, damaged compression) is a UserError.
    """
    with _whole(part):
        if part.format in ("parquet", "arrow"):
            from .columns import read_columns

            yield from read_columns(part, text_key, bad)
        elif part.format == "jsonl":
            yield from _json_lines(part, text_key, bad)
        else:
            yield from _text(part, bad)


def read_records(part: Slice, bad: Callable[[BadDocument], None]) -> Iterator[tuple[Spot, dict[str, Any]]]:
    """The records of a slice, whole, with where they are. Otherwise as `read_documents`."""
    with _whole(part):
        if part.format in ("parquet", "arrow"):
            from .columns import read_rows

            yield from read_rows(part, bad)
        elif part.format == "jsonl":
            yield from _json_records(part, bad)
        else:
            raise UserError(
                f"{part.path}: read as {part.format}, which holds no records: they come from jsonl, parquet, Arrow "
                "files or saved data sets"
            )


@contextmanager
def _whole(part: Slice) -> Iterator[None]:
    """Turns what a file that cannot be read raises into a UserError."""
    try:
        yield
    except OSError as error:
        # gzip.BadGzipFile is an OSError without an errno
        raise UserError(f"{part.path}: cannot read it: {error.strerror or error}") from None
    except (EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
        if part.compression is None:
            raise
        raise UserError(f"{part.path}: the {part.compression} data is truncated or damaged ({error})") from None


def _json_records(part: Slice, bad: Callable[[BadDocument], None]) -> Iterator[tuple[Spot, dict[str, Any]]]:
    for number, (offset, line) in enumerate(_lines(part), start=1):
        if not line.strip():
            continue
        place = Spot(part.path, offset=offset) if part.start else Spot(part.path, line=number)
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            bad(place.bad(_json_reason(line, error)))
            continue
        if isinstance(record, dict):
            yield place, record
        else:
            bad(place.bad(f"{kind_of(record)} where an object was expected"))


def _json_lines(part: Slice, text_key: str, bad: Callable[[BadDocument], None]) -> Iterator[bytes]:
    number = 0
    for offset, line in _lines(part):
        number += 1
        if not line.strip():
            continue
        try:
            record = orjson.loads(line)
            text = record[text_key]
            if type(text) is str:
                yield text.encode()
                continue
            reason = f"the value of {text_key!r} is {kind_of(text)}, a string was expected"
        except orjson.JSONDecodeError as error:
            reason = _json_reason(line, error)
        except (KeyError, TypeError):
            text = nested(record, text_key)
            if type(text) is str:
                yield text.encode()
                continue
            reason = key_reason(record, text_key, text)
        if part.start:
            bad(BadDocument(part.path, reason, offset=offset))
        else:
            bad(BadDocument(part.path, reason, line=number))


def nested(record: Any, text_key: str) -> Any:
    """The value at a dotted path, `a.b.c`; None if it leads nowhere."""
    for key in text_key.split("."):
        if not isinstance(record, dict):
            return None
        record = record.get(key)
    return record


def key_reason(record: Any, text_key: str, text: Any) -> str:
    """Why a record has no text at a key, in words."""
    if not isinstance(record, dict):
        return f"{kind_of(record)} where an object with the key {text_key!r} was expected"
    if text is not None:
        return f"the value of {text_key!r} is {kind_of(text)}, a string was expected"
    keys = ", ".join(repr(key) for key in key_paths(record)) or "none"
    return f"no text at the key {text_key!r}; the keys there are: {keys}; name one with --text-key"


def key_paths(record: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths of a record, at most twenty."""
    paths: list[str] = []
    for key, value in record.items():
        inner = key_paths(value, f"{prefix}{key}.") if isinstance(value, dict) else []
        paths += inner or [prefix + key]
    return paths[:20]


def kind_of(value: Any) -> str:
    """The JSON type of a value, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _json_reason(line: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as wrong:
        return f"invalid UTF-8 at byte {wrong.start} of the line ({wrong.reason})"
    hint = "; a file that is one JSON array must become one object a line" if line.strip() in (b"[", b"{") else ""
    return f"invalid JSON: {error.msg} at column {error.colno}{hint}"


def _lines(part: Slice) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines that begin in [start, stop), each with its line end, without a byte-order mark."""
    with open_decompressed(part) as file:
        position = 0
        if part.start:
            file.seek(part.start - 1)
            position = part.start - 1 + len(file.readline())
        while part.stop is None or position < part.stop:
            line = file.readline()
            if not line:
                return
            yield position, line.removeprefix(_BOM) if position == 0 else line
            position += len(line)


def _text(part: Slice, bad: Callable[[BadDocument], None]) -> Iterator[bytes]:
    if part.format == "text":
        with open_decompressed(part) as file:
            units = [(0, file.read().removeprefix(_BOM))]
    elif part.format == "paragraphs":
        units = _paragraphs(part)
    else:
        units = ((offset, line.rstrip(b"\r\n")) for offset, line in _lines(part))
    for number, (offset, text) in enumerate(units, start=1):
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            reason = f"invalid UTF-8 at byte {offset + error.start} ({error.reason})"
            line = number if part.format == "lines" and not part.start else None
            bad(BadDocument(part.path, reason, line=line))
            continue
        yield text


def _paragraphs(part: Slice) -> Iterator[tuple[int, bytes]]:
    """Runs of lines between blank ones."""
    start, lines = 0, []
    for offset, line in _lines(part):
        if line.strip():
            start = start if lines else offset
            lines.append(line)
        elif lines:
            yield start, b"".join(lines).rstrip(b"\r\n")
            lines = []
    if lines:
        yield start, b"".join(lines).rstrip(b"\r\n")


def open_decompressed(part: Slice) -> BinaryIO:
    """The file's bytes, decompressed."""
    if part.compression is None:
        return open(part.path, "rb", buffering=_BUFFER)
    if part.compression == "gz":
        return cast(BinaryIO, io.BufferedReader(gzip.open(part.path), _BUFFER))
    if part.compression == "xz":
        return cast(BinaryIO, io.BufferedReader(lzma.open(part.path), _BUFFER))
    if part.compression == "bz2":
        return cast(BinaryIO, io.BufferedReader(bz2.open(part.path), _BUFFER))
    return cast(BinaryIO, io.BufferedReader(_Zstandard(part.path), _BUFFER))


class _Zstandard(io.RawIOBase):
    """Decompresses frames one after the other. The library's own reader takes a truncated file for a whole one."""

    def __init__(self, path: str) -> None:
        import zstandard

        self._file = open(path, "rb")  # noqa: SIM115, closed with this object
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._error = zstandard.ZstdError
        self._ready = memoryview(b"")
        self._packed = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._packed or self._file.read(_BUFFER)
            if not packed:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(packed))
            except self._error as error:
                raise EOFError(str(error)) from None
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
