"""Recordings -> windows -> batches -> network -> what it says of each window: the way that embed and predict share.

Files are decoded by some threads while others compute spectrograms and the network, a batch each; every thread keeps
to one core, so that none waits for another. What is computed is the same with any number of threads and processes.
"""

import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets_scripts.corpus import SOUND_EXTENSIONS, UNREADABLE_EXTENSIONS, walk_files
from datasets_scripts.errors import AudioError, UserError
from dls_training.waveforms import in_order, one_core_each, resampled, sound_blocks, stream_windows

from .network import TrainedNetwork
from .settings import STANDARD_INPUT
from .tables import table_name

logger = logging.getLogger("dls")

PCM_BLOCK = 1 << 17  # bytes
ALL_EXTENSIONS = SOUND_EXTENSIONS | UNREADABLE_EXTENSIONS


class Recording(NamedTuple):
    """A sound file.

    Attributes:
        part: Number of the part of the work that it belongs to: see `parts`.
        name: In tables: its path as seen from a root folder.
        path: Where it is; `STANDARD_INPUT` stands for that.
    """

    part: int
    name: str
    path: str


class Finding(NamedTuple):
    """What the network says of a window; or the end of a recording.

    Attributes:
        recording: Whose window it is.
        start, end: In samples of the network's rate; both 0 where the recording ends.
        values: (numbers,), float32, once they are computed.
        error: Why it ends here, if it cannot be read any further.
    """

    recording: Recording
    start: int = 0
    end: int = 0
    values: np.ndarray | None = None
    error: str | None = None


def suffix(name: str) -> str:
    """Of a file's name, in lower case."""
    return os.path.splitext(name)[1].lower()


def common_root(inputs: list[Path]) -> Path:
    """The folder below which all inputs are, absolute."""
    return Path(os.path.commonpath([os.path.abspath(path if path.is_dir() else path.parent) for path in inputs]))


def find_files(inputs: list[Path]) -> list[Path]:
    """The sound files that inputs name, in order, each once; also those of formats that cannot be read, to be listed.

    Raises:
        UserError: naming an input that is not there, or holds no sound files.
    """
    found = {}
    for path in inputs:
        if path.is_dir():
            files = [Path(entry.path) for entry in walk_files(path) if suffix(entry.name) in ALL_EXTENSIONS]
            if not files:
                raise UserError(f"{path} holds no sound files (wav, flac, ogg, mp3, aiff, …)")
        elif path.exists():
            files = [path]
        else:
            raise UserError(f"INPUT {path}: there is no such file or folder")
        found |= {os.path.abspath(file): file for file in files}
    return list(found.values())


def decoded(recordings: Iterable[Recording], network: TrainedNetwork, step: int, pcm_rate: int | None, threads: int):
    """Each recording's windows, some at a time, and its end: (findings without values, windows or None)."""

    def windows(recording: Recording) -> Iterator[tuple[list[Finding], torch.Tensor | None]]:
        error = None
        try:
            if recording.path == STANDARD_INPUT:
                blocks = standard_input(pcm_rate or network.extractor.sampling_rate, network)
            else:
                blocks = sound_blocks({"bytes": None, "path": recording.path}, network.extractor)
            for places, found in stream_windows(blocks, network.length, step):
                yield [Finding(recording, *place) for place in places], found
        except AudioError as unreadable:
            error = table_name(unreadable)
            if suffix(recording.path) in UNREADABLE_EXTENSIONS:
                error += "; its format cannot be read: convert it, such as with ffmpeg -i NAME.m4a NAME.wav"
        yield [Finding(recording, error=error)], None

    return in_order(windows, recordings, threads)


def standard_input(rate: int, network: TrainedNetwork) -> Iterator[torch.Tensor]:
    """Raw 16-bit little-endian mono samples: consecutive (audio_channels, samples) at the network's rate.

    Raises:
        AudioError: if there are none.
    """

    def blocks() -> Iterator[torch.Tensor]:
        rest, size = b"", 0
        while data := sys.stdin.buffer.read1(PCM_BLOCK):
            data, size = rest + data, size + len(data)
            rest = data[len(data) // 2 * 2 :]
            if len(data) > 1:
                samples = np.frombuffer(data, "<i2", len(data) // 2).astype(np.float32) / 32768
                yield network.extractor.fit_channels(torch.from_numpy(samples)[None])
        if size < 2:
            raise AudioError("standard input ended before its first sample: expected raw 16-bit mono samples")
        if rest:
            logger.warning(
                f"standard input ended within a sample, after {size} bytes: the last byte is left out. Are these "
                f"16-bit mono samples of {rate} Hz (--sampling_rate)?"
            )

    return resampled(blocks(), rate, network.extractor.sampling_rate)


def batches(
    decoded: Iterable[tuple[list[Finding], torch.Tensor | None]], size: int
) -> Iterator[tuple[list[Finding], list[torch.Tensor]]]:
    """Full batches, whatever the lengths of recordings; but no part of the work shares one with another.

    So a part's batches are the same whenever it is computed, and so are the sums in them to the last bit.
    """
    findings, waveforms = [], []
    for found, windows in decoded:
        for number, finding in enumerate(found):
            if len(waveforms) == size or (findings and finding.recording.part != findings[0].recording.part):
                yield findings, waveforms
                findings, waveforms = [], []
            findings.append(finding)
            if windows is not None:
                waveforms.append(windows[number])
    if findings:
        yield findings, waveforms


def computed(
    batches: Iterable[tuple[list[Finding], list[torch.Tensor]]],
    network: Callable[[torch.Tensor], torch.Tensor],
    threads: int,
) -> Iterator[Finding]:
    """The findings with their values, in order. One batch more is under way than there are threads."""

    def values(waveforms: list[torch.Tensor]) -> Iterator[np.ndarray]:
        return iter(network(torch.stack(waveforms)).numpy() if waveforms else ())

    def finished(findings: list[Finding], under_way: Future) -> Iterator[Finding]:
        found = under_way.result()
        for finding in findings:
            is_window = finding.end > 0
            yield finding._replace(values=next(found)) if is_window else finding

    running = deque()
    with one_core_each(threads) as pool:
        for findings, waveforms in batches:
            running.append((findings, pool.submit(values, waveforms)))
            if len(running) > threads:
                yield from finished(*running.popleft())
        while running:
            yield from finished(*running.popleft())
