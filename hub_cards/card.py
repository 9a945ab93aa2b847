"""A run's own files -> its model card. A number that is not in them is not in the card."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from datasets_scripts.errors import UserError
from dls_training.record import RECORD_FILE, Record

from .sources import LICENCE_OF_THE_CODE, licence, source_rows, training_data

TEMPLATES = Path(__file__).parent / "templates"
ACCURACY, CONFUSION, EMBEDDING = "accuracy.png", "confusion_matrix.png", "embedding.png"


def write_card(folder: Path) -> None:
    """Writes README.md and its pictures beside a run's results, record, `config.json` and `preprocessor_config.json`.

    `accuracy.png` and `confusion_matrix.png` are drawn from the results, as far as there is something to draw;
    `embedding.png` is shown if it is there.

    Args:
        folder: Written by `train_npid.py` or `train_classification.py`.

    Raises:
        OSError: if one of the files is absent.
        UserError: if the record is absent or damaged.
    """
    results, config, signal = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("all_results.json", "config.json", "preprocessor_config.json")
    )
    record = Record.read(folder, needs_weights=False)
    if record is None:
        raise UserError(f"{folder} has no {RECORD_FILE}: an earlier version wrote it, and its own card stands")
    draw_pictures(folder, results)
    describe = {"npid": pretraining_card, "classification": classification_card}[results["task"]]
    data, template, fields = describe(results, config, record)
    sources = training_data(record)
    fields |= {
        "results": results,
        "run": record.own.facts,
        "earlier": [stage.facts for stage in record.stages[:-1]],
        "signal": signal,
        "initial_weights": config.get("initial_weights"),
        "clip_seconds": signal["max_length"] / signal["sampling_rate"],
        "table": markdown_table(accuracy_rows(results)),
        "pictures": [name for name in (ACCURACY, CONFUSION, EMBEDDING) if (folder / name).is_file()],
        "sources": markdown_table(source_rows(sources)),
        "seconds": results.get("seconds") or sum(fold["seconds"] for fold in results.get("folds", {}).values()),
        "stage_in_words": stage_in_words,
        "unknown": [stage.name for stage in record.stages if not stage.is_known],
        "earlier_seconds": sum(stage.facts.get("seconds", 0) for stage in record.stages[:-1]),
        "code_licence": LICENCE_OF_THE_CODE,
        "citations": list(dict.fromkeys(facts["citation"] for facts in sources.values() if "citation" in facts)),
    }
    # Not so with ImageNet's weights, or those of a folder that does not say what it was trained on.
    claimed = licence([facts.get("licence_id") for facts in sources.values()], record.is_complete)
    for key, value in claimed.items():
        setattr(data, key, value)
    text = "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in (template, "provenance.md"))
    card = ModelCard.from_template(data, template_str=text, **fields, **claimed)
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def draw_pictures(folder: Path, results: dict) -> None:
    """What of a run's results is easier to see than to read."""
    from dls_training.report import draw_accuracy, draw_confusion_matrix  # matplotlib takes its time

    rows = accuracy_rows(results)
    if len(rows) > 1:
        draw_accuracy(folder / ACCURACY, *accuracy_curves(results, rows))
    if "confusion_matrix" in results:
        draw_confusion_matrix(folder / CONFUSION, results["confusion_matrix"], list(results["per_class_accuracy"]))


def accuracy_curves(results: dict, rows: list[dict]) -> tuple[dict[str, dict], str]:
    """What `draw_curves` takes, and what it shows."""
    epochs = [row["epoch"] for row in rows]

    def curve(column: str) -> dict:
        return {
            "epochs": epochs,
            "mean_accuracy_per_epoch": [row[column] for row in rows],
            "std_accuracy_per_epoch": [row.get("std", 0.0) for row in rows],
            "folds": results.get("folds", {}),
        }

    if results["task"] == "npid":
        return {name: curve(name) for name in rows[0] if name != "epoch"}, "k-NN accuracy of the embedding"
    column = "mean" if "mean" in rows[0] else f"fold {next(iter(results['folds']))}"
    return {results["corpus"]: curve(column)}, "accuracy on the held-out fold"


def pretraining_card(results: dict, config: dict, record: Record) -> tuple[ModelCardData, str, dict]:
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["audio", "esresnet", "instance-discrimination", "self-supervised"],
    )
    held_out = results["excluded_folds"]
    protocol = (
        f"The folds {held_out} were left out of the training."
        if held_out
        else "Transductive: every fold was trained on, without labels. Accuracies measured on these corpora have seen "
        "their test clips' sound, not their labels."
    )
    if len(record.stages) > 1:
        protocol += " That is said of this training alone, not of what came before it."
    return data, "pretraining.md", {"protocol": protocol, "embedding_dim": config["embedding_dim"]}


def stage_in_words(stage: dict) -> str:
    """What an earlier stage did to the weights, in a sentence; see `Stage.facts`."""
    if stage["task"] is None:
        return f"Started from `{stage['name']}`, of which it is not known what it has heard."
    what = {
        "npid": "Pre-trained on unlabelled audio by instance discrimination",
        "classification": "Trained with labels as a classifier",
    }[stage["task"]]
    clips = ", ".join(f"{count} of {name}" for name, count in stage["clips"].items())
    left_out = f"; left out: {stage['excluded_folds']}" if stage["excluded_folds"] else ""
    return f"{what} (`{stage['name']}`; clips: {clips}{left_out})."


def classification_card(results: dict, config: dict, record: Record) -> tuple[ModelCardData, str, dict]:
    folds = results["folds"]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="audio-classification",
        tags=["audio", "esresnet"],
        model_name=f"esresnet-{results['corpus']}",
        eval_results=evaluations(results),
    )
    rows, held_out = accuracy_rows(results), next(iter(folds))
    heard = [fold_results["test_clips_heard_in_pretraining"] for fold_results in folds.values()]
    leaks = Counter()
    for fold_results in folds.values():
        leaks.update(fold_results["test_labels_seen_before"])
    recognised = {name: share for name, share in results["per_class_accuracy"].items() if share is not None}
    fields = {
        "heard": None if None in heard else sum(heard),
        "leaks": leaks,
        "test_clips": sum(fold_results["test_clips"] for fold_results in folds.values()),
        "training_clips": [fold_results["training_clips"] for fold_results in folds.values()],
        "labels": list(config["id2label"].values()),
        "held_out": held_out,
        "trained": bool(results["mean_accuracy_per_epoch"]),
        "mean": rows[-1]["mean" if len(folds) > 1 else f"fold {held_out}"],
        "std": rows[-1].get("std"),
        "hardest": sorted(recognised.items(), key=lambda item: item[1])[:3],
        "classes": markdown_table([{"class": name, "recognised": share} for name, share in recognised.items()]),
    }
    return data, "classification.md", fields


def evaluations(results: dict) -> list[EvalResult]:
    """Each fold's accuracy and, of several, their mean and standard deviation.

    Results are told apart by task, dataset, config and split alone: without the fold in one of these, the folds would
    overwrite one another.
    """
    corpus, folds = results["corpus"], results["folds"]
    title = results["corpora"][corpus].get("title", corpus)

    def result(config: str, name: str, metric: str, value: float) -> EvalResult:
        return EvalResult(
            task_type="audio-classification",
            dataset_type=corpus,
            dataset_name=f"{title}, {name}",
            dataset_config=config,
            dataset_split="train",  # of the dataset, all of whose clips are there; the fold says which were held out
            metric_type=metric,
            metric_value=value,
        )

    final = {fold: final_accuracy(fold_results) for fold, fold_results in folds.items()}
    found = [result(f"fold-{fold}", f"fold {fold} held out", "accuracy", value) for fold, value in final.items()]
    if len(folds) > 1:
        name, values = f"{len(folds)} folds held out in turn", list(final.values())
        found.append(result("all-folds", name, "accuracy", float(np.mean(values))))
        found.append(result("all-folds", name, "accuracy_std", float(np.std(values))))
    return found


def final_accuracy(fold_results: dict) -> float:
    """On the held-out fold after the last epoch; of the closed-form classifier, where no epoch was trained."""
    return (fold_results["accuracy_per_epoch"] or [fold_results["accuracy_at_start"]])[-1]


def accuracy_rows(results: dict) -> list[dict]:
    """One row per evaluation: {"epoch": number, what: accuracy}; epoch 0 is a closed-form classifier's."""
    if results["task"] == "npid":
        return [{"epoch": e["epoch"], **e["knn_accuracy"]} for e in results["history"] if e.get("knn_accuracy")]
    start, folds = "mean_accuracy_at_start" in results, results["folds"]

    def curve(source, prefix=""):
        first = [source[f"{prefix}accuracy_at_start"]] if start else []
        return first + source[f"{prefix}accuracy_per_epoch"]

    columns = {f"fold {fold}": curve(fold_results) for fold, fold_results in folds.items()}
    if len(columns) > 1:
        columns |= {"mean": curve(results, "mean_"), "std": curve(results, "std_")}
    rows = zip(*columns.values(), strict=True)
    return [{"epoch": epoch, **dict(zip(columns, row, strict=True))} for epoch, row in enumerate(rows, 1 - start)]


def markdown_table(rows: list[dict]) -> str:
    """Rows with the same keys -> a Markdown table, accuracies with three digits; no rows, no table."""
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
