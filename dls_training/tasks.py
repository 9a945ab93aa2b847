"""What differs between the train scripts' tasks in results, cards, commits and on the page: a class each.

A new task is a class here, with its name in `TASKS`, and a card's template.
"""

import math
from collections import Counter
from operator import itemgetter
from pathlib import Path
from typing import Protocol

from huggingface_hub import EvalResult

ACCURACY, CONFUSION, EMBEDDING = PICTURES = ("accuracy.png", "confusion_matrix.png", "embedding.png")


class Task(Protocol):
    """What is asked of every task. `results` are those of all_results.json, `trained` is a `TrainedFolder`."""

    name: str  # in results and records
    training: str  # what it did to the weights, in words
    pipeline_tag: str | None  # of the card's metadata; None: there is no pipeline for it
    tags: tuple[str, ...]  # likewise
    template: str  # of the card
    measured: str  # by its accuracies, in words
    architecture: str  # class of `modeling_dls` that its folder loads as
    score: str  # what the page's scores are, in words
    results: dict[str, type]  # what of its results others rely on, beside what every task has

    def title(self, results: dict) -> str:
        """Of the commit that publishes the run."""

    def accuracy_rows(self, results: dict) -> list[dict]:
        """One row per evaluation: {"epoch": number, what: accuracy}; epoch 0 is before any training."""

    def accuracy_curves(self, results: dict) -> dict[str, dict]:
        """The same, as `draw_curves` takes it."""

    def metadata(self, results: dict) -> dict:
        """Of the card, besides what every task has."""
        return {}

    def card_fields(self, results: dict) -> dict:
        """What `template` names, besides what every task has."""
        return {}

    def pretraining_folder(self, folder: Path, results: dict) -> Path | None:
        """Where the memory bank is that the page looks for neighbours in; None if there never was one."""

    def class_names(self, trained) -> list[str]:
        """What the page's scores are of; empty where there is nothing to name classes by."""

    def scores(self, trained, waveform, embeddings, embedding) -> tuple:
        """Scores as the train script evaluates, of a sound's windows (windows, classes) and of the whole (classes,).

        Args:
            trained: Has class names.
            waveform: (audio_channels, samples).
            embeddings: (windows, embedding_dim); None without a memory bank.
            embedding: (embedding_dim,), unit length, of the whole sound; likewise.
        """

    def introduction(self, trained, seconds: str) -> str:
        """What the page begins with; `seconds` says how much the network hears at a time."""


class Pretraining(Task):
    """Instance discrimination, by train_npid.py."""

    name = "npid"
    training = "Pre-trained on unlabelled audio by instance discrimination"
    pipeline_tag = None
    tags = ("instance-discrimination", "self-supervised")
    template = "pretraining.md"
    measured = "k-NN accuracy of the embedding"
    architecture = "ESResNetForInstanceDiscrimination"
    score = "Share of votes"
    results = {"clips": dict, "history": list, "knn": dict}  # noqa: RUF012

    def title(self, results):
        return f"ESResNet pre-trained on {', '.join(results['clips'])}, seed {results['seed']}"

    def accuracy_rows(self, results):
        return [{"epoch": e["epoch"], **e["knn_accuracy"]} for e in results["history"] if e.get("knn_accuracy")]

    def accuracy_curves(self, results):
        rows = self.accuracy_rows(results)
        curves = {name: [row[name] for row in rows] for name in rows[0]}
        epochs = curves.pop("epoch")
        return {name: {"epochs": epochs, "mean_accuracy_per_epoch": curve} for name, curve in curves.items()}

    def pretraining_folder(self, folder, results):
        return folder

    def class_names(self, trained):
        return trained.memory.classes if len(trained.memory.labelled) else []

    def scores(self, trained, waveform, embeddings, embedding):
        whole = trained.memory.votes(embedding[None], **trained.votes)[0]
        return trained.memory.votes(embeddings, **trained.votes), whole

    def introduction(self, trained, seconds):
        heard = ", ".join(f"{clips} clips of {name}" for name, clips in trained.results["clips"].items())
        voting = "so labels are the votes of the {k} nearest of the clips that it remembers (weighted k-NN)."
        how = voting.format(**trained.votes) if trained.class_names else "and knows no labels."
        return (
            f"# What does this sound like?\nA network pre-trained without labels on {heard}. It has no classifier, "
            f"{how} It hears {seconds} at a time."
        )


class Classification(Task):
    """Classes of a corpus with one fold, each in turn, or none held out, by train_classification.py."""

    name = "classification"
    training = "Trained with labels as a classifier"
    pipeline_tag = "audio-classification"
    tags = ()
    template = "classification.md"
    measured = "accuracy on the held-out fold"
    architecture = "ESResNetForAudioClassification"
    score = "Probability"
    results = {"corpus": str, "folds": dict}  # noqa: RUF012

    def title(self, results):
        return f"ESResNet trained on {results['corpus']}, seed {results['seed']}"

    def accuracy_rows(self, results):
        columns = {f"fold {fold}": with_start(found) for fold, found in results["folds"].items()}
        if len(columns) > 1:
            columns |= {what: with_start(results, f"{what}_") for what in ("mean", "std")}
        rows = zip(epochs(results), *columns.values(), strict=True)
        return [dict(zip(["epoch", *columns], row, strict=True)) for row in rows]

    def accuracy_curves(self, results):
        curves = {f"{what}_accuracy_per_epoch": with_start(results, f"{what}_") for what in ("mean", "std")}
        return {results["corpus"]: {"epochs": epochs(results), "folds": results["folds"], **curves}}

    def metadata(self, results):
        return {"model_name": f"esresnet-{results['corpus']}", **measured_metadata(results)}

    def card_fields(self, results):
        if not results["folds"]:
            return {}
        heard, leaks = [], Counter()
        for fold in results["folds"].values():
            heard.append(fold["test_clips_heard_in_pretraining"])
            leaks.update(fold["test_labels_seen_before"])
        recognised = [
            {"class": name, "recognised": share}
            for name, share in results.get("per_class_accuracy", {}).items()
            if share is not None
        ]
        return {
            "heard": None if None in heard else sum(heard),
            "leaks": leaks,
            "final": {what: with_start(results, f"{what}_")[-1] for what in ("mean", "std")},
            "interval": interval(results),
            "recognised": recognised,
            "confused": sorted((row for row in recognised if row["recognised"] < 1), key=itemgetter("recognised"))[:3],
            "answered": [
                {"class": name, "F1": f1, "average precision": results["average_precision"][name]}
                for name, f1 in results.get("f1", {}).items()
            ],
        }

    def pretraining_folder(self, folder, results):
        options = results["options"]
        return None if options["init"] == "scratch" else Path(options["model_name_or_path"])

    def class_names(self, trained):
        return list(trained.network.model.config.id2label.values())

    def scores(self, trained, waveform, embeddings, embedding):
        probabilities = trained.network.per_window(waveform)
        return probabilities, probabilities.mean(dim=0)

    def introduction(self, trained, seconds):
        return (
            f"# What is this sound?\nA classifier of {len(trained.class_names)} classes, fine-tuned on "
            f"{trained.results['corpus']}. It hears {seconds} at a time; of a longer sound, the mean over its windows "
            "counts."
        )


OF_EVERY_TASK = {"corpora": dict, "seed": int, "command": str, "options": dict}
TASKS = {task.name: task for task in (Pretraining(), Classification())}


def task_of(results: dict | None) -> Task | None:
    """The task whose results these are; None if they are no results of ours, or none at all."""
    results = results or {}
    task = TASKS.get(str(results.get("task")))
    expected = OF_EVERY_TASK | task.results if task else {}
    return task if all(isinstance(results.get(name), kind) for name, kind in expected.items()) else None


def with_start(results: dict, prefix: str = "") -> list[float]:
    """Accuracies after each epoch, of a fold or over folds; the closed-form classifier's first, if there is one."""
    start = f"{prefix}accuracy_at_start"
    return [*([results[start]] if start in results else []), *results[f"{prefix}accuracy_per_epoch"]]


def epochs(results: dict) -> list[int]:
    """Of the accuracies `with_start`; none where none were measured."""
    measured = len(results.get("mean_accuracy_per_epoch", []))
    return list(range(0 if "mean_accuracy_at_start" in results else 1, measured + 1))


def final_accuracy(fold_results: dict) -> float:
    """On the held-out fold after the last epoch; of the closed-form classifier, where no epoch was trained."""
    return with_start(fold_results)[-1]


def interval(results: dict) -> str | None:
    """Wilson's interval of 95 % for the accuracy, with the clips of all folds taken together, in words.

    None for yes-or-no answers, whose accuracy is one of clips with several answers each.
    """
    folds = results["folds"].values()
    clips = sum(fold["test_clips"] for fold in folds)
    if not clips or "per_class_accuracy" not in results:
        return None
    share = sum(final_accuracy(fold) * fold["test_clips"] for fold in folds) / clips
    square = 1.96**2
    middle = share + square / (2 * clips)
    reach = 1.96 * math.sqrt(share * (1 - share) / clips + square / (4 * clips**2))
    low, high = ((middle + sign * reach) / (1 + square / clips) for sign in (-1, 1))
    return f"{100 * low:.0f} % to {100 * high:.0f} %"


def measured_metadata(results: dict) -> dict:
    """What a card's metadata say was measured; nothing where nothing was."""
    found = evaluations(results)
    if not found:
        return {"eval_results": None}
    metrics = dict.fromkeys(each.metric_type for each in found if each.metric_type in ("accuracy", "f1"))
    return {"eval_results": found, "metrics": list(metrics)}


def evaluations(results: dict) -> list[EvalResult]:
    """Each fold's accuracy and, of several, their mean and standard deviation.

    Results are told apart by task, dataset, config and split alone: without the fold in one of these, the folds would
    overwrite one another.
    """
    corpus, folds = results["corpus"], results["folds"]
    title = results["corpora"][corpus].get("title", corpus)
    found = [(f"fold-{fold}", f"fold {fold} held out", "accuracy", final_accuracy(folds[fold])) for fold in folds]
    if len(folds) > 1:
        every = ("all-folds", f"{len(folds)} folds held out in turn")
        found.append((*every, "accuracy", with_start(results, "mean_")[-1]))
        found.append((*every, "accuracy_std", with_start(results, "std_")[-1]))
    for fold, measured in folds.items():
        if measured.get("macro_f1") is not None:
            found.append((f"fold-{fold}", f"fold {fold} held out", "f1", measured["macro_f1"]))
    return [
        EvalResult(
            task_type="audio-classification",
            dataset_type=corpus,
            dataset_name=f"{title}, {name}",
            dataset_config=config,
            dataset_split="test",  # of the config with this fold held out, as `datasets_scripts export` names them
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for config, name, metric, value in found
    ]
