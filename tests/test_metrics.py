"""Accuracy against numpy, and without a network."""

import socket

import datasets
import evaluate
import huggingface_hub
import numpy as np
import pytest

from dls_training.metrics import Accuracy


@pytest.fixture
def clips():
    rng = np.random.default_rng(0)
    return rng.integers(0, 10, 137), np.where(rng.random(137) < 0.5, 3, rng.integers(0, 10, 137))


def test_compute(clips):
    predictions, references = clips
    expected = float((predictions == references).mean())
    assert 0 < expected < 1
    metric = Accuracy(keep_in_memory=True)
    assert metric.compute(predictions=predictions, references=references) == {"accuracy": expected}
    assert metric.compute(predictions=predictions.tolist(), references=references.tolist()) == {"accuracy": expected}


@pytest.mark.parametrize("batch_size", [1, 16, 137])
def test_batches_of_any_size_give_what_all_at_once_gives(clips, batch_size):
    predictions, references = clips
    metric = Accuracy(keep_in_memory=True)
    for _ in range(2):  # an epoch leaves nothing behind for the next
        for first in range(0, 137, batch_size):
            part = slice(first, first + batch_size)
            metric.add_batch(predictions=predictions[part].tolist(), references=references[part].tolist())
        accuracy = metric.compute()["accuracy"]
        assert isinstance(accuracy, float)
        assert accuracy == pytest.approx((predictions == references).mean())


@pytest.mark.parametrize(("predictions", "expected"), [([0, 1, 2], 1.0), ([1, 2, 0], 0.0), ([0, 1, 1], 2 / 3)])
def test_extremes(predictions, expected):
    assert Accuracy().compute(predictions=predictions, references=[0, 1, 2]) == {"accuracy": expected}


def test_works_offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("a metric of ours went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    # What HF_HUB_OFFLINE=1 sets when the libraries are imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    metric = Accuracy()
    metric.add_batch(predictions=[0, 1], references=[0, 2])
    assert metric.compute() == {"accuracy": 0.5}
