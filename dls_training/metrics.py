"""Metrics as an `evaluate` module that lives here: `evaluate.load` would fetch one from the Hub."""

import datasets
import evaluate
import numpy as np


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
