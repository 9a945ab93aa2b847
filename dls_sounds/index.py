"""An index: vectors of recordings in a Parquet file that says which network made them, and of what."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datasets_scripts.errors import UserError

FACTS = b"dls"  # key of an index's metadata
FLOATS_AT_A_TIME = 1 << 22  # a row group, which is read as a block


def schema(dim: int, facts: dict | None = None) -> pa.Schema:
    """Columns file, start, end (in s) and embedding, of which none can be missing: that makes them fast to read.

    Args:
        dim: Length of a vector.
        facts: What `Index.facts` shall be; JSON.
    """
    vector = pa.list_(pa.field("item", pa.float32(), nullable=False), dim)
    columns = {"file": pa.string(), "start": pa.float64(), "end": pa.float64(), "embedding": vector}
    fields = [pa.field(name, type, nullable=False) for name, type in columns.items()]
    return pa.schema(fields, metadata=facts and {FACTS: json.dumps(facts)})


def rows_per_block(dim: int) -> int:
    """Row groups of an index."""
    return max(1, FLOATS_AT_A_TIME // dim)


class Index:
    """An index that is there.

    Attributes:
        path: Of the file.
        facts: `model` and `digest` of the network (see `TrainedNetwork`), `layer`, `seconds` and `overlap` of windows
            or None where a row is a file, `root`: the folder from which `file` is seen.
        dim: Length of a vector.
        num_rows, num_blocks: Of the table.
        block_starts: (num_blocks + 1,): the number of each block's first row.
    """

    def __init__(self, path: Path):
        """
        Raises:
            UserError: if there is no such file, or it is no index.
        """
        self.path = path
        try:
            file = self.opened()
            self.facts = json.loads((file.schema_arrow.metadata or {}).get(FACTS, b"null"))
        except FileNotFoundError:
            raise UserError(f"{path}: there is no such file; dls embed makes an index") from None
        except (OSError, pa.ArrowException, ValueError) as error:
            raise UserError(f"{path} cannot be read as an index of dls embed ({error})") from error
        if not isinstance(self.facts, dict):
            raise UserError(f"{path} is no index of dls embed: choose another file, or remove it and embed anew")
        self.dim = file.schema_arrow.field("embedding").type.list_size
        self.num_rows, self.num_blocks = file.metadata.num_rows, file.num_row_groups
        self.block_starts = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in range(self.num_blocks))])

    def opened(self) -> pq.ParquetFile:
        """Memory-mapped; each thread needs one of its own."""
        return pq.ParquetFile(self.path, memory_map=True)

    @property
    def root(self) -> Path:
        return Path(self.facts["root"])

    def vectors(self, block: int) -> np.ndarray:
        """(rows, dim) of a block."""
        table = self.opened().read_row_group(block, columns=["embedding"], use_threads=False)
        return table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, self.dim)

    def places(self, rows: np.ndarray) -> pa.Table:
        """file, start and end of some rows, in the order in which they are given."""
        file, found = self.opened(), []
        for row in rows.tolist():
            block = int(np.searchsorted(self.block_starts, row, "right")) - 1
            columns = file.read_row_group(block, columns=["file", "start", "end"])
            found.append(columns.slice(row - self.block_starts[block], 1))
        return pa.concat_tables(found)

    def files(self) -> set[str]:
        """All names, each once."""
        return set(self.opened().read(columns=["file"])["file"].unique().to_pylist())

    def tables(self) -> Iterator[pa.RecordBatch]:
        """All rows, in order."""
        return self.opened().iter_batches(rows_per_block(self.dim))
