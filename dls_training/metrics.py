"""Metrics as `evaluate` modules that live here: `evaluate.load` would fetch them from the Hub."""

import datasets
import evaluate
import numpy as np


class ClassMetric(evaluate.Metric):
    """What the metrics below have in common: class indices are compared with class indices.

    Attributes:
        description: What `compute` returns.
    """

    description = ""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description="predictions and references: class indices.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )


class Accuracy(ClassMetric):
    """Share of predictions that equal their reference.

    Example:
        >>> Accuracy().compute(predictions=[0, 1, 1], references=[0, 1, 2])
        {'accuracy': 0.6666666666666666}
    """

    description = "Share of predictions that equal their reference, 0..1."

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class ConfusionMatrix(ClassMetric):
    """How many clips of each class (rows) were taken for each class (columns).

    Example:
        >>> ConfusionMatrix().compute(predictions=[0, 1, 1], references=[0, 1, 2], num_classes=3)
        {'confusion_matrix': [[1, 0, 0], [0, 1, 0], [0, 1, 0]]}
    """

    description = "Counts, classes of the references by classes of the predictions, as lists of rows."

    def _compute(self, predictions, references, num_classes: int | None = None) -> dict[str, list[list[int]]]:
        return {"confusion_matrix": confusion_matrix(predictions, references, num_classes)}


class PerClassAccuracy(ClassMetric):
    """Share of each class's clips that were recognised (its recall).

    Example:
        >>> PerClassAccuracy().compute(predictions=[0, 1, 1], references=[0, 1, 2], num_classes=4)
        {'per_class_accuracy': [1.0, 1.0, 0.0, None]}
    """

    description = "For each class the share of its clips that were recognised, 0..1; None where there was none."

    def _compute(self, predictions, references, num_classes: int | None = None) -> dict[str, list[float | None]]:
        return {"per_class_accuracy": per_class_accuracy(confusion_matrix(predictions, references, num_classes))}


def confusion_matrix(predictions, references, num_classes: int | None = None) -> list[list[int]]:
    """Counts, true classes by predicted ones.

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
