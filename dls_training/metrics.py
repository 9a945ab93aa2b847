"""Metrics as an `evaluate` module that lives here: `evaluate.load` would fetch one from the Hub."""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import average_precision_score, f1_score


class ClassificationMetrics(evaluate.Metric):
    """Accuracy, confusion matrix and the accuracy of each class (its recall), from class indices.

    Example:
        >>> metrics = ClassificationMetrics().compute(predictions=[0, 1, 1], references=[0, 1, 2], num_classes=4)
        >>> metrics["confusion_matrix"]
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
        >>> metrics["accuracy"], metrics["per_class_accuracy"]
        (0.6666666666666666, [1.0, 1.0, 0.0, None])
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="accuracy, 0..1; confusion_matrix, see the function; per_class_accuracy, likewise.",
            citation="",
            inputs_description="predictions and references: class indices; num_classes: see `confusion_matrix`.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, num_classes: int | None = None) -> dict:
        matrix = confusion_matrix(predictions, references, num_classes)
        return {
            "accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references))),
            "confusion_matrix": matrix,
            "per_class_accuracy": per_class_accuracy(matrix),
        }


class YesNoMetrics(evaluate.Metric):
    """How well each class is answered with yes or no, from scores.

    Example:
        >>> scores = [[0.9, 0.2], [0.4, 0.7], [0.6, 0.1]]  # of three clips, the last of which is of no class
        >>> found = YesNoMetrics().compute(
        ...     predictions=scores, references=[[1, 0], [-1, 1], [0, 0]], thresholds=[0.5, 0.5], seconds=[5, 5, 5]
        ... )
        >>> found["f1"], found["macro_f1"], found["average_precision"]
        ([0.6666666666666666, 1.0], 0.8333333333333333, [1.0, 1.0])
        >>> found["accuracy"], found["false_alarms"], found["background_hours"] * 3600
        (0.6666666666666666, 1, 5.0)
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=(
                "accuracy: share of clips of which every known answer is right; f1 and average_precision: of each "
                "class, None where no clip is of it; macro_f1: the mean of the former; false_alarms: classes answered "
                "with yes in clips that are of none, of which background_hours were heard."
            ),
            citation="",
            inputs_description=(
                "predictions: scores of each class; references: 1 for yes, 0 for no, -1 where it is not known; "
                "thresholds: from which score on it is yes, of each class; seconds: how long each clip is."
            ),
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(self, predictions, references, thresholds, seconds) -> dict:
        scores, truth = np.asarray(predictions), np.asarray(references)
        answers, known = scores >= np.asarray(thresholds, scores.dtype), truth >= 0
        f1, precision = [], []
        for own, score, answer, is_known in zip(truth.T, scores.T, answers.T, known.T, strict=True):
            is_tested = (own == 1).any()
            f1.append(float(f1_score(own[is_known], answer[is_known])) if is_tested else None)
            precision.append(float(average_precision_score(own[is_known], score[is_known])) if is_tested else None)
        is_background, tested = (truth == 0).all(axis=1), [value for value in f1 if value is not None]
        return {
            "accuracy": float(((answers == truth) | ~known).all(axis=1).mean()),
            "f1": f1,
            "macro_f1": float(np.mean(tested)) if tested else None,
            "average_precision": precision,
            "false_alarms": int(answers[is_background].sum()),
            "background_hours": float(np.asarray(seconds)[is_background].sum() / 3600),
        }


def confusion_matrix(predictions, references, num_classes: int | None = None) -> list[list[int]]:
    """Counts, true classes (rows) by predicted ones (columns).

    Args:
        predictions: (clips,), class indices.
        references: (clips,), likewise.
        num_classes: None takes the largest index that occurs for the last class.

    Raises:
        ValueError: if an index is none of a class.
    """
    pairs = np.stack([references, predictions]).astype(np.int64)
    size = int(pairs.max()) + 1 if num_classes is None else num_classes
    if pairs.min() < 0 or pairs.max() >= size:
        raise ValueError(f"class indices must be in 0..{size - 1}, not {pairs.min()}..{pairs.max()}")
    counts = np.bincount(pairs[0] * size + pairs[1], minlength=size * size)
    return counts.reshape(size, size).tolist()


def per_class_accuracy(matrix: list[list[int]]) -> list[float | None]:
    """Each class's share on the diagonal of its row of a confusion matrix; None for a class without clips."""
    return [row[i] / sum(row) if sum(row) else None for i, row in enumerate(matrix)]
