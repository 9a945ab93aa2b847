"""What tables, folders and file names say of the files of a folder: label, fold, recording, stretch.

Metadata tables list the files. Labels of stretches are beside or instead of them. What no table says, names may.
"""

import json
import math
import posixpath
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .corpus import SOUND_EXTENSIONS, UNREADABLE_EXTENSIONS, read_rows, relative_name, walk_files, whole_number
from .errors import CorpusError

# Folds that folders' names stand for; in fold 0 is what is never held out.
SPLITS = {
    **dict.fromkeys(("train", "training"), 0),
    **dict.fromkeys(("test", "testing"), 1),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), 2),
}
# What stands for the absence of all classes, in upper or lower case; the first is what all of them are known by.
NO_CLASS = BACKGROUND, *_ = ("background", "noise", "other", "silence")
_FOLD = re.compile(r"fold[ _-]?(\d{1,9})")
# Names of the column with the class in selection tables, in the order of preference.
_RAVEN_LABELS = ("label", "species", "class", "annotation", "common name")


class Said(NamedTuple):
    """What a line of a table says of a file.

    Attributes:
        name: of the file, as it is written.
        line: of the table.
        label: of a class; empty: it has none; None: nothing is said.
        present: False: it is not of that class.
        start, end: of the stretch of which that is said, in s.
        fold: None: nothing is said.
        source: the original recording; None: nothing is said.
    """

    name: str
    line: int
    label: str | None = None
    present: bool = True
    start: float = 0.0
    end: float = math.inf
    fold: int | None = None
    source: str | None = None


class Files:
    """The files of a folder, by their names relative to it.

    Attributes:
        sounds: with a sound's suffix, in a fixed order.
        unreadable: likewise, in formats that cannot be read.
        tables: what says something of them.
        known, readable: all of the files; those of `sounds`.
    """

    def __init__(self, root: Path):
        self.root, self.sounds, self.unreadable, self.tables = root, [], [], []
        for entry in walk_files(root):
            name = relative_name(Path(entry.path), root)
            suffix = posixpath.splitext(name)[1].lower()
            if suffix in SOUND_EXTENSIONS:
                self.sounds.append(name)
            elif suffix in UNREADABLE_EXTENSIONS:
                self.unreadable.append(name)
            elif reader_of(name):
                self.tables.append(name)
        names = [*self.sounds, *self.unreadable]
        self.known, self.readable = set(names), set(self.sounds)
        self.by_form = {_form(name): name for name in reversed(names)}
        self.by_stem: dict[str, list[str]] = {}
        for name in names:
            for key in {posixpath.basename(name), posixpath.splitext(posixpath.basename(name))[0]}:
                self.by_stem.setdefault(key, []).append(name)

    def read_tables(self) -> tuple[dict[str, Said], list[tuple[str, str, Said]]]:
        """What metadata list, by the files' names; and labels of stretches: name, place and what is said.

        Raises:
            CorpusError: naming the table that is wrong, and its line.
        """
        listed: dict[str, Said] = {}
        stretches = []
        for reader in READERS.values():
            for table in (table for table in self.tables if reader_of(table) is reader):
                for said in reader(self.root / table, table, self):
                    name, where = self.find(said.name, table), f"{table}, line {said.line}"
                    if reader not in (read_metadata, read_metadata_lines):
                        stretches.append((name, where, said))
                    elif listed.setdefault(name, said) is not said:
                        raise CorpusError(f"{self.root / table}: {name} is listed twice")
        return listed, stretches

    def find(self, written: str, table: str) -> str:
        """The file that a table means; where there is none, its name below the folder as it is written.

        Names may differ in their Unicode form and separators, and may be absolute.
        """
        name = posixpath.join(posixpath.dirname(table), written)
        if name in self.known:
            return name
        form = _form(written)
        inside = form.removeprefix(f"{_form(self.root.as_posix())}/")
        name = inside if inside != form else _form(posixpath.join(posixpath.dirname(table), form))
        return self.by_form.get(name, name)

    def find_sound_of(self, table: str, written: str | None) -> str:
        """The file that a selection table is about: the one that it names, or the one that is named like it."""
        stem = posixpath.basename(table).split(".Table.")[0].removesuffix(".selections.txt")
        name = self.find(written or stem, table)
        if name in self.known:
            return name
        named = self.by_stem.get(posixpath.basename(_form(written)) if written else stem, [])
        beside = [other for other in named if posixpath.dirname(other) == posixpath.dirname(table)]
        return next((found[0] for found in (beside, named) if len(found) == 1), name)


def normal(label: str | None) -> str:
    """A label's one form: names of folders have another Unicode form on some systems; `NO_CLASS` has one name."""
    label = unicodedata.normalize("NFC", label or "")
    return BACKGROUND if label.casefold() in NO_CLASS else label


def with_answer(answers: Mapping[str, bool], label: str, present: bool) -> dict[str, bool]:
    """What is said of a stretch, {label: whether it is there}, and one thing more, which prevails.

    `BACKGROUND` rules every class out. A class that is there rules it out, and so does that it is not there.
    """
    if label == BACKGROUND and present:
        return {BACKGROUND: True}
    if label == BACKGROUND or present:
        answers = {name: is_present for name, is_present in answers.items() if name != BACKGROUND}
    return dict(answers) if label == BACKGROUND else {**answers, label: present}


def _form(name: str) -> str:
    return unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")))


def reader_of(table: str) -> Callable[[Path, str, Files], Iterator[Said]] | None:
    """What reads a table, by its name; None: it is none."""
    name = posixpath.basename(table).lower()
    return next((read for key, read in READERS.items() if name == key or (key[0] == "." and name.endswith(key))), None)


def _metadata(rows: Iterator[tuple[int, dict]], path: Path) -> Iterator[Said]:
    for line, row in rows:
        fold = whole_number(row, "fold", path) if row.get("fold") else None
        if fold is not None and fold < 1:
            raise CorpusError(f"{path}: folds are numbered from 1, found {fold} for {row['file_name']}")
        # Without a value, "fold" says that the file is never held out, whatever folder it is in.
        fold = 0 if "fold" in row and fold is None else fold
        source = row.get("source_id") or None
        yield Said(row["file_name"], line, row.get("label"), fold=fold, source=source)


def read_metadata(path: Path, table: str, files: Files) -> Iterator[Said]:
    """`metadata.csv`: file_name, and perhaps label, fold, source_id."""
    return _metadata(read_rows(path, ["file_name"], ["file_name"]), path)


def read_metadata_lines(path: Path, table: str, files: Files) -> Iterator[Said]:
    """`metadata.jsonl`: the same, an object a line."""

    def rows():
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise CorpusError(f"{path}: cannot be read as UTF-8 text ({error})") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line).items()
            except (ValueError, AttributeError, RecursionError):
                raise CorpusError(f"{path}, line {number}: is no JSON object") from None
            # What is neither text nor a number is some other column's.
            row = {
                key: "" if value is None else str(value) for key, value in values if not isinstance(value, list | dict)
            }
            if isinstance(dict(values).get("label"), list | dict):
                raise CorpusError(f"{path}, line {number}: label must be one class; labels.csv can give several")
            if not row.get("file_name"):
                raise CorpusError(f"{path}, line {number}: no value for file_name")
            yield number, row

    return _metadata(rows(), path)


def read_labels(path: Path, table: str, files: Files) -> Iterator[Said]:
    """`labels.csv`: file_name,start,end,label,present; without start and end the whole file is meant."""
    for line, row in read_rows(path, ["file_name", "start", "end", "label"], ["file_name", "label"]):
        where = f"{path}, line {line}"
        present = row.get("present") or "1"
        if present not in ("0", "1"):
            raise CorpusError(f"{where}: present must be 1, or 0 for what is not of the class, not {present!r}")
        yield Said(row["file_name"], line, row["label"], present == "1", *_stretch(row["start"], row["end"], where))


def read_selections(path: Path, table: str, files: Files) -> Iterator[Said]:
    """Raven's selection tables: a line a selection, times in s, the class in one of `_RAVEN_LABELS`."""
    times = ["Begin Time (s)", "End Time (s)"]
    for line, row in read_rows(path, times, times, delimiter="\t", quoting=3):
        values = {column.lower(): value for column, value in row.items()}
        column = next((name for name in _RAVEN_LABELS if name in values), None)
        if column is None:
            raise CorpusError(f"{path}: no column with the class; expected one of {', '.join(_RAVEN_LABELS)}")
        start, end = _stretch(row[times[0]], row[times[1]], f"{path}, line {line}")
        # In tables about several files, times go on from file to file.
        if offset := values.get("file offset (s)"):
            first = _seconds(offset, f"{path}, line {line}")
            start, end = first, first + end - start
        written = values.get("begin path") or values.get("begin file")
        if values[column]:
            yield Said(files.find_sound_of(table, written), line, values[column], True, start, end)


def _stretch(start: str, end: str, where: str) -> tuple[float, float]:
    first, last = _seconds(start or "0", where), _seconds(end, where) if end else math.inf
    if not 0 <= first < last:
        raise CorpusError(
            f"{where}: from {start} to {end} s is no stretch; end must be after start, and start 0 or later"
        )
    return first, last


def _seconds(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise CorpusError(f"{where}: times must be numbers of seconds, such as 1.5, not {text!r}")
    return value


# By names, or by what names end in; in the order in which they are read: what is said later prevails.
READERS = {
    "metadata.csv": read_metadata,
    "metadata.jsonl": read_metadata_lines,
    ".selections.txt": read_selections,
    "labels.csv": read_labels,
}


class FromNames(NamedTuple):
    """What names of folders and files say, by the files' names.

    Attributes:
        labels, folds, sources: of the files of which that is said.
        inferred: what was understood, in words.
        strays: files in no folder, if these alone keep folders from being classes.
        unmatched: files whose names say nothing, where they should.
    """

    labels: Mapping[str, str] = {}
    folds: Mapping[str, int] = {}
    sources: Mapping[str, str] = {}
    inferred: Sequence[str] = ()
    strays: Sequence[str] = ()
    unmatched: Sequence[str] = ()


def from_folders(names: Collection[str]) -> FromNames:
    """Folders are classes if every file is in one, but for those that are splits or folds, and one around them all."""
    parts = {name: name.split("/")[:-1] for name in names}
    folds, inferred = {}, []
    _leave_folder_around(parts)
    for level in (0, 1):
        found = {name: folders[level] for name, folders in parts.items() if len(folders) > level}
        if names and len(found) == len(parts) and (numbers := _folds_of(set(found.values()))):
            folds = {name: numbers[folder] for name, folder in found.items()}
            parts = {name: [*folders[:level], *folders[level + 1 :]] for name, folders in parts.items()}
            words = {0: "is never held out"}
            inferred = [
                f"folder {folder} {words.get(number, f'is fold {number}')}" for folder, number in numbers.items()
            ]
            break
    _leave_folder_around(parts)
    strays = [name for name, folders in parts.items() if not folders]
    if not strays:
        return FromNames({name: folders[0] for name, folders in parts.items()}, folds, inferred=inferred)
    classes = {folders[0] for folders in parts.values() if folders}
    few = len(classes) > 1 and len(strays) < len(parts) / 2
    return FromNames(folds=folds, inferred=inferred, strays=strays if few else [])


def _leave_folder_around(parts: dict[str, list[str]]) -> None:
    while parts and all(parts.values()) and len({folders[0] for folders in parts.values()}) == 1:
        if _folds_of({next(iter(parts.values()))[0]}):
            return
        for folders in parts.values():
            del folders[0]


def _folds_of(folders: set[str]) -> dict[str, int] | None:
    """Folds by the names of folders; None if one of these is neither a split nor a fold."""
    numbers: dict[str, int] = {}
    for folder in sorted(folders):
        numbered = _FOLD.fullmatch(folder.lower())
        number = int(numbered[1]) if numbered else SPLITS.get(folder.lower())
        if number is None:
            return None
        numbers[folder] = number
    from_zero = any(number == 0 and folder.lower() not in SPLITS for folder, number in numbers.items())
    return {folder: number + (from_zero and folder.lower() not in SPLITS) for folder, number in numbers.items()}


def from_file_names(names: Collection[str], pattern: str) -> FromNames:
    """Groups `label` and `source` of a regular expression, where it is found in the files' names."""
    found = {name: re.search(pattern, posixpath.basename(name)) for name in names}
    groups = {name: match.groupdict() for name, match in found.items() if match}
    labels, sources = (
        {name: values[group] for name, values in groups.items() if values.get(group)} for group in ("label", "source")
    )
    unmatched = [name for name, match in found.items() if not match]
    return FromNames(labels, sources=sources, inferred=[f"labels from files' names by {pattern}"], unmatched=unmatched)
