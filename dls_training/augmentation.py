"""Augmentation of waveforms (ESResNet's) and of power spectrograms, a batch at a time and on any device.

Every random choice is made from numbers in [0, 1) that the caller draws for each clip, so that a clip's view depends
on the seed, the epoch and the clip alone, not on the batch, the worker or the process that it falls to.
"""

import torch
import torch.nn.functional as F

from modeling_dls.spectrogram_esresnet import POWER_FLOOR


class WaveformAugmentation:
    """Time inversion, time scaling, then random padding up to or random crop down to a fixed length (ESResNet).

    Attributes:
        NUM_DRAWS: Random numbers per clip, for inversion, scale and position; further ones are ignored.
        length: Samples of a view.
        max_scale: A clip is stretched by max_scale^U(-1, 1), linearly interpolated.
        p_inversion: Probability of playing a clip backwards. (The original's code flips the channel axis instead; this
            does what its paper says.)
    """

    NUM_DRAWS = 3
    MAX_SCALE = 1.25

    def __init__(self, length: int, max_scale: float = MAX_SCALE, p_inversion: float = 0.5):
        self.length = length
        self.max_scale = max_scale
        self.p_inversion = p_inversion

    def __call__(self, waveform: torch.Tensor, lengths: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Makes one view of each clip.

        Args:
            waveform: (batch, channels, samples), each clip filled up to the longest with any finite numbers.
            lengths: (batch,), samples of each clip, int64.
            draws: (batch, NUM_DRAWS) in [0, 1), float64.

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
        # Asking a GPU whether there is anything to do would wait for it; there, doing it for nothing is cheaper.
        may_ask = view.device.type == "cpu"
        if may_ask and not (room > 0).any():
            return view
        threshold = masked_std(waveform, lengths) / 2
        for fallback in (torch.zeros_like(start), room):
            quiet = (room > 0) & (masked_std(view) < threshold)
            if may_ask and not quiet.any():
                break
            again = self._resample(waveform, lengths, scaled, scale, fallback, inverted)
            view = torch.where(quiet[:, None, None], again, view)
        return view

    def _resample(self, waveform, lengths, scaled, scale, start, inverted) -> torch.Tensor:
        """Reads samples start .. start + length - 1 of each inverted, scaled clip."""
        # One affine map takes a view's time to a place in the file; a clip that is inverted is read from its end.
        # Beyond the clip's ends it stays at its first or last sample.
        start, scaled, last = (column.double()[:, None] for column in (start, scaled, lengths - 1))
        step = torch.where(inverted, -1.0, 1.0)[:, None] / scale[:, None]
        first = torch.where(inverted[:, None], last, 0.0)
        ends = torch.cat([first, first + (scaled - 1) * step], dim=1)
        lowest, highest = ends.amin(1, keepdim=True).clamp(min=0), torch.minimum(ends.amax(1, keepdim=True), last)
        time = torch.arange(self.length, dtype=torch.float64, device=waveform.device)
        position = torch.addcmul(first + start * step, time, step).clamp_(lowest, highest)
        left = position.long()
        fraction = position.frac_().to(waveform.dtype)[:, None]
        waveform = F.pad(waveform, (0, 1))  # the last sample needs a next one, of which it takes nothing
        index = left[:, None].expand(-1, waveform.shape[1], -1)
        view = torch.lerp(waveform.gather(2, index), waveform[..., 1:].gather(2, index), fraction)
        if waveform.shape[1] == 1:
            return view
        # Beyond a clip's ends, the mean over channels.
        inside = (time >= -start) & (time < scaled - start)
        return torch.where(inside[:, None], view, view.mean(dim=1, keepdim=True))


class SpectrogramAugmentation:
    """Strong augmentation of power spectrograms, without which small corpora are memorised clip by clip.

    Random resized crop in time and, within each band, in frequency; time inversion; mixing with another clip; gain;
    masks in time and, for each band, in frequency.

    Attributes:
        OVERSAMPLING: How much finer than the network's pictures those to crop from should be: a crop is then as sharp
            as the whole clips that the network sees in evaluation.
        NUM_DRAWS: Random numbers per clip.
        min_time, min_frequency: Smallest share of the picture that a crop keeps.
        max_mix: Largest share of another clip's power.
        gain_db: Largest change of level, in dB, up or down.
        max_time_mask, max_frequency_mask: Largest share of the picture that one mask hides. What is hidden becomes as
            loud as the clip is on average, in dB: silence would be an event of its own.
        floor: Power below which the network hears no difference.
    """

    OVERSAMPLING = 2
    NUM_MASKS = 2
    NUM_BANDS = 3
    NUM_DRAWS = 7 + 2 * NUM_MASKS * (1 + NUM_BANDS)
    MAX_STRENGTH = 1.5  # a crop then keeps a tenth of the time

    def __init__(
        self,
        min_time: float = 0.4,
        min_frequency: float = 0.8,
        max_mix: float = 0.3,
        gain_db: float = 8.0,
        max_time_mask: float = 1 / 6,
        max_frequency_mask: float = 1 / 4,
        floor: float = POWER_FLOOR,
    ):
        self.min_time = min_time
        self.min_frequency = min_frequency
        self.max_mix = max_mix
        self.gain_db = gain_db
        self.max_time_mask = max_time_mask
        self.max_frequency_mask = max_frequency_mask
        self.floor = floor

    @classmethod
    def of_strength(cls, strength: float, floor: float = POWER_FLOOR) -> "SpectrogramAugmentation":
        """The default ranges, all scaled: 0 only plays clips backwards, 1 is the default.

        Args:
            strength: 0 .. MAX_STRENGTH.
            floor: See the attribute.
        """
        default = cls()
        return cls(
            min_time=1 - strength * (1 - default.min_time),
            min_frequency=1 - strength * (1 - default.min_frequency),
            max_mix=strength * default.max_mix,
            gain_db=strength * default.gain_db,
            max_time_mask=strength * default.max_time_mask,
            max_frequency_mask=strength * default.max_frequency_mask,
            floor=floor,
        )

    def __call__(
        self, power: torch.Tensor, draws: torch.Tensor, size: tuple[int, int], partner: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Makes one view of each clip of a batch.

        Args:
            power: (clips, audio_channels, 3, fine height, fine width), above zero, of any precision: the batch, and
                after it what is only mixed into its clips.
            draws: (clips, NUM_DRAWS) in [0, 1).
            size: Height and width of the views.
            partner: (batch,), int64: the number, in `power`, of the clip that is mixed into each, cropped by its own
                draws; None mixes nothing.

        Returns:
            (batch, audio_channels, 3, *size), above zero, float32 at least.
        """
        dtype = torch.promote_types(power.dtype, torch.float32)
        draws = draws.to(dtype)
        view = self.resized_crop(power, draws[:, :4], draws[:, 4] < 0.5, size)
        if partner is not None:
            alone, draws = view[: len(partner)], draws[: len(partner)]
            view = view.index_select(0, partner).lerp_(alone, per_clip(1 - self.max_mix * draws[:, 5]))
        view *= per_clip(10 ** (self.gain_db * (2 * draws[:, 6] - 1) / 10))
        average = view.clamp(min=self.floor).log_().mean(dim=(1, 2, 3, 4), keepdim=True).exp_()
        return view.lerp_(average, self.masked(draws[:, 7:], *size)[:, None])

    def resized_crop(
        self, power: torch.Tensor, draws: torch.Tensor, inverted: torch.Tensor, size: tuple[int, int]
    ) -> torch.Tensor:
        """Stretches a random rectangle, the same in each channel and band, to the whole picture, bilinearly.

        First along frequency, whole rows at a time, then along time: in a third of the time of `F.grid_sample`.
        """
        clips, channels, bands, fine_height, fine_width = power.shape
        upper, lower, below = stretched(self.min_frequency, draws[:, 2:], size[0], fine_height)
        left, right, beyond = stretched(self.min_time, draws[:, :2], size[1], fine_width)
        left, right, beyond = (torch.where(inverted[:, None], t.flip(1), t) for t in (left, right, beyond))
        pictures = torch.arange(clips * channels * bands, device=power.device).view(clips, -1, 1)
        upper, lower = (
            power.reshape(-1, fine_width).index_select(0, (pictures * fine_height + row[:, None]).flatten())
            for row in (upper, lower)
        )
        rows = upper.to(draws.dtype).view(clips, -1, size[0], fine_width)
        rows = rows.lerp_(lower.to(draws.dtype).view_as(rows), below[:, None, :, None]).flatten(1, 2)
        left, right = (rows.gather(2, column[:, None].expand(-1, rows.shape[1], -1)) for column in (left, right))
        return left.lerp_(right, beyond[:, None]).view(clips, channels, bands, *size)

    def masked(self, draws: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Which cells are hidden: (batch, 3, height, width), 1 there and 0 elsewhere."""
        in_time, in_frequency = draws.split([2 * self.NUM_MASKS, 2 * self.NUM_MASKS * self.NUM_BANDS], dim=1)
        columns = hidden_stretches(in_time.view(-1, self.NUM_MASKS, 2), self.max_time_mask, width)
        rows = hidden_stretches(in_frequency.reshape(-1, self.NUM_MASKS, 2), self.max_frequency_mask, height).view(
            -1, self.NUM_BANDS, height
        )
        return torch.maximum(columns.to(draws.dtype)[:, None, None, :], rows.to(draws.dtype)[..., None])


# What a clip's view is made from, whichever of the two are used: the numbers of one never shift those of the other.
NUM_DRAWS = WaveformAugmentation.NUM_DRAWS + SpectrogramAugmentation.NUM_DRAWS


def per_clip(values: torch.Tensor) -> torch.Tensor:
    """(batch,) -> (batch, 1, 1, 1, 1)."""
    return values[:, None, None, None, None]


def stretched(
    min_share: float, draws: torch.Tensor, size: int, fine: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the cells of a random stretch of `fine` cells come from, once it is `size` cells long.

    Args:
        min_share: Smallest share of the cells that the stretch keeps.
        draws: (clips, 2), for its length and its place.
        size, fine: Cells after and before.

    Returns:
        The cells on either side, int64, and how far it is from the first to the second, 0..1: (clips, size) each.
    """
    share = min_share + (1 - min_share) * draws[:, :1]
    middle = torch.arange(size, device=draws.device, dtype=draws.dtype) + 0.5
    position = ((1 - share) * draws[:, 1:] * fine + middle * (share * fine / size) - 0.5).clamp_(0, fine - 1)
    first = position.long()
    return first, (first + 1).clamp_(max=fine - 1), position - first


def hidden_stretches(draws: torch.Tensor, max_share: float, size: int) -> torch.Tensor:
    """Stretches of random length and place: draws (rows, stretches, 2) -> (rows, size), bool."""
    length = (draws[..., 0] * (max_share * size + 1)).floor()
    first = (draws[..., 1] * (size - length + 1)).floor()
    cell = torch.arange(size, device=draws.device)
    inside = (cell >= first[..., None]) & (cell < (first + length)[..., None])
    return inside.any(dim=1)


def masked_std(waveform: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
    """Standard deviation of each clip over its channels and its own samples, all where no lengths are given: (batch,).

    By sums of squares: exact enough to tell a loud crop from a quiet one, and many times faster than torch.std.
    """
    count = torch.full((len(waveform),), waveform[0].numel(), device=waveform.device)
    if lengths is not None:
        beyond = torch.arange(waveform.shape[2], device=waveform.device) >= lengths[:, None]
        waveform, count = waveform.masked_fill(beyond[:, None], 0), lengths * waveform.shape[1]
    spread = waveform.square().sum(dim=(1, 2)) - waveform.sum(dim=(1, 2)).square() / count
    return (spread / (count - 1).clamp(min=1)).clamp(min=0).sqrt()
