"""`dls predict`: recordings -> what is heard in them, where."""

import logging
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from datasets_scripts.errors import UserError

from .engine import Finding, common_root, find_files
from .network import Classifier
from .run_onnx import SEVERAL_LABELS_FROM, best_labels, cells, detections
from .settings import AUTO, STANDARD_INPUT, PredictSettings
from .tables import table_name, write_csv, write_parquet, write_raven
from .work import Work, compute, finish, processes, recordings

logger = logging.getLogger("dls")

SCHEMA = pa.schema(
    [("file", pa.string()), ("start", pa.float64()), ("end", pa.float64()), ("label", pa.string()),
     ("score", pa.float32())]
)  # fmt: skip
ROWS_AT_A_TIME = 1 << 16


def rule(classifier: Classifier, threshold: float | str) -> Callable[[np.ndarray], np.ndarray]:
    """Scores -> the labels that hold; "auto" as in `PredictSettings`."""
    if threshold == AUTO:
        if classifier.threshold is None and not classifier.multi_label:
            return lambda scores: scores.argmax()[None]
        threshold = SEVERAL_LABELS_FROM if classifier.threshold is None else classifier.threshold
    if isinstance(threshold, dict):
        threshold = np.array([threshold[label] for label in classifier.labels], np.float32)
    return lambda scores: np.flatnonzero(scores >= threshold)


def make_rows(classifier: Classifier, settings: PredictSettings) -> Callable[[str, Iterator[Finding]], Iterator[dict]]:
    """What makes rows of a recording's windows."""
    step, rate = classifier.step(settings.overlap), classifier.extractor.sampling_rate
    as_scores = settings.top_k is not None and settings.threshold is None
    holds = rule(classifier, AUTO if settings.threshold is None else settings.threshold)

    def among_the_best(scores: np.ndarray) -> np.ndarray:
        best = np.argsort(-scores, kind="stable")[: settings.top_k]
        return np.intersect1d(best, holds(scores))

    def rows(name: str, windows: Iterator[Finding]) -> Iterator[dict]:
        found = cells(windows, step)
        found = best_labels(found, settings.top_k) if as_scores else detections(found, among_the_best)
        for start, end, label, score in found:
            yield {
                "file": name, "start": start / rate, "end": end / rate, "label": classifier.labels[label],
                "score": score,
            }  # fmt: skip

    return rows


def write_table(path: Path, tables: Iterator[pa.RecordBatch], rate: int) -> int:
    """In the format that its name says; see `PredictSettings`."""
    if path.suffix.lower() == ".parquet":
        return write_parquet(path, SCHEMA, tables, ROWS_AT_A_TIME)
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix.lower() == ".csv":
            return write_csv(file, SCHEMA, tables)
        return write_raven(file, tables, rate / 2)


def main(settings: PredictSettings) -> None:
    """Runs `dls predict`, alone or as one of torchrun's processes.

    Raises:
        UserError: naming what the user can mend.
    """
    with processes():
        if settings.input == [Path(STANDARD_INPUT)]:
            if os.environ.get("WORLD_SIZE", "1") != "1":
                raise UserError("INPUT -: standard input can be read by one process only")
            named, again = [(STANDARD_INPUT, Path(STANDARD_INPUT))], uuid.uuid4().hex  # it cannot be heard again
        else:
            root, again = common_root(settings.input), None
            files = find_files(settings.input)
            named = [(table_name(os.path.relpath(file, root)), file) for file in files]
        classifier = Classifier(settings.model, settings.windows, settings.mixed_precision)
        logger.info(f"{len(named)} files, {len(classifier.labels)} labels, {classifier}")
        plan = {name: settings.plain()[name] for name in ("overlap", "threshold", "top_k", "batch_size")}
        plan |= {"model": classifier.digest, "length": classifier.length, "dtype": str(classifier.dtype)}
        plan |= {"again": again, "labels": classifier.labels, "auto": classifier.threshold}
        work = Work(settings.output, recordings(named), plan)
        compute(work, classifier, settings, make_rows(classifier, settings), SCHEMA, settings.sampling_rate)
        finish(work, lambda path, tables: write_table(path, tables, classifier.extractor.sampling_rate))
