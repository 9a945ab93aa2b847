"""The tables of a comparison: lists of rows, dicts with the same keys."""

import json
import math
import statistics

import numpy as np

from .outcomes import (
    FIRST_EPOCHS,
    RESAMPLES,
    Runs,
    epoch_that_reaches,
    paired_difference,
    seconds_before,
    seconds_to,
)
from .plan import SCRATCH, Plan

# A script's options that may differ between the arms, seeds and machines of one setting.
DIFFERENT_OPTIONS = {
    "corpus", "model_name_or_path", "preset", "init", "fold", "seed", "output_dir", "resume_from_checkpoint",
    "dataloader_num_workers", "report_to", "cache_gigabytes", "push_to_hub", "hub_model_id", "hub_private_repo",
}  # fmt: skip


def tables(plan: Plan, by_setting: dict[str, dict[str, Runs]], results: list[dict]) -> dict:
    """Everything in the report that is measured: lists of rows with the same keys, by what they tell."""
    cells = {result["cell"]: result for result in results}
    settings = [
        {
            "name": name,
            "options": plan.settings[name],
            "accuracy": accuracy_rows(arms),
            "baseline": baseline(plan, arms).label,
            "differences": difference_rows(plan, arms),
            "closed_form": closed_form_rows(arms),
            "seconds": seconds_rows(arms, plan.target, cells),
        }
        for name, arms in by_setting.items()
        if arms
    ]
    return {
        "settings": settings,
        "pretraining": pretraining_rows(results),
        "search": search_rows(plan, results),
        "voting": voting(results),
        "search_fold": next((result["fold"] for result in results if result["kind"] == "search"), None),
        "machines": machines(results),
        "circumstances": differences_in_circumstances(results),
        "first_epochs": FIRST_EPOCHS,
        "resamples": RESAMPLES,
    }


def accuracy_rows(arms: dict[str, Runs]) -> list[dict]:
    """A line per arm: accuracy after the first epochs and the last; none where no epoch was trained."""
    last = min((runs.accuracy.shape[2] for runs in arms.values()), default=0)
    epochs = {f"epoch {epoch}": epoch for epoch in range(1, min(FIRST_EPOCHS + 1, last))}
    epochs[f"epoch {last} (last)"] = last
    return [
        {"arm": runs.label}
        | {name: mean_and_spread(runs.accuracy[:, :, epoch - 1]) for name, epoch in epochs.items()}
        | {"seeds × folds": f"{len(runs.seeds)} × {len(runs.folds)}", "held-out clips heard": heard(runs)}
        for runs in (arms.values() if last else [])
    ]


def heard(runs: Runs) -> str:
    """How many of all folds' held-out clips the pre-training has heard; every seed's has heard the same ones."""
    found = [runs.by_run[runs.seeds[0], fold] for fold in runs.folds]
    if not any(runs.origin.values()):
        return "nothing heard"
    counts = [run["test_clips_heard_in_pretraining"] for run in found]
    clips = sum(run["test_clips"] for run in found)
    return "unknown" if None in counts else f"{sum(counts)} of {clips}"


def baseline(plan: Plan, arms: dict[str, Runs]) -> Runs:
    """What the arms are compared with: training from scratch, or, where that is none of them, the first."""
    scratch = (runs for arm, runs in arms.items() if plan.arms[arm]["pretraining"] == SCRATCH)
    return next(scratch, next(iter(arms.values())))


def difference_rows(plan: Plan, arms: dict[str, Runs]) -> list[dict]:
    """A line per arm beside the baseline: the paired difference, and how long the baseline takes to come as far."""
    base = baseline(plan, arms)
    epoch = min((FIRST_EPOCHS, *(runs.accuracy.shape[2] for runs in arms.values())))
    rows = []
    for runs in [runs for runs in arms.values() if runs is not base]:
        mean, low, high, seeds, folds = paired_difference(runs, base)
        row = {
            "arm": runs.label,
            "difference": f"{mean:+.3f}" if seeds else "no seed in common",
            "95 % interval": f"{low:+.3f} to {high:+.3f}" if math.isfinite(low) else "one run only",
            "seeds × folds": f"{seeds} × {folds}",
        }
        if epoch:
            reached = runs.accuracy[:, :, epoch - 1].mean()
            row |= {f"accuracy after epoch {epoch}": reached}
            row |= {f"which “{base.label}” reaches after epoch": epoch_that_reaches(base, reached)}
        rows.append(row)
    return rows


def closed_form_rows(arms: dict[str, Runs]) -> list[dict]:
    """A line per arm whose classifier was computed, not trained."""
    return [
        {
            "arm": runs.label,
            "accuracy": mean_and_spread(runs.values(lambda run: run["accuracy_at_start"])),
            "seconds a fold": f"{np.median(runs.values(lambda run: run['seconds_at_start'])):.1f}",
        }
        for runs in arms.values()
        if runs.has_start
    ]


def seconds_rows(arms: dict[str, Runs], target: float, cells: dict[str, dict]) -> list[dict]:
    """A line per arm: seconds to the target accuracy, medians over folds and seeds."""
    rows = []
    for runs in arms.values():
        keys = [(seed, fold) for seed in runs.seeds for fold in runs.folds]
        own = [seconds_to(runs.by_run[key], target) for key in keys]
        before = [seconds_before(runs.origin[key], cells) for key in keys]
        whole = "trained elsewhere"
        if None not in before:
            whole = median_of_runs([a + b for a, b in zip(own, before, strict=True)])
        rows.append({"arm": runs.label, "fine-tuning": median_of_runs(own), "with its pre-training": whole})
    return rows


def pretraining_rows(results: list[dict]) -> list[dict]:
    """A line per pre-training and labelled corpus: k-NN accuracy of the embedding, over seeds and folds."""
    rows = []
    found = [result for result in results if result["kind"] == "pretrain"]
    for name in dict.fromkeys(result["pretraining"] for result in found):
        runs = [result for result in found if result["pretraining"] == name]
        left_out = sum(map(len, runs[0]["excluded_folds"].values()))
        for corpus in runs[0]["history"][0]["knn_accuracy"] or [None]:
            pairs = [knn_before_and_after(run, corpus) for run in runs if corpus]
            rows.append(
                {
                    "pre-training": name,
                    "k-NN on": corpus or "no labels",
                    "before": plus_minus([before for before, _ in pairs]),
                    "after": plus_minus([after for _, after in pairs]),
                    "runs": len(runs),
                    "clips": plus_minus([sum(run["clips"].values()) for run in runs], ".0f"),
                    "epochs": plus_minus([run["history"][-1]["epoch"] for run in runs], ".0f"),
                    "minutes": plus_minus([run["wall_seconds"] / 60 for run in runs], ".1f"),
                    "folds": f"{left_out} left out" if left_out else "all heard (transductive)",
                }
            )
    return rows


def search_rows(plan: Plan, results: list[dict]) -> list[dict]:
    """A line per combination that was tried: k-NN accuracy on the held-out fold, and the difference to the base."""
    tried = {}
    for result in (result for result in results if result["kind"] == "search"):
        said = ", ".join(f"{option} {value}" for option, value in result["change"].items())
        tried.setdefault(said, {})[result["seed"]] = result
    knn = {
        said: {seed: knn_before_and_after(run, plan.corpus) for seed, run in runs.items()}
        for said, runs in tried.items()
    }
    best = max((mean_after(pairs) for pairs in knn.values()), default=None)
    rows = []
    for said, runs in tried.items():
        pairs, base = knn[said], knn.get("", {})
        differences = [after - base[seed][1] for seed, (_, after) in pairs.items() if seed in base and said]
        after = plus_minus([after for _, after in pairs.values()])
        rows.append(
            {
                "change": f"`{said}`" if said else "none (the base)",
                "k-NN before": plus_minus([before for before, _ in pairs.values()]),
                "k-NN after": f"**{after}**" if mean_after(pairs) == best else after,
                "difference to the base": f"{np.mean(differences):+.3f}" if differences else "",
                "seeds": len(runs),
                "minutes": plus_minus([run["wall_seconds"] / 60 for run in runs.values()], ".1f"),
            }
        )
    return rows


def mean_after(pairs: dict[int, tuple[float, float]]) -> float:
    return np.mean([after for _, after in pairs.values()])


def voting(results: list[dict]) -> str:
    """How neighbours vote in the k-NN accuracies, in words."""
    words = []
    for result in (result for result in results if result["kind"] in ("pretrain", "search")):
        knn = result.get("knn") or {"k": result["options"].get("knn_k", 5), "sigma": "the run's temperature"}
        words.append(f"the {knn['k']} nearest clips vote, each with exp(similarity / {knn['sigma']})")
    return " or ".join(dict.fromkeys(words))


def knn_before_and_after(result: dict, corpus: str) -> tuple[float, float]:
    accuracies = [entry["knn_accuracy"][corpus] for entry in result["history"] if entry.get("knn_accuracy")]
    return accuracies[0], accuracies[-1]


def plus_minus(values, digits: str = ".3f") -> str:
    """Mean and, where values differ, their standard deviation; nothing of nothing."""
    if not len(values):
        return ""
    mean, spread = np.mean(values), np.std(values)
    return f"{mean:{digits}}" + (f" ± {spread:{digits}}" if spread > 0 else "")


def mean_and_spread(values: np.ndarray) -> str:
    """Mean, and standard deviation over folds of the mean over seeds.

    Args:
        values: (seeds, folds).
    """
    by_fold = values.mean(axis=0)
    return f"{by_fold.mean():.3f}" + (f" ± {by_fold.std():.3f}" if len(by_fold) > 1 else "")


def median_of_runs(seconds: list[float]) -> str:
    """The median, where more than half of the runs got there, and how many did."""
    reached = sum(map(math.isfinite, seconds))
    median = statistics.median(seconds)
    return f"{f'{median:.0f} s' if math.isfinite(median) else 'not reached'} ({reached} of {len(seconds)})"


def machines(results: list[dict]) -> list[dict]:
    """What the cells ran on, and how many ran there."""
    count = {}
    for result in (result for result in results if "environment" in result):
        environment = result["environment"]
        versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
        told = {name: environment[name] for name in ("hardware", "threads", "precision", "commit")}
        line = tuple((told | {"versions": versions}).items())
        count[line] = count.get(line, 0) + 1
    return [{"cells": number} | dict(line) for line, number in count.items()]


def differences_in_circumstances(results: list[dict]) -> list[str]:
    """What differs between cells that are set side by side, beside what the plan says."""
    found = [result for result in results if result["kind"] == "finetune"]
    problems = []
    for name in sorted({name for result in found for name in result["network"]}):
        values = {json.dumps(result["network"].get(name)) for result in found}
        if len(values) > 1:
            problems.append(f"network or spectrogram: {name} is {' or '.join(sorted(values))}")
    for setting in dict.fromkeys(result["setting"] for result in found):
        runs = [result["options"] for result in found if result["setting"] == setting]
        for name in sorted({name for options in runs for name in options} - DIFFERENT_OPTIONS):
            values = {json.dumps(options.get(name)) for options in runs}
            if len(values) > 1:
                problems.append(f"{setting}: --{name} is {' or '.join(sorted(values))}")
    return problems
