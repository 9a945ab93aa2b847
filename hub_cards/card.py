"""A run's own files -> its model card. A number that is not in them is not in the card."""

import json
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

TEMPLATES = Path(__file__).parent / "templates"


def write_card(folder: Path) -> None:
    """Writes README.md beside a run's `all_results.json`, `config.json` and `preprocessor_config.json`.

    Args:
        folder: Written by `train_npid.py` or `train_classification.py`.

    Raises:
        OSError: if one of the files is absent.
    """
    results, config, signal = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("all_results.json", "config.json", "preprocessor_config.json")
    )
    describe = {"npid": pretraining_card, "classification": classification_card}[results["task"]]
    data, template, fields = describe(results, config)
    fields |= {
        "results": results,
        "signal": signal,
        "initial_weights": config.get("initial_weights"),
        "clip_seconds": signal["max_length"] / signal["sampling_rate"],
        "table": markdown_table(accuracy_rows(results)),
    }
    text = "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in (template, "provenance.md"))
    card = ModelCard.from_template(data, template_str=text, **fields)
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def pretraining_card(results: dict, config: dict) -> tuple[ModelCardData, str, dict]:
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
    return data, "pretraining.md", {"protocol": protocol, "embedding_dim": config["embedding_dim"]}


def classification_card(results: dict, config: dict) -> tuple[ModelCardData, str, dict]:
    corpus, folds = results["corpus"], results["folds"]
    # Results are told apart by task, dataset, config and split alone: without the fold in one of these, the folds
    # would overwrite one another.
    evaluations = [
        EvalResult(
            task_type="audio-classification",
            dataset_type=corpus,
            dataset_name=f"{corpus}, fold {fold} held out",
            dataset_config=f"fold-{fold}",
            dataset_split="train",
            metric_type="accuracy",
            metric_value=final_accuracy(fold_results),
        )
        for fold, fold_results in folds.items()
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="audio-classification",
        tags=["audio", "esresnet"],
        model_name=f"esresnet-{corpus}",
        eval_results=evaluations,
    )
    rows, held_out = accuracy_rows(results), next(iter(folds))
    heard = [fold_results["test_clips_heard_in_pretraining"] for fold_results in folds.values()]
    fields = {
        "heard": None if None in heard else sum(heard),
        "test_clips": sum(fold_results["test_clips"] for fold_results in folds.values()),
        "labels": list(config["id2label"].values()),
        "held_out": held_out,
        "trained": bool(results["mean_accuracy_per_epoch"]),
        "mean": rows[-1]["mean" if len(folds) > 1 else f"fold {held_out}"],
        "std": rows[-1].get("std"),
    }
    return data, "classification.md", fields


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
