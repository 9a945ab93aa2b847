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
            power: (clips, audio_channels, 3, fine height, fine width), above zero: the batch, and after it what is
                only mixed into its clips.
            draws: (clips, NUM_DRAWS) in [0, 1).
            size: Height and width of the views.
            partner: (batch,), int64: the number, in `power`, of the clip that is mixed into each, cropped by its own
                draws; None mixes nothing.

        Returns:
            (batch, audio_channels, 3, *size), above zero.
        """
        draws = draws.to(power.dtype)
        view = self.resized_crop(power, draws[:, :4], draws[:, 4] < 0.5, size)
        if partner is not None:
            draws = draws[: len(partner)]
            view = torch.lerp(view[: len(partner)], view[partner], per_clip(self.max_mix * draws[:, 5]))
        view = view * per_clip(10 ** (self.gain_db * (2 * draws[:, 6] - 1) / 10))
        average = view.clamp(min=self.floor).log().mean(dim=(1, 2, 3, 4), keepdim=True).exp()
        return torch.where(self.masked(draws[:, 7:], *size)[:, None], average, view)

    def resized_crop(
        self, power: torch.Tensor, draws: torch.Tensor, inverted: torch.Tensor, size: tuple[int, int]
    ) -> torch.Tensor:
        """Stretches a random rectangle, the same in each channel and band, to the whole picture."""
        width = self.min_time + (1 - self.min_time) * draws[:, 0]
        height = self.min_frequency + (1 - self.min_frequency) * draws[:, 2]
        # In the coordinates of grid_sample the picture reaches from -1 to 1.
        centre_x, centre_y = (1 - width) * (2 * draws[:, 1] - 1), (1 - height) * (2 * draws[:, 3] - 1)
        zero = torch.zeros_like(width)
        to_source = torch.stack(
            [torch.where(inverted, -width, width), zero, centre_x, zero, height, centre_y], dim=1
        ).view(-1, 2, 3)
        pictures = power.flatten(1, 2)
        grid = F.affine_grid(to_source, (*pictures.shape[:2], *size), align_corners=False)
        view = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
        return view.unflatten(1, power.shape[1:3])

    def masked(self, draws: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Which cells are hidden: (batch, 3, height, width), bool."""
        in_time, in_frequency = draws.split([2 * self.NUM_MASKS, 2 * self.NUM_MASKS * self.NUM_BANDS], dim=1)
        columns = hidden_stretches(in_time.view(-1, self.NUM_MASKS, 2), self.max_time_mask, width)
        rows = hidden_stretches(in_frequency.reshape(-1, self.NUM_MASKS, 2), self.max_frequency_mask, height).view(
            -1, self.NUM_BANDS, height
        )
        return columns[:, None, None, :] | rows[..., None]


# What a clip's view is made from, whichever of the two are used: the numbers of one never shift those of the other.
NUM_DRAWS = WaveformAugmentation.NUM_DRAWS + SpectrogramAugmentation.NUM_DRAWS


def per_clip(values: torch.Tensor) -> torch.Tensor:
    """(batch,) -> (batch, 1, 1, 1, 1)."""
    return values[:, None, None, None, None]


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
