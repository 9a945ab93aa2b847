"""Tables as Parquet, as CSV, and as Raven selection tables, written as their rows come. Any name can stand in them."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.parquet as pq

RAVEN_COLUMNS = (
    "Selection", "View", "Channel", "Begin Time (s)", "End Time (s)", "Low Freq (Hz)", "High Freq (Hz)", "Begin File",
    "File Offset (s)", "Annotation", "Score",
)  # fmt: skip
DECIMALS = 6  # of seconds and scores that are written as text
IN_A_CELL = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})  # Raven knows no quotation marks


def table_name(path) -> str:
    """A path as it stands in tables. It need not be text: bytes that are none are written as \\\\udcff."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def write_parquet(path: Path, schema: pa.Schema, tables: Iterable[pa.RecordBatch], rows_at_a_time: int) -> int:
    """Row groups of so many rows, in which vectors lie as they are in memory. Returns the number of rows."""
    count = 0
    names = [field.name for field in schema if pa.types.is_string(field.type)]
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=names) as writer:
        for table in regrouped(schema, tables, rows_at_a_time):
            writer.write_table(table)
            count += len(table)
    return count


def regrouped(schema: pa.Schema, tables: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """The same rows, at least so many at a time but for the last."""
    waiting, count = [], 0
    for table in tables:
        waiting.append(table)
        count += len(table)
        if count >= rows:
            yield pa.Table.from_batches(waiting, schema)
            waiting, count = [], 0
    yield pa.Table.from_batches(waiting, schema)


def write_csv(file: TextIO, schema: pa.Schema, tables: Iterable[pa.RecordBatch]) -> int:
    """Quoted as RFC 4180 says. Returns the number of rows."""
    count = 0
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(schema.names)
    for table in tables:
        writer.writerows(zip(*map(as_text, table.columns), strict=True))
        count += len(table)
    return count


def write_raven(file: TextIO, tables: Iterable[pa.RecordBatch], highest: float) -> int:
    """A box for each row of file, start, end, label and score, from 0 to `highest` Hz. Returns the number of rows.

    Times are from the beginning of each row's file.
    """
    count = 0
    file.write("\t".join(RAVEN_COLUMNS) + "\n")
    for table in tables:
        for name, start, end, label, score in zip(*map(as_text, table.columns), strict=True):
            count += 1
            name, label = name.translate(IN_A_CELL), label.translate(IN_A_CELL)
            cells = (count, "Spectrogram 1", 1, start, end, 0, highest, name, start, label, score)
            file.write("\t".join(map(str, cells)) + "\n")
    return count


def as_text(column: pa.Array) -> list:
    """Numbers without the digits that only their format adds."""
    values = column.to_pylist()
    return [round(value, DECIMALS) for value in values] if pa.types.is_floating(column.type) else values
