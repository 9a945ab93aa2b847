"""Pictures are bounded, and none costs a result."""

import logging
import resource

import numpy as np
import pytest
import torch
from PIL import Image

from dls_training.report import draw_confusion_matrix, draw_embedding


@pytest.mark.parametrize("clips, dim", [(1, 8), (5, 1), (1, 1), (2, 2)])
def test_few_clips_or_numbers_have_a_map(clips, dim, tmp_path):
    draw_embedding(tmp_path / "map.png", torch.randn(clips, dim), np.zeros(clips, int), ["a"], "title")
    assert Image.open(tmp_path / "map.png").size[0] > 100


def test_features_that_are_no_numbers_cost_the_map_alone(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "dls"):
        draw_embedding(tmp_path / "map.png", torch.full((5, 3), torch.nan), np.zeros(5, int), ["a"], "title")
    assert not (tmp_path / "map.png").exists() and "map.png is left out" in caplog.text


def test_a_thousand_classes_take_no_more_than_sixty(tmp_path):
    names, before = [f"class {i}" for i in range(1000)], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    draw_confusion_matrix(tmp_path / "matrix.png", np.eye(1000, dtype=int).tolist(), names)
    labels = np.arange(1000)
    draw_embedding(tmp_path / "map.png", torch.randn(1000, 4), labels, names, "title")
    assert max(Image.open(tmp_path / "matrix.png").size) < 3000 and (tmp_path / "map.png").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
