"""File bytes -> decode -> resample -> waveforms of the extractor's rate and channels, on every core."""

import itertools
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
import torchaudio
from datasets import Dataset
from torch.utils.data import get_worker_info

from datasets_scripts import AudioError, decode_audio
from modeling_dls.feature_extraction_esresnet import ESResNetFeatureExtractor, cached_tensors, fit_length

# Numbers in a resampler's filter. A rate without a common factor, such as 44101 Hz, would need gigabytes.
LARGEST_FILTER = 2**25
# A clip's last window is dropped where less than this share of it would be new (files a few samples over length).
MIN_NEW_SHARE = 0.1


@cached_tensors(maxsize=16)
def _resampler(source_rate: int, target_rate: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(_workable_rate(source_rate, target_rate), target_rate)


def _workable_rate(source_rate: int, target_rate: int) -> int:
    """The source's rate, or the nearest one that needs no larger filter than `LARGEST_FILTER`: inaudibly off pitch."""

    def filter_size(rate: int) -> int:
        return rate * target_rate // math.gcd(rate, target_rate) ** 2

    nearby = (source_rate + sign * step for step in itertools.count() for sign in (-1, 1))
    return next(rate for rate in nearby if rate > 0 and filter_size(rate) <= LARGEST_FILTER)


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="decoding")


def _in_threads(work: Callable, items: list) -> list:
    """`work` of each item, on every core. Decoding leaves Python's lock alone, so threads are enough."""
    if len(items) < 2 or get_worker_info() is not None:  # a decoding process has brothers on the other cores
        return [work(item) for item in items]
    return list(_pool().map(work, items))


def load_waveforms(
    cells: Iterable[dict], extractor: ESResNetFeatureExtractor, max_seconds: float | None = None
) -> list[torch.Tensor | AudioError]:
    """Decodes clips, fits their channels and resamples them.

    Each clip by itself: the rounding of a convolution over several would depend on which of them share a batch.

    Args:
        cells: `{"bytes", "path"}` each, cells of a corpus's audio column.
        extractor: Gives the rate and the number of channels.
        max_seconds: Load no more than each clip's beginning; None loads all.

    Returns:
        For each clip (audio_channels, samples), float32; or, naming the file, why it cannot be decoded or has more
        channels than can be fitted.
    """

    def load(cell: dict) -> torch.Tensor | AudioError:
        try:
            samples, rate = decode_audio(cell, end=math.inf if max_seconds is None else max_seconds)
            waveform = extractor.fit_channels(torch.from_numpy(samples))
        except AudioError as error:
            return error
        except ValueError as error:
            return AudioError(f"{cell['path'] or 'embedded clip'}: {error}")
        return waveform if rate == extractor.sampling_rate else _resampler(rate, extractor.sampling_rate)(waveform)

    return _in_threads(load, list(cells))


def load_waveform(audio: dict, extractor: ESResNetFeatureExtractor, max_seconds: float | None = None) -> torch.Tensor:
    """One clip of `load_waveforms`: (audio_channels, samples).

    Raises:
        AudioError: naming the file, if it cannot be decoded, or has more channels than can be fitted.
    """
    (waveform,) = load_waveforms([audio], extractor, max_seconds)
    if isinstance(waveform, AudioError):
        raise waveform
    return waveform


class DecodedWaveforms:
    """Waveforms that are decoded each time they are asked for."""

    def __init__(self, rows: Dataset, extractor: ESResNetFeatureExtractor):
        self.rows = rows.select_columns("audio")
        self.extractor = extractor

    def read(self, clips: list[int]) -> list[torch.Tensor]:
        """(audio_channels, samples) of each row number.

        Raises:
            AudioError: naming the file.
        """
        waveforms = load_waveforms(self.rows[clips]["audio"], self.extractor)
        for waveform in waveforms:
            if isinstance(waveform, AudioError):
                raise waveform
        return waveforms


def window_starts(samples: int, length: int) -> list[int]:
    """Where the consecutive windows of a clip begin; [0] where one holds it.

    The last window ends with the clip, unless it would bring next to nothing new.
    """
    if samples <= length * (1 + MIN_NEW_SHARE):
        return [0]
    count = -int(-(samples - MIN_NEW_SHARE * length) // length)
    return [min(i * length, samples - length) for i in range(count)]


def evaluation_windows(waveform: torch.Tensor, length: int) -> torch.Tensor:
    """A clip from each of its `window_starts` on: (windows, channels, length). Where one holds it, it is padded
    centrally.
    """
    starts = window_starts(waveform.shape[1], length)
    if len(starts) == 1:
        return fit_length(waveform, length)[None]
    return torch.stack([waveform[:, start : start + length] for start in starts])
