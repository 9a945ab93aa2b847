"""From a corpus's listing to a prepared dataset: check it, decode every file once, keep references in Arrow."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.utils import tqdm

from .audio import AudioFacts, inspect_audio
from .corpus import Clip, Corpus, FolderCorpus, common_features, walk_files
from .errors import AudioError, CorpusError

SCHEMA_VERSION = "1.3.0"  # in every cache key: raise it when the columns or the checks change
_SHOWN = 5
_REPORT_MARK = "\n\nCorpus report: "
_REPAIR = "Repair the files, or leave them out with skip_unreadable=True (--skip_unreadable)."
_COMPLETE = "Get what is missing, or use the copy as it is with allow_partial=True (--allow_partial)."

Read = list[tuple[Clip, AudioFacts]]


@dataclass
class FolderConfig(datasets.BuilderConfig):
    """What changes the prepared data, besides the folder's content."""

    allow_partial: bool = False
    skip_unreadable: bool = False


class FolderBuilder(datasets.ArrowBasedBuilder):
    """Prepares a corpus that lies in a folder. Rows refer to the files by path; nothing is copied.

    Args:
        corpus: which one.
        root: its root folder, as `Corpus.find_root` gives it.
        allow_partial: put up with what the folder lacks, and say so in the report.
        skip_unreadable: leave unreadable files out, and say so in the report.
        cache_dir: where prepared data are kept; None: Hugging Face's place for them.
    """

    BUILDER_CONFIG_CLASS = FolderConfig
    VERSION = datasets.Version(SCHEMA_VERSION)

    def __init__(
        self,
        corpus: FolderCorpus,
        root: Path,
        allow_partial: bool,
        skip_unreadable: bool,
        cache_dir: str | None = None,
    ):
        self.corpus, self.root = corpus, root
        options = {"allow_partial": allow_partial, "skip_unreadable": skip_unreadable}
        super().__init__(
            cache_dir=cache_dir,
            dataset_name=f"dls_{corpus.name}",
            config_id="default",
            # Names, sizes and times of change: a changed folder is prepared anew, an unchanged one is not read again.
            hash=_fingerprint(corpus.name, root, options),
            **options,
        )

    def _info(self) -> datasets.DatasetInfo:
        corpus = self.corpus
        return datasets.DatasetInfo(
            description=corpus.title, citation=corpus.citation, homepage=corpus.homepage, license=corpus.licence
        )

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        listing = self.corpus.read(self.root)
        _check_identities(listing.clips, self.root)
        if not listing.clips and not listing.missing:
            raise CorpusError(f"{self.root}: holds no clip of {self.corpus.name}; expected {self.corpus.layout}")
        short = shortfalls([clip.fold for clip in listing.clips], [clip.label for clip in listing.clips], self.corpus)
        if not self.config.allow_partial:
            lists = {"listed but absent": listing.missing, "present but not listed": listing.unlisted, "": short}
            self._refuse(lists, _COMPLETE)
        facts = _inspect_all([clip.path for clip in listing.clips], self.root, self.corpus.whole_files)
        # Relative names: the report goes into published cards, where a user's own paths have no business.
        unreadable = [str(fact).removeprefix(f"{self.root}{os.sep}") for fact in facts if isinstance(fact, AudioError)]
        if not self.config.skip_unreadable:
            self._refuse({"unreadable": unreadable}, _REPAIR)
        read = [(c, f) for c, f in zip(listing.clips, facts, strict=True) if not isinstance(f, AudioError)]
        wrong = _wrong_durations(read, listing.seconds, self.root)
        if not self.config.allow_partial:
            self._refuse({"wrong duration": wrong}, _COMPLETE)
        read, duplicates = _without_repeats(read, self.root) if self.corpus.unique_content else (read, [])
        if not read:
            raise CorpusError(f"{self.root}: none of the {len(facts)} sound files can be read; {unreadable[:1]}")
        shortened = [
            f"{clip.path.relative_to(self.root).as_posix()}: {_how_much(fact)}" for clip, fact in read if fact.missing
        ]
        crossings = _crossings(read)
        report = blank_report(self.corpus.name, len(read)) | {
            "shortfalls": short,
            "missing": listing.missing,
            "unlisted": listing.unlisted,
            "skipped": unreadable,
            "shortened": shortened,
            "wrong_durations": wrong,
            "duplicates": duplicates,
            "crossings": crossings,
            "unexpected_crossings": _unexpected(crossings, self.corpus.known_crossings),
        }
        self.info.description = describe_with_report(self.corpus.title, report)
        self.info.features = common_features(listing.class_names, self.corpus.columns)
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
    return (f"{len(names)} {kind}: " if kind else "") + ", ".join(names[:_SHOWN]) + more


def blank_report(corpus: str, clips: int) -> dict:
    """The report on a corpus that nothing is wrong with; see `corpus_report`."""
    lists = ["shortfalls", "missing", "unlisted", "skipped", "shortened", "wrong_durations", "duplicates"]
    lists += ["unexpected_crossings"]
    return {"corpus": corpus, "clips": clips, **{key: [] for key in lists}, "crossings": {}}


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
        another file has the same content), `unexpected_crossings` (recordings in several folds that the official split
        does not have there). `crossings` maps each `source_id` that is in more than one fold to its folds.
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


def _inspect_all(paths: list[Path], root: Path, whole_files: bool) -> list[AudioFacts | AudioError]:
    def inspect(path: Path) -> AudioFacts | AudioError:
        try:
            os.fspath(path).encode()
            fact = inspect_audio(path)
            return AudioError(f"{path}: is truncated: {_how_much(fact)}") if whole_files and fact.missing else fact
        except UnicodeEncodeError:
            return AudioError(f"{os.fsencode(path)!r}: the file's name is not UTF-8; rename it")
        except AudioError as error:
            return error

    # libsndfile and xxhash work outside Python's lock, so threads are enough to use every core.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(tqdm(pool.map(inspect, paths), total=len(paths), desc=f"Checking {root.name}", unit=" clips"))


def _how_much(fact: AudioFacts) -> str:
    seconds = fact.num_frames / fact.sampling_rate
    return f"{seconds:.3f} of {seconds / (1 - fact.missing):.3f} s decode"


def shortfalls(clip_folds: list[int], clip_labels: list[str | None], corpus: Corpus) -> list[str]:
    """Deviations from the official number of clips, in all, per fold and per class, in words."""
    folds, classes = Counter(clip_folds), Counter(clip_labels)
    total = sum(corpus.fold_sizes.values())
    found = [f"{len(clip_folds)} clips instead of {total}"] if total and len(clip_folds) != total else []
    if corpus.fold_sizes:
        found += [
            f"fold {fold}: {n} clips, official is none" for fold, n in folds.items() if fold not in corpus.fold_sizes
        ]
    found += [f"fold {f}: {folds[f]} clips instead of {n}" for f, n in corpus.fold_sizes.items() if folds[f] != n]
    found += [
        f"class {c}: {classes[c]} clips instead of {n}" for c, n in corpus.class_sizes.items() if classes[c] != n
    ]
    return found


def _wrong_durations(read: Read, seconds: tuple[float, float], root: Path) -> list[str]:
    low, high = seconds
    lengths = ((clip.path.relative_to(root).as_posix(), fact.num_frames / fact.sampling_rate) for clip, fact in read)
    return [
        f"{name} ({length:.3f} s, expected {low:g} to {high:g} s)"
        for name, length in lengths
        if not low <= length <= high
    ]


def _without_repeats(read: Read, root: Path) -> tuple[Read, list[str]]:
    first, kept, repeats = {}, [], []
    for clip, fact in read:
        name = clip.path.relative_to(root).as_posix()
        if fact.digest in first:
            repeats.append(f"{name} (same as {first[fact.digest]})")
        else:
            first[fact.digest] = name
            kept.append((clip, fact))
    return kept, repeats


def _crossings(read: Read) -> dict[str, list[int]]:
    folds: dict[str, set[int]] = {}
    for clip, _ in read:
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


def _table(read: Read, features: datasets.Features) -> pa.Table:
    label_of = features["label"].str2int
    rows = [
        {
            "audio": {"bytes": None, "path": os.fspath(clip.path)},
            "label": None if clip.label is None else label_of(clip.label),
            "fold": clip.fold,
            "clip_id": clip.clip_id or fact.digest,
            "source_id": clip.source_id,
            **clip.extra,
            **{column: value for column, value in fact._asdict().items() if column in features},
        }
        for clip, fact in read
    ]
    return pa.Table.from_pylist(rows, schema=features.arrow_schema)
