"""The closed-form classifier against ridge regressions that are solved one by one."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dls_training.closed_form import LOGIT_SCALES, PENALTIES, PENALTY_FOR_SINGLE_CLIPS, ridge_classifier


def clusters(per_class, num_classes=3, size=7, noise=1.0, seed=0):
    """Clips around a centre for each class: features (clips, size), labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_classes).repeat(per_class)
    centres = 2 * torch.randn(num_classes, size, generator=generator)
    return centres[labels] + noise * torch.randn(len(labels), size, generator=generator), labels


def slow_ridge(X, Y, penalty):
    """Weight and unpenalised bias, by the normal equations of the features with a column of ones."""
    X = np.hstack([X, np.ones((len(X), 1))])
    shrink = penalty * np.eye(X.shape[1])
    shrink[-1, -1] = 0
    return np.linalg.solve(X.T @ X + shrink, X.T @ Y)


@pytest.mark.parametrize("noise", [0.5, 5.0])
@pytest.mark.parametrize("size", [4, 40])  # fewer and more numbers than clips
def test_the_penalty_and_the_scale_are_those_of_leaving_each_clip_out(size, noise):
    features, labels = clusters(6, size=size, noise=noise)
    X = features.double().numpy()
    Y = np.eye(3)[labels]
    standard = (X - X.mean(0)) / X.std(0)
    unit = (standard**2).sum() / len(X)
    left_out = {}
    for share in PENALTIES.tolist():
        rows = []
        for i in range(len(X)):
            others = np.arange(len(X)) != i
            rows.append(np.append(standard[i], 1) @ slow_ridge(standard[others], Y[others], share * unit))
        left_out[share] = np.array(rows)
    share = min(left_out, key=lambda share: ((left_out[share] - Y) ** 2).sum())
    predictions = torch.from_numpy(left_out[share])
    scale = min(LOGIT_SCALES.tolist(), key=lambda scale: F.cross_entropy(scale * predictions, labels).item())
    slow = slow_ridge(standard, Y, share * unit)
    expected = scale * np.hstack([standard, np.ones((len(X), 1))]) @ slow
    weight, bias = ridge_classifier(features, labels, 3)
    np.testing.assert_allclose(features @ weight.T + bias, expected, rtol=1e-3, atol=1e-3)


def test_one_clip_per_class_has_a_fixed_penalty():
    features, labels = clusters(1)
    X = features.double().numpy()
    standard = (X - X.mean(0)) / X.std(0)
    slow = slow_ridge(standard, np.eye(3)[labels], PENALTY_FOR_SINGLE_CLIPS * (standard**2).sum() / len(X))
    expected = torch.from_numpy(np.hstack([standard, np.ones((len(X), 1))]) @ slow)
    weight, bias = ridge_classifier(features, labels, 3)
    logits = features @ weight.T + bias
    ratio = (logits - logits.mean(1, keepdim=True)) / (expected - expected.mean(1, keepdim=True))
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-3, atol=0)
    assert (logits.argmax(1) == labels).all()


def test_a_class_without_clips_and_a_constant_feature():
    features, labels = clusters(5)
    features[:, 2] = 3.0
    weight, bias = ridge_classifier(features, labels, 4)
    assert weight.shape == (4, 7) and bias.shape == (4,)
    assert torch.isfinite(weight).all() and torch.isfinite(bias).all() and not weight[:, 2].any()
    assert ((features @ weight.T + bias).argmax(1) == labels).all()
