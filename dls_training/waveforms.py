"""A stretch of a file -> decoded, resampled samples of the extractor's rate and channels, in bounded memory."""

import contextlib
import itertools
import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
import torchaudio

from datasets_scripts.audio import Sound, opened_sound
from datasets_scripts.errors import AudioError
from datasets_scripts.identity import WHOLE
from datasets_scripts.windows import MIN_NEW_SHARE
from modeling_dls.feature_extraction_esresnet import ESResNetFeatureExtractor, fit_length
from modeling_dls.spectrogram_esresnet import cached_tensors

# Numbers in a resampler's filter. A rate without a common factor, such as 44101 Hz, would need gigabytes.
LARGEST_FILTER = 2**25
AHEAD = 2
WINDOWS_AT_A_TIME = 16  # of a recording that is read from its beginning to its end


@cached_tensors(maxsize=16)
def _resampler(source_rate: int, target_rate: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(workable_rate(source_rate, target_rate), target_rate)


@lru_cache(maxsize=64)
def workable_rate(source_rate: int, target_rate: int) -> int:
    """The source's rate, or the nearest one that needs no larger filter than `LARGEST_FILTER`: inaudibly off pitch."""

    def filter_size(rate: int) -> int:
        return rate * target_rate // math.gcd(rate, target_rate) ** 2

    nearby = (source_rate + sign * step for step in itertools.count() for sign in (-1, 1))
    return next(rate for rate in nearby if rate > 0 and filter_size(rate) <= LARGEST_FILTER)


def ratio(source_rate: int, target_rate: int) -> tuple[int, int]:
    """Samples that resampling takes, and gives, at a time: (44100, 22050) -> (2, 1)."""
    source_rate = workable_rate(source_rate, target_rate)
    divisor = math.gcd(source_rate, target_rate)
    return source_rate // divisor, target_rate // divisor


def resampled_length(frames: int, source_rate: int, target_rate: int) -> int:
    """Samples that so many frames become."""
    taken, given = ratio(source_rate, target_rate)
    return -(-frames * given // taken)


def frames_of(stretch: tuple[float, float], num_frames: int, rate: int) -> tuple[int, int]:
    """First frame of a stretch (in s), and its end, in a file of so many frames."""
    start, end = stretch
    return round(start * rate), num_frames if math.isinf(end) else min(num_frames, round(end * rate))


def read_waveform(
    audio: dict,
    extractor: ESResNetFeatureExtractor,
    first: int = 0,
    last: int | None = None,
    stretch: tuple[float, float] = WHOLE,
) -> torch.Tensor:
    """Decodes a part of a clip, fits its channels and resamples it, as if it had been cut out of the resampled whole.

    No more is decoded than this part and what the resampling filter sees beside it.

    Args:
        audio: `{"bytes", "path"}`, a cell of a corpus's audio column.
        extractor: Gives the rate and the number of channels.
        first, last: Samples at the extractor's rate; None reads to the end.
        stretch: Of the file, in s, that is the clip.

    Returns:
        (audio_channels, samples), float32; fewer than were asked for where the clip ends.

    Raises:
        AudioError: naming the file, if it cannot be decoded, or has more channels than can be fitted.
    """
    with opened_sound(audio) as sound:
        return _read(sound, extractor, first, last, stretch)


def _read(sound: Sound, extractor, first: int, last: int | None, stretch) -> torch.Tensor:
    rate = sound.sampling_rate
    begin, end = frames_of(stretch, sound.num_frames, rate)
    taken, given = ratio(rate, extractor.sampling_rate)
    resampler = None if taken == given else _resampler(rate, extractor.sampling_rate)
    # Whole groups of samples, so that the filter meets them as in the whole, and those that it looks at beside them.
    margin = -(-resampler.width // taken) + 1 if resampler else 0
    group = max(first // given - margin, 0)
    start = begin + group * taken
    stop = end if last is None else min(end, begin + (-(-last // given) + margin) * taken)
    if start >= stop and first:  # a file without any sound is said to be that
        return torch.empty(extractor.audio_channels, 0)
    parts, to_the_end = [], stop == end and math.isinf(stretch[1])
    for block in sound.blocks(start / rate, math.inf if to_the_end else stop / rate):
        try:
            parts.append(extractor.fit_channels(torch.from_numpy(block)))
        except ValueError as error:
            raise AudioError(f"{sound.name}: {error}") from error
    waveform = torch.cat(parts, dim=1)
    if resampler:
        waveform = resampler(waveform)
    offset = first - group * given
    return waveform[:, offset : None if last is None else offset + last - first]


def in_order(work: Callable[[object], Iterable], items: Iterable, at_a_time: int) -> Iterator:
    """What `work` gives of each item, one item after the other, though threads work on several at a time.

    None of them is more than `AHEAD` results ahead of who asks, so that memory is bounded.
    """
    ended, given_up = object(), threading.Event()

    def run(item, results: queue.Queue) -> None:
        def put(result) -> None:
            while not given_up.is_set():
                with contextlib.suppress(queue.Full):
                    return results.put(result, timeout=1)

        try:
            for result in work(item):
                put(result)
            put(ended)
        except BaseException as error:
            put(error)

    items = iter(items)
    with ThreadPoolExecutor(at_a_time, thread_name_prefix="decoding") as pool:
        waiting = deque()
        try:
            while True:
                for item in itertools.islice(items, at_a_time - len(waiting)):
                    waiting.append(queue.Queue(AHEAD))
                    pool.submit(run, item, waiting[-1])
                if not waiting:
                    return
                while (result := waiting[0].get()) is not ended:
                    if isinstance(result, BaseException):
                        raise result
                    yield result
                waiting.popleft()
        finally:
            given_up.set()


def window_starts(samples: int, length: int) -> list[int]:
    """Where the consecutive windows of a clip begin; [0] where one holds it.

    The last window ends with the clip, unless it would bring next to nothing new.
    """
    count = int(window_counts(np.array([samples]), length)[0])
    return [0] if count == 1 else [min(i * length, samples - length) for i in range(count)]


def window_counts(samples: np.ndarray, length: int) -> np.ndarray:
    """How many `window_starts` clips of so many samples have, (clips,)."""
    return np.maximum(1, np.ceil((samples - MIN_NEW_SHARE * length) / length)).astype(int)


def evaluation_windows(waveform: torch.Tensor, length: int) -> torch.Tensor:
    """A clip from each of its `window_starts` on: (windows, channels, length). Where one holds it, it is padded
    centrally.
    """
    starts = window_starts(waveform.shape[1], length)
    if len(starts) == 1:
        return fit_length(waveform, length)[None]
    return torch.stack([waveform[:, start : start + length] for start in starts])


def stream_windows(
    audio: dict, extractor: ESResNetFeatureExtractor
) -> Iterator[tuple[list[tuple[int, int]], torch.Tensor]]:
    """The `evaluation_windows` of a whole file, whose length nobody knows before it has been decoded.

    Args:
        audio: A cell of a corpus's audio column.
        extractor: With `max_length`.

    Yields:
        Where some windows start and end, in samples of the extractor's rate, and the windows, (some, channels,
        max_length).

    Raises:
        AudioError: see `read_waveform`.
    """
    length, first = extractor.max_length, 0
    with opened_sound(audio) as sound:
        waveform = torch.empty(extractor.audio_channels, 0)
        while True:
            # Two windows more than are given out: what the last ones are depends on where the sound ends.
            wanted = (WINDOWS_AT_A_TIME + 2) * length
            start = first + waveform.shape[1]
            new = _read(sound, extractor, start, first + wanted, WHOLE)
            waveform = torch.cat([waveform, new], dim=1)
            if waveform.shape[1] < wanted:
                starts = window_starts(waveform.shape[1], length)
                # The last stands for what would bring next to nothing new, too: files end with it.
                ends = [*(start + length for start in starts[:-1]), waveform.shape[1]]
                places = [(first + start, first + end) for start, end in zip(starts, ends, strict=True)]
                yield places, evaluation_windows(waveform, length)
                return
            given = waveform[:, : WINDOWS_AT_A_TIME * length].unflatten(1, (WINDOWS_AT_A_TIME, length))
            yield (
                [(first + i * length, first + (i + 1) * length) for i in range(WINDOWS_AT_A_TIME)],
                given.transpose(0, 1),
            )
            waveform = waveform[:, WINDOWS_AT_A_TIME * length :].clone()
            first += WINDOWS_AT_A_TIME * length
