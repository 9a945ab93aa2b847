"""What every corpus must say about itself, and the folder reading they share. Imports nothing heavy."""

import csv
import math
import os
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from .errors import CorpusError

CORPORA: dict[str, "Corpus"] = {}  # by name, as they are defined
# What libsndfile reads and people record in; matched without regard to case.
SOUND_EXTENSIONS = frozenset((
    ".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".w64",
    ".bwf", ".rf64",
))  # fmt: skip
# What people record in, too, but libsndfile does not read.
UNREADABLE_EXTENSIONS = frozenset((
    ".m4a", ".m4b", ".aac", ".wma", ".webm", ".weba", ".mp4", ".mov", ".mka", ".mkv", ".amr", ".3gp", ".ac3", ".ape",
    ".wv", ".tta", ".ra", ".dsf", ".dff",
))  # fmt: skip
# Folders that systems put beside people's own, with deleted files, previews and the like in them.
OF_SYSTEMS = frozenset((
    "$RECYCLE.BIN", "RECYCLER", "System Volume Information", "lost+found", "@eaDir", "#recycle", "#snapshot",
    "__MACOSX",
))  # fmt: skip
LARGEST_NUMBER = 2**31 - 1


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
        fold: official fold, from 1; 0 where there are no folds, and for clips that are never held out.
        clip_id: unique within the corpus; None stands for the content's digest.
        source_id: the original recording.
        extra: values of the corpus's own columns.
        start, end: of the stretch that is the clip, in s; 0 and infinity: the whole file.
        present: False: the clip is not of the class `label`.
        where: file and line that say so, for messages; empty: nothing is said of stretches.
    """

    path: Path
    label: str | None
    fold: int
    clip_id: str | None
    source_id: str
    extra: Mapping[str, Any] = {}
    start: float = 0.0
    end: float = math.inf
    present: bool = True
    where: str = ""


@dataclass
class Listing:
    """What a folder holds, against what its metadata promises. File names are relative to the corpus's root.

    Attributes:
        clips: several for a file where its stretches are told apart.
        missing: listed, but not there.
        unlisted: there, but not listed.
        seconds: shortest and longest that clips may be.
        classes: those that are named, whether or not there is a clip of them that can be read.
        findings: other lists of a corpus report.
    """

    clips: list[Clip]
    missing: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    seconds: tuple[float, float] = (0.0, math.inf)
    classes: set[str] = field(default_factory=set)
    findings: dict[str, list[str]] = field(default_factory=dict)


class Corpus:
    """The facts about one corpus. A subclass that has a name of its own is known to `load_corpus`.

    Attributes:
        name: the name `load_corpus` knows it by.
        title: its full name.
        licence: as its publisher states it.
        licence_id: the Hub's identifier for that licence.
        homepage: where it is described.
        citation: BibTeX.
        columns: columns beyond the common ones, and their types.
        options: of `load_corpus`, that are for this corpus alone.
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
    columns: ClassVar[dict[str, str]] = {}
    options: ClassVar[tuple[str, ...]] = ()
    fold_sizes: ClassVar[dict[int, int]] = {}
    class_sizes: ClassVar[dict[str, int]] = {}
    known_crossings: ClassVar[dict[tuple[int, ...], int]] = {}

    def __init_subclass__(cls):
        if "name" in vars(cls):
            CORPORA[cls.name] = cls()

    @staticmethod
    def published_identity(path: str, clip_id: str | None = None) -> str | None:
        """What all editions of a published clip have in common, however they are encoded; None: nothing is known.

        Args:
            path: of a file, wherever it lies.
            clip_id: of a clip of this corpus; None: any file, which may be one of this corpus's clips.
        """
        return None


class FolderCorpus(Corpus):
    """A corpus that comes as a folder of sound files.

    Attributes:
        archives: official archives; empty where there is nothing to download.
        layout: what its folder looks like, for messages.
        marks: files or folders by which its root is known: it has the first of them that there is.
        unique_content: whether byte-identical files are one clip.
        whole_files: whether every file was published whole, so that one which lost anything is not the publisher's.
    """

    archives: ClassVar[tuple[Archive, ...]] = ()
    layout: ClassVar[str]
    marks: ClassVar[tuple[str, ...]]
    unique_content: ClassVar[bool] = False
    whole_files: ClassVar[bool] = True

    def find_root(self, folder: Path) -> Path | None:
        """The corpus's root: `folder`, or the first folder in it, by name; None if none has the layout."""
        inside = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        return next((root for mark in self.marks for root in (folder, *inside) if (root / mark).exists()), None)

    def read(self, root: Path) -> Listing:
        """List the clips. Opens metadata, no sound file. It is called with `options`, where a corpus has any.

        Raises:
            CorpusError: the metadata contradict themselves or the official classes.
        """
        raise NotImplementedError


def walk_files(root: Path) -> Iterator[os.DirEntry]:
    """Every file below `root` in a fixed order, hidden and systems' own left out. Links are followed, loops not."""
    visited = set()

    def walk(folder: str) -> Iterator[os.DirEntry]:
        place = os.path.realpath(folder)
        if place in visited:
            return
        visited.add(place)
        with os.scandir(folder) as entries:
            own = (entry for entry in entries if not entry.name.startswith(".") and entry.name not in OF_SYSTEMS)
            found = sorted(own, key=lambda entry: entry.name)
        for entry in found:
            # Of a link to itself `entry.is_dir` is an error; of all else it need not ask the disk.
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                yield from walk(entry.path)
            elif entry.is_symlink() or entry.is_file():  # a link to nothing is reported as unreadable, not passed over
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


def relative_name(path: Path, root: Path) -> str:
    """A file's name in lists, reports and messages."""
    return path.as_posix().removeprefix(f"{root.as_posix()}/")


def listed_clips(
    root: Path, table: Path, clips: list[Clip], used: Callable[[Clip], bool] = lambda clip: True
) -> tuple[list[Clip], list[str], list[str]]:
    """What a table lists against what there is.

    Args:
        root: the corpus's root.
        table: for messages.
        clips: what it lists.
        used: which of them are the corpus's.

    Returns:
        The clips whose files are there; the files that are missing; and the sound files that the table does not list.

    Raises:
        CorpusError: a file is listed twice.
    """
    listed: dict[str, Clip] = {}
    for clip in clips:
        if listed.setdefault(relative_name(clip.path, root), clip) is not clip:
            raise CorpusError(f"{table}: {relative_name(clip.path, root)} is listed twice")
    on_disk = dict.fromkeys(relative_name(path, root) for path in sound_files(root))
    wanted = {name: clip for name, clip in listed.items() if used(clip)}
    found = [clip for name, clip in wanted.items() if name in on_disk]
    return found, [name for name in wanted if name not in on_disk], [name for name in on_disk if name not in listed]


def read_table(path: Path, required: list[str]) -> list[dict[str, str]]:
    """Rows of a CSV file with a header, each value stripped.

    Raises:
        CorpusError: as `read_rows`; or a required value is lacking.
    """
    return [row for _, row in read_rows(path, required, required)]


def read_rows(
    path: Path, required: Collection[str], filled: Collection[str], **dialect
) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a table with a header, each value stripped, with the number of the line that each ends in.

    Args:
        path: of the file.
        required: columns that must be there.
        filled: columns in which every row must have a value.
        **dialect: as `csv.reader` takes it.

    Raises:
        CorpusError: the file cannot be read, is not UTF-8 text, or lacks a required column or value.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True, **dialect)
            columns = reader.fieldnames or []
            if absent := [column for column in required if column not in columns]:
                found = ", ".join(columns).replace("\0", "") or "nothing"
                advice = "; separate columns by commas" if ";" in found and "," not in found else ""
                advice = "; save it as UTF-8 text" if any("\0" in column for column in columns) else advice
                expected = ", ".join(required)
                raise CorpusError(f"{path}: no column {', '.join(absent)}; expected {expected}, found {found}{advice}")
            for values in reader:
                row = {key: (value or "").strip() for key, value in values.items() if isinstance(key, str)}
                if any(values.get(None, ())):
                    raise CorpusError(
                        f"{path}, line {reader.line_num}: more values than columns; quote what has a comma in it"
                    )
                if empty := [column for column in filled if not row[column]]:
                    raise CorpusError(f"{path}, line {reader.line_num}: no value for {', '.join(empty)}")
                yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CorpusError(f"{path}: cannot be read as a UTF-8 CSV table ({error}); save it as UTF-8 text") from None


def whole_number(row: Mapping[str, str], column: str, path: Path) -> int:
    """A row's value as an int, or a message that names the table, the row and the column."""
    try:
        if abs(number := int(row[column])) > LARGEST_NUMBER:
            raise ValueError
        return number
    except ValueError:
        raise CorpusError(
            f"{path}: column {column} must hold whole numbers up to {LARGEST_NUMBER}, found {row[column]!r:.50} in "
            f"{reprlib.repr(dict(row))}"
        ) from None
