"""A stretch of a file -> decoded, resampled samples of the extractor's rate and channels, in bounded memory."""

import contextlib
import itertools
import math
import queue
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch

from datasets_scripts.audio import Sound, opened_sound
from datasets_scripts.errors import AudioError, UserError
from datasets_scripts.identity import WHOLE
from modeling_dls import torchaudio_guard
from modeling_dls.feature_extraction_esresnet import (
    ESResNetFeatureExtractor,
    beyond_first,
    evaluation_windows,
    window_starts,
)
from modeling_dls.spectrogram_esresnet import cached_tensors

# Numbers in a resampler's filter. A rate without a common factor, such as 44101 Hz, would need gigabytes.
LARGEST_FILTER = 2**25
# torch goes on without releases of torchaudio: beside a newer torch this one is the newest, built for CUDA 13.
NEWEST_TORCHAUDIO = (2, 11)
AHEAD = 1  # results of an item that wait to be asked for
WINDOWS_AT_A_TIME = 4  # of a recording that is read from its beginning to its end


@cached_tensors(maxsize=16)
def _resampler(source_rate: int, target_rate: int) -> torch.nn.Module:
    try:
        from torchaudio.transforms import Resample
    except ImportError as error:
        raise UserError(torchaudio_advice(torchaudio_guard.PROBLEM or error)) from error
    return Resample(workable_rate(source_rate, target_rate), target_rate)


def torchaudio_advice(error: Exception) -> str:
    """What to install where torchaudio cannot be loaded: it says itself of no torch that it needs another."""
    release = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if release <= NEWEST_TORCHAUDIO:
        pair = f"'torchaudio=={release[0]}.{release[1]}.*'"
    else:
        newest = ".".join(map(str, NEWEST_TORCHAUDIO))
        pair = f"'torch=={newest}.*' 'torchaudio=={newest}.*'"
    return (
        f"sounds of another rate than the network's are resampled by torchaudio, which cannot be loaded beside torch "
        f"{torch.__version__} ({str(error).splitlines()[0]}): pip install {pair}, from where torch was installed from "
        "(PyTorch's index for CPUs, or for the same CUDA)"
    )


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
        parts.append(_fitted(block, sound, extractor))
    waveform = torch.cat(parts, dim=1)
    if resampler:
        waveform = resampler(waveform)
    offset = first - group * given
    return waveform[:, offset : None if last is None else offset + last - first]


def _fitted(block: np.ndarray, sound: Sound, extractor) -> torch.Tensor:
    try:
        return extractor.fit_channels(torch.from_numpy(block))
    except ValueError as error:
        raise AudioError(f"{sound.name}: {error}") from error


def one_core_each(threads: int) -> ThreadPoolExecutor:
    """Threads whose operators do not spread over other cores, where they would wait for one another's."""
    return ThreadPoolExecutor(threads, "one core", torch.set_num_threads, (1,))


def in_order(work: Callable[[object], Iterable], items: Iterable, at_a_time: int) -> Iterator:
    """What `work` gives of each item, one item after the other, though threads work on several at a time.

    None of them is more than `AHEAD` results ahead of who asks, so that memory is bounded. Each computes on one core.
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
                if given_up.is_set():  # the rest of an item may be hours
                    return
            put(ended)
        except BaseException as error:
            put(error)

    items = iter(items)
    with one_core_each(at_a_time) as pool:
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


def window_counts(samples: np.ndarray, length: int) -> np.ndarray:
    """How many `window_starts` clips of so many samples have, (clips,)."""
    return 1 + np.maximum(0, np.ceil(beyond_first(samples, length) / length)).astype(int)


def resampled(blocks: Iterable[torch.Tensor], source_rate: int, target_rate: int) -> Iterator[torch.Tensor]:
    """Consecutive parts (channels, any number of samples) of a sound, as if it had been resampled as a whole."""
    taken, given = ratio(source_rate, target_rate)
    if taken == given:
        yield from blocks
        return
    resampler = _resampler(source_rate, target_rate)
    margin = -(-resampler.width // taken) + 1  # groups of samples that the filter looks at beside its own
    waiting, done = None, 0  # of whose groups so many were given out, and are there for their successors' sake
    for block in blocks:
        waiting = block if waiting is None else torch.cat([waiting, block], dim=1)
        ready = waiting.shape[1] // taken - margin
        if ready > done:
            yield resampler(waiting)[:, done * given : ready * given]
            first = max(ready - margin, 0)
            waiting, done = waiting[:, first * taken :], ready - first
    if waiting is not None:
        yield resampler(waiting)[:, done * given :]


def sound_blocks(
    audio: dict, extractor: ESResNetFeatureExtractor, stretch: tuple[float, float] = WHOLE
) -> Iterator[torch.Tensor]:
    """A file, or a stretch of it (in s), from beginning to end: (audio_channels, samples) at the extractor's rate.

    Raises:
        AudioError: see `read_waveform`.
    """
    with opened_sound(audio) as sound:
        blocks = (_fitted(block, sound, extractor) for block in sound.blocks(*stretch))
        yield from resampled(blocks, sound.sampling_rate, extractor.sampling_rate)


def stream_windows(
    blocks: Iterable[torch.Tensor], length: int, step: int | None = None
) -> Iterator[tuple[list[tuple[int, int]], torch.Tensor]]:
    """The windows of a sound whose length nobody knows before its end: those of `window_starts`.

    Args:
        blocks: Consecutive (channels, samples), such as `sound_blocks`.
        length, step: In samples; see `window_starts`.

    Yields:
        Where some windows start and end, and the windows, (some, channels, length). Where one holds the sound, it is
        padded centrally.
    """
    step = step or length
    parts, samples, first = [], 0, 0  # what no window was made of so far, and where it begins
    for block in blocks:
        parts.append(block)
        samples += block.shape[1]
        # Two are left at least: where the last begins and ends depends on where the sound does.
        while beyond_first(samples, length) > WINDOWS_AT_A_TIME * step:
            waveform, starts = torch.cat(parts, dim=1), range(first, first + WINDOWS_AT_A_TIME * step, step)
            windows = waveform.unfold(1, length, step)[:, :WINDOWS_AT_A_TIME].transpose(0, 1)
            yield [(start, start + length) for start in starts], windows
            parts = [waveform[:, WINDOWS_AT_A_TIME * step :].clone()]
            samples, first = parts[0].shape[1], starts.stop
    waveform = torch.cat(parts, dim=1)
    starts = window_starts(samples, length, step)
    # The last stands for what would bring next to nothing new, too: files end with it.
    ends = [*(start + length for start in starts[:-1]), samples]
    places = [(first + start, first + end) for start, end in zip(starts, ends, strict=True)]
    yield places, evaluation_windows(waveform, length, step)
