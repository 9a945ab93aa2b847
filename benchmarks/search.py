"""Searching an index of a million windows with dls search, beside the matrix product alone.

    python benchmarks/search.py

The vectors are generated, of unit length; the index lies in the system's file cache. `dls search` looks at every
vector; the product alone has them ready in memory.
"""

import tempfile
from pathlib import Path

from measuring import Arm, paired, ratio_line, run, summarise, take_turns


def write_index(path: Path, windows: int, dim: int, root: Path = Path("/")) -> None:
    """Of files of an hour, `0.wav` and so on below `root`."""
    import numpy as np
    import pyarrow as pa

    from dls_sounds.index import rows_per_block, schema
    from dls_sounds.tables import write_parquet

    facts = {"model": "none", "digest": "", "layer": "projection", "seconds": 5.0, "overlap": 0.0, "root": str(root)}
    random, rows, columns = np.random.default_rng(0), rows_per_block(dim), schema(dim, facts)

    def tables():
        for first in range(0, windows, rows):
            numbers = np.arange(first, min(first + rows, windows))
            vectors = random.standard_normal((len(numbers), dim), dtype=np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            names, starts = [f"{number // 720}.wav" for number in numbers], 5.0 * (numbers % 720)
            embedding = pa.FixedSizeListArray.from_arrays(vectors.ravel(), type=columns.field("embedding").type)
            yield pa.RecordBatch.from_arrays([pa.array(names), starts, starts + 5, embedding], schema=columns)

    write_parquet(path, columns, tables(), rows)


def arms(path: Path, windows: int, dim: int, top_k: int) -> dict[str, Arm]:
    import numpy as np

    from dls_sounds.index import Index
    from dls_sounds.searching import nearest

    index, query = Index(path), np.random.default_rng(1).standard_normal(dim).astype(np.float32)
    vectors = np.concatenate([index.vectors(block) for block in range(index.num_blocks)])

    def search():
        rows, _ = nearest(Index(path), query, top_k)
        index.places(rows)

    return {
        f"the best {top_k} of {windows:,} windows x {dim}": Arm(search, windows * 1e-6, "M windows"),
        "the matrix product alone": Arm(lambda: vectors @ query, windows * 1e-6, "M windows"),
    }


def measure(args) -> list[dict]:
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "index.parquet"
        write_index(path, args.windows, args.dim)
        made, seconds = take_turns([(arms, (path, args.windows, args.dim, args.top_k))], args.rounds)
    search, product = made
    lines = summarise(made, seconds)
    lines[0]["reach"] = "<= 2 s for a million"
    ratios = (alone / own for own, alone in paired(seconds, search, product))
    return [*lines, ratio_line("the matrix product alone / the search, in seconds", ratios)]


if __name__ == "__main__":
    run(
        measure,
        windows=(1_000_000, "in the index"),
        dim=(128, "numbers of a vector"),
        top_k=(10, "that are found"),
        rounds=7,
    )
