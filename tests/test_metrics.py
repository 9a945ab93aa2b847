"""Metrics against numpy and scikit-learn, in evaluate's evaluator, and without a network."""

import socket

import datasets
import evaluate
import huggingface_hub
import numpy as np
import pytest
import torch
from datasets import Dataset
from evaluate import evaluator
from sklearn.metrics import average_precision_score, confusion_matrix, f1_score, recall_score

from dls_training.metrics import ClassificationMetrics, YesNoMetrics
from modeling_dls import ESResNetConfig, ESResNetFeatureExtractor, ESResNetForAudioClassification


@pytest.fixture
def clips():
    rng = np.random.default_rng(0)
    return rng.integers(0, 10, 137), np.where(rng.random(137) < 0.5, 3, rng.integers(0, 10, 137))


def test_compute(clips):
    predictions, references = clips
    expected = float((predictions == references).mean())
    assert 0 < expected < 1
    metric = ClassificationMetrics(keep_in_memory=True)
    found = metric.compute(predictions=predictions, references=references)
    assert found["accuracy"] == expected
    assert metric.compute(predictions=predictions.tolist(), references=references.tolist()) == found


@pytest.mark.parametrize("batch_size", [1, 16, 137])
def test_batches_of_any_size_give_what_all_at_once_gives(clips, batch_size):
    predictions, references = clips
    metric = ClassificationMetrics(keep_in_memory=True)
    for _ in range(2):  # an epoch leaves nothing behind for the next
        for first in range(0, 137, batch_size):
            part = slice(first, first + batch_size)
            metric.add_batch(predictions=predictions[part].tolist(), references=references[part].tolist())
        accuracy = metric.compute()["accuracy"]
        assert isinstance(accuracy, float)
        assert accuracy == pytest.approx((predictions == references).mean())


@pytest.mark.parametrize(("predictions", "expected"), [([0, 1, 2], 1.0), ([1, 2, 0], 0.0), ([0, 1, 1], 2 / 3)])
def test_extremes(predictions, expected):
    found = ClassificationMetrics().compute(predictions=predictions, references=[0, 1, 2])
    assert found["accuracy"] == expected


def test_confusion_matrix_and_per_class_accuracy(clips):
    predictions, references = clips
    found = ClassificationMetrics().compute(predictions=predictions, references=references, num_classes=11)
    assert found["confusion_matrix"] == confusion_matrix(references, predictions, labels=range(11)).tolist()
    recall = found["per_class_accuracy"]
    expected = recall_score(references, predictions, labels=range(11), average=None, zero_division=np.nan).tolist()
    assert recall[:10] == expected[:10] and recall[10] is None and np.isnan(expected[10])


def test_class_that_does_not_exist():
    with pytest.raises(ValueError, match=r"must be in 0\.\.1, not 0\.\.2"):
        ClassificationMetrics().compute(predictions=[0, 1], references=[0, 2], num_classes=2)


def test_yes_and_no_from_scores():
    """Clip by clip and class by class; what is not known counts nowhere, and background is what is of no class."""
    random = np.random.default_rng(0)
    scores, truth = random.random((50, 4)).astype(np.float32), random.integers(-1, 2, (50, 4))
    truth[:, 3] = np.minimum(truth[:, 3], 0)  # no clip is of the last class
    truth[:10] = 0
    thresholds, seconds = [0.3, 0.5, 0.7, 0.9], random.integers(1, 9, 50)
    found = YesNoMetrics(keep_in_memory=True).compute(
        predictions=scores, references=truth, thresholds=thresholds, seconds=seconds
    )
    right = [all((s >= t) == a for s, t, a in zip(*row, strict=True) if a >= 0)
             for row in zip(scores, [thresholds] * 50, truth, strict=True)]  # fmt: skip
    assert found["accuracy"] == pytest.approx(np.mean(right)) and 0 < np.mean(right) < 1
    for own in range(3):
        known = truth[:, own] >= 0
        answers = scores[known, own] >= thresholds[own]
        assert found["f1"][own] == pytest.approx(f1_score(truth[known, own], answers))
        precision = average_precision_score(truth[known, own], scores[known, own])
        assert found["average_precision"][own] == pytest.approx(precision)
    assert found["f1"][3] is found["average_precision"][3] is None
    assert found["macro_f1"] == pytest.approx(np.mean(found["f1"][:3]))
    background = [row for row in range(50) if not truth[row].any()]
    assert found["background_hours"] == pytest.approx(seconds[background].sum() / 3600) and len(background) >= 10
    assert found["false_alarms"] == sum(scores[row][own] >= thresholds[own] for row in background for own in range(4))


def test_evaluator():
    """evaluate's own evaluator takes our model, extractor and metrics, and needs no ffmpeg for samples."""
    torch.manual_seed(0)
    names = ["a", "b", "c"]
    settings = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = ESResNetForAudioClassification(ESResNetConfig.from_preset("tiny", **settings)).eval()
    extractor = ESResNetFeatureExtractor.from_preset("tiny", max_length=22050)
    rng = np.random.default_rng(0)
    sounds = [(0.1 * 3.0**i * rng.standard_normal(22050)).astype(np.float32) for i in range(6)]
    with torch.no_grad():
        inputs = extractor(sounds, sampling_rate=44100, return_tensors="pt")
        answers = model(**inputs).logits.argmax(-1).tolist()
    labels = [(answer + (i % 3 == 0)) % 3 for i, answer in enumerate(answers)]  # every third is wrong
    rows = [{"audio": {"array": sound, "sampling_rate": 44100}, "label": labels[i]} for i, sound in enumerate(sounds)]
    data = Dataset.from_list(rows).with_format("numpy")
    found = evaluator("audio-classification").compute(
        model_or_pipeline=model, feature_extractor=extractor, data=data, metric=ClassificationMetrics(),
        input_column="audio", label_column="label", label_mapping=settings["label2id"],
    )  # fmt: skip
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert (
        found["confusion_matrix"]
        == confusion_matrix(labels, answers, labels=range(1 + max(labels + answers))).tolist()
    )


def test_works_offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("a metric of ours went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    # What HF_HUB_OFFLINE=1 sets when the libraries are imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    metric = ClassificationMetrics()
    metric.add_batch(predictions=[0, 1], references=[0, 2])
    assert metric.compute()["accuracy"] == 0.5
