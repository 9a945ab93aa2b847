"""From a corpus's listing to a prepared dataset: check it, decode every file once, keep references in Arrow."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
from datasets.utils import tqdm

from .audio import AudioFacts, inspect_audio
from .corpus import Clip, Corpus, FolderCorpus, relative_name, walk_files
from .errors import AudioError, CorpusError, printable
from .identity import STRETCH_COLUMNS, WHOLE
from .labels import BACKGROUND, NO_CLASS, with_answer

SCHEMA_VERSION = "1.5.0"  # in every cache key: raise it when the columns or the checks change
_SHOWN = 5
_REPORT_MARK = "\n\nCorpus report: "
_REPAIR = "Repair the files, or leave them out with skip_unreadable=True (--skip_unreadable)."
_COMPLETE = "Get what is missing, or use the copy as it is with allow_partial=True (--allow_partial)."
CONVERT = "convert them, such as: ffmpeg -i NAME.m4a NAME.wav"
_SHORTEST = 0.001  # s: windows and tables tell stretches apart by milliseconds
_ROUNDING = 0.05  # s by which a stretch may end after its file
# Columns where stretches have labels, or clips are of no class: their place in s, and of which classes they are, and
# are not.
STRETCH_FEATURES = {
    **dict.fromkeys(STRETCH_COLUMNS, datasets.Value("float64")),
    **dict.fromkeys(("labels", "absent_labels"), datasets.List(datasets.Value("string"))),
}
# Lists of a corpus report in words, in the order of their weight.
STATES = {
    "shortfalls": "deviations from the official counts",
    "missing": "listed files absent",
    "unlisted": "files ignored that the metadata do not list",
    "skipped": "unreadable files left out",
    "shortened": "files used without their end, which cannot be decoded",
    "wrong_durations": "clips of an unexpected length",
    "duplicates": "files left out with the same content as another",
    "conflicts": "copies of one file with different labels, which has none therefore",
    "unsupported": f"files in a format that cannot be read; {CONVERT}",
    "empty_classes": "classes without a clip",
    "strays": "files in no folder, so that folders are not taken for classes; move them into one, or away",
    "unmatched": "files whose names do not match the label pattern",
    "unexpected_crossings": "unofficial crossings of the folds",
}


class CheckedClip(NamedTuple):
    """A clip, the name of its file below the corpus's root, and what decoding that showed."""

    clip: Clip
    name: str
    facts: AudioFacts
    labels: Mapping[str, bool] = {}  # whether it is of a class, or `BACKGROUND`, as far as that is said


class FolderBuilder(datasets.ArrowBasedBuilder):
    """Prepares a corpus that lies in a folder. Rows refer to the files by path; nothing is copied.

    Args:
        corpus: which one.
        root: its root folder, as `FolderCorpus.find_root` gives it.
        allow_partial: accept what the folder lacks, and say so in the report.
        skip_unreadable: leave unreadable files out, and say so in the report.
        cache_dir: where prepared data are kept.
        **options: of the corpus's own.
    """

    VERSION = datasets.Version(SCHEMA_VERSION)

    def __init__(
        self,
        corpus: FolderCorpus,
        root: Path,
        allow_partial: bool,
        skip_unreadable: bool,
        cache_dir: str,
        **options,
    ):
        self.corpus, self.root, self.options = corpus, root, options
        self.allow_partial, self.skip_unreadable = allow_partial, skip_unreadable
        options = {"allow_partial": allow_partial, "skip_unreadable": skip_unreadable, **options}
        # Names, sizes and times of change: a changed folder is prepared anew, an unchanged one is not read again.
        fingerprint = _fingerprint(corpus.name, root, options)
        super().__init__(cache_dir=cache_dir, dataset_name=f"dls_{corpus.name}", hash=fingerprint)

    def _info(self) -> datasets.DatasetInfo:
        corpus = self.corpus
        return datasets.DatasetInfo(
            description=corpus.title, citation=corpus.citation, homepage=corpus.homepage, license=corpus.licence
        )

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        corpus, listing = self.corpus, self.corpus.read(self.root, **self.options)
        folds, labels = [clip.fold for clip in listing.clips], [clip.label for clip in listing.clips]
        _check_identities(listing.clips, self.root)
        unsupported = listing.findings.get("unsupported", [])
        if not listing.clips and not listing.missing:
            others = f"; {_summary('in other formats', unsupported)}: {CONVERT}" if unsupported else ""
            raise CorpusError(f"{self.root}: holds no clip of {corpus.name}; expected {corpus.layout}{others}")
        found: dict[str, Any] = listing.findings | {
            "missing": listing.missing,
            "unlisted": listing.unlisted,
            "shortfalls": shortfalls(folds, labels, corpus),
        }
        if not self.allow_partial:
            kinds = {"listed but absent": "missing", "present but not listed": "unlisted", "": "shortfalls"}
            self._refuse({kind: found[key] for kind, key in kinds.items()}, _COMPLETE)
        read, found["skipped"] = _read(listing.clips, self.root, corpus.whole_files)
        if not self.skip_unreadable:
            self._refuse({"unreadable": found["skipped"]}, _REPAIR)
        if not read:
            raise CorpusError(
                f"{self.root}: none of the {len(listing.clips)} sound files can be read; {found['skipped'][:1]}"
            )
        found["wrong_durations"] = _wrong_durations(read, listing.seconds)
        if not self.allow_partial:
            self._refuse({"wrong duration": found["wrong_durations"]}, _COMPLETE)
        shortened = {name: _how_much(facts) for _, name, facts, _ in read if facts.missing}
        found["shortened"] = [f"{name}: {how_much}" for name, how_much in shortened.items()]
        if corpus.unique_content:
            self._refuse({"labels of stretches outside their file": _outside(read)}, "Mend these lines.")
            read, found["duplicates"], found["conflicts"] = _each_stretch_once(read)
        found["crossings"] = _crossings(read)
        found["unexpected_crossings"] = _unexpected(found["crossings"], corpus.known_crossings)
        present = {label for each in read for label, is_present in each.labels.items() if is_present}
        used = {clip.label for clip, *_ in read if clip.label is not None} | present - {BACKGROUND}
        if no_class := sum(BACKGROUND in each.labels for each in read):
            words = f"{no_class} clips are of none of the classes ({', '.join(NO_CLASS)})"
            found["inferred"] = [*found.get("inferred", []), words]
        found["empty_classes"] = sorted(listing.classes - used)
        report = blank_report(corpus.name, len(read)) | found
        report |= {key: [printable(name) for name in report[key]] for key in STATES}
        self.info.description = describe_with_report(corpus.title, report)
        self.info.features = common_features(list(corpus.class_sizes) or sorted(used), corpus.columns)
        if no_class or any(clip.where for clip in listing.clips):
            self.info.features = datasets.Features(self.info.features | STRETCH_FEATURES)
        table = _table(read, self.info.features)
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN, gen_kwargs={"table": table})]

    def _generate_tables(self, table: pa.Table) -> Iterator[tuple[int, pa.Table]]:
        yield 0, table

    def _refuse(self, problems: dict[str, list[str]], advice: str) -> None:
        parts = [_summary(kind, names) for kind, names in problems.items() if names]
        if parts:
            raise CorpusError(f"{self.corpus.name} in {self.root}: {'; '.join(parts)}. {advice}")


def _summary(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (f"{len(names)} {kind}: " if kind else "") + ", ".join(map(printable, names[:_SHOWN])) + more


def common_features(class_names: list[str], columns: Mapping[str, str]) -> datasets.Features:
    """The schema that all corpora share, and a corpus's own columns."""
    return datasets.Features(
        {
            "audio": datasets.Audio(decode=False),
            "label": datasets.ClassLabel(names=class_names),
            "fold": datasets.Value("int64"),
            "clip_id": datasets.Value("string"),
            "source_id": datasets.Value("string"),
            **{column: datasets.Value(kind) for column, kind in columns.items()},
            "digest": datasets.Value("string"),
            "sampling_rate": datasets.Value("int64"),
            "num_channels": datasets.Value("int64"),
            "num_frames": datasets.Value("int64"),
        }
    )


def blank_report(corpus: str, clips: int) -> dict:
    """The report on a corpus that nothing is wrong with; see `corpus_report`."""
    return {"corpus": corpus, "clips": clips, "inferred": [], **{key: [] for key in STATES}, "crossings": {}}


def describe_with_report(text: str, report: dict) -> str:
    """A dataset's description that carries its report: the description is what survives select, map and pickling."""
    return text + _REPORT_MARK + json.dumps(report)


def corpus_report(dataset: datasets.Dataset) -> dict:
    """What loading found out about a corpus.

    Args:
        dataset: from `load_corpus`, or selected from one.

    Returns:
        `corpus` and `clips` (at load time), and lists that are empty for a complete corpus:
        `shortfalls` (deviations from the official counts, in words), `missing` (listed but absent),
        `unlisted` (present but not listed), `skipped` (unreadable: name and reason), `shortened` (used, though some of
        their length cannot be decoded: name, and how much can), `wrong_durations`, `duplicates` (left out because
        another file has the same content), `conflicts` (those of them with different labels), `unsupported` (in a
        format that cannot be read), `empty_classes` (without a clip), `strays` (in no folder, where all others are),
        `unmatched` (by the label pattern), `unexpected_crossings` (recordings in several folds that the official split
        does not have there). `crossings` maps each `source_id` that is in more than one fold to its folds, and
        `inferred` says where labels and folds come from.
    """
    _, mark, report = dataset.info.description.partition(_REPORT_MARK)
    if not mark:
        raise CorpusError("this dataset carries no corpus report: it was not loaded by load_corpus")
    return json.loads(report)


def _fingerprint(name: str, root: Path, options: dict) -> str:
    digest = hashlib.sha256(json.dumps([SCHEMA_VERSION, name, os.fspath(root), options]).encode())
    for entry in walk_files(root):
        stat = entry.stat(follow_symlinks=os.path.exists(entry.path))
        digest.update(f"{os.fsencode(entry.path)!r} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _read(clips: list[Clip], root: Path, whole_files: bool) -> tuple[list[CheckedClip], list[str]]:
    """Decodes every file once: the clips that can be read; and name and reason of those that cannot."""

    def check(path: Path) -> AudioFacts | str:
        name = relative_name(path, root)
        try:
            os.fspath(path).encode()
            facts = inspect_audio(path)
            return f"{name}: is truncated: {_how_much(facts)}" if whole_files and facts.missing else facts
        except UnicodeEncodeError:
            return f"{os.fsencode(path)!r}: the file's name is not UTF-8; rename it"
        except AudioError as error:
            # Relative: the report goes into published cards, where a user's own paths have no business.
            return str(error).removeprefix(f"{root}{os.sep}")

    paths = list(dict.fromkeys(clip.path for clip in clips))
    # libsndfile and xxhash work outside Python's lock, so threads are enough to use every core.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checked = list(tqdm(pool.map(check, paths), total=len(paths), desc=f"Checking {root.name}", unit=" files"))
    facts_of = {path: facts for path, facts in zip(paths, checked, strict=True) if not isinstance(facts, str)}
    read = [
        CheckedClip(clip, relative_name(clip.path, root), facts_of[clip.path])
        for clip in clips
        if clip.path in facts_of
    ]
    return read, [reason for reason in checked if isinstance(reason, str)]


def _how_much(facts: AudioFacts) -> str:
    seconds = facts.num_frames / facts.sampling_rate
    return f"{seconds:.3f} of {seconds / (1 - facts.missing):.3f} s decode"


def shortfalls(clip_folds: list[int], clip_labels: list[str | None], corpus: Corpus) -> list[str]:
    """Deviations from the official number of clips, in all, per fold and per class, in words."""
    folds, classes = Counter(clip_folds), Counter(clip_labels)
    total = sum(corpus.fold_sizes.values())
    found = [f"{len(clip_folds)} clips instead of {total}"] if total and len(clip_folds) != total else []
    if corpus.fold_sizes:
        found += [
            f"fold {fold}: {n} clips, official is none" for fold, n in folds.items() if fold not in corpus.fold_sizes
        ]
    kinds: list[tuple[str, Mapping, Mapping]] = [
        ("fold", folds, corpus.fold_sizes), ("class", classes, corpus.class_sizes)
    ]  # fmt: skip
    for kind, counts, sizes in kinds:
        found += [f"{kind} {key}: {counts[key]} clips instead of {n}" for key, n in sizes.items() if counts[key] != n]
    return found


def _wrong_durations(read: list[CheckedClip], seconds: tuple[float, float]) -> list[str]:
    low, high = seconds
    lengths = ((name, _seconds(facts)) for _, name, facts, _ in read)
    return [f"{n} ({s:.3f} s, expected {low:g} to {high:g} s)" for n, s in lengths if not low <= s <= high]


def _seconds(facts: AudioFacts) -> float:
    return facts.num_frames / facts.sampling_rate


def _outside(read: list[CheckedClip]) -> list[str]:
    return [
        f"{clip.where}: {clip.start:g} to {clip.end:g} s of {name}, which has {_seconds(facts):.3f} s"
        for clip, name, facts, _ in read
        if clip.start >= _seconds(facts) or _seconds(facts) + _ROUNDING < clip.end < WHOLE[1]
    ]


def _each_stretch_once(read: list[CheckedClip]) -> tuple[list[CheckedClip], list[str], list[str]]:
    """Puts together what is said of one stretch of one content, under its first name; what is said later prevails.

    Returns:
        The clips; files with the content of another; and those of them that should have another label.
    """
    first: dict[str, CheckedClip] = {}
    merged: dict[tuple, CheckedClip] = {}
    repeats, conflicts = {}, []
    of_files: dict[str, set[str]] = {}
    for clip, _, facts, _ in read:
        if clip.label and not clip.where:
            of_files.setdefault(facts.digest, set()).add(clip.label)
    for each in read:
        clip, name, facts, _ = each
        original = first.setdefault(facts.digest, each)
        if name != original.name:
            repeats[name] = f"{name} (same as {original.name})"
            if not clip.where and clip.label and clip.label != (original.clip.label or clip.label):
                conflicts.append(f"{original.name} ({original.clip.label}) and {name} ({clip.label})")
        start, end = clip.start, min(clip.end, _seconds(facts))
        is_whole = start == 0 and end >= _seconds(facts) - _SHORTEST
        key = (facts.digest, *(WHOLE if is_whole else (start, end)))
        part = clip._replace(start=key[1], end=key[2], path=original.clip.path, source_id=original.clip.source_id)
        if not is_whole:
            frames = round(end * facts.sampling_rate) - round(start * facts.sampling_rate)
            facts = facts._replace(num_frames=max(1, frames))
        same = merged.get(key, CheckedClip(part, original.name, facts))
        if clip.label and (clip.where or len(of_files[facts.digest]) == 1):
            same = same._replace(labels=with_answer(same.labels, clip.label, clip.present))
        merged[key] = same
    found = []
    for each in merged.values():
        present = [label for label, is_present in each.labels.items() if is_present and label != BACKGROUND]
        found.append(each._replace(clip=each.clip._replace(label=present[0] if len(present) == 1 else None)))
    return found, list(repeats.values()), conflicts


def _crossings(read: list[CheckedClip]) -> dict[str, list[int]]:
    folds: dict[str, set[int]] = {}
    for clip, *_ in read:
        folds.setdefault(clip.source_id, set()).add(clip.fold)
    return {source: sorted(found) for source, found in folds.items() if len(found) > 1}


def _unexpected(crossings: dict[str, list[int]], known: dict[tuple[int, ...], int]) -> list[str]:
    found = Counter(map(tuple, crossings.values()))
    return [
        f"folds {' and '.join(map(str, folds))}: {n} recordings are in both, officially {known.get(folds, 0)}"
        for folds, n in found.items()
        if n > known.get(folds, 0)
    ]


def _check_identities(clips: list[Clip], root: Path) -> None:
    first: dict[str, Path] = {}
    for clip in clips:
        if clip.clip_id and first.setdefault(clip.clip_id, clip.path) != clip.path:
            raise CorpusError(
                f"{root}: {clip.path.name} and {first[clip.clip_id].name} are both clip {clip.clip_id}; remove one"
            )


def _table(read: list[CheckedClip], features: datasets.Features) -> pa.Table:
    label_of, classes = features["label"].str2int, features["label"].names
    rows = [
        {
            "audio": {"bytes": None, "path": os.fspath(clip.path)},
            "label": None if clip.label is None else label_of(clip.label),
            "fold": clip.fold,
            "clip_id": clip.clip_id or _name_of(clip, facts),
            "source_id": clip.source_id,
            **clip.extra,
            **{column: value for column, value in facts._asdict().items() if column in features},
            **{column: value for column, value in _stretch(clip, labels, classes).items() if column in features},
        }
        for clip, _, facts, labels in read
    ]
    return pa.Table.from_pylist(rows, schema=features.arrow_schema)


def _name_of(clip: Clip, facts: AudioFacts) -> str:
    is_whole = (clip.start, clip.end) == WHOLE
    return facts.digest if is_whole else f"{facts.digest}@{clip.start:.3f}-{clip.end:.3f}"


def _stretch(clip: Clip, labels: Mapping[str, bool], classes: list[str]) -> dict:
    present, absent = ([label for label, there in labels.items() if there is wanted] for wanted in (True, False))
    if BACKGROUND in labels:
        present, absent = [], classes
    return dict(zip(STRETCH_FEATURES, (clip.start, clip.end, present, absent), strict=True))
