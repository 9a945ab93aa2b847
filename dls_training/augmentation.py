"""ESResNet's waveform augmentation, a batch at a time and on any device.

Every random choice is made from numbers in [0, 1) that the caller draws for each clip, so that a clip's view depends
on the seed, the epoch and the clip alone, not on the batch, the worker or the process that it falls to.
"""

import torch
import torch.nn.functional as F

NUM_DRAWS = 3  # per clip: time inversion, time scaling, position


class WaveformAugmentation:
    """Time inversion, time scaling, then random padding up to or random crop down to a fixed length (ESResNet).

    Attributes:
        length: Samples of a view.
        max_scale: A clip is stretched by max_scale^U(-1, 1), linearly interpolated.
        p_inversion: Probability of playing a clip backwards. (The original's code flips the channel axis instead; this
            does what its paper says.)
    """

    def __init__(self, length: int, max_scale: float = 1.25, p_inversion: float = 0.5):
        self.length = length
        self.max_scale = max_scale
        self.p_inversion = p_inversion

    def __call__(self, waveform: torch.Tensor, lengths: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Makes one view of each clip.

        Args:
            waveform: (batch, channels, samples), each clip filled up to the longest with anything.
            lengths: (batch,), samples of each clip, int64.
            draws: (batch, 3) in [0, 1), float64.

        Returns:
            (batch, channels, length). Padding repeats the mean over channels of the first and of the last sample; a
            crop much quieter than its clip (standard deviation below half) gives way to the clip's head, and that,
            where it is as quiet, to its tail.
        """
        inverted = draws[:, 0] < self.p_inversion
        scale = self.max_scale ** (2 * draws[:, 1] - 1)
        scaled = (lengths * scale).long().clamp_(min=1)
        # Room to move: a crop starts at 0 .. scaled - length, padding shifts the clip by 0 .. length - scaled.
        room = scaled - self.length
        start = (draws[:, 2] * (room.abs() + 1)).long() * room.sign()
        view = self._resample(waveform, lengths, scaled, scale, start, inverted)
        threshold = masked_std(waveform, lengths) / 2
        for fallback in (torch.zeros_like(start), room):
            quiet = (room > 0) & (view.flatten(1).std(dim=1) < threshold)
            # Asking a GPU whether any clip is quiet would wait for it; there, doing the work for nothing is cheaper.
            if view.device.type == "cpu" and not quiet.any():
                break
            again = self._resample(waveform, lengths, scaled, scale, fallback, inverted)
            view = torch.where(quiet[:, None, None], again, view)
        return view

    def _resample(self, waveform, lengths, scaled, scale, start, inverted) -> torch.Tensor:
        """Reads samples start .. start + length - 1 of each inverted, scaled clip."""
        last = (lengths - 1).double()[:, None]
        time = torch.arange(self.length, dtype=torch.float64, device=waveform.device) + start[:, None]
        inside = None
        if waveform.shape[1] > 1:
            inside = ((time >= 0) & (time < scaled[:, None]))[:, None]
        # One affine map takes a view's time to a place in the file; a clip that is inverted is read from its end.
        direction = torch.where(inverted, -1.0, 1.0)[:, None]
        position = time.clamp_(min=0).clamp_(max=scaled[:, None] - 1).mul_(direction / scale[:, None])
        position = position.add_(torch.where(inverted[:, None], last, 0.0)).clamp_(min=0).clamp_(max=last)
        left = position.long().clamp_(max=(lengths[:, None] - 2).clamp(min=0))
        fraction = position.sub_(left).to(waveform.dtype)[:, None]
        if waveform.shape[2] == 1:
            waveform = F.pad(waveform, (0, 1))
        index = left[:, None].expand(-1, waveform.shape[1], -1)
        view = torch.lerp(waveform.gather(2, index), waveform[..., 1:].gather(2, index), fraction)
        # Beyond a clip's ends, its first or last sample: of several channels, their mean.
        return view if inside is None else torch.where(inside, view, view.mean(dim=1, keepdim=True))


def masked_std(waveform: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each clip over its channels and its own samples: (batch,)."""
    beyond = torch.arange(waveform.shape[2], device=waveform.device) >= lengths[:, None]
    own = waveform.masked_fill(beyond[:, None], 0)
    count = lengths * waveform.shape[1]
    variance = (own.square().sum(dim=(1, 2)) - own.sum(dim=(1, 2)).square() / count) / (count - 1).clamp(min=1)
    return variance.clamp(min=0).sqrt()
