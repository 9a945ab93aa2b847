"""`dls search`: what in an index sounds most like a sound. Exact: every vector is looked at, block by block."""

import logging
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from datasets_scripts.errors import UserError
from datasets_scripts.files import files_moved_into_place
from dls_training.runtime import start_logging
from dls_training.waveforms import sound_blocks, stream_windows

from .index import Index
from .network import Embedder
from .settings import SearchSettings
from .tables import write_csv

logger = logging.getLogger("dls")

THREADS = 2  # more would wait for memory


def nearest(index: Index, query: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of an index that are most similar to a vector.

    Args:
        index: With at least one row.
        query: (dim,), float32.
        top_k: How many, at most.

    Returns:
        Their numbers, int64, and cosine similarities, float32, best first; of equal ones the first row first.
    """
    query = query / np.linalg.norm(query).clip(1e-12)

    def best_of(block: int) -> tuple[np.ndarray, np.ndarray]:
        vectors = index.vectors(block)
        similarity = vectors @ query
        if index.facts["layer"] != "projection":  # whose vectors have unit length
            similarity /= np.sqrt(np.einsum("ij,ij->i", vectors, vectors)).clip(1e-12)
        if len(similarity) > top_k:
            best = np.flatnonzero(similarity >= np.partition(similarity, -top_k)[-top_k])
        else:
            best = np.arange(len(similarity))
        return index.block_starts[block] + best, similarity[best]

    with ThreadPoolExecutor(THREADS) as pool:
        rows, similarity = map(np.concatenate, zip(*pool.map(best_of, range(index.num_blocks)), strict=True))
    order = np.lexsort((rows, -similarity))[:top_k]
    return rows[order], similarity[order]


def embed_query(embedder: Embedder, path: Path, stretch: tuple[float, float]) -> np.ndarray:
    """(dim,): the mean over windows of a stretch (in s) of a file.

    Raises:
        AudioError: if it cannot be read.
    """
    blocks = sound_blocks({"bytes": None, "path": str(path)}, embedder.extractor, stretch)
    vectors = [embedder(windows) for _, windows in stream_windows(blocks, embedder.length)]
    return embedder.mean(torch.cat(vectors)).numpy()


def load_embedder(index: Index, settings: SearchSettings) -> Embedder:
    """The network that made the index.

    Raises:
        UserError: if it is not where it was, or --model is another one.
    """
    model = settings.model or index.facts["model"]
    if not settings.model and Path(model).is_absolute() and not Path(model).exists():
        raise UserError(f"--index {index.path} was made by {model}, which is gone: say with --model where it is now")
    embedder = Embedder(model, index.facts["layer"], index.facts["seconds"], settings.mixed_precision)
    if embedder.digest != index.facts["digest"]:
        raise UserError(
            f"--index {index.path} was made by another model ({index.facts['model']}) than {model}: their vectors "
            "cannot be compared"
        )
    return embedder


def main(settings: SearchSettings) -> None:
    """Runs `dls search`.

    Raises:
        UserError: naming what the user can mend.
    """
    start_logging()
    index = Index(settings.index)
    query = next((path for path in (settings.query, index.root / settings.query) if path.is_file()), None)
    if query is None:
        raise UserError(f"QUERY {settings.query}: there is no such file, neither here nor in {index.root}")
    if not index.root.is_dir():
        logger.warning(f"the files of {index.path} are no longer in {index.root}: names are as they were there")
    embedder = load_embedder(index, settings)
    end = math.inf if settings.end is None else settings.end
    vector = embed_query(embedder, query, (settings.start, end))
    rows, similarity = nearest(index, vector, settings.top_k)
    found = index.places(rows).append_column("similarity", pa.array(similarity))
    if settings.output is None:
        sys.stdout.reconfigure(errors="backslashreplace")
        write_csv(sys.stdout, found.schema, found.to_batches())
        return
    with (
        files_moved_into_place(settings.output.parent) as unfinished,
        (unfinished / settings.output.name).open("w", newline="", encoding="utf-8") as file,
    ):
        write_csv(file, found.schema, found.to_batches())
