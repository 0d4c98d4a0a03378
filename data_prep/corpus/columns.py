"""Reads text columns: parquet by row groups, Arrow files as Hugging Face `datasets` saves them. Never a whole file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import UserError
from .slices import BadDocument, Slice, Spot

ROWS = 256  # read at a time


def split_parquet(file: Slice, task_bytes: int) -> Iterator[Slice]:
    """Runs of row groups of about `task_bytes` on disk."""
    with _open_parquet(file.path) as parquet:
        groups = parquet.metadata.num_row_groups
        share = file.cost / max(1, groups)
        step = max(1, int(task_bytes / max(1.0, share)))
    for start in range(0, groups, step):
        stop = min(start + step, groups)
        yield replace(file, start=start, stop=stop, cost=int(share * stop) - int(share * start))


def read_columns(part: Slice, text_key: str, bad: Callable[[BadDocument], None]) -> Iterator[bytes]:
    """The documents of a slice. A null is a bad document; a column that is missing or no text is a UserError."""
    batches = _parquet_batches(part, text_key) if part.format == "parquet" else _arrow_batches(part)
    row = _rows_before(part)
    for batch in batches:
        for text in _text(batch, part.path, text_key):
            row += 1
            if text is None:
                bad(BadDocument(part.path, f"row {row}: the value of {text_key!r} is null, a string was expected"))
            elif _is_utf8(text):
                yield text
            else:
                bad(BadDocument(part.path, f"row {row}: invalid UTF-8 in {text_key!r}"))


def read_rows(part: Slice, bad: Callable[[BadDocument], None]) -> Iterator[tuple[Spot, dict[str, Any]]]:
    """The rows of a slice as records, nested columns as lists and objects, with where they are.

    Keys whose value is null are left out: in a column all objects have the same keys, whatever was written.
    """
    row = _rows_before(part)
    for batch in _parquet_batches(part) if part.format == "parquet" else _arrow_batches(part):
        for number, record in enumerate(_records_of(batch), start=row + 1):
            place = Spot(part.path, row=number)
            if record is None:
                bad(place.bad("invalid UTF-8 in its text"))
            else:
                yield place, record
        row += batch.num_rows


def _records_of(batch: pa.RecordBatch) -> list[dict[str, Any] | None]:
    """The rows of a batch; None for one whose strings are no UTF-8."""
    try:
        return [_without_nulls(record) for record in batch.to_pylist()]
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        return [record for row in range(batch.num_rows) for record in _records_of(batch.slice(row, 1))]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _rows_before(part: Slice) -> int:
    """Rows of a parquet file before those of the slice."""
    if part.format != "parquet" or not part.start:
        return 0
    with _open_parquet(part.path) as file:
        return sum(file.metadata.row_group(group).num_rows for group in range(part.start))


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _open_parquet(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole parquet file: {error}") from None


def _parquet_batches(part: Slice, text_key: str | None = None) -> Iterator[pa.RecordBatch]:
    """Batches of rows, of one column or, without a key, of all."""
    with _open_parquet(part.path) as file:
        groups = range(part.start, file.metadata.num_row_groups if part.stop is None else part.stop)
        names = file.schema_arrow.names
        if text_key is not None:
            top = text_key if text_key in names else text_key.split(".")[0]
            _require(top in names, part.path, text_key, file.schema_arrow)
        try:
            columns = None if text_key is None else [text_key]
            yield from file.iter_batches(ROWS, list(groups), columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{part.path}: damaged parquet data: {error}") from None


def _arrow_batches(part: Slice) -> Iterator[pa.RecordBatch]:
    """Record batches of the stream or the file format. Read, not mapped: mapped pages would count as our memory."""
    try:
        with pa.OSFile(part.path) as source:
            try:
                reader = pa.ipc.open_stream(source)
                batches = iter(reader)
            except pa.ArrowInvalid:
                source.seek(0)
                file = pa.ipc.open_file(source)
                batches = (file.get_batch(number) for number in range(file.num_record_batches))
            yield from batches
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{part.path}: not a whole Arrow file: {error}") from None


def _text(batch: pa.RecordBatch, path: str, text_key: str) -> Iterator[bytes | None]:
    column: pa.Array = pa.StructArray.from_arrays(batch.columns, batch.schema.names)
    for key in [text_key] if text_key in batch.schema.names else text_key.split("."):
        _require(
            pa.types.is_struct(column.type) and column.type.get_field_index(key) >= 0, path, text_key, batch.schema
        )
        column = pc.call_function("struct_field", [column], pc.StructFieldOptions(column.type.get_field_index(key)))
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    _require(pa.types.is_string(kind) or pa.types.is_large_string(kind) or _binary(kind), path, text_key, batch.schema)
    yield from column.cast(pa.large_binary()).to_pylist()


def _binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_string_view(kind)


def _require(condition: bool, path: str, text_key: str, schema: pa.Schema) -> None:
    if not condition:
        columns = ", ".join(f"{field.name!r} ({field.type})" for field in schema)
        raise UserError(f"{path}: no text column {text_key!r}; the columns there are: {columns} (name one: --text-key)")
