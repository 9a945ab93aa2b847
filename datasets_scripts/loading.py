"""`load_corpus`: one call for every corpus, wherever it comes from."""

import logging
from dataclasses import fields
from pathlib import Path

import datasets
from datasets.exceptions import DatasetGenerationError

from .audiofolder import AudioFolder
from .builder import FolderBuilder, corpus_report
from .corpus import Corpus
from .errors import CorpusError
from .esc import ESC10, ESC50
from .synthetic import SyntheticBuilder, SyntheticConfig

logger = logging.getLogger(__name__)

CORPORA: dict[str, Corpus] = {corpus.name: corpus for corpus in (ESC10(), ESC50(), AudioFolder())}
CORPUS_NAMES = [*CORPORA, "synthetic"]
_SYNTHETIC_OPTIONS = {f.name for f in fields(SyntheticConfig)} - {f.name for f in fields(datasets.BuilderConfig)}


def load_corpus(
    name: str,
    data_dir: str | Path | None = None,
    *,
    allow_partial: bool = False,
    skip_unreadable: bool = False,
    cache_dir: str | Path | None = None,
    **synthetic_options,
) -> datasets.Dataset:
    """Load a corpus with its official folds.

    Args:
        name: esc10, esc50, urbansound8k, dcase2013, synthetic or audiofolder.
        data_dir: the corpus's folder.
        allow_partial: accept a copy that lacks clips, has files its metadata do not list, or clips of a wrong length.
        skip_unreadable: leave out files that cannot be decoded.
        cache_dir: where prepared data are kept; None: Hugging Face's place for them (`HF_DATASETS_CACHE`).
        **synthetic_options: for synthetic only: num_classes, clips_per_class, clip_seconds, sampling_rate, seed.

    Returns:
        A dataset with the columns audio (`{"bytes", "path"}`, for `decode_audio`), label (ClassLabel, the official
        names in official order; None where there are no labels), fold (from 1; 0: no folds), clip_id, source_id, the
        corpus's own columns, and digest (SHA-256 of the file), sampling_rate (Hz), num_channels, num_frames.
        `corpus_report` tells what was left out or is lacking.

    Raises:
        CorpusError: whatever is wrong with the name, the folder, a file in it or an option.
    """
    if name not in CORPUS_NAMES:
        raise CorpusError(f"there is no corpus {name!r}; choose one of {', '.join(CORPUS_NAMES)}")
    unknown = set(synthetic_options) - (_SYNTHETIC_OPTIONS if name == "synthetic" else set())
    if unknown:
        raise CorpusError(f"{name} has no option {', '.join(sorted(unknown))}")
    cache_dir = None if cache_dir is None else str(cache_dir)
    if name == "synthetic":
        if data_dir is not None:
            raise CorpusError(f"synthetic is generated and reads no folder, but data_dir is {data_dir}")
        return _prepare(lambda: SyntheticBuilder(cache_dir, **synthetic_options))
    corpus = CORPORA[name]
    root = _find_root(corpus, data_dir)
    dataset = _prepare(lambda: FolderBuilder(corpus, root, allow_partial, skip_unreadable, cache_dir))
    _warn(root, corpus_report(dataset))
    return dataset


def _prepare(make_builder) -> datasets.Dataset:
    try:
        builder = make_builder()
        builder.download_and_prepare()
        return builder.as_dataset(split="train")
    except (OSError, DatasetGenerationError) as error:
        place = datasets.config.HF_DATASETS_CACHE
        raise CorpusError(
            f"the prepared corpus cannot be written or read ({error.__cause__ or error}); its place is cache_dir, or "
            f"else HF_DATASETS_CACHE, now {place}"
        ) from error


def _find_root(corpus: Corpus, data_dir: str | Path | None) -> Path:
    if data_dir is None:
        raise CorpusError(f"{corpus.name} needs data_dir, a folder with {corpus.layout}")
    folder = Path(data_dir).expanduser().resolve()
    if not folder.exists():
        raise CorpusError(f"{data_dir}: no such folder; {corpus.name} is a folder with {corpus.layout}")
    if not folder.is_dir():
        raise CorpusError(f"{data_dir}: not a folder; {corpus.name} is a folder with {corpus.layout}")
    root = corpus.find_root(folder)
    if root is None:
        raise CorpusError(f"{data_dir}: not the layout of {corpus.name}; expected {corpus.layout}")
    return root


def _warn(root: Path, report: dict) -> None:
    """Repeat at every load, cached or not, what was put up with."""
    for key, what in [
        ("skipped", "unreadable files left out"),
        ("missing", "listed files are absent"),
        ("unlisted", "files ignored, not in the metadata"),
        ("wrong_durations", "clips of an unexpected length"),
        ("duplicates", "files left out, same content as another"),
        ("shortfalls", "deviations from the official counts"),
    ]:
        if report[key]:
            shown = ", ".join(report[key][:5]) + (", …" if len(report[key]) > 5 else "")
            logger.warning("%s: %d %s: %s", root, len(report[key]), what, shown)
    if report["crossings"]:
        logger.warning("%s: original recordings in more than one fold: %s", root, report["crossings"])
