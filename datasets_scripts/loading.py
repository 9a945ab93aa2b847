"""`load_corpus`: one call for every corpus, wherever it comes from."""

import logging
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import datasets
from datasets.exceptions import DatasetGenerationError

from .archives import unpacked, unpacked_official
from .builder import STATES, FolderBuilder, corpus_report
from .corpora import CORPORA, CORPUS_NAMES
from .corpora.hub import HubDataset
from .corpus import FolderCorpus
from .errors import CorpusError
from .exporting import is_export, is_hub_id, load_export
from .generating import LIMITS, SyntheticBuilder
from .hub_datasets import unpacked_dataset
from .options import label_pattern

logger = logging.getLogger("dls")

# What others must know of a corpus whose sound is in what they use.
_FACTS = ("title", "licence", "licence_id", "homepage", "citation")


def corpus_facts(name: str) -> dict[str, str]:
    """Title, licence, the Hub's identifier for it, homepage and citation (BibTeX), as far as they are known.

    Args:
        name: of a corpus, one of `CORPUS_NAMES`.
    """
    facts = {fact: getattr(CORPORA[name], fact) for fact in _FACTS}
    return {fact: text for fact, text in facts.items() if text and text != "unknown"}


def load_corpus(
    name: str,
    data_dir: str | Path | None = None,
    *,
    allow_partial: bool = False,
    skip_unreadable: bool = False,
    cache_dir: str | Path | None = None,
    **options,
) -> datasets.Dataset:
    """Load a corpus with its official folds.

    Args:
        name: of a corpus, one of `CORPUS_NAMES`.
        data_dir: the corpus's folder; or its official archive, or a folder with its archives; or an export (a folder
            made by `python -m datasets_scripts export`, or the Hub id of one). None: the corpus is downloaded from
            its official address once (synthetic: generated).
        allow_partial: accept a copy that lacks clips, has files its metadata do not list, or clips of a wrong length.
        skip_unreadable: leave out files that cannot be decoded.
        cache_dir: where prepared data are kept; None: Hugging Face's place for them (`HF_DATASETS_CACHE`).
        **options: for synthetic, see `SyntheticConfig`. For audiofolder: label_pattern, a regular expression with
            groups `label` and perhaps `source` (the recording), which is searched for in every file's name; and
            folder_labels, False where folders are neither classes nor folds. For hub, see `unpacked_dataset`.

    An audiofolder's labels come from metadata.csv, metadata.jsonl, labels.csv and Raven's selection tables at any
    depth, else from its files' names by label_pattern, else from its folders' names: see docs/datasets.md. Where
    tables label stretches, each is a clip beside its whole file, and there are columns clip_start and clip_end (in s;
    0 and infinity: the whole file), labels and absent_labels (names of classes of which it is, and is not). label is
    the one class of which a clip is; None where there are several, or none. The labels background, noise, other and
    silence are no classes: a clip of theirs has all classes among its absent_labels.

    Returns:
        A dataset with the columns audio (`{"bytes", "path"}`, for `decode_audio`), label (ClassLabel, the official
        names in official order; None where there are no labels), fold (from 1; 0: no folds), clip_id, source_id, the
        corpus's own columns, and digest (128-bit XXH3 of the file), sampling_rate (Hz), num_channels, num_frames.
        `corpus_report` tells what was left out or is lacking.

    Raises:
        CorpusError: whatever is wrong with the name, the folder, a file in it or an option.
    """
    if name not in CORPORA:
        raise CorpusError(f"there is no corpus {name!r}; choose one of {', '.join(CORPUS_NAMES)}")
    unknown = options.keys() - (LIMITS if name == "synthetic" else CORPORA[name].options)
    if unknown:
        raise CorpusError(f"{name} has no option {', '.join(sorted(unknown))}")
    if options.get("label_pattern") is not None:
        try:
            label_pattern(options["label_pattern"])
        except ValueError as error:
            raise CorpusError(f"label_pattern {error}") from None
    cache = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser()
    try:
        dataset = _load(name, data_dir, allow_partial, skip_unreadable, cache, options)
    except (OSError, DatasetGenerationError) as error:
        raise CorpusError(
            f"{name} cannot be prepared in {cache} ({error.__cause__ or error}); cache_dir or the environment "
            "variable HF_DATASETS_CACHE can name another place"
        ) from error
    _say(str(data_dir or name), dataset)
    return dataset


def loading_options(name: str, given: Mapping) -> dict:
    """What of a command's options is for `load_corpus`, of one of its corpora.

    Args:
        name: of the corpus.
        given: options by their names on the command line; those of a run that was recorded before they were may lack.
    """
    found = {option: given[option] for option in ("allow_partial", "skip_unreadable")}
    own = dict(given) | {"folder_labels": not given.get("no_folder_labels")}
    return found | {option: own.get(option) for option in (CORPORA[name].options if name in CORPORA else ())}


def _load(
    name: str, data_dir: str | Path | None, allow_partial: bool, skip_unreadable: bool, cache: Path, options: dict
) -> datasets.Dataset:
    corpus = CORPORA[name]
    if isinstance(corpus, HubDataset):
        if data_dir is None:
            raise CorpusError(f"hub needs {corpus.layout}: hub=ID")
        root = unpacked_dataset(os.path.expanduser(data_dir), cache, **options).resolve()
        builder = FolderBuilder(corpus, root, allow_partial, skip_unreadable, str(cache))
    elif data_dir is not None and _is_export(data_dir):
        return load_export(corpus, os.path.expanduser(data_dir), str(cache))
    elif isinstance(corpus, FolderCorpus):
        root = _find_root(corpus, data_dir, cache)
        builder = FolderBuilder(corpus, root, allow_partial, skip_unreadable, str(cache), **options)
    elif data_dir is None:
        builder = SyntheticBuilder(str(cache), **options)
    else:
        raise CorpusError(f"{data_dir}: synthetic is generated; as data_dir it takes only an export of itself")
    try:
        builder.download_and_prepare()
    except CorpusError as error:
        if data_dir is None:
            raise CorpusError(f"{error} This copy was downloaded: delete {root} to download it again.") from None
        raise
    return builder.as_dataset(split="train")


def _is_export(data_dir: str | Path) -> bool:
    source = Path(data_dir).expanduser()
    return is_export(source) if source.exists() else is_hub_id(str(data_dir))


def _find_root(corpus: FolderCorpus, data_dir: str | Path | None, cache: Path) -> Path:
    """The corpus's root in a folder, in archives on disk, or downloaded."""
    if data_dir is None:
        if not corpus.archives:
            raise CorpusError(f"{corpus.name} needs data_dir, a folder with {corpus.layout}")
        place = unpacked_official(corpus, cache)
        root = corpus.find_root(place)
        if root is None:
            raise CorpusError(f"{place}: what was downloaded is not {corpus.name}; expected {corpus.layout}")
        return root
    source = Path(data_dir).expanduser().resolve()
    if not source.exists():
        raise CorpusError(f"{data_dir}: no such folder or archive; {corpus.name} is a folder with {corpus.layout}")
    folder = unpacked(_archives_beside(source, corpus), cache) if source.is_file() else source
    root = corpus.find_root(folder)
    if root is None and (archives := [source / a.filename for a in corpus.archives if (source / a.filename).exists()]):
        root = corpus.find_root(unpacked(archives, cache))
    if root is None:
        raise CorpusError(f"{data_dir}: not the layout of {corpus.name}; expected {corpus.layout}")
    return root


def _archives_beside(file: Path, corpus: FolderCorpus) -> list[Path]:
    """An archive and, if it is one of several official ones, the others in its folder."""
    official = [archive.filename for archive in corpus.archives]
    if file.name not in official:
        return [file]
    return [file.with_name(name) for name in official if file.with_name(name).exists()]


def _say(source: str, dataset: datasets.Dataset) -> None:
    """Says at every load, cached or not, what was inferred, and what was put up with."""
    report = corpus_report(dataset)
    if inferred := "; ".join(report["inferred"]):
        names, counts = dataset.features["label"].names, Counter(dataset.with_format(None)["label"][:])
        classes = ", ".join(f"{name} ({counts[number]})" for number, name in enumerate(names)) or "none"
        without = f"; {counts[None]} clips without a class" if counts[None] else ""
        logger.info("%s: %s; classes: %s%s", source, inferred, classes, without)
    for key, words in STATES.items():
        if report[key]:
            shown = ", ".join(report[key][:5]) + (", …" if len(report[key]) > 5 else "")
            logger.warning("%s: %d %s: %s", source, len(report[key]), words, shown)
