"""`dls embed`: recordings -> an index of vectors, which new recordings join."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from datasets_scripts.errors import UserError

from .engine import Finding, common_root, find_files
from .index import Index, rows_per_block, schema
from .network import Embedder
from .settings import PRETRAINED, EmbedSettings
from .tables import table_name, write_parquet
from .work import Work, compute, finish, parts_folder, processes, recordings

logger = logging.getLogger("dls")


def make_rows(embedder: Embedder, per_window: bool) -> Callable[[str, Iterator[Finding]], Iterator[dict]]:
    """What makes rows of a recording's windows: one for each, or one for their mean, which is taken as they come."""
    rate = embedder.extractor.sampling_rate

    def window_rows(name: str, windows: Iterator[Finding]) -> Iterator[dict]:
        for window in windows:
            yield {"file": name, "start": window.start / rate, "end": window.end / rate, "embedding": window.values}

    def file_row(name: str, windows: Iterator[Finding]) -> Iterator[dict]:
        total, count, end = np.zeros(embedder.dim), 0, 0
        for window in windows:
            total, count, end = total + window.values, count + 1, window.end
        if count:
            vector = embedder.mean(torch.from_numpy(total / count)[None]).float()
            yield {"file": name, "start": 0.0, "end": end / rate, "embedding": vector.numpy()}

    return window_rows if per_window else file_row


def check_agreement(index: Index, facts: dict) -> None:
    """What is in an index and what joins it can be compared.

    Raises:
        UserError: saying what differs.
    """
    for name in ("layer", "seconds", "overlap"):
        if index.facts[name] != facts[name]:
            raise UserError(
                f"--output {index.path} holds {described(index.facts)}, and this would be {described(facts)}: give "
                "the same options, or choose another --output"
            )
    if index.facts["digest"] != facts["digest"]:
        raise UserError(
            f"--output {index.path} was made by another model ({index.facts['model']}): its vectors and this "
            "one's cannot be compared; choose another --output, or remove it"
        )


def described(facts: dict) -> str:
    """What an index's rows are."""
    if facts["seconds"] is None:
        return f"{facts['layer']} vectors of whole files"
    return f"{facts['layer']} vectors of windows of {facts['seconds']:g} s with an overlap of {facts['overlap']:g}"


def new_files(settings: EmbedSettings, index: Index | None) -> tuple[Path, list[tuple[str, Path]]]:
    """The root from which names are seen, and (name, path) of the files that are not in the index."""
    root, known = common_root(settings.input), set()
    if index:
        known = index.files()
        if index.root.is_dir():
            root = index.root
        else:
            logger.warning(f"{index.root}, where the index's files were, is gone: they are looked for in {root}")
    files = ((table_name(Path(os.path.relpath(file, root)).as_posix()), file) for file in find_files(settings.input))
    return root, [(name, file.absolute()) for name, file in files if name not in known]


def main(settings: EmbedSettings) -> None:
    """Runs `dls embed`, alone or as one of torchrun's processes.

    Raises:
        UserError: naming what the user can mend.
    """
    output = settings.output
    with processes():
        index = Index(output) if output.exists() else None
        model = settings.model or (index.facts["model"] if index else str(PRETRAINED))
        if not (settings.model or index or PRETRAINED.is_dir()):
            raise UserError(f"argument --model: must be given, for --output is not there yet, nor is {PRETRAINED}")
        root, files = new_files(settings, index)
        embedder = Embedder(model, settings.layer, settings.windows, settings.mixed_precision)
        facts = {"model": embedder.source, "digest": embedder.digest, "layer": embedder.layer, "root": str(root)}
        per_window = settings.windows is not None
        facts |= {"seconds": embedder.seconds if per_window else None, "overlap": settings.overlap}
        if index:
            check_agreement(index, facts)
        logger.info(f"{len(files)} new files, {embedder.layer} vectors of {embedder.dim} numbers, {embedder}")
        if not files:
            shutil.rmtree(parts_folder(output), ignore_errors=True)
            logger.info(f"{output}: {index.num_rows} rows, nothing to add")
            return
        plan = facts | {"length": embedder.length, "batch_size": settings.batch_size, "dtype": str(embedder.dtype)}
        work = Work(output, recordings(files), plan)
        compute(work, embedder, settings, make_rows(embedder, per_window), schema(embedder.dim))

        def write(path: Path, tables: Iterator[pa.RecordBatch]) -> int:
            before = index.tables() if index else ()
            return write_parquet(
                path, schema(embedder.dim, facts), chain(before, tables), rows_per_block(embedder.dim)
            )

        finish(work, write)
