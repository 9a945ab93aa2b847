"""Arms side by side: what the raw numbers of a plan's cells say together, and how sure it is."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .plan import IMAGENET, Plan

RESAMPLES = 10_000
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

    The interval is the 2.5th to the 97.5th percentile of a bootstrap that draws folds and, independently, seeds, with
    replacement: all runs of a drawn seed share its pre-training, and all of a drawn fold its test clips.

    Returns:
        The difference, both ends of the interval, seeds, folds. The ends are NaN where there is but one run.
    """
    seeds = [seed for seed in one.seeds if seed in other.seeds]
    if not seeds:
        return math.nan, math.nan, math.nan, 0, len(one.folds)
    difference = one.early(seeds) - other.early(seeds)
    low, high = crossed_bootstrap(difference) if difference.size > 1 else (math.nan, math.nan)
    return difference.mean(), low, high, *difference.shape


def crossed_bootstrap(values: np.ndarray) -> tuple[float, float]:
    """Percentiles 2.5 and 97.5 of the mean of (seeds, folds), both drawn with replacement, always the same draws."""
    random, (seeds, folds) = np.random.default_rng(0), values.shape
    seed_draws = random.integers(seeds, size=(RESAMPLES, seeds, 1))
    fold_draws = random.integers(folds, size=(RESAMPLES, 1, folds))
    low, high = np.percentile(values[seed_draws, fold_draws].mean(axis=(1, 2)), [2.5, 97.5])
    return low, high


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
