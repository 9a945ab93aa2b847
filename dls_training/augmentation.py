"""ESResNet's waveform augmentation, a batch at a time and on any device.

Every random choice is made from numbers in [0, 1) that the caller draws for each clip, so that a clip's view depends
on the seed, the epoch and the clip alone, not on the batch, the worker or the process that it falls to.
"""

import torch

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
        time = torch.arange(self.length, device=waveform.device) + start[:, None]
        outside = (time < 0) | (time >= scaled[:, None])
        time = torch.minimum(time.clamp_(min=0), scaled[:, None] - 1)
        last = lengths[:, None] - 1
        position = torch.minimum(time / scale[:, None], last.double())
        left = position.long()
        fraction = (position - left).to(waveform.dtype)[:, None]
        right = torch.minimum(left + 1, last)
        left = torch.where(inverted[:, None], last - left, left)
        right = torch.where(inverted[:, None], last - right, right)
        view = torch.lerp(gather_time(waveform, left), gather_time(waveform, right), fraction)
        if view.shape[1] == 1:  # the mean over one channel is the edge sample, which is there already
            return view
        return torch.where(outside[:, None], view.mean(dim=1, keepdim=True), view)


def gather_time(waveform: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(batch, channels, samples) and (batch, length) -> (batch, channels, length)."""
    return waveform.gather(2, index[:, None].expand(-1, waveform.shape[1], -1))


def masked_std(waveform: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each clip over its channels and its own samples: (batch,)."""
    valid = (torch.arange(waveform.shape[2], device=waveform.device) < lengths[:, None])[:, None]
    count = lengths * waveform.shape[1]
    mean = (waveform * valid).sum(dim=(1, 2)) / count
    deviation = (waveform - mean[:, None, None]) * valid
    return (deviation.square().sum(dim=(1, 2)) / (count - 1).clamp(min=1)).sqrt()
