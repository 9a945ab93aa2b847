"""Complete trees with the official names, counts and metadata of each corpus, made of tiny sounds, for the tests."""

import csv
import io
import os
import shutil
from pathlib import Path

import numpy as np
import soundfile

from datasets_scripts.corpora.dcase2013 import DCASE2013
from datasets_scripts.corpora.esc import ESC10_CLASSES, ESC10_FOLDERS, ESC50_CLASSES
from datasets_scripts.corpora.urbansound8k import UrbanSound8K


def wav(seconds: float, rate: int = 100, channels: int = 1, seed: int = 0, **options) -> bytes:
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, (round(seconds * rate), channels))
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **{"format": "WAV", "subtype": "PCM_U8"} | options)
    return file.getvalue()


def numbered(sound: bytes, number: int) -> bytes:
    """The same sound with a content of its own: its last bytes, which are samples, count."""
    return sound[:-4] + number.to_bytes(4, "big")


def write_table(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def make_esc50(root: Path) -> Path:
    sound, rows = wav(5), []
    (root / "audio").mkdir(parents=True)
    for number in range(2000):
        target, fold = number % 50, number // 50 % 5 + 1
        name = f"{fold}-{10_000 + number}-A-{target}.wav"
        (root / "audio" / name).write_bytes(numbered(sound, number))
        category = ESC50_CLASSES[target]
        row = {"filename": name, "fold": fold, "target": target, "category": category}
        rows.append(row | {"esc10": category in ESC10_CLASSES, "src_file": 10_000 + number, "take": "A"})
    write_table(root / "meta" / "esc50.csv", rows)
    return root


def make_esc10(root: Path) -> Path:
    sound = wav(5, seed=1)  # not a byte in common with the newer edition, as in the published ones
    for index, folder in enumerate(ESC10_FOLDERS):
        (root / folder).mkdir(parents=True)
        for number in range(40):
            name = f"{number // 8 + 1}-{20_000 + 100 * index + number}-A.ogg"  # what is inside decides, not the suffix
            (root / folder / name).write_bytes(numbered(sound, 100 * index + number))
    (root / "README.md").write_text("not a sound")
    return root


def make_urbansound8k(root: Path) -> Path:
    sounds, rows = [wav(0.05, 1000), wav(4, 100, 2), wav(1, 100, subtype="PCM_16")], []
    labels = [label for label, size in enumerate(UrbanSound8K.class_sizes.values()) for _ in range(size)]
    folds = [fold for fold, size in UrbanSound8K.fold_sizes.items() for _ in range(size)]
    labels = np.random.default_rng(0).permutation(labels).tolist()
    names = list(UrbanSound8K.class_sizes)
    for number, (label, fold) in enumerate(zip(labels, folds, strict=True)):
        source = 100_000 + number // 4 * 10 + fold  # never in two folds
        name = f"{source}-{label}-0-{number}.wav"
        folder = root / "audio" / f"fold{fold}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(numbered(sounds[number % 3], number))
        row = {"slice_file_name": name, "fsID": source, "start": 0.5, "end": 4.5, "salience": 1, "fold": fold}
        rows.append(row | {"classID": label, "class": names[label]})
    write_table(root / "metadata" / "UrbanSound8K.csv", rows)
    return root


def make_dcase2013(root: Path) -> Path:
    sound = wav(30, 100, 2)
    for part in ("scenes_stereo", "scenes_stereo_testset"):
        (root / part).mkdir(parents=True)
        for index, label in enumerate(DCASE2013.class_sizes):
            for take in range(1, 11):
                name = f"{label}{take:02d}.wav"
                (root / part / name).write_bytes(numbered(sound, len(part) * 1000 + index * 20 + take))
    return root


def linked_copy(source: Path, target: Path) -> Path:
    """A copy that costs no room; files in it must be replaced, not written into."""
    return shutil.copytree(source, target, copy_function=os.link)


def replace(path: Path, content: bytes | str) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
