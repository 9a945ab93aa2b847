"""A comparison's raw numbers: one CSV, a line per finished cell. With the plan it is all that the report needs."""

import csv
import fcntl
import io
import json
import os
from pathlib import Path

import numpy as np

from datasets_scripts.errors import UserError
from datasets_scripts.files import files_moved_into_place

TEXTS = {
    "cell", "kind", "pretraining", "arm", "setting", "starts_from", "hardware", "precision", "commit", "versions",
    "command", "key",
}  # fmt: skip
# What is no text is JSON: accuracy and seconds are lists over folds of lists over `epochs`, of which 0 is before any
# step; `running_accuracy`, of --precise_bn, begins with epoch 1. An empty field is something that a cell of this kind
# does not have.
COLUMNS = (
    "cell", "kind", "pretraining", "arm", "setting", "change", "seed", "fold", "starts_from", "wall_seconds", "epochs",
    "folds", "test_clips", "test_clips_heard_in_pretraining", "accuracy", "running_accuracy",
    "seconds", "clips", "excluded_folds", "knn", "knn_accuracy",
    "hardware", "threads", "precision", "commit", "versions", "command", "key", "network", "options",
)  # fmt: skip
OF_EVERY_CELL = ("cell", "kind", "key")
OF_A_RUN = (*OF_EVERY_CELL, "seed", "wall_seconds", "network", "options")
NEEDED = {
    "imagenet": OF_EVERY_CELL,
    "pretrain": (*OF_A_RUN, "pretraining"),
    "search": OF_A_RUN,
    "finetune": (
        *OF_A_RUN, "arm", "setting", "epochs", "folds", "test_clips", "test_clips_heard_in_pretraining", "accuracy",
        "seconds",
    ),
}  # fmt: skip
# Of pre-training and search, where a corpus has labels: all of these, or none.
OF_NEIGHBOURS = ("epochs", "clips", "excluded_folds", "knn", "knn_accuracy")
csv.field_size_limit(1 << 30)  # the default is less than the epochs of a long run take


def read_results(path: Path) -> dict[str, dict]:
    """{cell: its line, without what is empty}; nothing where there is no such file.

    Raises:
        UserError: naming the line that is not as it was written.
    """
    if not path.exists():
        return {}
    results = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                result = {name: text if name in TEXTS else json.loads(text) for name, text in row.items() if text}
                check_result(result)
                if result["cell"] in results:
                    raise ValueError("there is another line of its cell")
                results[result["cell"]] = result
        except (ValueError, TypeError, KeyError, csv.Error) as error:
            raise UserError(
                f"{path}, line {reader.line_num}, is not as reproduce.py wrote it ({error}): mend it, or delete it to "
                "have its cell run again"
            ) from error
    return results


def check_result(result: dict) -> None:
    """Makes sure that a line's numbers may have been measured: one that a hand has changed must not become a figure.

    Raises:
        ValueError, TypeError, KeyError: where something is missing, a list is not as long as `folds` and `epochs` say,
            a share is outside 0..1, a time is negative, or more clips were heard than there were.
    """
    needed = NEEDED[result["kind"]]
    if result["kind"] in ("pretrain", "search") and not result.keys().isdisjoint(OF_NEIGHBOURS):
        needed += OF_NEIGHBOURS
    if missing := [name for name in needed if name not in result]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    epochs, folds = np.array(result.get("epochs", []), dtype=int), len(result.get("folds", []))
    shapes = {
        "accuracy": (folds, len(epochs)), "running_accuracy": (folds, (epochs > 0).sum()), "test_clips": (folds,),
        "seconds": (folds, len(epochs)), "wall_seconds": (), "seed": (),
    }  # fmt: skip
    expected = [(name, result[name], shape) for name, shape in shapes.items() if name in result]
    clips, neighbours = dict(result.get("clips", {})), dict(result.get("knn_accuracy", {}))
    expected.append(("clips", list(clips.values()), (len(clips),)))
    expected += [("knn_accuracy", shares, (len(epochs),)) for shares in neighbours.values()]
    for name, values, shape in expected:
        numbers = np.array(values, dtype=float)
        most = 1 if name.endswith("accuracy") else np.finfo(float).max
        if numbers.shape != shape or not ((numbers >= 0) & (numbers <= most)).all():
            raise ValueError(f"its {name}")
    heard = zip(result.get("test_clips_heard_in_pretraining", []), result.get("test_clips", []), strict=True)
    if any(number is not None and not 0 <= number <= clips for number, clips in heard):
        raise ValueError("its test_clips_heard_in_pretraining")
    if "fold" in result and folds and result["folds"] != [result["fold"]]:
        raise ValueError("its folds")


def add_result(path: Path, result: dict, order: list[str]) -> None:
    """Puts a cell's result into the file, beside what others have put there meanwhile.

    Args:
        path: The CSV.
        result: See COLUMNS.
        order: Names of all cells, as their lines are to follow one another.

    Raises:
        UserError: if the file is damaged or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path.parent, os.O_RDONLY)  # runs with other work folders may write, too
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = read_results(path) | {result["cell"]: result}
        rows = [results[name] for name in dict.fromkeys([*order, *results]) if name in results]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: as_text(value) for name, value in row.items()} for row in rows)
        with files_moved_into_place(path.parent) as folder:
            (folder / path.name).write_text(text.getvalue(), encoding="utf-8")
    finally:
        os.close(lock)


def as_text(value) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)
