"""The tables of a comparison: lists of rows, dicts with the same keys."""

import json
import math
import statistics
from collections import Counter
from dataclasses import fields

import numpy as np

from datasets_scripts.markdown import Markdown, code
from dls_training.settings import ClassificationSettings

from .outcomes import FIRST_EPOCHS, Runs, epoch_that_reaches, paired_difference, seconds_before
from .plan import SCRATCH, Plan


def of_setting(plan: Plan, name: str, arms: dict[str, Runs], cells: dict[str, dict]) -> dict:
    """What the report says of a fine-tuning setting: lists of rows with the same keys, by what they tell."""
    running = {arm: runs.running for arm, runs in arms.items() if runs.running_accuracy.size}
    return {
        "name": name,
        "options": plan.settings[name],
        "accuracy": accuracy_rows(arms),
        "baseline": baseline(plan, arms).label,
        "differences": difference_rows(plan, arms),
        "running_accuracy": accuracy_rows(running),
        "running_differences": difference_rows(plan, running) if running else [],
        "closed_form": closed_form_rows(arms),
        "seconds": seconds_rows(arms, plan.target, cells),
    }


def accuracy_rows(arms: dict[str, Runs]) -> list[dict]:
    """A line per arm: accuracy after the first epochs and the last; none where no epoch was trained."""
    last = min((runs.trained.shape[2] for runs in arms.values()), default=0)
    epochs = {f"epoch {epoch}": epoch for epoch in range(1, min(FIRST_EPOCHS + 1, last))}
    epochs[f"epoch {last} (last)"] = last
    return [
        {"arm": runs.label}
        | {name: mean_over_folds(runs.trained[:, :, epoch - 1]) for name, epoch in epochs.items()}
        | {"seeds × folds": f"{len(runs.seeds)} × {len(runs.folds)}", "held-out clips heard": heard(runs)}
        for runs in (arms.values() if last else [])
    ]


def heard(runs: Runs) -> str:
    """How many of all folds' held-out clips the pre-training has heard; every seed's has heard the same ones."""
    if not any(runs.origin.flat):
        return "nothing heard"
    return "unknown" if None in runs.heard[0] else f"{runs.heard[0].sum()} of {runs.clips[0].sum()}"


def baseline(plan: Plan, arms: dict[str, Runs]) -> Runs:
    """What the arms are compared with: training from scratch, or, where that is none of them, the first."""
    scratch = (runs for arm, runs in arms.items() if plan.arms[arm]["pretraining"] == SCRATCH)
    return next(scratch, next(iter(arms.values())))


def difference_rows(plan: Plan, arms: dict[str, Runs]) -> list[dict]:
    """A line per arm beside the baseline: the paired difference, and how long the baseline takes to come as far."""
    base = baseline(plan, arms)
    epoch = min((FIRST_EPOCHS, *(runs.trained.shape[2] for runs in arms.values())))
    rows = []
    for runs in [runs for runs in arms.values() if runs is not base]:
        mean, low, high, seeds, folds = paired_difference(runs, base)
        row = {
            "arm": runs.label,
            "difference": f"{mean:+.3f}" if seeds else "no seed in common",
            "95 % interval": f"{low:+.3f} to {high:+.3f}" if math.isfinite(low) else "too few seeds or folds",
            "seeds × folds": f"{seeds} × {folds}",
        }
        if epoch:
            reached = runs.trained[:, :, epoch - 1].mean()
            row |= {f"accuracy after epoch {epoch}": reached}
            row |= {f"which “{base.label}” reaches after epoch": epoch_that_reaches(base, reached)}
        rows.append(row)
    return rows


def closed_form_rows(arms: dict[str, Runs]) -> list[dict]:
    """A line per arm whose classifier was computed, not trained."""
    return [
        {
            "arm": runs.label,
            "accuracy": mean_over_folds(runs.accuracy[:, :, 0]),
            "seconds a fold": f"{np.median(runs.seconds[:, :, 0]):.1f}",
        }
        for runs in arms.values()
        if runs.has_start
    ]


def seconds_rows(arms: dict[str, Runs], target: float, cells: dict[str, dict]) -> list[dict]:
    """A line per arm: seconds to the target accuracy, medians over folds and seeds."""
    rows = []
    for runs in arms.values():
        own = runs.seconds_to(target)
        whole = own + [[seconds_before(name, cells) for name in names] for names in runs.origin]
        elsewhere = np.isnan(whole).any()
        whole = "trained elsewhere" if elsewhere else median_of_runs(whole)
        rows.append({"arm": runs.label, "fine-tuning": median_of_runs(own), "with its pre-training": whole})
    return rows


def pretraining_rows(results: list[dict]) -> list[dict]:
    """A line per pre-training and labelled corpus: k-NN accuracy of the embedding, over seeds and folds."""
    rows = []
    for name, runs in grouped(results, "pretrain", "pretraining").items():
        left_out = sum(map(len, runs[0]["excluded_folds"].values()))
        clips, epochs = [sum(run["clips"].values()) for run in runs], [run["epochs"][-1] for run in runs]
        for corpus in runs[0]["knn_accuracy"] or [None]:
            knn = [run["knn_accuracy"][corpus] for run in runs if corpus]
            rows.append(
                {
                    "pre-training": name,
                    "k-NN on": corpus or "no labels",
                    "before": plus_minus([accuracies[0] for accuracies in knn]),
                    "after": plus_minus([accuracies[-1] for accuracies in knn]),
                    "runs": len(runs),
                    "clips": plus_minus(clips, ".0f"),
                    "epochs": plus_minus(epochs, ".0f"),
                    "clips × epochs": plus_minus(np.multiply(clips, epochs).tolist(), ".0f"),
                    "minutes": plus_minus([run["wall_seconds"] / 60 for run in runs], ".1f"),
                    "folds": f"{left_out} left out" if left_out else "all heard (transductive)",
                }
            )
    return rows


def search_rows(corpus: str, results: list[dict]) -> list[dict]:
    """A line per combination that was tried: k-NN accuracy on the held-out fold, and the difference to the base."""
    tried = {}
    for result in (result for result in results if result["kind"] == "search"):
        change = ", ".join(f"{option} {value}" for option, value in result["change"].items())
        tried.setdefault(change, {})[result["seed"]] = result
    knn = {name: {seed: run["knn_accuracy"][corpus] for seed, run in runs.items()} for name, runs in tried.items()}
    reached = {name: np.mean([accuracies[-1] for accuracies in by_seed.values()]) for name, by_seed in knn.items()}
    rows = []
    for change, runs in tried.items():
        common = [seed for seed in runs if change and seed in knn.get("", {})]
        difference = np.mean([knn[change][seed][-1] - knn[""][seed][-1] for seed in common]) if common else None
        after = plus_minus([accuracies[-1] for accuracies in knn[change].values()])
        rows.append(
            {
                "change": code(change) if change else "none (the base)",
                "k-NN before": plus_minus([accuracies[0] for accuracies in knn[change].values()]),
                "k-NN after": Markdown(f"**{after}**") if reached[change] == max(reached.values()) else after,
                "difference to the base": f"{difference:+.3f}" if common else "",
                "seeds": len(runs),
                "minutes": plus_minus([run["wall_seconds"] / 60 for run in runs.values()], ".1f"),
            }
        )
    return rows


def voting(results: list[dict]) -> str:
    """How neighbours vote in the k-NN accuracies, in words."""
    ways = [(result["knn"]["k"], result["knn"]["sigma"]) for result in results if "knn" in result]
    return " or ".join(
        f"the {k} nearest clips vote, each with exp(similarity / {sigma})" for k, sigma in dict.fromkeys(ways)
    )


def plus_minus(values: list[float], digits: str = ".3f") -> str:
    """Mean and, where values differ, their standard deviation; nothing of nothing."""
    if not values:
        return ""
    mean, spread = np.mean(values), np.std(values)
    return f"{mean:{digits}}" + (f" ± {spread:{digits}}" if spread > 0 else "")


def mean_over_folds(values: np.ndarray) -> str:
    """Mean, and standard deviation over folds of the mean over seeds.

    Args:
        values: (seeds, folds).
    """
    by_fold = values.mean(axis=0)
    return f"{by_fold.mean():.3f}" + (f" ± {by_fold.std():.3f}" if len(by_fold) > 1 else "")


def median_of_runs(seconds: np.ndarray) -> str:
    """The median, where more than half of the runs got there, and how many did."""
    median = statistics.median(seconds.flat)
    reached = f"{median:.0f} s" if math.isfinite(median) else "not reached"
    return f"{reached} ({np.isfinite(seconds).sum()} of {seconds.size})"


def grouped(results: list[dict], kind: str, by: str) -> dict[str, list[dict]]:
    """Results of a kind, by a fact."""
    groups = {}
    for result in results:
        if result["kind"] == kind:
            groups.setdefault(result[by], []).append(result)
    return groups


def machines(results: list[dict]) -> list[dict]:
    """What the cells ran on, and how many ran there."""
    names = ("hardware", "threads", "precision", "commit", "versions")
    count = Counter(tuple(result.get(name, "") for name in names) for result in results if "hardware" in result)
    return [{"cells": number, **dict(zip(names, values, strict=True))} for values, number in count.items()]


def differences_in_circumstances(results: list[dict]) -> list[str]:
    """What differs between cells that are set side by side, beside what the plan says."""
    by_setting = grouped(results, "finetune", "setting")
    networks = [result["network"] for runs in by_setting.values() for result in runs]
    problems = [f"network or spectrogram: {difference}" for difference in differing(networks)]
    # A run from before there was an option had its default.
    usual = {field.name: field.metadata["default"] for field in fields(ClassificationSettings) if field.metadata}
    for setting, runs in by_setting.items():
        options = [run["options"] for run in runs]
        known = {name: usual.get(name) for own in options for name in own}
        problems += [f"{setting}: --{difference}" for difference in differing([known | own for own in options])]
    return problems


def differing(facts: list[dict]) -> list[str]:
    """The names whose values are not the same everywhere, and the values."""
    values = {
        name: sorted({json.dumps(found.get(name)) for found in facts})
        for name in sorted({name for found in facts for name in found})
    }
    return [f"{name} is {' or '.join(different)}" for name, different in values.items() if len(different) > 1]
