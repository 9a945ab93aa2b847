"""Statistics pooling: what a spectrogram and every stage's output hold, row by row and over time."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from .configuration_esresnet import ESResNetConfig


def averaged_rows(picture: torch.Tensor, rows: int) -> torch.Tensor:
    """(batch, channels, height, width) -> (batch, channels, rows, width), by the cheapest exact way."""
    if picture.shape[2] % rows:
        return F.adaptive_avg_pool2d(picture, (rows, picture.shape[3]))
    neighbours = picture.unflatten(2, (rows, -1)).unbind(3)
    return sum(neighbours[1:], start=neighbours[0]) / len(neighbours)


class RowStatistics(torch.autograd.Function):
    """Mean, standard deviation, maximum and mean absolute change along each row of a picture.

    What torch's own operators and their gradients give, but in passes that are vectorised over the channels of
    channels-last pictures (`var_mean` is not), and with one gradient instead of five that have to be added up.
    """

    EPSILON = 1e-4  # in the variance: where nothing varies, the square root has no gradient

    @staticmethod
    def forward(picture: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) -> (batch, 4, channels, height), float32 at least."""
        frames, time = RowStatistics.frames(picture)
        mean = frames.mean(time, keepdim=True)
        deviation = (frames - mean).square_().mean(time, keepdim=True).add_(RowStatistics.EPSILON).sqrt_()
        changes = RowStatistics.changes(frames, time)
        change = changes.abs_().sum(time, keepdim=True) / max(changes.shape[time], 1)
        statistics = torch.stack([mean, deviation, frames.amax(time, keepdim=True), change], dim=1).squeeze(time + 1)
        return statistics if time == 3 else statistics.transpose(2, 3)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        picture, statistics = ctx.saved_tensors
        frames, time = RowStatistics.frames(picture)
        # Each (batch, channels, height, 1), or in the order of the frames' dimensions.
        (mean, deviation, maximum, _), (of_mean, of_deviation, of_maximum, of_change) = (
            (t if time == 3 else t.transpose(2, 3)).contiguous().unsqueeze(time + 1).unbind(1)
            for t in (statistics, gradient)
        )
        length = frames.shape[time]
        total = torch.addcmul(of_mean / length, frames - mean, of_deviation / (length * deviation))
        # Frames that share the maximum share its gradient. A mask of bool would take several times as long to make.
        is_maximum = torch.ge(frames, maximum, out=torch.empty_like(frames))
        total.addcmul_(is_maximum, of_maximum / is_maximum.sum(time, keepdim=True))
        changes = RowStatistics.changes(frames, time).sign_().mul_(of_change / max(length - 1, 1))
        total.narrow(time, 1, length - 1).add_(changes)
        total.narrow(time, 0, length - 1).sub_(changes)
        return (total if time == 3 else total.permute(0, 3, 1, 2)).to(picture.dtype)

    @staticmethod
    def frames(picture: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The picture with its dimensions in the order in which they lie in memory, and which of them is time."""
        # Half precision is too coarse for a variance.
        picture = picture if picture.dtype == torch.float64 else picture.float()
        return (picture, 3) if picture.is_contiguous() else (picture.permute(0, 2, 3, 1), 2)

    @staticmethod
    def changes(frames: torch.Tensor, time: int) -> torch.Tensor:
        """From each frame to the next."""
        return frames.narrow(time, 1, frames.shape[time] - 1) - frames.narrow(time, 0, frames.shape[time] - 1)


class StatisticsPooling(nn.Module):
    """Mean, deviation, maximum and change over time of the spectrogram and of every stage's output, row by row.

    A sound's class shows in how much there is at which pitch, how it varies, how far it rises and how fast; a mean
    over the last stage's few cells keeps little of that, and the first stages know it as well as the last. Each number
    is standardised over clips by a batch norm without scale and shift, so that no stage drowns another.

    Attributes:
        rows: Rows that each picture's height is averaged to.
        norm: The batch norm.
    """

    def __init__(self, config: ESResNetConfig):
        super().__init__()
        self.rows = config.pooled_rows
        self.norm = nn.BatchNorm1d(config.hidden_size, affine=False)

    def forward(self, pictures: list[torch.Tensor]) -> torch.Tensor:
        """Pools (batch, audio_channels, channels, height, width) pictures -> (batch, hidden_size).

        For each picture: the means of all its channels and rows, then the standard deviations, the maxima, and the
        mean absolute differences between neighbouring frames (zero where there is one frame only).
        """
        statistics = []
        for picture, rows in zip(pictures, self.rows, strict=True):
            picture = picture.flatten(0, 1)
            if picture.shape[2] != rows:
                picture = averaged_rows(picture if picture.dtype == torch.float64 else picture.float(), rows)
            statistics.append(RowStatistics.apply(picture).flatten(1))
        pooled = torch.cat(statistics, dim=1).unflatten(0, pictures[0].shape[:2]).sum(dim=1)
        mean = self.norm.running_mean  # of a model that was cast as a whole, of its type
        return self.norm(pooled if mean is None else pooled.to(mean.dtype))
