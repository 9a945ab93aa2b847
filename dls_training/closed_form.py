"""A classifier in closed form: ridge regression on the features of a frozen network, no epoch of training."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.nn.modules.batchnorm import _BatchNorm  # of one process, or synchronised over several
from torch.utils.data import DataLoader

from modeling_dls import ESResNetForAudioClassification

VIEWS = 4  # of each clip, whose features are averaged

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


@torch.no_grad()
def start_from_ridge(
    model: ESResNetForAudioClassification,
    loader: DataLoader,
    make_views: Callable[[dict], torch.Tensor],
    accelerator: Accelerator,
    estimate_statistics: bool,
) -> None:
    """Sets a classifier to ridge regression on the features of augmented views of the training clips.

    Args:
        model: Not wrapped for several processes. It is left in training mode.
        loader: Of the training clips, prepared.
        make_views: A batch -> `input_values`.
        accelerator: Of the run.
        estimate_statistics: Whether batch norm's are taken of the same clips first: a random network's describe none.
    """

    def pooled(batch):
        with accelerator.autocast():
            return model.esresnet(make_views(batch)).pooler_output.float()

    if estimate_statistics:
        estimate_batch_norm_statistics(model, map(pooled, loader), accelerator)
    clips = len(loader.dataset)
    features = torch.zeros(clips, model.config.hidden_size, device=accelerator.device)
    views = torch.zeros(clips, device=accelerator.device)
    labels = torch.zeros(clips, dtype=torch.int64, device=accelerator.device)
    model.eval()
    for epoch in range(VIEWS):
        loader.set_epoch(epoch)
        for batch in loader:
            rows = batch["index"], batch["labels"], pooled(batch)
            index, own_labels, vectors = accelerator.gather_for_metrics(rows)
            features.index_add_(0, index, vectors)
            views.index_add_(0, index, torch.ones_like(index, dtype=views.dtype))
            labels[index] = own_labels
    model.train()
    seen = views > 0  # the sampler may leave a clip out of an epoch
    mean = features[seen] / views[seen, None]
    weight, bias = ridge_classifier(mean.cpu(), labels[seen].cpu(), model.config.num_labels)
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
