"""A classifier in closed form: ridge regression on the features of a frozen network, no epoch of training."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.nn.modules.batchnorm import _BatchNorm  # of one process, or synchronised over several
from torch.utils.data import DataLoader

from modeling_dls import ESResNetForAudioClassification

from .input_pipeline import mean_over_windows

# Shares of the mean squared length of the features, between hardly any penalty and hardly anything but it.
PENALTIES = torch.logspace(-4, 2, 25, dtype=torch.float64)
PENALTY_FOR_SINGLE_CLIPS = 0.1
LOGIT_SCALES = torch.logspace(-1, 3, 81, dtype=torch.float64)
SMALLEST_SHARE = 0.05  # of the median standard deviation
BISECTIONS = 50  # the last interval is 1e-12 of all logits
NO_THRESHOLD = 0.5  # where there is nothing to choose one by


class Ridge:
    """Least squares from standardised features to targets, for any penalty, from one eigendecomposition.

    That is of clips x clips or of size x size, whichever is smaller.

    Attributes:
        prior: (targets,), their means: what is predicted from nothing.
        unit: The features' mean squared length, which penalties are shares of.
    """

    def __init__(self, features: torch.Tensor, targets: torch.Tensor):
        """
        Args:
            features: (clips, size).
            targets: (clips, targets), float64.
        """
        X, self.Y = features.double(), targets
        self.mean, self.std = standardisation(X)
        self.X, self.prior = (X - self.mean) / self.std, targets.mean(dim=0)
        # The clips' principal components: X X' = P P' with orthogonal columns; squared lengths are eigenvalues.
        if len(X) < X.shape[1]:
            values, vectors = torch.linalg.eigh(self.X @ self.X.T)
            self.P = vectors * values.clamp(min=0).sqrt()
        else:
            values, vectors = torch.linalg.eigh(self.X.T @ self.X)
            self.P = self.X @ vectors
        self.values, self.squares = values.clamp(min=0), self.P.square()
        self.targets = self.P.T @ (targets - self.prior)
        self.unit = (self.values.sum() / len(X)).clamp(min=1)  # the features that vary, each with mean square 1

    def fitted(self, penalty: torch.Tensor) -> torch.Tensor:
        """(clips, targets)"""
        return self.prior + self.P @ (self.targets / (self.values + penalty)[:, None])

    def left_out(self, penalty: torch.Tensor) -> torch.Tensor:
        """Each clip's prediction by all others: exact for a linear smoother whose intercept is not penalised."""
        leverage = (self.squares @ (1 / (self.values + penalty)) + 1 / len(self.X))[:, None]
        return (self.fitted(penalty) - leverage * self.Y) / (1 - leverage)

    def left_out_together(self, penalty: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        """Each clip's prediction by all clips of other groups, likewise exact.

        Args:
            penalty: Of the features.
            groups: (clips,), of two groups or more.
        """
        predictions, errors = self.left_out(penalty), self.Y - self.fitted(penalty)
        shrunk = self.P / (self.values + penalty)
        for group in torch.unique(groups):
            rows = (groups == group).nonzero()[:, 0]
            if len(rows) > 1:
                unexplained = torch.eye(len(rows)).double() - shrunk[rows] @ self.P[rows].T - 1 / len(self.X)
                predictions[rows] = self.Y[rows] - torch.linalg.solve(unexplained, errors[rows])
        return predictions

    def linear(self, penalty: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (targets, size) and bias (targets,) of `scale` times what is predicted, from features as they are."""
        # Whichever side was decomposed: the features times what they leave unexplained, over the penalty.
        weight = scale * ((self.Y - self.fitted(penalty)).T @ self.X / penalty) / self.std
        return weight, scale * self.prior - weight @ self.mean


def standardisation(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of features (clips, size), infinite of those that hardly vary: (size,) each."""
    std = features.std(dim=0, correction=0)
    return features.mean(dim=0), torch.where(std > least_variation(std), std, torch.inf)


def least_variation(std: torch.Tensor) -> torch.Tensor:
    """Below which a feature's standard deviation is none: a share of the median of those that vary at all.

    What hardly varies is a picture of rounding, of bfloat16's eight bits in particular. Standardised, it would be as
    large as all others, and of another size on the next clip whose batch is rounded another way.
    """
    varies = std[std > 1e-6 * std.max()]
    return SMALLEST_SHARE * varies.median() if len(varies) else std.max()


def ridge_classifier(
    features: torch.Tensor, labels: torch.Tensor, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares from standardised features to one-hot labels, scaled so that its outputs are logits.

    The penalty has the smallest squared error when each clip in turn is left out (PRESS); the scale, common to all
    classes, the smallest cross entropy of the same predictions. No clip but the given ones is looked at. Where a class
    has a single clip, leaving it out leaves nothing to learn it from: the penalty is then a tenth of the features'
    mean squared length.

    Args:
        features: (clips, size).
        labels: (clips,), int64 in 0 .. num_classes - 1.
        num_classes: Classes.

    Returns:
        Weight (num_classes, size) and bias (num_classes,), float32, for the features as they are.
    """
    Y = F.one_hot(labels, num_classes).double()
    ridge = Ridge(features, Y)
    if labels.bincount(minlength=num_classes)[labels].min() > 1:
        errors = torch.stack([(ridge.left_out(ridge.unit * share) - Y).square().mean() for share in PENALTIES])
        penalty = ridge.unit * PENALTIES[errors.argmin()]
    else:
        penalty = ridge.unit * PENALTY_FOR_SINGLE_CLIPS
    predictions = ridge.left_out(penalty)
    cross_entropy = torch.stack([F.cross_entropy(scale * predictions, labels) for scale in LOGIT_SCALES])
    weight, bias = ridge.linear(penalty, LOGIT_SCALES[cross_entropy.argmin()])
    return weight.float(), bias.float()


def self_trained_classifier(
    features: torch.Tensor, labels: torch.Tensor, unlabelled: torch.Tensor, num_classes: int, rounds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ridge_classifier` that labels further clips by itself and learns from those, too: self-training.

    In round r it takes, of the clips that it last held to be of a class, up to r times as many as are labelled, the
    surest first, and begins anew with these (as curriculum labelling does, Cascante-Bonilla et al. 2021). As many of
    each class as of any other with as many labels: taken by their scores alone, a few classes would draw most clips.

    Args:
        features: (clips, size), of the labelled clips.
        labels: (clips,), int64 in 0 .. num_classes - 1.
        unlabelled: (further clips, size).
        num_classes: Classes.
        rounds: How often.

    Returns:
        See `ridge_classifier`.
    """
    counts = labels.bincount(minlength=num_classes).tolist()
    weight, bias = ridge_classifier(features, labels, num_classes)
    for number in range(1, rounds + 1):
        surest, own = (unlabelled @ weight.T + bias).softmax(dim=1).max(dim=1)
        order = surest.argsort(descending=True, stable=True)
        taken = torch.cat([order[own[order] == label][: number * count] for label, count in enumerate(counts)])
        everything = torch.cat([features, unlabelled[taken]]), torch.cat([labels, own[taken]])
        weight, bias = ridge_classifier(*everything, num_classes)
    return weight, bias


def yes_no_classifier(
    features: torch.Tensor, answers: torch.Tensor, recordings: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Least squares from standardised features to yes or no for each class, as logits, with thresholds.

    Each class learns from the clips of which its answer is known. Penalty, scale, offset and threshold come from
    predictions of clips whose recordings were left out; for a class that is in one recording alone, of clips that were
    left out one by one. Scale and offset make the predictions logits, and the threshold has the largest F1.

    Args:
        features: (clips, size).
        answers: (clips, classes): 1 for yes, 0 for no, -1 where it is not known.
        recordings: (clips,), numbers of the recordings that clips are from.

    Returns:
        Weight (classes, size), bias (classes,) and the thresholds of probabilities (classes,), float32;
        `NO_THRESHOLD` of a class that one clip is of, or all are.
    """
    classes = answers.shape[1]
    weight, bias = torch.zeros(classes, features.shape[1]), torch.zeros(classes)
    thresholds = torch.full((classes,), NO_THRESHOLD)
    for known in torch.unique(answers >= 0, dim=1).T:  # classes of which the same clips are known share their work
        own = ((answers >= 0) == known[:, None]).all(dim=0).nonzero()[:, 0]
        if known.sum() > 1:
            found = _of_known_answers(features[known], answers[known][:, own].double(), recordings[known])
            weight[own], bias[own], thresholds[own] = (part.float() for part in found)
    return weight, bias, thresholds


def _of_known_answers(
    features: torch.Tensor, Y: torch.Tensor, recordings: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`yes_no_classifier` of classes of which every clip's answer is known."""
    ridge = Ridge(features, Y)
    in_recordings = [len(torch.unique(recordings[column == 1])) for column in Y.T]
    in_several = torch.tensor(in_recordings) > 1
    can_be_left_out = (Y.sum(dim=0) > 1) & (Y.sum(dim=0) < len(Y))

    def left_out(penalty: torch.Tensor) -> torch.Tensor:
        predictions = ridge.left_out(penalty)
        if in_several.any():
            predictions = torch.where(in_several, ridge.left_out_together(penalty, recordings), predictions)
        return predictions

    penalty = ridge.unit * PENALTY_FOR_SINGLE_CLIPS
    if can_be_left_out.any():
        tested = [left_out(ridge.unit * share) - Y for share in PENALTIES]
        errors = torch.stack([each[:, can_be_left_out].square().mean() for each in tested])
        penalty = ridge.unit * PENALTIES[errors.argmin()]
    predictions = left_out(penalty)
    logits = [scale * predictions + offsets(scale * predictions, Y) for scale in LOGIT_SCALES]
    scale = LOGIT_SCALES[torch.stack([F.binary_cross_entropy_with_logits(each, Y) for each in logits]).argmin()]
    offset = offsets(scale * predictions, Y)
    thresholds = best_thresholds((scale * predictions + offset).sigmoid(), Y)
    weight, bias = ridge.linear(penalty, scale)
    return weight, bias + offset, torch.where(can_be_left_out, thresholds, NO_THRESHOLD)


def offsets(logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """What to add to logits (clips, classes) so that the mean probability of each class is its share: (classes,).

    That is the condition of logistic regression's intercept. Half a clip more for either answer keeps it finite.
    """
    share = (answers.sum(dim=0) + 0.5) / (len(answers) + 1)
    middle = share.logit()
    low, high = middle - logits.amax(dim=0), middle - logits.amin(dim=0)
    for _ in range(BISECTIONS):
        offset = (low + high) / 2
        is_high = (logits + offset).sigmoid().mean(dim=0) > share
        low, high = torch.where(is_high, low, offset), torch.where(is_high, offset, high)
    return (low + high) / 2


def best_thresholds(scores: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Of each class the threshold with the largest F1, halfway to the next lower score; of equals the highest.

    Args:
        scores: (clips, classes).
        answers: (clips, classes): 1 for yes, 0 for no.

    Returns:
        (classes,)
    """
    ordered, order = scores.sort(dim=0, descending=True)
    right, found = answers.gather(0, order).cumsum(dim=0), torch.arange(1, len(scores) + 1)[:, None]
    f1 = 2 * right / (found + answers.sum(dim=0))
    lower = torch.cat([ordered[1:], ordered[-1:]])
    f1[:-1][ordered[:-1] == ordered[1:]] = -1  # no threshold lies between equal scores
    best = f1.argmax(dim=0, keepdim=True)
    return ((ordered + lower) / 2).gather(0, best)[0]


@torch.no_grad()
def start_from_ridge(
    model: ESResNetForAudioClassification,
    loader: DataLoader,
    make_pictures: Callable[[dict], torch.Tensor],
    accelerator: Accelerator,
    recordings: Sequence[str],
    unlabelled: DataLoader | None = None,
    rounds: int = 0,
) -> None:
    """Sets a classifier to ridge regression on the features of the training clips, as they are: unaugmented.

    What it will be asked about is not augmented, either; features of clips that are played backwards, say, lead it
    astray. Where each class is answered with yes or no, its configuration gets `thresholds`, {class: of its
    probability}.

    Args:
        model: Not wrapped for several processes. It is left in training mode.
        loader: From `evaluation_loader`, of the training clips, prepared. A clip's features are the mean over its
            windows.
        make_pictures: A batch -> `input_values`.
        accelerator: Of the run.
        recordings: What each clip is from.
        unlabelled: Like `loader`, of clips for `self_trained_classifier`, where each clip is of one class.
        rounds: Likewise.
    """

    def pooled(batch):
        with accelerator.autocast():
            return model.esresnet(make_pictures(batch)).pooler_output

    model.eval()
    features, labels = mean_over_windows(accelerator, loader, pooled), loader.dataset.labels
    further = features[:0] if unlabelled is None else mean_over_windows(accelerator, unlabelled, pooled)
    model.train()
    if labels.ndim == 1:
        weight, bias = self_trained_classifier(features, labels, further, model.config.num_labels, rounds)
    else:
        numbers = torch.from_numpy(np.unique(recordings, return_inverse=True)[1])
        weight, bias, thresholds = yes_no_classifier(features, labels, numbers)
        model.config.thresholds = dict(zip(model.config.id2label.values(), thresholds.tolist(), strict=True))
    model.classifier.weight.copy_(weight)
    model.classifier.bias.copy_(bias)


def batch_norm_statistics(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the running means and variances and the counts of batches, by their names in the state dict."""
    return {
        f"{name}.{key}": value.clone()
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for key, value in module.named_buffers()
    }


def estimate_batch_norm_statistics(model: torch.nn.Module, passes: Iterable, accelerator: Accelerator) -> None:
    """Sets batch norm's statistics to the mean over some batches.

    Args:
        model: In whichever mode; is left in training mode.
        passes: Runs the model on a batch each time it is asked for the next.
        accelerator: Of the run, over whose processes statistics are averaged.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of all batches, however few they are
    model.train()
    for _ in passes:
        pass
    for norm, usual in zip(norms, momentum, strict=True):
        norm.momentum = usual
        for statistic in (norm.running_mean, norm.running_var):
            statistic.copy_(accelerator.reduce(statistic, "mean"))
