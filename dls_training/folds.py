"""What of a labelled corpus is trained on and what is held out, and what the weights know of it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset

from datasets_scripts import ClipIdentities, train_test_folds
from datasets_scripts.errors import UserError
from datasets_scripts.files import read_object

from .checkpoints import PREFIX
from .record import Record
from .runs import begun
from .settings import ClassificationSettings

RESULTS_FILE = "fold_results.json"


@dataclass
class Fold:
    """One fold held out.

    Attributes:
        number: Official.
        train, test: Its clips; of the former as many as --labels_per_class says.
        record: Of its run.
        facts: What its results say besides what is measured.
        output_dir: Its own.
    """

    number: int
    train: Dataset
    test: Dataset
    record: Record
    facts: dict
    output_dir: Path

    @property
    def results_file(self) -> Path:
        return self.output_dir / RESULTS_FILE

    def is_finished(self) -> bool:
        """Whether there are results of this very run; a shorter one goes on instead."""
        measured = read_object(self.results_file) or {}
        finished = Record.read(self.output_dir) if "confusion_matrix" in measured else None
        return finished is not None and finished.own.same_length(self.record.own)


def class_names(dataset: Dataset, name: str) -> list[str]:
    """A labelled corpus's classes.

    Raises:
        UserError: if clips have no labels.
    """
    if None in dataset["label"][:] or len(dataset.features["label"].names) < 2:
        raise UserError(
            f"--corpus {name} has no labels, or one class only: put each class's clips into a folder of its own, or "
            "add a metadata.csv with file_name and label"
        )
    return dataset.features["label"].names


def folds_to_run(choice: int | str, dataset: Dataset, name: str) -> list[int]:
    """The folds to hold out, one after the other.

    Raises:
        UserError: if the corpus has no such fold, or none at all.
    """
    folds = sorted(set(dataset["fold"][:]))
    if len(folds) < 2:
        raise UserError(
            f"--corpus {name} has no folds to hold out: add a metadata.csv with file_name, label and fold to it"
        )
    if choice != "all" and choice not in folds:
        raise UserError(f"--fold {choice}: {name} has folds {', '.join(map(str, folds))}")
    return folds if choice == "all" else [choice]


def few_labels(train: Dataset, per_class: int | None, seed: int) -> Dataset:
    """A random choice of `per_class` clips of each class, the same for the same seed; all of them for None."""
    if per_class is None:
        return train
    labels, random = np.array(train["label"][:]), np.random.default_rng(seed)
    chosen = [random.permutation(np.flatnonzero(labels == label))[:per_class] for label in np.unique(labels)]
    return train.select(np.sort(np.concatenate(chosen)))


def make_fold(settings: ClassificationSettings, number: int, corpus: str, dataset: Dataset, parent: Record,
              **facts) -> Fold:  # fmt: skip
    """Splits the corpus, and counts what of the held-out clips the weights have heard.

    Args:
        settings: Of the run.
        number: Of the fold that is held out.
        corpus: Its name.
        dataset: Its clips.
        parent: The record of what the run starts from.
        **facts: See `begun`.

    Raises:
        UserError: if the weights were trained on held-out clips with their labels, unless --allow_label_leakage.
    """
    output_dir = settings.output_dir / f"fold-{number}" if settings.fold == "all" else settings.output_dir
    train, test = train_test_folds(dataset, number)
    train = few_labels(train, settings.labels_per_class, settings.seed)
    held_out = ClipIdentities.of(test)
    seen = parent.labels_seen(held_out)
    if seen and not settings.allow_label_leakage:
        stages = ", ".join(f"{count} by {name}" for name, count in seen.items())
        raise UserError(
            f"fold {number}: --model_name_or_path {settings.model_name_or_path} was trained on held-out clips with "
            f"their labels, of {len(test)} clips {stages}: the accuracy would be no measure. Start from a network "
            "that has not seen them, or add --allow_label_leakage, which the card will report"
        )
    heard = {
        "training_clips": len(train),
        "test_clips": len(test),
        # From scratch there was no pre-training; None also stands for one of which that is not known.
        "test_clips_heard_in_pretraining": parent.heard(held_out) if parent.stages else None,
        "test_labels_seen_before": seen,
    }
    record = begun(
        settings, "classification", parent, [(corpus, dataset)], ClipIdentities.of(train), with_labels=True,
        clips={corpus: len(train)}, excluded_folds={corpus: [number]}, name=str(output_dir),
        also={"fold": number, "classes": dataset.features["label"].names}, **facts,
    )  # fmt: skip
    return Fold(number, train, test, record, heard | {"run": record.own.identity_digest}, output_dir)


def check_layout(settings: ClassificationSettings) -> None:
    """Raises UserError if a run with --fold all would go on as one with --fold N, or the other way round."""
    output_dir = settings.output_dir
    folds = sorted(path for path in output_dir.glob("fold-*") if path.is_dir())
    single = [*output_dir.glob(f"{PREFIX}*"), *output_dir.glob(RESULTS_FILE)]
    if (folds and settings.fold != "all") or (single and settings.fold == "all"):
        found = (folds or single)[0].name
        raise UserError(
            f"--output_dir {output_dir} belongs to a different run: --fold is {settings.fold!r}, but {found} is "
            "there. Repeat its options, or start anew in another --output_dir"
        )
