"""The closed-form classifier against ridge regressions that are solved one by one."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from torch.utils._python_dispatch import TorchDispatchMode

from dls_sounds import run_onnx
from dls_training.closed_form import (
    LOGIT_SCALES,
    NO_THRESHOLD,
    PENALTIES,
    PENALTY_FOR_SINGLE_CLIPS,
    Ridge,
    best_thresholds,
    ridge_classifier,
    self_trained_classifier,
    yes_no_classifier,
)


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


@pytest.mark.parametrize("rounds", [0, 1, 4])
def test_self_training_takes_the_surest_of_each_class(rounds):
    """Clip by clip: in round r, of each class, the r x n that are likeliest of it among those that are held for it."""
    features, labels = clusters(12, num_classes=4, noise=2.0)
    labels, further = torch.cat([labels[:12], labels[12:14]]), features[14:]  # some classes have four, some three
    known = features[: len(labels)]
    expected = ridge_classifier(known, labels, 4)
    for number in range(1, rounds + 1):
        probabilities = (further @ expected[0].T + expected[1]).softmax(1).tolist()
        taken = {label: [] for label in range(4)}
        for clip in sorted(range(len(further)), key=lambda clip: -max(probabilities[clip])):
            label = probabilities[clip].index(max(probabilities[clip]))
            if len(taken[label]) < number * (labels == label).sum():
                taken[label].append(clip)
        chosen = torch.tensor([clip for clips in taken.values() for clip in clips])
        own = torch.tensor([label for label, clips in taken.items() for _ in clips])
        assert 0 < len(chosen) < len(further) or number > 2
        expected = ridge_classifier(torch.cat([known, further[chosen]]), torch.cat([labels, own]), 4)
    weight, bias = self_trained_classifier(known, labels, further, 4, rounds)
    assert torch.equal(weight, expected[0]) and torch.equal(bias, expected[1])


def test_self_training_learns_from_clips_without_labels():
    """Where each class has many forms, of which a few labels show some: means of ten draws."""
    right = torch.zeros(2)
    for seed in range(10):
        features, labels = clusters(40, num_classes=8, size=30, noise=3.0, seed=seed)
        known, further, test = slice(0, 24), slice(24, 240), slice(240, None)
        for number, rounds in enumerate((0, 5)):
            weight, bias = self_trained_classifier(features[known], labels[known], features[further], 8, rounds)
            right[number] += ((features[test] @ weight.T + bias).argmax(1) == labels[test]).float().mean() / 10
    assert right[1] > right[0] + 0.03, right


def test_self_training_with_nothing_to_label_and_a_class_without_clips():
    features, labels = clusters(6)
    for clips in (0, 1):
        weight, bias = self_trained_classifier(features, labels, features[:clips], 5, 3)
        assert torch.isfinite(weight).all() and (weight[3:] == 0).all() and (bias[3:] == 0).all()
    assert torch.equal(self_trained_classifier(features, labels, features[:0], 5, 3)[0],
                       ridge_classifier(features, labels, 5)[0])  # fmt: skip


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


def test_rounding_is_no_feature():
    """The last bits of a dead feature, which differ from batch to batch, decide nothing, here and on a device."""
    generator = torch.Generator().manual_seed(1)
    features, labels = clusters(40, size=100)
    dead = -1.2 + 1e-5 * torch.randn(len(features), 3, generator=generator)
    features = torch.cat([features, dead, 0.2 * features[:, :1]], dim=1)  # the last is small, and varies
    for weight, bias in (
        ridge_classifier(features, labels, 3),
        map(torch.from_numpy, run_onnx.ridge_classifier(features.numpy(), labels.numpy(), 3)),
    ):
        assert not weight[:, 100:103].any() and weight[:, 103].any()
        rounded = features.bfloat16().float()
        assert ((rounded @ weight.T + bias).argmax(1) == labels).all()


DEGENERATE = {
    "as usual": ({}, None),
    "more clips than features": ({"per_class": 20}, None),
    "as many": ({"per_class": 5, "size": 15}, None),
    "of low rank": ({"per_class": 20, "size": 30}, 4),
    "of low rank, few clips": ({"per_class": 5, "size": 40}, 4),
    "one clip per class": ({"per_class": 1, "num_classes": 12}, None),
    "one clip per class, many features": ({"per_class": 1, "num_classes": 12, "size": 40}, None),
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("more_classes", [0, 90])  # than clips
def test_either_side_gives_the_same(case, more_classes):
    """Features that never vary change nothing but which side is the smaller."""
    shape, rank = DEGENERATE[case]
    features, labels = clusters(**{"per_class": 5, "noise": 3.0, **shape})
    if rank:
        size, generator = features.shape[1], torch.Generator().manual_seed(1)
        features = (
            features @ torch.randn(size, rank, generator=generator) @ torch.randn(rank, size, generator=generator)
        )
    num_classes = int(labels.max()) + 1 + more_classes
    weight, bias = ridge_classifier(features, labels, num_classes)
    constant = torch.full((len(features), len(features)), 3.0)
    other_weight, other_bias = ridge_classifier(torch.cat([features, constant], dim=1), labels, num_classes)
    assert not other_weight[:, features.shape[1] :].any() and bias.isfinite().all()
    torch.testing.assert_close(other_weight[:, : features.shape[1]], weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(other_bias, bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clips", [1, 6])
def test_features_that_never_vary_leave_the_share_of_each_class(clips):
    labels = torch.tensor([0, 0, 0, 1, 1, 2])[:clips]
    weight, bias = ridge_classifier(torch.full((clips, 5), 2.0), labels, 4)
    assert not weight.any() and bias.isfinite().all() and bias.argmax() == 0
    assert bias[3] == 0


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize(("clips", "size"), [(3000, 50), (50, 3000)])
def test_memory_is_that_of_the_smaller_side(clips, size):
    features = torch.randn(clips, size, generator=torch.Generator().manual_seed(0))
    with LargestTensor() as largest:
        ridge_classifier(features, torch.arange(clips) % 5, 5)
    assert largest.elements == clips * size


# --- Yes or no for each class ---


def answered(seed, unknown=0.0, clips=40, size=7):
    """Clips of none, one or both of two classes, four from each recording: features, answers, recordings."""
    generator = torch.Generator().manual_seed(seed)
    answers = (torch.rand(clips, 2, generator=generator) < 0.4).long()
    features = torch.randn(clips, size, generator=generator)
    features = features + 2 * answers.float() @ torch.randn(2, size, generator=generator)
    answers[torch.rand(clips, 2, generator=generator) < unknown] = -1
    return features, answers, torch.arange(clips) // 4


@pytest.mark.parametrize("size", [4, 60])  # fewer and more numbers than clips
@pytest.mark.parametrize("together", [False, True])
def test_predictions_of_what_was_left_out_are_those_of_a_refit(size, together):
    features, answers, recordings = answered(0, size=size)
    recordings = recordings if together else torch.arange(len(features))
    ridge = Ridge(features, answers.double())
    standard = ((features.double() - ridge.mean) / ridge.std).numpy()
    for penalty in (0.01 * ridge.unit, ridge.unit):
        found = ridge.left_out_together(penalty, recordings) if together else ridge.left_out(penalty)
        for recording in recordings.unique():
            out = (recordings == recording).numpy()
            weights = slow_ridge(standard[~out], answers.numpy()[~out], penalty.item())
            expected = np.hstack([standard[out], np.ones((out.sum(), 1))]) @ weights
            np.testing.assert_allclose(found[out], expected, rtol=1e-6, atol=1e-8)


def test_every_class_learns_from_the_clips_of_which_its_answer_is_known():
    """As if the others were not there; classes of which the same is known are learned together, or apart."""
    features, answers, recordings = answered(1, unknown=0.3)
    weight, bias, thresholds = yes_no_classifier(features, answers, recordings)
    for own in range(2):
        known = answers[:, own] >= 0
        alone = yes_no_classifier(features[known], answers[known, own : own + 1], recordings[known])
        for found, expected in zip((weight, bias, thresholds), alone, strict=True):
            torch.testing.assert_close(found[own : own + 1], expected)


def test_scores_are_probabilities_and_thresholds_tell_yes_from_no():
    features, answers, recordings = answered(2, clips=800)
    weight, bias, thresholds = yes_no_classifier(features[:400], answers[:400], recordings[:400])
    answers, scores = answers[400:], (features[400:] @ weight.T + bias).sigmoid()
    torch.testing.assert_close(scores.mean(dim=0), answers.float().mean(dim=0), atol=0.05, rtol=0)
    for own in range(2):
        assert f1_score(answers[:, own], scores[:, own] >= thresholds[own]) > 0.8


def test_a_threshold_has_the_largest_f1():
    random = np.random.default_rng(0)
    answers = (random.random((60, 5)) < 0.3).astype(float)
    scores = np.round(np.clip(0.3 * answers + random.random((60, 5)) / 1.5, 0, 1), 2)  # some are equal
    found = best_thresholds(torch.from_numpy(scores), torch.from_numpy(answers)).numpy()
    for threshold, score, answer in zip(found, scores.T, answers.T, strict=True):
        best = max(f1_score(answer, score >= other) for other in score)
        assert f1_score(answer, score >= threshold) == pytest.approx(best)


def test_classes_that_tell_nothing_have_the_usual_threshold():
    """One that a single clip is of, one that all are of, and one that is known from a single clip."""
    features, answers, recordings = answered(3)
    answers = torch.cat([answers, torch.zeros(40, 3, dtype=torch.int64)], dim=1)
    answers[0, 2], answers[:, 3], answers[1:, 4] = 1, 1, -1
    weight, bias, thresholds = yes_no_classifier(features, answers, recordings)
    assert torch.isfinite(weight).all() and torch.isfinite(bias).all()
    assert ((thresholds > 0) & (thresholds < 1)).all()
    assert (thresholds[2:] == NO_THRESHOLD).all() and (thresholds[:2] != NO_THRESHOLD).all()
    assert ((features @ weight.T + bias).sigmoid()[:, 3] > 0.9).all()
