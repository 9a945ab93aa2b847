"""Long recordings as many clips: windows of a fixed length, each a row that refers to a stretch of its file."""

import os
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pyarrow as pa
from datasets.fingerprint import Hasher
from datasets.utils import tqdm

from .audio import opened_sound
from .errors import CorpusError
from .identity import STRETCH_COLUMNS, stretches

# A last window is dropped where less than this share of it would be new (files a few samples over length).
MIN_NEW_SHARE = 0.1
_SHORTEST_STEP = 0.001  # s: clip_ids tell windows of a file apart by milliseconds


def cut_into_windows(
    dataset: datasets.Dataset, seconds: float, overlap: float = 0.0, silence_db: float | None = None
) -> tuple[datasets.Dataset, int]:
    """Cuts every clip into windows. Nothing of the sound is copied.

    Windows begin every seconds * (1 - overlap); the last ends with the clip, unless less than `MIN_NEW_SHARE` of it
    would be new. A clip that one window holds, within the same tolerance, stays as it is: the same clip as without
    windows.

    Args:
        dataset: from `load_corpus`, or selected from one. Its clips may be stretches of files already.
        seconds: length of a window.
        overlap: share of a window that the next one has, too, from 0 to below 1.
        silence_db: windows whose level is lower are left out: the mean square of all channels in dB, where that of
            samples that are all 1 is 0 dB. For that every clip is decoded once. None: all windows are used.

    Returns:
        A dataset with a row for each window: `clip_start` and `clip_end` (`STRETCH_COLUMNS`, in s; 0 and infinity for
        a whole file), clip_id with "@" and the start behind it, num_frames of the window, and all else as it was; and
        the number of windows that were left out.

    Raises:
        CorpusError: the options make no windows, all windows are left out, or (AudioError, with silence_db) a file
            cannot be decoded.
    """
    step = seconds * (1 - overlap)
    if not (0 < seconds < np.inf and 0 <= overlap < 1 and min(step, MIN_NEW_SHARE * seconds) >= _SHORTEST_STEP):
        raise CorpusError(
            f"windows of {seconds:g} s with an overlap of {overlap:g}: expected an overlap from 0 to below 1, and "
            f"windows of {_SHORTEST_STEP / MIN_NEW_SHARE:g} s or more that begin at least {_SHORTEST_STEP:g} s apart"
        )
    facts = dataset.remove_columns("audio").with_format("arrow")[:]
    rates, frames = (facts[column].to_numpy() for column in ("sampling_rate", "num_frames"))
    clips = stretches(dataset)
    windows = [_windows(*row, seconds, step) for row in zip(rates.tolist(), frames.tolist(), clips, strict=True)]
    left_out = 0
    if silence_db is not None:
        levels = _levels(dataset, rates, clips, windows)
        windows = [found[level >= silence_db] for found, level in zip(windows, levels, strict=True)]
        left_out = sum(map(len, levels)) - sum(map(len, windows))
    if not any(map(len, windows)):
        raise CorpusError(f"no window is left: all {left_out} are below {silence_db:g} dB" if left_out else "no clips")
    rows = np.repeat(np.arange(len(facts)), list(map(len, windows)))
    starts, ends = np.concatenate(windows).T
    is_part = (starts != clips[rows, 0]) | (ends != clips[rows, 1])
    facts = facts.take(rows)
    names = [
        f"{name}@{start:.3f}" if part else name
        for name, start, part in zip(facts["clip_id"].to_pylist(), starts.tolist(), is_part.tolist(), strict=True)
    ]
    lengths = np.where(is_part, np.rint(ends * rates[rows]) - np.rint(starts * rates[rows]), frames[rows])
    columns = {name: facts[name] for name in facts.column_names} | {
        "audio": _audio(dataset, rows),
        "clip_id": names,
        "num_frames": lengths.astype(np.int64),
        **dict(zip(STRETCH_COLUMNS, (starts, ends), strict=True)),
    }
    info = dataset.info.copy()
    info.features = datasets.Features(dataset.features | dict.fromkeys(STRETCH_COLUMNS, datasets.Value("float64")))
    table = pa.table({name: columns[name] for name in info.features}, schema=info.features.arrow_schema)
    # The fingerprint is given: to make one, all the sound would be read.
    fingerprint = Hasher.hash([dataset._fingerprint, seconds, overlap, silence_db])
    return datasets.Dataset(table, info=info, split=dataset.split, fingerprint=fingerprint), left_out


def _windows(rate: int, frames: int, clip: np.ndarray, seconds: float, step: float) -> np.ndarray:
    """(windows, 2): starts and ends in s, whole frames; the clip's own where one window holds it."""
    length, step = max(1, round(seconds * rate)), max(1, round(step * rate))
    count = 1 + max(0, -int(-(frames - length * (1 + MIN_NEW_SHARE)) // step))
    if count == 1:
        return clip[None]
    starts = round(clip[0] * rate) + np.minimum(np.arange(count) * step, frames - length)
    return np.stack([starts, starts + length], axis=1) / rate


def _audio(dataset: datasets.Dataset, rows: np.ndarray) -> pa.ChunkedArray:
    """The audio column's cells of some rows, in order and more than once."""
    audio = dataset.select_columns("audio").with_format("arrow")
    if all(chunk.field("bytes").null_count == len(chunk) for chunk in dataset.data.column("audio").chunks):
        return audio[:]["audio"].take(rows)
    # Slices refer to the embedded sound; taking would copy it for each window.
    cells = {row: audio[row]["audio"].chunk(0) for row in np.unique(rows).tolist()}
    return pa.chunked_array([cells[row] for row in rows.tolist()])


def _levels(dataset: datasets.Dataset, rates: np.ndarray, clips: np.ndarray, windows: list) -> list[np.ndarray]:
    """Of each clip's windows the level in dB."""
    audio = dataset.with_format(None).select_columns("audio")

    def levels(row: int) -> np.ndarray:
        start, end = np.rint(np.where(np.isinf(windows[row]), 0, windows[row]) * rates[row]).astype(np.int64).T
        end[np.isinf(windows[row][:, 1])] = np.iinfo(np.int64).max
        edges, places = np.unique(np.concatenate([start, end]), return_inverse=True)
        energy, counts = np.zeros(len(edges)), np.zeros(len(edges))  # from each edge to the next
        position = start[0]
        with opened_sound(audio[row]["audio"]) as sound:
            for block in sound.blocks(*clips[row].tolist()):
                first = np.searchsorted(edges, position, "right") - 1
                inside = edges[first + 1 : np.searchsorted(edges, position + block.shape[1])] - position
                cuts = np.concatenate([[0], inside])
                squares = np.square(block, dtype=np.float64).mean(axis=0)
                energy[first : first + len(cuts)] += np.add.reduceat(squares, cuts)
                counts[first : first + len(cuts)] += np.diff(cuts, append=block.shape[1])
                position += block.shape[1]
        # Not differences of running sums: beside loud sound they would round quiet windows away.
        spans = [slice(a, b) for a, b in zip(*np.split(places, 2), strict=True)]
        means = [energy[span].sum() / max(1, counts[span].sum()) for span in spans]
        with np.errstate(divide="ignore"):
            return 10 * np.log10(means)

    # Decoding leaves Python's lock alone, so threads are enough to use every core.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(tqdm(pool.map(levels, range(len(dataset))), total=len(dataset), desc="Levels", unit=" clips"))
