"""Power spectrograms that are computed once and kept on disk, for augmentation that happens after them.

A clip's sound then costs a read from a memory-mapped file instead of decoding and a Fourier transform.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from modeling_dls.feature_extraction_esresnet import ESResNetFeatureExtractor

from .arguments import UserError
from .checkpoints import folder_moved_into_place, write_json

logger = logging.getLogger("dls")

FORMAT_VERSION = 1  # in the key: raise it when what is kept changes
POWER_FILE = "power.bin"
WINDOWS_FILE = "windows.json"
SIGNAL_SETTINGS = (
    "sampling_rate",
    "n_fft",
    "win_length",
    "hop_length",
    "spec_height",
    "spec_width",
    "resize_mode",
    "max_length",
    "audio_channels",
)


class KeptSpectrograms:
    """The power spectrograms of every clip's consecutive windows, memory-mapped.

    bfloat16: its eight bits of mantissa are 0.02 dB, and it reaches as far down as float32.

    Attributes:
        windows: Windows of each clip, (clips,).
        first: Number of each clip's first window, (clips,).
        power: (windows, audio_channels, 3, height, width), the bits of bfloat16 as uint16.
    """

    def __init__(self, folder: Path):
        """
        Args:
            folder: From `keep_spectrograms`.
        """
        content = json.loads((folder / WINDOWS_FILE).read_text(encoding="utf-8"))
        self.windows = np.array(content["windows"])
        self.first = np.cumsum(self.windows) - self.windows
        shape = (int(self.windows.sum()), *content["shape"])
        self.power = np.memmap(folder / POWER_FILE, np.uint16, "r", shape=shape)

    def read(self, clips: np.ndarray, draws: np.ndarray) -> torch.Tensor:
        """One window of each clip: (batch, audio_channels, 3, height, width), bfloat16.

        Args:
            clips: (batch,), row numbers.
            draws: (batch,) in [0, 1), which window.
        """
        rows = self.first[clips] + (draws * self.windows[clips]).astype(int)
        return torch.from_numpy(self.power[rows]).view(torch.bfloat16)


def keep_spectrograms(
    rows: Dataset, loader: DataLoader, extractor: ESResNetFeatureExtractor, oversampling: int, max_gigabytes: float
) -> KeptSpectrograms:
    """Computes the spectrograms of a corpus's clips, or finds those that an earlier run kept.

    They lie in the cache of `datasets` (`HF_DATASETS_CACHE`), under a key of the clips' content and the settings. Two
    processes that want the same ones compute them once.

    Args:
        rows: The clips, with their `digest`.
        loader: From `evaluation_loader`, of these rows.
        extractor: With `max_length`.
        oversampling: See `ESResNetFeatureExtractor.power`.
        max_gigabytes: Of all that is kept: what was not used for longest is deleted to make room.

    Raises:
        UserError: if they are larger than that, or cannot be written.
        AudioError: naming a file that cannot be decoded.
    """
    settings = {name: getattr(extractor, name) for name in SIGNAL_SETTINGS}
    key = hashlib.blake2b(digest_size=16)
    key.update(json.dumps([FORMAT_VERSION, settings, oversampling]).encode())
    key.update("\n".join(rows["digest"][:]).encode())
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "dls_spectrograms"
    folder = cache / key.hexdigest()
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{folder.name}.lock"):
        if not folder.is_dir():
            for leftover in cache.glob(f".{folder.name}.*"):  # of a run that was killed meanwhile
                shutil.rmtree(leftover)
            with folder_moved_into_place(folder) as unfinished:
                write_spectrograms(unfinished, loader, extractor, oversampling, max_gigabytes)
        os.utime(folder)
    make_room(cache, folder, max_gigabytes)
    logger.info(f"spectrograms of {len(rows)} clips are kept in {folder} ({gigabytes(folder):.2f} GB)")
    return KeptSpectrograms(folder)


@torch.no_grad()
def write_spectrograms(folder: Path, loader: DataLoader, extractor, oversampling: int, max_gigabytes: float) -> None:
    """Computes a batch at a time and appends it: memory does not grow with the corpus."""
    windows, shape = [], None
    with (
        (folder / POWER_FILE).open("wb") as file,
        tqdm(desc="keeping spectrograms", total=len(loader.dataset), unit=" clips", leave=False) as bar,
    ):
        for batch in loader:
            for part in batch["windows"].split(8):
                power = extractor.power(part, oversampling).to(torch.bfloat16)
                shape = list(power.shape[1:])
                file.write(power.view(torch.uint16).numpy().data)
            windows += batch["counts"].tolist()
            bar.update(len(batch["counts"]))
            if file.tell() > max_gigabytes * 1e9:
                raise UserError(
                    f"--keep_spectrograms: more than {max_gigabytes:g} GB are needed; raise --cache_gigabytes, or "
                    "leave --keep_spectrograms out"
                )
    write_json(folder / WINDOWS_FILE, {"windows": windows, "shape": shape})


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
