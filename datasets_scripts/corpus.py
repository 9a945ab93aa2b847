"""What every corpus must say about itself, and the folder reading they share."""

import csv
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import datasets

from .audio import SOUND_EXTENSIONS
from .errors import CorpusError


class Archive(NamedTuple):
    """An official archive.

    Attributes:
        url: official address.
        filename: what it is called on disk.
        size: bytes, where the publisher's file is stable.
        md5: hexadecimal digest, where the publisher's file is stable.
    """

    url: str
    filename: str
    size: int | None = None
    md5: str | None = None


class Clip(NamedTuple):
    """One clip as the corpus's own listing gives it, before its file is opened.

    Attributes:
        path: absolute path of the sound file.
        label: class name, None where there is none.
        fold: official fold, from 1; 0 where there are no folds.
        clip_id: unique within the corpus; None stands for the content's digest.
        source_id: the original recording.
        extra: values of the corpus's own columns.
    """

    path: Path
    label: str | None
    fold: int
    clip_id: str | None
    source_id: str
    extra: Mapping[str, Any] = {}


@dataclass
class Listing:
    """What a folder holds, against what its metadata promises. File names are relative to the corpus's root."""

    clips: list[Clip]
    class_names: list[str]
    missing: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    seconds: tuple[float, float] = (0.0, float("inf"))


class Corpus:
    """The facts about one corpus.

    Attributes:
        name: the name `load_corpus` knows it by.
        title: its full name.
        licence: as its publisher states it.
        licence_id: the Hub's identifier for that licence.
        homepage: where it is described.
        citation: BibTeX.
        columns: features beyond the common ones.
        fold_sizes: official number of clips per fold; empty where there is nothing official.
        class_sizes: official number of clips per class, in the official order.
        known_crossings: how many recordings are in several folds in the official split, by those folds.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    licence: ClassVar[str] = ""
    licence_id: ClassVar[str] = "unknown"
    homepage: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    columns: ClassVar[dict[str, Any]] = {}
    fold_sizes: ClassVar[dict[int, int]] = {}
    class_sizes: ClassVar[dict[str, int]] = {}
    known_crossings: ClassVar[dict[tuple[int, ...], int]] = {}


class FolderCorpus(Corpus, ABC):
    """A corpus that comes as a folder of sound files.

    Attributes:
        archives: official archives; empty where there is nothing to download.
        layout: what its folder looks like, for messages.
        unique_content: whether byte-identical files are one clip.
        whole_files: whether every file was published whole, so that one which lost anything is not the publisher's.
    """

    archives: ClassVar[tuple[Archive, ...]] = ()
    layout: ClassVar[str]
    unique_content: ClassVar[bool] = False
    whole_files: ClassVar[bool] = True

    @abstractmethod
    def find_root(self, folder: Path) -> Path | None:
        """The corpus's root: `folder`, or a folder directly in it; None if neither has the layout."""

    @abstractmethod
    def read(self, root: Path) -> Listing:
        """List the clips. Opens metadata, no sound file.

        Raises:
            CorpusError: the metadata contradict themselves or the official classes.
        """


def common_features(class_names: list[str], columns: Mapping[str, Any]) -> datasets.Features:
    """The schema that all corpora share, and a corpus's own columns behind it."""
    return datasets.Features(
        {
            "audio": datasets.Audio(decode=False),
            "label": datasets.ClassLabel(names=class_names),
            "fold": datasets.Value("int64"),
            "clip_id": datasets.Value("string"),
            "source_id": datasets.Value("string"),
            **columns,
            "digest": datasets.Value("string"),
            "sampling_rate": datasets.Value("int64"),
            "num_channels": datasets.Value("int64"),
            "num_frames": datasets.Value("int64"),
        }
    )


def first_with(folder: Path, *parts: str) -> Path | None:
    """`folder` or the first folder in it, by name, that has every one of `parts`."""
    inside = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    for candidate in (folder, *inside):
        if all((candidate / part).exists() for part in parts):
            return candidate
    return None


def walk_files(root: Path) -> Iterator[os.DirEntry]:
    """Every file below `root` in a fixed order, hidden ones left out. Links are followed, loops are not."""
    visited = set()

    def walk(folder: str) -> Iterator[os.DirEntry]:
        place = os.path.realpath(folder)
        if place in visited:
            return
        visited.add(place)
        with os.scandir(folder) as entries:
            found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
        for entry in found:
            if entry.is_dir():
                yield from walk(entry.path)
            elif entry.is_file() or entry.is_symlink():  # a link to nothing is reported as unreadable, not passed over
                yield entry

    try:
        yield from walk(os.fspath(root))
    except OSError as error:
        raise CorpusError(f"{error.filename or root}: cannot be listed ({error.strerror or error})") from None


def sound_files(root: Path) -> Iterator[Path]:
    """The sound files below `root`, by extension, in a fixed order.

    Raises:
        CorpusError: a folder cannot be listed.
    """
    return (Path(e.path) for e in walk_files(root) if os.path.splitext(e.name)[1].lower() in SOUND_EXTENSIONS)


def read_table(path: Path, required: list[str]) -> list[dict[str, str]]:
    """Rows of a CSV file with a header, each value stripped.

    Raises:
        CorpusError: the file cannot be read, is not UTF-8 text, or lacks a required column or value.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            absent = [column for column in required if column not in (reader.fieldnames or [])]
            if absent:
                raise CorpusError(
                    f"{path}: no column {', '.join(absent)}; expected {', '.join(required)}, "
                    f"found {', '.join(reader.fieldnames or []) or 'nothing'}"
                )
            rows = [
                {key: (value or "").strip() for key, value in row.items() if isinstance(key, str)} for row in reader
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CorpusError(f"{path}: cannot be read as a UTF-8 CSV table ({error})") from None
    for number, row in enumerate(rows, 2):
        empty = [column for column in required if not row[column]]
        if empty:
            raise CorpusError(f"{path}, line {number}: no value for {', '.join(empty)}")
    return rows


def whole_number(row: Mapping[str, str], column: str, path: Path) -> int:
    """A row's value as an int, or a message that names the table, the row and the column."""
    try:
        return int(row[column])
    except ValueError:
        raise CorpusError(
            f"{path}: column {column} must hold whole numbers, found {row[column]!r} in {dict(row)}"
        ) from None
