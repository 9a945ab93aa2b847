"""A classifier in closed form: ridge regression on the features of a frozen network, no epoch of training."""

import torch
import torch.nn.functional as F

# Shares of the mean squared length of the features, between hardly any penalty and hardly anything but it.
PENALTIES = torch.logspace(-4, 2, 25, dtype=torch.float64)
PENALTY_FOR_SINGLE_CLIPS = 0.1
LOGIT_SCALES = torch.logspace(-1, 3, 81, dtype=torch.float64)


def ridge_classifier(
    features: torch.Tensor, labels: torch.Tensor, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares from standardised features to one-hot labels, scaled so that its outputs are logits.

    The penalty has the smallest squared error when each clip in turn is left out (PRESS, which one eigendecomposition
    gives for every penalty); the scale, common to all classes, the smallest cross entropy of the same predictions. No
    clip but the given ones is looked at. Where a class has a single clip, leaving it out leaves nothing to learn it
    from: the penalty is then a tenth of the features' mean squared length.

    Args:
        features: (clips, size).
        labels: (clips,), int64 in 0 .. num_classes - 1.
        num_classes: Classes.

    Returns:
        Weight (num_classes, size) and bias (num_classes,), float32, for the features as they are.
    """
    X, Y = features.double(), F.one_hot(labels, num_classes).double()
    mean, std = X.mean(dim=0), X.std(dim=0, correction=0)
    std = torch.where(std > 1e-6 * std.max(), std, torch.inf)  # what never varies is left out
    X, prior = (X - mean) / std, Y.mean(dim=0)
    values, vectors = torch.linalg.eigh(X @ X.T)
    targets = vectors.T @ (Y - prior)
    unit = values.clamp(min=0).mean()

    def left_out(penalty):
        """Each clip's prediction by all others: exact for a linear smoother whose intercept is not penalised."""
        shrunk = values / (values + penalty)
        leverage = ((vectors.square() * shrunk).sum(dim=1) + 1 / len(X))[:, None]
        return (prior + vectors @ (shrunk[:, None] * targets) - leverage * Y) / (1 - leverage)

    if labels.bincount(minlength=num_classes)[labels].min() > 1:
        errors = torch.stack([(left_out(unit * share) - Y).square().mean() for share in PENALTIES])
        penalty = unit * PENALTIES[errors.argmin()]
    else:
        penalty = unit * PENALTY_FOR_SINGLE_CLIPS
    predictions = left_out(penalty)
    cross_entropy = torch.stack([F.cross_entropy(scale * predictions, labels) for scale in LOGIT_SCALES])
    scale = LOGIT_SCALES[cross_entropy.argmin()]
    weight = scale * (X.T @ vectors @ (targets / (values + penalty)[:, None])).T / std
    return weight.float(), (scale * prior - weight @ mean).float()
