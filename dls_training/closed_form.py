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
    gives for every penalty, of clips x clips or of size x size, whichever is smaller); the scale, common to all
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
    X, Y = features.double(), F.one_hot(labels, num_classes).double()
    mean, std = X.mean(dim=0), X.std(dim=0, correction=0)
    std = torch.where(std > 1e-6 * std.max(), std, torch.inf)  # what never varies is left out
    X, prior = (X - mean) / std, Y.mean(dim=0)
    # The clips' principal components: X X' = P P' with orthogonal columns, whose squared lengths are the eigenvalues.
    if len(X) < X.shape[1]:
        values, vectors = torch.linalg.eigh(X @ X.T)
        P = vectors * values.clamp(min=0).sqrt()
    else:
        values, vectors = torch.linalg.eigh(X.T @ X)
        P = X @ vectors
    values, squares, targets = values.clamp(min=0), P.square(), P.T @ (Y - prior)
    unit = (values.sum() / len(X)).clamp(min=1)  # the number of features that vary, each with mean square 1

    def fitted(penalty):
        return prior + P @ (targets / (values + penalty)[:, None])

    def left_out(penalty):
        """Each clip's prediction by all others: exact for a linear smoother whose intercept is not penalised."""
        leverage = (squares @ (1 / (values + penalty)) + 1 / len(X))[:, None]
        return (fitted(penalty) - leverage * Y) / (1 - leverage)

    if labels.bincount(minlength=num_classes)[labels].min() > 1:
        errors = torch.stack([(left_out(unit * share) - Y).square().mean() for share in PENALTIES])
        penalty = unit * PENALTIES[errors.argmin()]
    else:
        penalty = unit * PENALTY_FOR_SINGLE_CLIPS
    predictions = left_out(penalty)
    cross_entropy = torch.stack([F.cross_entropy(scale * predictions, labels) for scale in LOGIT_SCALES])
    scale = LOGIT_SCALES[cross_entropy.argmin()]
    # Ridge's weights, whichever side was decomposed: the features times what they leave unexplained, over the penalty.
    weight = scale * ((Y - fitted(penalty)).T @ X / penalty) / std
    return weight.float(), (scale * prior - weight @ mean).float()
