"""What is computed once from each clip and kept on disk: its decoded waveform, or its power spectrograms.

A clip then costs a read from a memory-mapped file instead of decoding, and a Fourier transform where spectrograms are
kept.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock
from tqdm.auto import tqdm

from modeling_dls.feature_extraction_esresnet import ESResNetFeatureExtractor

from .arguments import UserError
from .checkpoints import folder_moved_into_place, write_json
from .waveforms import DecodedWaveforms, evaluation_windows

logger = logging.getLogger("dls")

FORMAT_VERSION = 2  # in the key: raise it when what is kept changes
DATA_FILE, INDEX_FILE = "data.bin", "index.json"
CLIPS_AT_A_TIME = 16
WAVEFORM_SETTINGS = ("sampling_rate", "audio_channels")
SPECTROGRAM_SETTINGS = (
    *WAVEFORM_SETTINGS,
    "n_fft",
    "win_length",
    "hop_length",
    "spec_height",
    "spec_width",
    "resize_mode",
    "frequency_scale",
    "max_length",
)


class KeptWaveforms:
    """The decoded, resampled waveform of every clip, memory-mapped, float32.

    Attributes:
        ends: Where each clip ends in `samples`, (clips,).
        samples: (audio_channels * all samples,): each clip's channels one after the other.
    """

    def __init__(self, folder: Path):
        """
        Args:
            folder: From `keep_waveforms`.
        """
        index = read_index(folder)
        self.channels, self.ends = index["channels"], np.cumsum(index["lengths"]) * index["channels"]
        # "c": torch wants memory that it might write to; nothing is written, and nothing would reach the file.
        self.samples = np.memmap(folder / DATA_FILE, np.float32, "c")

    def read(self, clips: list[int]) -> list[torch.Tensor]:
        """(audio_channels, samples) of each row number, in mapped memory."""
        starts = [self.ends[clip - 1] if clip else 0 for clip in clips]
        return [
            torch.from_numpy(self.samples[start : self.ends[clip]]).view(self.channels, -1)
            for start, clip in zip(starts, clips, strict=True)
        ]


class KeptSpectrograms:
    """The power spectrograms of every clip's consecutive windows, memory-mapped.

    Attributes:
        windows: Windows of each clip, (clips,).
        first: Number of each clip's first window, (clips,).
        power: (windows, audio_channels, 3, height, width): float32, or the bits of bfloat16 as uint16.
    """

    def __init__(self, folder: Path):
        """
        Args:
            folder: From `keep_spectrograms`.
        """
        index = read_index(folder)
        self.windows = np.array(index["windows"])
        self.first = np.cumsum(self.windows) - self.windows
        dtype = {"float32": np.float32, "bfloat16": np.uint16}[index["dtype"]]
        self.power = np.memmap(folder / DATA_FILE, dtype, "r", shape=(int(self.windows.sum()), *index["shape"]))

    def read(self, clips: np.ndarray, draws: np.ndarray) -> torch.Tensor:
        """One window of each clip: (batch, audio_channels, 3, height, width).

        Args:
            clips: (batch,), row numbers.
            draws: (batch,) in [0, 1), which window.
        """
        return self._read(self.first[clips] + (draws * self.windows[clips]).astype(int))

    def read_all(self, clips: np.ndarray) -> torch.Tensor:
        """Every window of each clip, one clip after the other: (windows, audio_channels, 3, height, width)."""
        return self._read(np.concatenate([np.arange(self.windows[c]) + self.first[c] for c in clips]))

    def _read(self, rows: np.ndarray) -> torch.Tensor:
        power = torch.from_numpy(self.power[rows])
        return power if power.dtype == torch.float32 else power.view(torch.bfloat16)


def keep_waveforms(rows: Dataset, extractor: ESResNetFeatureExtractor, max_gigabytes: float) -> KeptWaveforms:
    """Decodes and resamples the clips of a corpus, or finds what an earlier run kept: see `keep`."""

    def write(add, waveforms):
        add(waveforms)
        return [waveform.shape[1] for waveform in waveforms]

    def index(lengths):
        return {"channels": extractor.audio_channels, "lengths": lengths}

    settings = {name: getattr(extractor, name) for name in WAVEFORM_SETTINGS}
    return KeptWaveforms(keep("waveforms", rows, extractor, settings, write, index, max_gigabytes))


def keep_spectrograms(
    rows: Dataset,
    extractor: ESResNetFeatureExtractor,
    oversampling: int,
    max_gigabytes: float,
    dtype: torch.dtype = torch.bfloat16,
) -> KeptSpectrograms:
    """Computes the power spectrograms of a corpus's clips, or finds what an earlier run kept: see `keep`.

    Args:
        rows, max_gigabytes: See `keep`.
        extractor: With `max_length`.
        oversampling: See `ESResNetFeatureExtractor.power`.
        dtype: bfloat16's eight bits of mantissa are 0.02 dB, and it reaches as far down as float32.
    """
    shape = []

    @torch.no_grad()
    def write(add, waveforms):
        windows = [evaluation_windows(waveform, extractor.max_length) for waveform in waveforms]
        for part in torch.cat(windows).split(8):
            power = extractor.power(part, oversampling).to(dtype).contiguous()
            shape[:] = power.shape[1:]
            add([power])
        return [len(own) for own in windows]

    def index(windows):
        return {"windows": windows, "shape": shape, "dtype": str(dtype).removeprefix("torch.")}

    settings = {name: getattr(extractor, name) for name in SPECTROGRAM_SETTINGS}
    settings |= {"oversampling": oversampling, "dtype": str(dtype)}
    return KeptSpectrograms(keep("spectrograms", rows, extractor, settings, write, index, max_gigabytes))


def keep(
    what: str,
    rows: Dataset,
    extractor: ESResNetFeatureExtractor,
    settings: dict,
    write: Callable,
    index: Callable[[list[int]], dict],
    max_gigabytes: float,
) -> Path:
    """The folder with what is kept of a corpus's clips: an earlier run's, or a new one.

    It lies in the cache of `datasets` (`HF_DATASETS_CACHE`), under a key of the clips' content and the settings. Two
    processes that want the same compute it once.

    Args:
        what: "waveforms" or "spectrograms".
        rows: The clips, with their `digest`.
        extractor: Gives the rate and the number of channels.
        settings: All that the result depends on, beside the clips.
        write: Takes a function that appends tensors to the data, and waveforms; returns a number for each clip.
        index: Those numbers of all clips -> what is needed to read the data.
        max_gigabytes: Of all that is kept: what was not used for longest is deleted to make room.

    Raises:
        UserError: if it is larger than that, or cannot be written.
        AudioError: naming a file that cannot be decoded.
    """
    key = hashlib.blake2b(digest_size=16)
    key.update(json.dumps([FORMAT_VERSION, what, settings]).encode())
    key.update("\n".join(rows["digest"][:]).encode())
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "dls_kept"
    folder = cache / f"{what}-{key.hexdigest()}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{folder.name}.lock"):
        if not folder.is_dir():
            for leftover in cache.glob(f".{folder.name}.*"):  # of a run that was killed meanwhile
                shutil.rmtree(leftover)
            with folder_moved_into_place(folder) as unfinished:
                numbers = write_data(unfinished / DATA_FILE, what, rows, extractor, write, max_gigabytes)
                write_json(unfinished / INDEX_FILE, index(numbers))
        os.utime(folder)
    make_room(cache, folder, max_gigabytes)
    logger.info(f"{what} of {len(rows)} clips are kept in {folder} ({gigabytes(folder):.2f} GB)")
    return folder


def write_data(path: Path, what: str, rows: Dataset, extractor, write: Callable, max_gigabytes: float) -> list[int]:
    """Computes a few clips at a time and appends them: memory does not grow with the corpus."""
    numbers, waveforms = [], DecodedWaveforms(rows, extractor)
    with (
        path.open("wb") as file,
        tqdm(desc=f"keeping {what}", total=len(rows), unit=" clips", leave=False) as bar,
    ):

        def add(tensors: list[torch.Tensor]) -> None:
            for tensor in tensors:
                raw = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
                file.write(raw.contiguous().numpy().data)

        for start in range(0, len(rows), CLIPS_AT_A_TIME):
            clips = list(range(start, min(start + CLIPS_AT_A_TIME, len(rows))))
            numbers += write(add, waveforms.read(clips))
            bar.update(len(clips))
            if file.tell() > max_gigabytes * 1e9:
                raise UserError(
                    f"--keep_{what}: more than {max_gigabytes:g} GB are needed; raise --cache_gigabytes, or leave "
                    f"--keep_{what} out"
                )
    return numbers


def read_index(folder: Path) -> dict:
    return json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))


def gigabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*")) / 1e9


def make_room(cache: Path, newest: Path, max_gigabytes: float) -> None:
    """Deletes what was not used for longest, but never `newest`. Who has a file mapped keeps its content."""
    for leftover in cache.glob(".*"):  # of runs that were killed, and never started again
        if time.time() - leftover.stat().st_mtime > 24 * 3600:
            shutil.rmtree(leftover, ignore_errors=True)
    left = max_gigabytes - gigabytes(newest)
    kept = [path for path in cache.iterdir() if path.is_dir() and path != newest and not path.name.startswith(".")]
    for folder in sorted(kept, key=lambda path: path.stat().st_mtime, reverse=True):
        left -= gigabytes(folder)
        if left < 0:
            logger.info(f"{folder} is deleted: --cache_gigabytes is {max_gigabytes:g}")
            shutil.rmtree(folder, ignore_errors=True)
