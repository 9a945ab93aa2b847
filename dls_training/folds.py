"""What of a labelled corpus is trained on and what is held out, and what the weights know of it."""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets

from datasets_scripts import ClipIdentities, train_test_folds
from datasets_scripts.errors import UserError
from datasets_scripts.files import read_object
from datasets_scripts.labels import NO_CLASS

from .checkpoints import PREFIX
from .input_pipeline import ANSWERS, label_numbers
from .record import Record
from .runs import begun
from .settings import ClassificationSettings

logger = logging.getLogger("dls")

RESULTS_FILE = "fold_results.json"
MOST_FOLDS = 5  # where they are made


@dataclass
class Fold:
    """One fold held out, or none.

    Attributes:
        number: From 1; None where nothing is held out.
        train, test: Its clips; of the former as many as --labels_per_class says. None where nothing is held out.
        unlabelled: What can be heard beside `train`, without labels, for --self_training_rounds; None without that.
        record: Of its run.
        facts: What its results say besides what is measured.
        output_dir: Its own.
    """

    number: int | None
    train: Dataset
    test: Dataset | None
    unlabelled: Dataset | None
    record: Record
    facts: dict
    output_dir: Path

    @property
    def name(self) -> str:
        """For the log."""
        return "all clips" if self.number is None else f"fold {self.number}"

    @property
    def results_file(self) -> Path:
        return self.output_dir / RESULTS_FILE

    def is_finished(self) -> bool:
        """Whether there are results of this very run; a shorter one goes on instead."""
        measured = read_object(self.results_file) or {}
        finished = Record.read(self.output_dir) if "loss_per_epoch" in measured else None
        return finished is not None and finished.own.same_length(self.record.own)


@dataclass
class LabelledCorpus:
    """What of a corpus can be fine-tuned on.

    Attributes:
        name: Of the corpus.
        clips: Those of one class, with folds. Where some are of several classes, or known not to be of one, each class
            is answered with yes or no, and these are all of which an answer is known, with the column `ANSWERS`.
        unlabelled: The others.
        made_folds: How many folds were made, because it has none; 0: it has some, or none are needed.
    """

    name: str
    clips: Dataset
    unlabelled: Dataset
    made_folds: int = 0

    @classmethod
    def of(cls, name: str, dataset: Dataset, fold: int | str) -> "LabelledCorpus":
        """Leaves out what has no label, and makes folds where a fold is to be held out and there are none.

        A class of which no clip is is none, whatever clips are said not to be of it.

        Args:
            name: Of the corpus.
            dataset: From `load_corpus`.
            fold: --fold.

        Raises:
            UserError: if there are no labels, or too few recordings of a class.
        """
        labels, answers = label_numbers(dataset), yes_no_answers(dataset)
        if answers is not None:
            labels = answers
            dataset = dataset.add_column(ANSWERS, answers.tolist())
        is_labelled = labels >= 0 if answers is None else (labels >= 0).any(axis=1)
        if len(dataset.features["label"].names) < (2 if answers is None else 1) or not is_labelled.any():
            raise UserError(
                f"--corpus {name} has no labels, or one class only: put each class's clips into a folder of its own, "
                f"or add a metadata.csv with file_name and label ({', '.join(NO_CLASS)} are no classes, but say that "
                "a clip is of none)"
            )
        if answers is not None:
            several, none = (answers == 1).sum(axis=1) > 1, (answers == 0).all(axis=1)
            logger.info(
                f"{name}: each class is answered with yes or no, for {several.sum()} clips are of several classes, "
                f"{none.sum()} of none"
            )
        if not is_labelled.all():
            logger.info(f"{name}: {is_labelled.sum()} clips have labels, {(~is_labelled).sum()} have none")
        made = 0
        if fold != "none" and not np.any(np.array(dataset["fold"][:])[is_labelled]):
            folds = np.zeros(len(dataset), int)
            sources = np.array(dataset["source_id"][:])[is_labelled]
            folds[is_labelled] = make_folds(labels[is_labelled], sources, dataset.features["label"].names, name)
            made = int(folds.max())
            logger.info(f"{name} has no folds: {made} were made, stratified by class and grouped by recording")
            # Before a selection, as above: columns added to one would write embedded clips to disk once more.
            dataset = dataset.remove_columns("fold").add_column("fold", folds)
        labelled, unlabelled = (dataset.select(np.flatnonzero(own)) for own in (is_labelled, ~is_labelled))
        return cls(name, labelled, unlabelled, made)

    @property
    def answers_each_class(self) -> bool:
        """Whether with yes or no, as `ANSWERS` says."""
        return ANSWERS in self.clips.column_names

    @property
    def classes(self) -> list[str]:
        """In the order of the labels."""
        return self.clips.features["label"].names

    def folds_to_run(self, choice: int | str) -> list[int | None]:
        """The folds to hold out, one after the other; None: nothing is held out.

        Raises:
            UserError: if there is no such fold, or nothing else to train on.
        """
        if choice == "none":
            return [None]
        folds = sorted(set(self.clips["fold"][:]))
        if len(folds) < 2:
            raise UserError(
                f"--corpus {self.name} has no folds to hold out: all labelled clips are in fold {folds[0]}. Put some "
                "into others, or train on everything with --fold none"
            )
        folds = [fold for fold in folds if fold]
        chosen = folds if choice == "all" else [int(number) for number in str(choice).split(",")]
        if not set(chosen) <= set(folds):
            raise UserError(f"--fold {choice}: {self.name} has folds {', '.join(map(str, folds))}")
        return chosen


def yes_no_answers(dataset: Dataset) -> np.ndarray | None:
    """Whether each clip is of each class, where one label a clip cannot say that.

    A clip that is of some class is of no other that it is not said to be of. Where it is only said of which classes a
    clip is not, nothing is known of the others.

    Args:
        dataset: From `load_corpus`.

    Returns:
        (clips, classes) int64: 1 for yes, 0 for no, -1 where it is not known. None where each clip is of one class, or
        nothing is known of it.
    """
    if "absent_labels" not in dataset.column_names:
        return None
    numbers = {name: number for number, name in enumerate(dataset.features["label"].names)}
    answers = np.full((len(dataset), len(numbers)), -1)
    for row, present, absent in zip(answers, dataset["labels"][:], dataset["absent_labels"][:], strict=True):
        is_of, is_not_of = ([numbers[name] for name in names if name in numbers] for names in (present, absent))
        row[range(len(row)) if is_of else is_not_of] = 0
        row[is_of] = 1
    counts, is_known = (answers == 1).sum(axis=1), (answers >= 0).any(axis=1)
    return answers if np.any(is_known & (counts != 1)) else None


def memberships(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Of which classes each clip is: (clips, classes), bool, of either form of `label_numbers`."""
    return labels == 1 if labels.ndim == 2 else labels[:, None] == np.arange(num_classes)


def make_folds(labels: np.ndarray, sources: np.ndarray, classes: list[str], corpus: str) -> np.ndarray:
    """Folds that are stratified by class and keep recordings together.

    There are as many as the rarest class has recordings, at most `MOST_FOLDS`; fewer, where otherwise a class would
    be in one fold only. A clip of several classes counts for the rarest of them.

    Args:
        labels: Of all clips, in either form of `label_numbers`.
        sources: (clips,), names of the recordings that they are from.
        classes: Names, for messages.
        corpus: Likewise.

    Returns:
        (clips,), from 1; the same for the same clips.

    Raises:
        UserError: if all clips of a class are from one recording, or recordings that hold several classes allow none.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # takes its time, and most corpora have folds

    members = memberships(labels, len(classes))
    sizes = np.where(members, members.sum(axis=0), len(labels) + 1)
    strata = np.where(members.any(axis=1), sizes.argmin(axis=1), len(classes))
    recordings = {
        label: len(set(sources[members[:, label]])) for label in np.flatnonzero(members.any(axis=0)).tolist()
    }
    rarest = min(recordings, key=recordings.get)
    if recordings[rarest] < 2:
        raise UserError(
            f"--corpus {corpus} has no folds, and none can be made: all clips of {classes[rarest]} are from one "
            "recording. Add another, or train on everything with --fold none"
        )
    for number in range(min(MOST_FOLDS, recordings[rarest]), 1, -1):
        splits = StratifiedGroupKFold(number, shuffle=True, random_state=0).split(strata, strata, sources)
        folds = np.zeros(len(labels), int)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of strata with fewer clips than folds
            for fold, (_, held_out) in enumerate(splits, 1):
                folds[held_out] = fold
        if len(set(folds)) == number and all(len(set(folds[members[:, label]])) > 1 for label in recordings):
            return folds
    raise UserError(
        f"--corpus {corpus} has no folds, and none can be made that have every class in more than one: add a "
        "metadata.csv with file_name, label and fold, or train on everything with --fold none"
    )


def few_labels(train: Dataset, per_class: int | None, seed: int) -> tuple[Dataset, Dataset]:
    """A random choice of `per_class` clips of each class, and of those of none, all of them for None; and the rest.

    It is the same for the same seed.
    """
    if per_class is None:
        return train, train.select([])
    members = memberships(label_numbers(train), len(train.features["label"].names))
    members, random = np.column_stack([members, ~members.any(axis=1)]), np.random.default_rng(seed)
    chosen = [random.permutation(np.flatnonzero(own))[:per_class] for own in members.T]
    chosen = np.unique(np.concatenate(chosen))
    return train.select(chosen), train.select(np.setdiff1d(np.arange(len(train)), chosen))


def to_label(corpus: LabelledCorpus, number: int | None, rest: Dataset, test: Dataset | None) -> Dataset:
    """The clips that a classifier may label by itself: none that is held out, and none of a recording that is.

    Args:
        corpus: Its clips.
        number: Of the fold that is held out, None for none.
        rest: Labelled clips whose labels are not to be used.
        test: The clips that are held out.

    Raises:
        UserError: if there are none, or each class is answered with yes or no.
    """
    if corpus.answers_each_class:
        raise UserError(
            f"--self_training_rounds is for clips of one class each, and in --corpus {corpus.name} each class is "
            "answered with yes or no: leave it out"
        )
    others = corpus.unlabelled
    if test is not None:
        held_out = np.isin(others["source_id"][:], test["source_id"][:]) | (np.array(others["fold"][:]) == number)
        others = others.select(np.flatnonzero(~held_out))
    if not len(rest) + len(others):
        raise UserError(
            f"--self_training_rounds needs clips without a label, and --corpus {corpus.name} leaves none: add some "
            "that are not of the recordings held out, or leave it out"
        )
    return concatenate_datasets([rest, others])


def make_fold(settings: ClassificationSettings, number: int | None, corpus: LabelledCorpus, parent: Record,
              **facts) -> Fold:  # fmt: skip
    """Splits the corpus, and counts what of the held-out clips the weights have heard.

    Args:
        settings: Of the run.
        number: Of the fold that is held out; None: everything is trained on.
        corpus: Its clips.
        parent: The record of what the run starts from.
        **facts: See `begun`.

    Raises:
        UserError: if a class is in the held-out fold alone; if the weights were trained on held-out clips with their
            labels, unless --allow_label_leakage; or if there is nothing for --self_training_rounds to label.
    """
    output_dir = settings.output_dir / f"fold-{number}" if settings.has_several_folds else settings.output_dir
    train, test = (corpus.clips, None) if number is None else train_test_folds(corpus.clips, number)
    if test is not None:
        there, heard = (memberships(label_numbers(part), len(corpus.classes)).any(axis=0) for part in (test, train))
        if (there & ~heard).any():
            names = ", ".join(corpus.classes[label] for label in np.flatnonzero(there & ~heard))
            raise UserError(
                f"fold {number}: all clips of {names} are in this fold, and none is left to learn from. Put some into "
                "another, or train on everything with --fold none"
            )
    train, rest = few_labels(train, settings.labels_per_class, settings.seed)
    unlabelled = to_label(corpus, number, rest, test) if settings.self_training_rounds else None
    measured, given, heard = {"training_clips": len(train)}, corpus.clips, train
    if unlabelled is not None:
        measured["unlabelled_clips"] = facts["without_label"] = len(unlabelled)
        given, heard = (concatenate_datasets(pair) for pair in ([given, corpus.unlabelled], [train, unlabelled]))
    if test is not None:
        measured |= facts_of_held_out(settings, number, test, parent)
    record = begun(
        settings, "classification", parent, [(corpus.name, given)], ClipIdentities.of(heard), with_labels=True,
        clips={corpus.name: len(train)}, excluded_folds={} if number is None else {corpus.name: [number]},
        name=str(output_dir), also={"fold": number, "classes": corpus.classes}, **facts,
    )  # fmt: skip
    return Fold(number, train, test, unlabelled, record, measured | {"run": record.own.identity_digest}, output_dir)


def facts_of_held_out(settings: ClassificationSettings, number: int, test: Dataset, parent: Record) -> dict:
    """What the weights know of the held-out clips.

    Raises:
        UserError: if they were trained on some with their labels, unless --allow_label_leakage.
    """
    held_out = ClipIdentities.of(test)
    seen = parent.labels_seen(held_out)
    if seen and not settings.allow_label_leakage:
        stages = ", ".join(f"{count} by {name}" for name, count in seen.items())
        raise UserError(
            f"fold {number}: --model_name_or_path {settings.model_name_or_path} was trained on held-out clips with "
            f"their labels, of {len(test)} clips {stages}: the accuracy would be no measure. Start from a network "
            "that has not seen them, or add --allow_label_leakage, which the card will report"
        )
    return {
        "test_clips": len(test),
        # From scratch there was no pre-training; None also stands for one of which that is not known.
        "test_clips_heard_in_pretraining": parent.heard(held_out) if parent.stages else None,
        "test_labels_seen_before": seen,
    }


def check_layout(settings: ClassificationSettings) -> None:
    """Raises UserError if a run with several folds would go on as one with a single one or none, or vice versa."""
    output_dir = settings.output_dir
    folds = sorted(path for path in output_dir.glob("fold-*") if path.is_dir())
    single = [*output_dir.glob(f"{PREFIX}*"), *output_dir.glob(RESULTS_FILE)]
    if single if settings.has_several_folds else folds:
        found = (folds or single)[0].name
        raise UserError(
            f"--output_dir {output_dir} belongs to a different run: --fold is {settings.fold!r}, but {found} is "
            "there. Repeat its options, or start anew in another --output_dir"
        )
