"""The page's pictures, as matplotlib figures."""

import torch
from matplotlib.figure import Figure

from dls_training.report import draw_map, draw_spectrogram

from .analysis import Analysis
from .memory import Memory

DPI = 150
LINES = 5  # of the time line
GREY = "#808080"


def on_any_ground(figure: Figure) -> Figure:
    """Makes a figure that can be read on a bright page and on a dark one: no ground of its own, all else mid-grey."""
    figure.set_facecolor("none")
    for axes in figure.axes:
        axes.set_facecolor("none")
        axes.tick_params(colors=GREY)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_color(GREY)
        for spine in axes.spines.values():
            spine.set_edgecolor(GREY)
        if legend := axes.get_legend():
            legend.get_frame().set_alpha(0)
            for text in legend.get_texts():
                text.set_color(GREY)
    return figure


def spectrogram_figure(spectrogram: torch.Tensor, start: float, seconds: float) -> Figure:
    """What the network sees of a window, a row per audio channel.

    Args:
        spectrogram: (audio_channels, 3, height, width).
        start: Of the window, in s.
        seconds: Its length.
    """
    channels, width = len(spectrogram), spectrogram.shape[-1]
    figure = Figure(figsize=(7, 0.6 + 1.9 * channels), dpi=DPI, layout="constrained")
    for axes, picture in zip(figure.subplots(channels, 1, squeeze=False)[:, 0], spectrogram, strict=True):
        draw_spectrogram(axes, picture, "")
    axes.set_xticks([0, width / 2, width - 1], [f"{start + share * seconds:.1f} s" for share in (0, 0.5, 1)])
    axes.set_xlabel("low pitches red, middle ones green, high ones blue", fontsize="small")
    return on_any_ground(figure)


def map_figure(memory: Memory, analysis: Analysis) -> Figure:
    """The memory bank with the sound among its clips."""
    figure = Figure(figsize=(7, 4), dpi=DPI, layout="constrained")
    axes, rows = figure.subplots(), memory.on_map
    nearest = memory.vectors[[neighbour.row for neighbour in analysis.neighbours]] if analysis.neighbours else None
    drawn = "" if len(rows) == len(memory.vectors) else f"{len(rows)} of "
    title = f"{drawn}{len(memory.vectors)} clips, on their two principal components"
    draw_map(axes, memory.vectors[rows], memory.labels[rows], memory.classes, title, analysis.embedding, nearest)
    axes.title.set_fontsize("small")
    return on_any_ground(figure)


def time_line_figure(analysis: Analysis) -> Figure:
    """The scores of the likeliest classes over the windows of a long sound, a line per class."""
    figure = Figure(figsize=(10, 2.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    middles = [(window.start + window.end) / 2 for window in analysis.windows]
    scores = {name: [window.scores[name] for window in analysis.windows] for name in analysis.scores}
    for name in sorted(scores, key=lambda name: max(scores[name]), reverse=True)[:LINES]:
        axes.plot(middles, scores[name], marker="o", markersize=4, label=name)
    axes.set(xlabel="s", xlim=(0, analysis.seconds), ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    return on_any_ground(figure)
