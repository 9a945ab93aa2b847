"""What a corpus holds, in numbers, in words and as a picture."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np

from .audio import decode_audio
from .builder import STATES, corpus_report
from .errors import CorpusError
from .identity import STRETCH_COLUMNS, WHOLE
from .markdown import escaped

_DRAWN_SECONDS = 30.0  # of long recordings


def measures(dataset: datasets.Dataset) -> str:
    """Markdown list of the number of clips, their lengths, sampling rates and channels. No sound is decoded for it."""
    plain = dataset.with_format(None)
    rates, channels = plain["sampling_rate"][:], plain["num_channels"][:]
    seconds = np.asarray(plain["num_frames"][:]) / np.asarray(rates)
    return (
        f"- {len(dataset)} clips, {seconds.sum() / 3600:.2f} h\n"
        f"- length in s: {seconds.min():.3f} to {seconds.max():.3f}, median {np.median(seconds):.3f}\n"
        f"- sampling rate in Hz: {_counted(rates)}\n"
        f"- channels: {_counted(channels)}"
    )


def _counted(values: list[int]) -> str:
    return ", ".join(f"{value} ({count} clips)" for value, count in sorted(Counter(values).items()))


def class_table(dataset: datasets.Dataset, text: Callable[[object], str] = escaped) -> str:
    """Markdown table: one row per class, one column per fold, and the sums.

    Args:
        dataset: from `load_corpus`.
        text: How names are written; `str` where nothing makes HTML of it.
    """
    plain = dataset.with_format(None)
    labels, folds = plain["label"][:], plain["fold"][:]
    cells, sizes = Counter(zip(labels, folds, strict=True)), dict(sorted(Counter(folds).items()))
    rows: list[list] = [["class", *(f"fold {fold}" if fold else "no fold" for fold in sizes), "all"]]
    rows.append(["---"] + ["---:"] * (len(sizes) + 1))
    for label, name in [*enumerate(dataset.features["label"].names), (None, "(no label)")]:
        counts = [cells[label, fold] for fold in sizes]
        if label is not None or any(counts):
            rows.append([name, *counts, sum(counts)])
    rows.append(["all", *sizes.values(), len(dataset)])
    return "\n".join("| " + " | ".join(map(text, row)) + " |" for row in rows)


def state(dataset: datasets.Dataset, text: Callable[[object], str] = escaped) -> str:
    """Markdown list of what the report says is lacking, left out or odd; or that nothing is. See `class_table`."""
    report = corpus_report(dataset)
    lines = [f"- {text(words)}" for words in report["inferred"]]
    for key, words in STATES.items():
        if found := report[key]:
            more = f", and {len(found) - 10} more" if len(found) > 10 else ""
            lines.append(f"- {len(found)} {words}: {', '.join(map(text, found[:10]))}{more}")
    if report["crossings"]:
        lines.append(f"- {len(report['crossings'])} original recordings are in more than one fold")
    is_complete = len(lines) == len(report["inferred"])
    return "\n".join([*lines, *(["- complete, nothing left out"] if is_complete else [])])


def draw_classes(dataset: datasets.Dataset, path: Path) -> None:
    """Write a picture with one three-band spectrogram per class (the first clip of each), as in the paper's figure 3.

    Args:
        dataset: from `load_corpus`; without labels, its first clips are drawn.
        path: the file to write; its suffix decides the format.

    Raises:
        CorpusError: the picture cannot be written.
    """
    from matplotlib.figure import Figure

    try:  # before the work is done, not after it
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CorpusError(f"{path}: the picture cannot be written ({error.strerror})") from None
    names = dataset.features["label"].names
    labels = dataset.with_format(None)["label"][:]
    chosen = {name: labels.index(label) for label, name in enumerate(names) if label in labels} or {
        Path(dataset[i]["audio"]["path"] or str(i)).name: i for i in range(min(10, len(dataset)))
    }
    columns = 5
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(3 * columns, 2.4 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, (name, index) in zip(figure.axes, chosen.items(), strict=False):
        axes.imshow(_picture(dataset[index]), origin="lower", aspect="auto")
        axes.set_title(name, fontsize=9)
    figure.suptitle("Three-band spectrograms: low band red, middle green, high blue; time to the right, pitch upwards")
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path}: the picture cannot be written ({error})") from None


def _picture(clip: dict) -> np.ndarray:
    import torch

    from modeling_dls import three_band_spectrogram

    start, end = (clip.get(column, whole) for column, whole in zip(STRETCH_COLUMNS, WHOLE, strict=True))
    samples, _ = decode_audio(clip["audio"], start, min(end, start + _DRAWN_SECONDS))
    mono = torch.from_numpy(samples).mean(0)
    shortest = 4096  # a few windows: the shortest clips are 50 ms
    bands = three_band_spectrogram(torch.nn.functional.pad(mono, (0, max(0, shortest - len(mono)))))
    decibels = bands.permute(1, 2, 0).numpy()
    return np.clip((decibels - decibels.max() + 80) / 80, 0, 1)
