"""Arms side by side: what the raw numbers of a plan's cells say together, and how sure it is."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import t as student_t

from .plan import IMAGENET, Plan

# Fewer seeds or folds say too little of how they differ for an interval that covers what it says.
FEWEST_FOR_INTERVAL = 3
# Differences are averaged over the epochs that pre-training is meant to save.
FIRST_EPOCHS = 3
# More lines in one picture cannot be told apart.
MOST_LINES = 10


@dataclass
class Runs:
    """An arm's runs in one fine-tuning setting.

    Attributes:
        label: Of the arm.
        seeds: Those of which every fold is there.
        folds: Held out in turn.
        epochs: (epochs,), after which was measured; 0 is the closed-form classifier, before any step.
        accuracy: (seeds, folds, epochs), 0..1
        running_accuracy: (seeds, folds, epochs from 1), of the same weights with running batch-norm statistics; empty
            where these were scored alone.
        seconds: (seeds, folds, epochs), since a fold's fine-tuning began.
        clips: (seeds, folds), how many were held out.
        heard: (seeds, folds), how many of them pre-training had heard; None where that is not known.
        origin: (seeds, folds), the cell whose weights a run started from; None from scratch.
    """

    label: str
    seeds: list[int]
    folds: list[int]
    epochs: np.ndarray
    accuracy: np.ndarray
    running_accuracy: np.ndarray
    seconds: np.ndarray
    clips: np.ndarray
    heard: np.ndarray
    origin: np.ndarray

    @property
    def has_start(self) -> bool:
        """Whether the closed-form classifier was scored."""
        return self.epochs[0] == 0

    @property
    def trained(self) -> np.ndarray:
        """(seeds, folds, epochs): accuracy after epoch 1, 2, …"""
        return self.accuracy[:, :, self.epochs > 0]

    @property
    def running(self) -> "Runs":
        """The same weights, scored with running batch-norm statistics; there are none of before training."""
        return replace(self, epochs=self.epochs[self.epochs > 0], accuracy=self.running_accuracy)

    def early(self, seeds: list[int]) -> np.ndarray:
        """(seeds, folds): mean of the first epochs; of the closed-form classifier, where no epoch was trained."""
        accuracy = self.trained if self.trained.size else self.accuracy
        return accuracy[[self.seeds.index(seed) for seed in seeds], :, :FIRST_EPOCHS].mean(axis=2)

    def seconds_to(self, target: float) -> np.ndarray:
        """(seeds, folds): until the accuracy was first seen to be at least `target`; infinite if it never was."""
        return np.where(self.accuracy >= target, self.seconds, math.inf).min(axis=2)

    def curve(self) -> dict:
        """What `draw_curves` takes: means over folds and seeds, and how the means over seeds differ between folds."""
        by_fold = self.accuracy.mean(axis=0)
        mean, spread = by_fold.mean(axis=0), by_fold.std(axis=0)
        return {
            "epochs": self.epochs, "mean_accuracy_per_epoch": mean, "std_accuracy_per_epoch": spread,
            "folds": self.folds,
        }  # fmt: skip


def gather(plan: Plan, results: list[dict]) -> dict[str, dict[str, Runs]]:
    """{setting: {arm: its runs}}, as far as a seed's folds are complete.

    Args:
        plan: Of the results.
        results: Of its finished cells, see results.py.
    """
    settings = {name: {} for name in plan.settings}
    for setting, arms in settings.items():
        found = [result for result in results if result["kind"] == "finetune" and result["setting"] == setting]
        folds = sorted({fold for result in found for fold in result["folds"]})
        for arm, declared in plan.arms.items():
            runs = runs_of(declared["label"], folds, [result for result in found if result["arm"] == arm])
            if runs:
                arms[arm] = runs
    return settings


def runs_of(label: str, folds: list[int], results: list[dict]) -> Runs | None:
    """What one arm's cells of one setting say, seeds with a missing fold left out; None without a complete seed."""
    place = {(result["seed"], fold): (result, i) for result in results for i, fold in enumerate(result["folds"])}
    seeds = sorted({seed for seed, _ in place if all((seed, fold) in place for fold in folds)})
    if not seeds:
        return None
    runs = [[place[seed, fold] for fold in folds] for seed in seeds]
    cells = [result for row in runs for result, _ in row]
    first, last = max(cell["epochs"][0] for cell in cells), min(cell["epochs"][-1] for cell in cells)

    def between(values: list, epochs: list[int]) -> list:
        return values[epochs.index(first) : epochs.index(last) + 1]

    def of_runs(measure: Callable[[dict, int], object], kind: type | None = None) -> np.ndarray:
        return np.array([[measure(cell, i) for cell, i in row] for row in runs], kind)

    return Runs(
        label, seeds, folds, np.arange(first, last + 1),
        of_runs(lambda cell, i: between(cell["accuracy"][i], cell["epochs"])),
        of_runs(lambda cell, i: cell["running_accuracy"][i][:last] if "running_accuracy" in cell else []),
        of_runs(lambda cell, i: between(cell["seconds"][i], cell["epochs"])),
        of_runs(lambda cell, i: cell["test_clips"][i]),
        of_runs(lambda cell, i: cell["test_clips_heard_in_pretraining"][i], object),
        of_runs(lambda cell, i: cell.get("starts_from"), object),
    )  # fmt: skip


def curves(by_setting: dict[str, dict[str, Runs]]) -> dict[str, dict[str, dict]]:
    """{setting: {arm's label: its curve}}, where a picture shows more than the tables: several arms and points."""
    return {
        name: {runs.label: runs.curve() for runs in arms.values()}
        for name, arms in by_setting.items()
        if 1 < len(arms) <= MOST_LINES and any(len(runs.epochs) > 1 for runs in arms.values())
    }


def paired_difference(one: Runs, other: Runs) -> tuple[float, float, float, int, int]:
    """The mean difference of two arms' accuracy over the first epochs, run by run, and how sure it is.

    Returns:
        The difference, both ends of its 95 % interval (NaN where there are too few seeds or folds), seeds, folds.
    """
    seeds = [seed for seed in one.seeds if seed in other.seeds]
    if not seeds:
        return math.nan, math.nan, math.nan, 0, len(one.folds)
    difference = one.early(seeds) - other.early(seeds)
    enough = min(difference.shape) >= FEWEST_FOR_INTERVAL
    return difference.mean(), *(interval(difference) if enough else (math.nan, math.nan)), *difference.shape


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of (seeds, folds), which seeds and folds share in: all runs of a seed have its
    pre-training in common, and all of a fold its test clips.

    Two-way analysis of variance with both effects random: the mean's variance is estimated by the sum of the mean
    squares of seeds and of folds (rather too large: the residual's would have to be taken off), and Student's factor
    is the mean of both their factors, weighted by these squares (Cochran's approximation). What it covers is simulated
    in tests/test_reproduce.py: 95 % where seeds or folds decide alone, more where they do not.
    """
    seeds, folds = values.shape
    squares = folds * values.mean(axis=1).var(ddof=1), seeds * values.mean(axis=0).var(ddof=1)
    if not sum(squares):
        return values.mean(), values.mean()
    factor = np.average(student_t.ppf(0.975, (seeds - 1, folds - 1)), weights=squares)
    half = factor * math.sqrt(sum(squares) / values.size)
    return values.mean() - half, values.mean() + half


def epoch_that_reaches(runs: Runs, accuracy: float) -> str:
    """The first epoch after which the mean over folds and seeds is at least `accuracy`."""
    means = runs.trained.mean(axis=(0, 1))
    reached = np.flatnonzero(means >= accuracy)
    return str(reached[0] + 1) if len(reached) else f"not within {len(means)}"


def seconds_before(name: str | None, cells: dict[str, dict]) -> float:
    """Wall seconds of all pre-training that led to a cell's weights; NaN where some of it happened elsewhere."""
    if name is None:
        return 0.0
    if name == IMAGENET or name not in cells:
        return math.nan
    return cells[name]["wall_seconds"] + seconds_before(cells[name].get("starts_from"), cells)
