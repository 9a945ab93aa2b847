"""Arms side by side: what the raw numbers of a plan's cells say together, and how sure it is."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .plan import IMAGENET, Plan

EPOCH_COLUMNS = ("cell", "arm", "setting", "seed", "fold", "epoch", "accuracy", "seconds")
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
        by_run: (seed, fold) -> what train_classification.py says of a fold.
        origin: (seed, fold) -> name of the cell whose weights the run started from; None from scratch.
    """

    label: str
    seeds: list[int]
    folds: list[int]
    by_run: dict[tuple[int, int], dict]
    origin: dict[tuple[int, int], str | None]

    def values(self, measure: Callable[[dict], object]) -> np.ndarray:
        """(seeds, folds, …) of something that is measured in every run."""
        return np.array([[measure(self.by_run[seed, fold]) for fold in self.folds] for seed in self.seeds])

    @property
    def accuracy(self) -> np.ndarray:
        """(seeds, folds, epochs), 0..1"""
        epochs = min(len(run["accuracy_per_epoch"]) for run in self.by_run.values())
        return self.values(lambda run: run["accuracy_per_epoch"][:epochs])

    @property
    def has_start(self) -> bool:
        """Whether the closed-form head was scored before any step."""
        return all("accuracy_at_start" in run for run in self.by_run.values())


def gather(plan: Plan, results: list[dict]) -> dict[str, dict[str, Runs]]:
    """{setting: {arm: its runs}}, as far as a seed's folds are complete.

    Args:
        plan: Of the results.
        results: Of its finished cells, as `CellStore` keeps them.
    """
    settings = {}
    for setting in plan.settings:
        found = [r for r in results if r["kind"] == "finetune" and r["setting"] == setting]
        folds = sorted({int(fold) for result in found for fold in result["folds"]})
        arms = {
            arm: runs_of(plan.arms[arm]["label"], folds, [r for r in found if r["arm"] == arm]) for arm in plan.arms
        }
        settings[setting] = {arm: runs for arm, runs in arms.items() if runs.seeds}
    return settings


def runs_of(label: str, folds: list[int], results: list[dict]) -> Runs:
    """What one arm's cells of one setting say, seeds with a missing fold left out."""
    by_run = {(r["seed"], int(fold)): run for r in results for fold, run in r["folds"].items()}
    origin = {(r["seed"], int(fold)): r["starts_from"] for r in results for fold in r["folds"]}
    seeds = sorted({seed for seed, _ in by_run if all((seed, fold) in by_run for fold in folds)})
    complete = {key: run for key, run in by_run.items() if key[0] in seeds}
    return Runs(label, seeds, folds, complete, origin)


def curve(runs: Runs) -> dict:
    """What `draw_curves` takes: mean over folds and seeds, standard deviation over folds of the mean over seeds."""
    by_fold = runs.accuracy.mean(axis=0)
    if runs.has_start:
        by_fold = np.column_stack([runs.values(lambda run: run["accuracy_at_start"]).mean(axis=0), by_fold])
    return {
        "epochs": np.arange(by_fold.shape[1]) + (0 if runs.has_start else 1),
        "mean_accuracy_per_epoch": by_fold.mean(axis=0),
        "std_accuracy_per_epoch": by_fold.std(axis=0),
        "folds": runs.folds,
    }


def curves(by_setting: dict[str, dict[str, Runs]]) -> dict[str, dict[str, dict]]:
    """{setting: {arm's label: see `curve`}}, where a picture shows more than the tables: several arms and points."""
    panels = {name: {runs.label: curve(runs) for runs in arms.values()} for name, arms in by_setting.items()}
    return {
        name: arms
        for name, arms in panels.items()
        if 1 < len(arms) <= MOST_LINES and any(len(found["mean_accuracy_per_epoch"]) > 1 for found in arms.values())
    }


def paired_difference(one: Runs, other: Runs) -> tuple[float, float, float, int, int]:
    """The mean difference of two arms' accuracy over the first epochs, run by run, and how sure it is.

    The interval is the 2.5th to the 97.5th percentile of a bootstrap that draws folds and, independently, seeds, with
    replacement: all runs of a drawn seed share its pre-training, and all of a drawn fold its test clips.

    Returns:
        The difference, both ends of the interval, seeds, folds. The ends are NaN where there is but one run.
    """
    seeds = [seed for seed in one.seeds if seed in other.seeds]
    means = [
        np.array([[early_accuracy(runs.by_run[seed, fold]) for fold in one.folds] for seed in seeds])
        for runs in (one, other)
    ]
    if not seeds:
        return math.nan, math.nan, math.nan, 0, len(one.folds)
    difference = means[0] - means[1]
    low, high = crossed_bootstrap(difference) if difference.size > 1 else (math.nan, math.nan)
    return difference.mean(), low, high, *difference.shape


def early_accuracy(run: dict) -> float:
    """Mean of the first epochs; of the closed-form classifier, where no epoch was trained."""
    return np.mean(run["accuracy_per_epoch"][:FIRST_EPOCHS] or [run["accuracy_at_start"]])


def crossed_bootstrap(values: np.ndarray) -> tuple[float, float]:
    """Percentiles 2.5 and 97.5 of the mean of (seeds, folds), both drawn with replacement, always the same draws."""
    random, (seeds, folds) = np.random.default_rng(0), values.shape
    seed_draws = random.integers(seeds, size=(RESAMPLES, seeds, 1))
    fold_draws = random.integers(folds, size=(RESAMPLES, 1, folds))
    low, high = np.percentile(values[seed_draws, fold_draws].mean(axis=(1, 2)), [2.5, 97.5])
    return low, high


def epoch_that_reaches(runs: Runs, accuracy: float) -> str:
    """The first epoch after which the mean over folds and seeds is at least `accuracy`."""
    means = runs.accuracy.mean(axis=(0, 1))
    reached = np.flatnonzero(means >= accuracy)
    return str(reached[0] + 1) if len(reached) else f"not within {len(means)}"


def seconds_to(run: dict, target: float) -> float:
    """Seconds of fine-tuning until a fold's accuracy was first seen to be at least `target`; infinite if never."""
    if run.get("accuracy_at_start", 0.0) >= target:
        return run["seconds_at_start"]
    epochs = zip(run["accuracy_per_epoch"], run["seconds_per_epoch"], strict=True)
    return next((seconds for accuracy, seconds in epochs if accuracy >= target), math.inf)


def seconds_before(name: str | None, cells: dict[str, dict]) -> float | None:
    """Wall seconds of all pre-training that led to a cell's weights; None where some of it happened elsewhere."""
    if name is None:
        return 0.0
    if name == IMAGENET or name not in cells:
        return None
    earlier = seconds_before(cells[name]["starts_from"], cells)
    return None if earlier is None else earlier + cells[name]["wall_seconds"]


def epoch_lines(results: list[dict]) -> list[dict]:
    """Every epoch of every fold; epoch 0 is the closed-form head."""
    lines = []
    for result in (result for result in results if result["kind"] == "finetune"):
        told = {"cell": result["cell"]} | {name: result[name] for name in ("arm", "setting", "seed")}
        for fold, run in result["folds"].items():
            if "accuracy_at_start" in run:
                at_start = {"epoch": 0, "accuracy": run["accuracy_at_start"], "seconds": run["seconds_at_start"]}
                lines.append(told | {"fold": int(fold)} | at_start)
            for i, accuracy in enumerate(run["accuracy_per_epoch"]):
                measured = {"epoch": i + 1, "accuracy": accuracy, "seconds": run["seconds_per_epoch"][i]}
                lines.append(told | {"fold": int(fold)} | measured)
    return lines
