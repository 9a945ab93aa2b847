"""File bytes -> decode -> resample -> waveforms of the extractor's rate and channels, a batch at a time."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
import torchaudio
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import get_worker_info

from datasets_scripts import AudioError, decode_audio
from modeling_dls.feature_extraction_esresnet import ESResNetFeatureExtractor, fit_length

# A clip's last window is dropped where less than this share of it would be new (files a few samples over length).
MIN_NEW_SHARE = 0.1


@lru_cache(maxsize=16)
def _resampler(source_rate: int, target_rate: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(source_rate, target_rate)


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="decoding")


def _in_threads(work: Callable, items: list) -> list:
    """`work` of each item, on every core. Decoding leaves Python's lock alone, so threads are enough."""
    if len(items) < 2 or get_worker_info() is not None:  # a decoding process has brothers on the other cores
        return [work(item) for item in items]
    return list(_pool().map(work, items))


def load_waveforms(cells: Iterable[dict], extractor: ESResNetFeatureExtractor) -> list[torch.Tensor | AudioError]:
    """Decodes clips, fits their channels and resamples them, all of one rate in one operation.

    Args:
        cells: `{"bytes", "path"}` each, cells of a corpus's audio column.
        extractor: Gives the rate and the number of channels.

    Returns:
        For each clip (audio_channels, samples), float32; or, naming the file, why it cannot be decoded or has more
        channels than can be fitted.
    """

    def decode(cell: dict) -> tuple[torch.Tensor | AudioError, int]:
        try:
            samples, rate = decode_audio(cell)
            return extractor.fit_channels(torch.from_numpy(samples)), rate
        except AudioError as error:
            return error, 0
        except ValueError as error:
            return AudioError(f"{cell['path'] or 'embedded clip'}: {error}"), 0

    decoded = _in_threads(decode, list(cells))
    waveforms, rates = [waveform for waveform, _ in decoded], [rate for _, rate in decoded]
    for rate in set(rates) - {0, extractor.sampling_rate}:
        own = [number for number, found in enumerate(rates) if found == rate]
        for number, waveform in zip(own, resample([waveforms[n] for n in own], rate, extractor), strict=True):
            waveforms[number] = waveform
    return waveforms


def resample(waveforms: list[torch.Tensor], rate: int, extractor: ESResNetFeatureExtractor) -> list[torch.Tensor]:
    """Clips of one rate, each (audio_channels, samples), to the extractor's rate."""
    lengths = [-(-waveform.shape[1] * extractor.sampling_rate // rate) for waveform in waveforms]
    # The filter sees zeros beyond a clip's end, whether they are padding or not.
    padded = pad_sequence([waveform.T for waveform in waveforms], batch_first=True).transpose(1, 2)
    resampled = _resampler(rate, extractor.sampling_rate)(padded.contiguous())
    return [clip[:, :length] for clip, length in zip(resampled, lengths, strict=True)]


def load_waveform(audio: dict, extractor: ESResNetFeatureExtractor) -> torch.Tensor:
    """One clip of `load_waveforms`: (audio_channels, samples).

    Raises:
        AudioError: naming the file, if it cannot be decoded, or has more channels than can be fitted.
    """
    (waveform,) = load_waveforms([audio], extractor)
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


def evaluation_windows(waveform: torch.Tensor, length: int) -> torch.Tensor:
    """Consecutive windows of a clip; a clip no longer than one is padded centrally: (windows, channels, length).

    The last window ends with the clip, unless it would bring next to nothing new.
    """
    samples = waveform.shape[1]
    if samples <= length * (1 + MIN_NEW_SHARE):
        return fit_length(waveform, length)[None]
    count = -int(-(samples - MIN_NEW_SHARE * length) // length)
    starts = [min(i * length, samples - length) for i in range(count)]
    return torch.stack([waveform[:, start : start + length] for start in starts])
