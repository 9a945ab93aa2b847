"""The feature extractor as products of matrices, which every runtime has and is fast at: a graph needs no FFT.

An FFT operator would be slower (onnxruntime's, eight times), and a whole DFT matrix larger than the network. The
transform of n_fft = A x B samples is two short ones instead (Cooley and Tukey), with factors between them.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from modeling_dls import ESResNetFeatureExtractor
from modeling_dls.spectrogram_esresnet import NUM_BANDS, POWER_FLOOR, _analysis_window, _mel_filters, power_to_decibel


def divisors(n_fft: int) -> tuple[int, int]:
    """(A, B) with A x B = n_fft, as equal as can be, the larger first."""
    smaller = next(divisor for divisor in range(math.isqrt(n_fft), 0, -1) if n_fft % divisor == 0)
    return n_fft // smaller, smaller


def turns(rows: torch.Tensor, columns: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Real and imaginary part of exp(-2 pi i row column / length), float64."""
    angle = (-2 * math.pi / length) * (rows[:, None] * columns % length)
    return angle.cos(), angle.sin()


def resizing(size: int, target: int, mode: str) -> torch.Tensor:
    """What resizes a column of `size` numbers, as `three_band_power` does: (target, size)."""
    identity = torch.eye(size)[:, None]
    if mode == "area":
        return F.interpolate(identity, target, mode="area")[:, 0].T.contiguous()
    return F.interpolate(identity, target, mode="linear", align_corners=True)[:, 0].T.contiguous()


class GraphSpectrogram(nn.Module):
    """`ESResNetFeatureExtractor.spectrogram` of one length, the same but for rounding.

    Attributes:
        filters, rows, columns: Matrices that are mostly zeros, and are stored so; each may be None.
    """

    def __init__(self, extractor: ESResNetFeatureExtractor, length: int):
        """
        Args:
            extractor: Whose settings hold.
            length: Of the waveforms, in samples.
        """
        super().__init__()
        self.extractor = extractor
        n_fft, hop = extractor.n_fft, extractor.hop_length
        self.num_frames = length // hop + 1
        self.first, self.second = divisors(n_fft)
        # Of a real signal's spectrum the other half is known.
        self.half = self.first // 2 + 1
        slow, fast, half = (torch.arange(size, dtype=torch.float64) for size in (self.first, self.second, self.half))
        window = _analysis_window(extractor.win_length, n_fft, torch.float32, torch.device("cpu"))
        self.window = nn.Buffer(window)
        self.transform_slow = nn.Buffer(torch.cat(turns(half, slow, self.first)).float())
        self.factors = nn.Buffer(torch.stack(turns(half, fast, n_fft)).float())
        real, imaginary = turns(fast, fast, self.second)
        parts = torch.cat([torch.cat([real, imaginary], 1), torch.cat([-imaginary, real], 1)])
        self.transform_fast = nn.Buffer(parts.float())
        # Where the transform leaves each frequency; the upper half's are the lower's, mirrored.
        cells = torch.arange(self.half)[:, None] + self.first * torch.arange(self.second)
        cells = torch.minimum(cells, n_fft - cells).flatten()
        place = torch.empty(n_fft // 2 + 1, dtype=torch.int64).scatter_(0, cells, torch.arange(len(cells)))
        filters = columns = rows = None
        height, width = extractor.spec_height, extractor.spec_width
        if extractor.frequency_scale == "mel":
            count, self.band_height = NUM_BANDS * height, height
            mel = _mel_filters(count, n_fft, extractor.sampling_rate, torch.float32, torch.device("cpu"))
            filters = torch.zeros(len(cells), count).index_copy_(0, place, mel)
        else:
            self.band_height = len(place) // NUM_BANDS
            if height not in (None, self.band_height):
                columns = resizing(self.band_height, height, extractor.resize_mode).T.contiguous()
        if width not in (None, self.num_frames):
            rows = resizing(self.num_frames, width, extractor.resize_mode)
        self.place = nn.Buffer(place[: NUM_BANDS * self.band_height])
        self.filters, self.columns, self.rows = (
            each if each is None else nn.Buffer(each) for each in (filters, columns, rows)
        )

    def frames(self, waveform: torch.Tensor) -> torch.Tensor:
        """(batch, samples) -> (batch, frames, win_length): what the centred STFT analyses, up to a shift in time."""
        hop, length, n_fft = self.extractor.hop_length, self.extractor.win_length, self.extractor.n_fft
        before = n_fft // 2 - (n_fft - length) // 2
        whole = (self.num_frames - 1) * hop + length
        after = max(0, whole - before - waveform.shape[1])
        padded = F.pad(waveform[:, None], (before, after), mode="reflect")[:, 0]
        # Frames overlap: each is some neighbouring blocks of a hop, and is copied block by block.
        blocks = -(-length // hop)
        total = (self.num_frames - 1 + blocks) * hop
        padded = F.pad(padded, (0, max(0, total - padded.shape[1])))[:, :total].unflatten(1, (-1, hop))
        return torch.cat([padded[:, block : block + self.num_frames] for block in range(blocks)], dim=2)[..., :length]

    def power(self, waveform: torch.Tensor) -> torch.Tensor:
        """(batch, samples) -> (batch, frames, cells)."""
        frames = self.frames(waveform) * self.window
        frames = F.pad(frames, (0, self.extractor.n_fft - frames.shape[-1]))
        slow = self.transform_slow @ frames.unflatten(2, (self.first, self.second))
        (real, imaginary), (cosine, sine) = slow.split(self.half, dim=2), self.factors
        turned = torch.cat([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=3)
        squares = (turned @ self.transform_fast).square()
        power = squares[..., : self.second] + squares[..., self.second :]
        return power.clamp(min=POWER_FLOOR).flatten(2)

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        """(batch, audio_channels, samples) -> (batch, audio_channels, 3, height, width)."""
        power = self.power(waveform.flatten(0, 1))
        power = power @ self.filters if self.filters is not None else power[..., self.place]
        power = power.unflatten(2, (NUM_BANDS, self.band_height)).transpose(1, 2)
        if self.columns is not None:
            power = power @ self.columns
        if self.rows is not None:
            power = self.rows @ power
        normalised = self.extractor.do_normalize
        settings = (self.extractor.min_db, self.extractor.mean, self.extractor.std) if normalised else ()
        return power_to_decibel(power.transpose(2, 3), *settings).unflatten(0, waveform.shape[:2])
