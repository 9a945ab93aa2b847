"""One store of clips: decoded stretch by stretch when they are asked for, or cached on disk.

file bytes -> decode a stretch, resample -> (cache) -> … -> power spectrogram -> (cache, where that is asked for) -> …
"""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from datasets_scripts import ClipIdentities
from datasets_scripts.errors import AudioError, UserError
from datasets_scripts.files import json_digest
from modeling_dls.feature_extraction_esresnet import ESResNetFeatureExtractor, fit_length

from .augmentation import SpectrogramAugmentation
from .cache import CachedFolder, gigabytes
from .cores import in_threads
from .settings import TrainingSettings
from .waveforms import read_waveform, resampled_length, window_counts

logger = logging.getLogger("dls")

# A recording much longer than a view is cut to a random stretch of this many views before augmentation, so that an
# hour of audio is neither decoded nor sent to the device, nor padded to by its batch.
MAX_VIEWS_PER_CLIP = 4
CACHE_VERSION = 3  # in the key: raise it when what is cached changes
KEPT_AT_A_TIME = 16  # windows
WAVEFORM_SETTINGS = ("sampling_rate", "audio_channels")
SPECTROGRAM_SETTINGS = (
    *WAVEFORM_SETTINGS,
    *("n_fft", "win_length", "hop_length", "spec_height", "spec_width"),
    *("resize_mode", "frequency_scale", "max_length"),
)
# Training crops from finer pictures; evaluation's are as exact as if they were computed anew. bfloat16's eight bits of
# mantissa are 0.02 dB, and it reaches as far down as float32.
FINE, EXACT = "fine.bin", "exact.bin"
PICTURES = {
    FINE: (SpectrogramAugmentation.OVERSAMPLING, torch.bfloat16, np.uint16),
    EXACT: (1, torch.float32, np.float32),
}
SAMPLES = "samples.bin"


class ClipStore:
    """The clips of some corpora: decoded when asked for, or cached on disk as waveforms or power spectrograms.

    A corpus is cached once for all folds and all runs with the same settings, a row per clip; who needs a part of it
    selects rows. A clip is a row of consecutive windows (`window_starts`), and any of them can be had alone: nothing
    that is read is longer than `MAX_VIEWS_PER_CLIP` windows, however long the file is.

    Attributes:
        lengths: Samples of each clip at the extractor's rate, (clips,).
        windows: Windows of each clip, (clips,).
        caches_spectrograms: Whether power spectrograms are read, and not waveforms.
    """

    def __init__(self, corpora: list[Dataset], extractor: ESResNetFeatureExtractor, settings: TrainingSettings):
        """
        Args:
            corpora: From `load_corpus`, whole.
            extractor: With `max_length` and `audio_channels`.
            settings: Options: `keep_spectrograms`, `keep_waveforms`, `cache_gigabytes`.

        Raises:
            UserError: if the cache cannot be written, or is too small.
            AudioError: naming a file that cannot be decoded.
        """
        self.extractor, self.caches_spectrograms = extractor, settings.keep_spectrograms
        self.audio = concatenate_datasets([corpus.with_format(None).select_columns("audio") for corpus in corpora])
        identities = [ClipIdentities.of(corpus) for corpus in corpora]
        names = [name[0] for clips in identities for name in clips.names()]
        self.row_of = {name: row for row, name in reversed(list(enumerate(names)))}  # where it is first
        self.stretches = np.concatenate([clips.stretch for clips in identities]).tolist()
        rate = extractor.sampling_rate
        frames = [pair for c in corpora for pair in zip(c["num_frames"][:], c["sampling_rate"][:], strict=True)]
        if lower := sum(own_rate < rate for _, own_rate in frames):
            logger.warning(
                f"{lower} of {len(frames)} clips have a lower rate than the network's {rate} Hz, and nothing in the "
                "frequencies above: --sampling_rate can bring the others down to it"
            )
        self.lengths = np.array([resampled_length(length, own_rate, rate) for length, own_rate in frames])
        self.windows = window_counts(self.lengths, extractor.max_length)
        self.first_window = np.cumsum(self.windows) - self.windows
        self.first_sample = extractor.audio_channels * (np.cumsum(self.lengths) - self.lengths)
        self.corpora = np.cumsum([0, *map(len, corpora)])  # where the rows of each begin
        self.folders: list[CachedFolder] = []  # which are in use for as long as these are
        self.samples, self.pictures = [], {name: [] for name in PICTURES}
        for number, clips in enumerate(identities):
            rows = range(*self.corpora[number : number + 2])
            if settings.keep_spectrograms:
                folder = self._cached(
                    "spectrograms", SPECTROGRAM_SETTINGS, clips, rows, self._write_pictures, settings
                )
                count = self.windows[rows].sum()
                for name, (_, _, stored) in PICTURES.items():
                    shape = (count, *folder.index[name])
                    self.pictures[name].append(np.memmap(folder.path / name, stored, "r", shape=shape))
            elif settings.keep_waveforms:
                folder = self._cached("waveforms", WAVEFORM_SETTINGS, clips, rows, self._write_samples, settings)
                # "c": torch wants memory that it might write to; nothing is written, and nothing would reach the file.
                self.samples.append(np.memmap(folder.path / SAMPLES, np.float32, "c"))

    def __len__(self) -> int:
        return len(self.lengths)

    def rows_of(self, clips: Dataset) -> np.ndarray:
        """Where clips are that were selected from the corpora, or combined of them: (clips,)."""
        return np.array([self.row_of[name[0]] for name in ClipIdentities.of(clips).names()], int)

    def for_training(self, rows: np.ndarray, draws: np.ndarray) -> dict[str, torch.Tensor]:
        """One stretch of each clip, to make a view of.

        Args:
            rows: (batch,)
            draws: (batch,) in [0, 1), which stretch of a long clip.

        Returns:
            `signal`, waveforms (batch, audio_channels, samples), each filled up to the longest, or power spectrograms
            (batch, audio_channels, 3, fine height, fine width); and `lengths` (batch,), samples before filling up.
        """
        if self.caches_spectrograms:
            numbers = self.first_window[rows] + (draws * self.windows[rows]).astype(int)
            return {"signal": self._pictures(FINE, numbers), "lengths": torch.from_numpy(self.lengths[rows])}
        longest = MAX_VIEWS_PER_CLIP * self.extractor.max_length
        firsts = (draws * (np.maximum(self.lengths[rows] - longest, 0) + 1)).astype(int)
        waveforms = self.read([(row, first, first + longest) for row, first in zip(rows, firsts, strict=True)])
        signal = pad_sequence([waveform.T for waveform in waveforms], batch_first=True).transpose(1, 2).contiguous()
        return {"signal": signal, "lengths": torch.tensor([waveform.shape[1] for waveform in waveforms])}

    def for_evaluation(self, rows: np.ndarray, windows: np.ndarray) -> dict[str, torch.Tensor]:
        """One window of each clip, by the numbers of both, (batch,): like `for_training`, all of one length."""
        lengths = torch.full((len(rows),), self.extractor.max_length)
        if self.caches_spectrograms:
            return {"signal": self._pictures(EXACT, self.first_window[rows] + windows), "lengths": lengths}
        return {"signal": self.window_waveforms(rows, windows), "lengths": lengths}

    def window_waveforms(self, rows: np.ndarray, windows: np.ndarray) -> torch.Tensor:
        """(batch, audio_channels, max_length); a clip that is one window is cropped or padded centrally."""
        requests, length = [], self.extractor.max_length
        for row, window in zip(rows.tolist(), windows.tolist(), strict=True):
            whole = self.windows[row] == 1
            first = 0 if whole else min(window * length, self.lengths[row] - length)
            requests.append((row, first, self.lengths[row] if whole else first + length))
        return torch.stack([fit_length(waveform, length) for waveform in self.read(requests)])

    def read(self, requests: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        """Waveforms of (row, first sample, end): each (audio_channels, samples), shorter where the clip ends before.

        Raises:
            AudioError: naming a file that cannot be decoded, or has become shorter since it was checked.
        """
        requests = [(int(row), int(first), int(min(last, self.lengths[row]))) for row, first, last in requests]
        if self.samples:
            return [self._kept_waveform(*request) for request in requests]
        cells = self.audio[[row for row, _, _ in requests]]["audio"]

        def decode(job) -> torch.Tensor:
            cell, (row, first, last) = job
            waveform = read_waveform(cell, self.extractor, first, last, self.stretches[row])
            if waveform.shape[1] < last - first:
                raise AudioError(f"{cell['path'] or 'embedded clip'}: has become shorter since it was checked")
            return waveform

        return in_threads(decode, list(zip(cells, requests, strict=True)))

    def _corpus(self, row: int) -> int:
        return np.searchsorted(self.corpora, row, side="right") - 1

    def _kept_waveform(self, row: int, first: int, last: int) -> torch.Tensor:
        corpus, channels = self._corpus(row), self.extractor.audio_channels
        start = self.first_sample[row] - self.first_sample[self.corpora[corpus]]
        samples = self.samples[corpus][start : start + channels * self.lengths[row]]
        return torch.from_numpy(samples).view(-1, channels)[first:last].T

    def _pictures(self, name: str, numbers: np.ndarray) -> torch.Tensor:
        """Power spectrograms, by the numbers of their windows in the whole store."""
        cached, (_, dtype, stored) = self.pictures[name], PICTURES[name]
        starts = np.cumsum([0, *map(len, cached)])
        corpus = np.searchsorted(starts, numbers, side="right") - 1
        pictures = np.empty((len(numbers), *cached[0].shape[1:]), stored)
        for which in np.unique(corpus):
            pictures[corpus == which] = cached[which][numbers[corpus == which] - starts[which]]
        return torch.from_numpy(pictures).view(dtype)

    def _cached(
        self, what: str, signal: tuple[str, ...], clips: ClipIdentities, rows: range, write: Callable, settings
    ) -> CachedFolder:
        """The folder with what is cached of a corpus."""
        key = json_digest([CACHE_VERSION, [getattr(self.extractor, name) for name in signal], clips.digest_of_all()])
        limit = settings.cache_gigabytes
        folder = CachedFolder(f"{what}-{key}", lambda path: write(path, rows, Room(what, limit)), limit)
        logger.info(f"{what} of {len(rows)} clips are cached in {folder.path} ({gigabytes(folder.path):.2f} GB)")
        self.folders.append(folder)
        return folder

    @torch.no_grad()
    def _write_pictures(self, path: Path, rows: range, room: "Room") -> dict:
        """Decodes every window once, for both kinds of pictures. Returns their shapes."""
        shapes, clips = {}, np.repeat(rows, self.windows[rows])
        windows = np.arange(len(clips)) + self.first_window[clips[0]] - self.first_window[clips]
        with (path / FINE).open("wb") as fine, (path / EXACT).open("wb") as exact:
            for part in room.parts(len(clips)):
                for waveforms in self.window_waveforms(clips[part], windows[part]).split(8):
                    for file, (name, (oversampling, dtype, _)) in zip((fine, exact), PICTURES.items(), strict=True):
                        power = self.extractor.power(waveforms, oversampling).to(dtype).contiguous()
                        room.fill(file, power)
                        shapes[name] = power.shape[1:]
        return shapes

    def _write_samples(self, path: Path, rows: range, room: "Room") -> dict:
        step = KEPT_AT_A_TIME * self.extractor.max_length
        with (path / SAMPLES).open("wb") as file:
            for part in room.parts(len(rows)):
                for row in rows[part]:
                    for first in range(0, self.lengths[row], step):
                        room.fill(file, self.read([(row, first, first + step)])[0].T)
        return {}


class Room:
    """Writes a cache, within the space that there is for it, and shows how far it has come."""

    def __init__(self, what: str, max_gigabytes: float):
        self.what, self.max_gigabytes, self.bytes = what, max_gigabytes, 0

    def parts(self, count: int):
        """Slices of so many clips or windows, a few at a time."""
        with tqdm(desc=f"keeping {self.what}", total=count, unit=" clips", leave=False) as bar:
            for start in range(0, count, KEPT_AT_A_TIME):
                yield slice(start, start + KEPT_AT_A_TIME)
                bar.update(min(KEPT_AT_A_TIME, count - start))

    def fill(self, file, tensor: torch.Tensor) -> None:
        """Appends a tensor's numbers.

        Raises:
            UserError: if there is no room.
        """
        raw = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()
        self.bytes += raw.nbytes
        if self.bytes > self.max_gigabytes * 1e9:
            raise UserError(
                f"--keep_{self.what}: more than {self.max_gigabytes:g} GB are needed; raise --cache_gigabytes, or "
                f"leave --keep_{self.what} out"
            )
        file.write(raw.data)
