"""An audio dataset of the Hub's -> a folder of sound files with a metadata.csv, which is read as any other."""

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from filelock import FileLock

from .corpus import SOUND_EXTENSIONS, UNREADABLE_EXTENSIONS
from .errors import CorpusError
from .files import folder_moved_into_place, json_digest

_LAYOUT = 1  # raise it when the folders are written in another way
_TRAINED_ON = ("train", "training")
_FOLD = "fold"  # the column that is taken without being named


def unpacked_dataset(
    source: str, cache: Path, audio_column_name: str | None = None, label_column_name: str | None = None,
    fold_column_name: str | None = None, dataset_config_name: str | None = None,
) -> Path:  # fmt: skip
    """The folder that a dataset's clips are in, written once.

    Folds are those of the column. Without one, `train` is never held out, and each other split is a fold; a single
    split has no folds.

    Args:
        source: a Hub id, or a folder that `load_dataset` can load.
        cache: where prepared data are kept.
        audio_column_name: default: `audio`.
        label_column_name: default: `label`; a dataset without that column has no labels.
        fold_column_name: default: `fold`, if there is one.
        dataset_config_name: default: the dataset's own default.

    Raises:
        CorpusError: if it cannot be loaded, or a column is not there or of another kind.
    """
    splits = _loaded(source, dataset_config_name, cache)
    features = next(iter(splits.values())).features
    audio = audio_column_name or "audio"
    if not isinstance(features.get(audio), datasets.Audio):
        sounds = [name for name, feature in features.items() if isinstance(feature, datasets.Audio)]
        raise _no_column(source, "audio", audio, sounds, "with sound")
    label = _column(source, features, "label", label_column_name, "label")
    fold = _column(source, features, "fold", fold_column_name, _FOLD)
    names = {"audio": audio, "label": label, "fold": fold}
    fingerprints = {name: split._fingerprint for name, split in splits.items()}
    folder = cache / "dls_hub" / json_digest([_LAYOUT, fingerprints, names])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # the processes of a run come here together
        if not folder.is_dir():
            with folder_moved_into_place(folder) as unfinished:
                _write(source, splits, names, unfinished)
    return folder


def _loaded(source: str, config: str | None, cache: Path) -> dict[str, datasets.Dataset]:
    try:
        with _sounds_as_they_are():
            found = datasets.load_dataset(source, config, cache_dir=str(cache))
    except Exception as error:  # whatever the Hub, files or their readers may raise: for the user it is one problem
        words = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise CorpusError(
            f"{source}: load_dataset cannot load it ({words[0]}); expected a dataset's Hub id or folder, and "
            "--dataset_config_name where it has several"
        ) from error
    return dict(found)


@contextmanager
def _sounds_as_they_are() -> Iterator[None]:
    """Has `datasets` take files and bytes without torchcodec, which it asks for even where nothing is encoded."""
    encode = datasets.Audio.encode_example

    def pass_on(self, value) -> dict:
        if isinstance(value, str | Path):
            return {"bytes": None, "path": str(value)}
        if isinstance(value, dict) and "array" not in value:
            return {"bytes": value.get("bytes"), "path": value.get("path")}
        return encode(self, value)

    datasets.Audio.encode_example = pass_on
    try:
        yield
    finally:
        datasets.Audio.encode_example = encode


def _column(source: str, features: datasets.Features, what: str, given: str | None, usual: str) -> str | None:
    """A column that may lack where nobody named it."""
    if given is not None and given not in features:
        raise _no_column(source, what, given, list(features), "")
    return given or (usual if usual in features else None)


def _no_column(source: str, what: str, name: str, others: list[str], kind: str) -> CorpusError:
    there = f"; --{what}_column_name can name one of {', '.join(others)}" if others else f"; it has none {kind}"
    return CorpusError(f"{source}: has no column {name!r} {kind}".rstrip() + there)


def _write(source: str, splits: dict[str, datasets.Dataset], names: dict[str, str | None], folder: Path) -> None:
    folds = _folds(source, splits, names["fold"])
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "label", "fold"])
        for split, rows in splits.items():
            label_of = _labels(source, rows, names["label"])
            sounds = rows.cast_column(names["audio"], datasets.Audio(decode=False)).select_columns([names["audio"]])
            for number, (row, fold, label) in enumerate(zip(sounds, folds[split], label_of, strict=True)):
                path = _save(row[names["audio"]], folder / split / f"{number:06d}", f"{source}, {split}, row {number}")
                table.writerow([path.relative_to(folder).as_posix(), label, fold or ""])


def _folds(source: str, splits: dict[str, datasets.Dataset], column: str | None) -> dict[str, list[int]]:
    if column is None:
        held_out = [name for name in splits if name not in _TRAINED_ON]
        held_out = held_out if len(splits) > 1 else []
        number = {name: place for place, name in enumerate(held_out, start=1)}
        return {name: [number.get(name, 0)] * len(rows) for name, rows in splits.items()}
    found = {name: rows[column][:] for name, rows in splits.items()}
    values = {value for each in found.values() for value in each}
    if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values):
        example = next(value for value in values if not isinstance(value, int) or value < 0)
        raise CorpusError(f"{source}: column {column!r} must hold folds as whole numbers, not {example!r}")
    first = 1 if 0 in values else 0  # ours are counted from 1
    return {name: [value + first for value in each] for name, each in found.items()}


def _labels(source: str, rows: datasets.Dataset, column: str | None) -> Iterator[str]:
    if column is None:
        return iter([""] * len(rows))
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return ("" if value is None or value < 0 else feature.names[value] for value in rows[column][:])
    if not isinstance(feature, datasets.Value) or feature.dtype.startswith("float"):
        raise CorpusError(f"{source}: column {column!r} must hold one class a clip, as text or number, not {feature}")
    return ("" if value is None else str(value) for value in rows[column][:])


def _save(audio: dict | None, stem: Path, where: str) -> Path:
    """Writes a clip's own bytes; of a file on this machine, a link to it."""
    if not audio or (audio["bytes"] is None and not os.path.isfile(audio["path"] or "")):
        raise CorpusError(f"{where}: has no sound")
    suffix = Path(audio["path"] or "").suffix.lower()
    path = stem.with_suffix(suffix if suffix in SOUND_EXTENSIONS | UNREADABLE_EXTENSIONS else ".wav")
    path.parent.mkdir(exist_ok=True)
    if audio["bytes"] is None:
        path.symlink_to(Path(audio["path"]).resolve())
    else:
        path.write_bytes(audio["bytes"])
    return path
