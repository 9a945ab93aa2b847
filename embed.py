"""Embeds every sound of a folder with a trained network, and writes the vectors as Parquet.

    python embed.py recordings --model runs/npid --output embeddings.parquet

One row a file: `file` (path below the folder), `start` and `end` (in s), `embedding`; with --windows one row per
window of `--clip_seconds`. Memory does not depend on how long files are. Files that cannot be read are listed beside
it, in embeddings.unreadable.csv.
"""
# ruff: noqa: E402

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from datasets_scripts.errors import UserError
from datasets_scripts.options import Options, flag, one_of, option, path, path_or_id, whole
from dls_training.settings import CLIP_SECONDS, PRECISIONS


@dataclass(kw_only=True)
class EmbeddingSettings(Options):
    """Embeds every sound of a folder with a trained network, and writes the vectors as Parquet."""

    SCRIPT: ClassVar[str] = "embed.py"

    folder: Path = option(None, path, "sound files at any depth", positional=True, required=True)
    model: str = option(None, path_or_id, "a trained folder or a Hub id", required=True)
    output: Path = option("embeddings.parquet", path, "where the vectors go")
    layer: str | None = option(
        None, one_of("projection", "pooled"),
        help="projection: unit vectors of instance discrimination; pooled: the features before any head (default: "
        "projection where the checkpoint has one)",
    )  # fmt: skip
    windows: bool = option(False, flag, "a row per window, instead of their mean per file")
    clip_seconds: float | None = option(None, CLIP_SECONDS, "length of a window (default: the checkpoint's, or 5)")
    batch_size: int = option(32, whole(1, 1 << 16), "windows at a time")
    mixed_precision: str = option(
        "auto", one_of(*PRECISIONS), "auto: bf16 where the processor computes in it, else fp16 on CUDA, else no"
    )


# Options are read before anything heavy is imported: --help answers at once.
SETTINGS = EmbeddingSettings.parsed() if __name__ == "__main__" else None

import csv
import logging
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm.auto import tqdm
from transformers import AutoConfig

from datasets_scripts import sound_files
from datasets_scripts.command_line import run_command
from datasets_scripts.errors import AudioError
from datasets_scripts.files import files_moved_into_place
from dls_training.cores import cores_in_use
from dls_training.networks import set_length
from dls_training.runtime import choose_device_and_precision, decoding_processes, start_logging
from dls_training.waveforms import in_order, stream_windows
from modeling_dls import ESResNetFeatureExtractor, ESResNetForInstanceDiscrimination, ESResNetModel

logger = logging.getLogger("dls")

CLIP_SECONDS = 5.0  # where neither the checkpoint nor the user says
ROWS_AT_A_TIME = 1024  # written together: Parquet's row groups


class Window(NamedTuple):
    """A stretch of a file.

    Attributes:
        file: Path below the folder.
        start, end: In s.
        waveform: (audio_channels, samples).
    """

    file: str
    start: float
    end: float
    waveform: torch.Tensor


class Embedder:
    """A network that is made ready for repeated inference: batch norm folded, weights in the precision of its sums.

    Attributes:
        dim: Length of a vector.
        extractor: From the checkpoint.
        device: Where it runs.
    """

    def __init__(self, source: str, layer: str | None, mixed_precision: str, clip_seconds: float | None):
        """
        Args:
            source: Folder or Hub id.
            layer: `"projection"`, `"pooled"`, or None for whichever the checkpoint has.
            mixed_precision: See `choose_device_and_precision`.
            clip_seconds: Length of a window; None takes the checkpoint's.

        Raises:
            UserError: if there is no such checkpoint, it has no projection where one is asked for, or needs timm.
        """
        try:
            config = AutoConfig.from_pretrained(source)
            self.extractor = ESResNetFeatureExtractor.from_pretrained(source)
            has_projection = ESResNetForInstanceDiscrimination.__name__ in (config.architectures or [])
            if layer == "projection" and not has_projection:
                raise ValueError("it was not saved by train_npid.py and has no projection: use --layer pooled")
            self.layer = layer or ("projection" if has_projection else "pooled")
            network = ESResNetForInstanceDiscrimination if self.layer == "projection" else ESResNetModel
            model = network.from_pretrained(source).eval()
        except (ImportError, OSError, ValueError, RuntimeError) as error:
            raise UserError(f"--model {source}: {error}") from error
        if clip_seconds is not None or self.extractor.max_length is None:
            set_length(self.extractor, clip_seconds or CLIP_SECONDS)
        self.extractor.audio_channels = self.extractor.audio_channels or 1
        self.dim = config.embedding_dim if self.layer == "projection" else config.hidden_size
        self.device, self.precision = choose_device_and_precision(mixed_precision)
        self.dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        self.model = model.fold_batch_norm().to(self.device, self.dtype, memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, waveforms: torch.Tensor) -> torch.Tensor:
        """(windows, audio_channels, samples) -> (windows, dim), float32."""
        outputs = self.model(self.extractor.spectrogram(waveforms.to(self.device)).to(self.dtype))
        vectors = outputs.embeddings if self.layer == "projection" else outputs.pooler_output
        return vectors.float().cpu()

    def finished(self, mean: torch.Tensor) -> torch.Tensor:
        """A file's vector from the mean of its windows'."""
        return F.normalize(mean, dim=0) if self.layer == "projection" else mean


def batched(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


class Recordings(IterableDataset):
    """The windows of a folder's sound files, in order, some at a time: (path below the folder, places, windows).

    Whatever follows in the place of windows that cannot be had is the AudioError.
    """

    def __init__(self, folder: Path, extractor: ESResNetFeatureExtractor, at_a_time: int):
        self.folder, self.extractor, self.at_a_time = folder, extractor, at_a_time

    def __iter__(self) -> Iterator[tuple[str, list[tuple[int, int]], torch.Tensor] | tuple[str, AudioError]]:
        paths, at_a_time = sound_files(self.folder), self.at_a_time
        if process := get_worker_info():  # the loader asks its processes in turn, a file each
            paths, at_a_time = islice(paths, process.id, None, process.num_workers), 1
        return in_order(self.windows, paths, at_a_time)

    def windows(self, path: Path):
        # Names need not be text: what is none is written as \\udcff, so that no table is lost for it.
        name = path.relative_to(self.folder).as_posix().encode("utf-8", "backslashreplace").decode()
        try:
            for places, windows in stream_windows({"bytes": None, "path": str(path)}, self.extractor):
                yield name, places, windows
        except AudioError as error:
            yield name, error


def windows_of(recordings: Iterable, embedder: Embedder, unreadable: dict[str, str], bar: tqdm) -> Iterator[Window]:
    """Every file's windows, in order. What cannot be read goes to `unreadable`: {file: reason}."""
    rate, last = embedder.extractor.sampling_rate, None
    for name, *found in recordings:
        bar.update(name != last)
        last = name
        if isinstance(found[0], AudioError):
            unreadable[name] = str(found[0])
            continue
        for (start, end), window in zip(*found, strict=True):
            yield Window(name, start / rate, end / rate, window)


def embedded(windows: Iterable[Window], embedder: Embedder, batch_size: int) -> Iterator[tuple[Window, torch.Tensor]]:
    """Full batches, whatever the lengths of the files."""
    for batch in batched(windows, batch_size):
        vectors = embedder(torch.stack([window.waveform for window in batch]))
        yield from ((window._replace(waveform=None), vector) for window, vector in zip(batch, vectors, strict=True))


def rows(found: Iterable[tuple[Window, torch.Tensor]], embedder: Embedder, per_window: bool) -> Iterator[dict]:
    """A row per window; or per file, whose vectors are averaged as they come."""
    if per_window:
        for window, vector in found:
            yield window._asdict() | {"embedding": vector.numpy()}
        return
    for name, group in groupby(found, key=lambda pair: pair[0].file):
        total, count = 0, 0
        for window, vector in group:
            total, count, end = total + vector, count + 1, window.end
        yield {"file": name, "start": 0.0, "end": end, "embedding": embedder.finished(total / count).numpy()}


def write_rows(path: Path, lines: Iterable[dict], dim: int) -> int:
    """Writes Parquet as the rows come. Returns their number."""
    fields = [("file", pa.string()), ("start", pa.float64()), ("end", pa.float64())]
    schema = pa.schema([*fields, ("embedding", pa.list_(pa.float32(), dim))])
    count = 0
    with pq.ParquetWriter(path, schema) as writer:
        for batch in batched(lines, ROWS_AT_A_TIME):
            writer.write_table(pa.Table.from_pylist(batch, schema))
            count += len(batch)
    return count


def write_unreadable(path: Path, unreadable: dict[str, str]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "reason"])
        writer.writerows(unreadable.items())


def main(settings: EmbeddingSettings) -> None:
    start_logging()
    if not settings.folder.is_dir():
        raise UserError(f"{settings.folder} is not a folder: FOLDER holds the sound files to embed")
    total = sum(1 for _ in sound_files(settings.folder))
    if not total:
        raise UserError(f"{settings.folder} holds no sound files (wav, flac, ogg, mp3, aiff, …)")
    embedder = Embedder(settings.model, settings.layer, settings.mixed_precision, settings.clip_seconds)
    logger.info(
        f"{total} files, {embedder.layer} vectors of {embedder.dim} numbers, on {embedder.device}, precision "
        f"{'fp32' if embedder.precision == 'no' else embedder.precision}"
    )
    recordings = Recordings(settings.folder, embedder.extractor, at_a_time=cores_in_use())
    loader = DataLoader(recordings, batch_size=None, num_workers=decoding_processes(embedder.device))
    listed = settings.output.with_name(f"{settings.output.stem}.unreadable.csv")
    unreadable: dict[str, str] = {}
    with (
        files_moved_into_place(settings.output.parent) as unfinished,
        tqdm(total=total, unit=" clips", desc="embedding") as bar,
    ):
        windows = windows_of(loader, embedder, unreadable, bar)
        found = rows(embedded(windows, embedder, settings.batch_size), embedder, settings.windows)
        count = write_rows(unfinished / settings.output.name, found, embedder.dim)
        if not count:
            raise UserError(f"none of the {total} files can be read; the first: {next(iter(unreadable.values()))}")
        if unreadable:
            write_unreadable(unfinished / listed.name, unreadable)
        rate = bar.n / bar.format_dict["elapsed"]
    if unreadable:
        logger.warning(f"{len(unreadable)} of {total} files cannot be read: see {listed}")
    else:
        listed.unlink(missing_ok=True)  # of an earlier run
    logger.info(f"{settings.output}: {count} rows, {rate:.1f} clips/s")


if __name__ == "__main__":
    sys.exit(run_command(main, SETTINGS))
