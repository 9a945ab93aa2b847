"""Official folds, and several corpora as one for pre-training."""

from collections import Counter
from collections.abc import Collection, Mapping
from itertools import repeat

import datasets
import numpy as np

from .errors import CorpusError
from .identity import STRETCH_COLUMNS, ClipIdentities

_KEPT_COLUMNS = ["audio", "label", "fold", "clip_id", "source_id", "digest", *STRETCH_COLUMNS]


def train_test_folds(dataset: datasets.Dataset, fold: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The official split for one fold.

    Args:
        dataset: from `load_corpus`.
        fold: the fold held out for testing, from 1; clips of fold 0 are always trained on.

    Returns:
        Every other fold's clips, and this fold's clips.

    Raises:
        CorpusError: there is no such fold, or nothing is left to train on.
    """
    folds = _folds(dataset)
    existing = sorted(set(folds.tolist()) - {0})
    if fold not in existing or (folds == fold).all():
        problem = f"fold {fold} cannot be held out" if fold in existing else f"there is no fold {fold}"
        there = f"{'folds' if len(existing) > 1 else 'only fold'} {', '.join(map(str, existing))}"
        nothing = "no folds (a plain folder has none; give it a metadata.csv with a fold column)"
        raise CorpusError(f"{problem}: this corpus has {there if existing else nothing}")
    return dataset.select(np.flatnonzero(folds != fold)), dataset.select(np.flatnonzero(folds == fold))


def combine_corpora(
    corpora: list[tuple[str, datasets.Dataset]], excluded_folds: Mapping[str, Collection[int]] | None = None
) -> tuple[datasets.Dataset, dict]:
    """Several corpora as one unlabelled training set, every clip once.

    The first corpus that has a clip keeps it. Two clips are the same if they are the same stretch of the same file's
    content, or if their ESC identity is the same (ESC-10's and ESC-50's files of one clip differ).

    Args:
        corpora: pairs of a name and a dataset from `load_corpus`.
        excluded_folds: folds to leave out, by corpus. Whatever overlaps with their clips in other corpora is left out
            too: what is to be tested on must not come back under another name.

    Returns:
        A dataset with columns audio, corpus, label (int64 or None, numbered as in its own corpus), fold, clip_id,
        source_id and digest; and a dict: `clips` (kept per corpus), `removed` (in all), and `removed_pairs`, a list of
        `{"kept_in", "removed_from", "clips"}`, in which "NAME held out" stands for NAME's excluded folds.
    """
    if not corpora:
        raise CorpusError("no corpus was given to combine")
    excluded_folds = excluded_folds or {}
    identities = [ClipIdentities.of(dataset) for _, dataset in corpora]
    held_out = [np.isin(_folds(data), list(excluded_folds.get(name, ()))) for name, data in corpora]
    owner_of: dict[bytes, str] = {}
    kept_counts: Counter[str] = Counter()
    removed: Counter[tuple[str, str]] = Counter()
    parts = []
    for (name, dataset), clips, own_held_out in zip(corpora, identities, held_out, strict=True):
        kept = []
        unheld = np.flatnonzero(~own_held_out)
        kept_out_by = _owners_of_held_out(clips[unheld], corpora, identities, held_out)
        names = clips.names()
        for index, owner in zip(unheld.tolist(), kept_out_by, strict=True):
            owner = owner or next((owner_of[key] for key in names[index] if key in owner_of), None)
            if owner is None:
                kept.append(index)
                owner_of.update(zip(names[index], repeat(name)))
            else:
                removed[owner, name] += 1
        kept_counts[name] += len(kept)
        # Selected last: columns added to a selection would write its embedded clips to disk once more.
        parts.append(_plain(name, dataset).select(kept))
    report = {
        "clips": dict(kept_counts),
        "removed": sum(removed.values()),
        "removed_pairs": [
            {"kept_in": first, "removed_from": second, "clips": n} for (first, second), n in removed.items()
        ],
    }
    return datasets.concatenate_datasets(parts), report


def _folds(dataset: datasets.Dataset) -> np.ndarray:
    return np.asarray(dataset.with_format(None)["fold"][:])


def _owners_of_held_out(clips: ClipIdentities, corpora, identities, held_out) -> list[str | None]:
    """For each clip "NAME held out" where its sound, or a part of it, is in NAME's excluded folds; else None."""
    owners: list[str | None] = [None] * len(clips)
    for (name, _), others, excluded in zip(corpora, identities, held_out, strict=True):
        for index in np.flatnonzero(clips.shared_with(others[excluded])).tolist() if excluded.any() else ():
            owners[index] = f"{name} held out"
    return owners


def _plain(name: str, dataset: datasets.Dataset) -> datasets.Dataset:
    # Replacing the column, not casting it: a cast would write every embedded clip to disk once more.
    labels = dataset.with_format(None)["label"][:]
    dataset = dataset.remove_columns([column for column in dataset.column_names if column not in _KEPT_COLUMNS])
    dataset = dataset.remove_columns("label").add_column("label", labels, feature=datasets.Value("int64"))
    dataset.info.description = ""  # a report on one corpus would be wrong for several
    return dataset.add_column("corpus", [name] * len(dataset), feature=datasets.Value("string"))
