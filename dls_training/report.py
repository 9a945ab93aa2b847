"""Pictures of what was measured: spectrograms as the network sees them, accuracy curves, a map of the embedding."""

import itertools
import logging
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure  # without pyplot, which needs a screen and holds on to what it draws
from matplotlib.ticker import MaxNLocator

logger = logging.getLogger("dls")

MOST_NAMES = 60  # of classes, in one picture: more can neither be read nor, one line each, be paid for


def costs_no_result(draw: Callable[..., None]) -> Callable[..., None]:
    """Of a run's picture, (path, …): where it cannot be drawn it is left out, and said; results are worth more."""

    @wraps(draw)
    def attempt(path: Path, *arguments) -> None:
        try:
            draw(path, *arguments)
        except Exception as error:  # whatever matplotlib or linear algebra makes of numbers that are none
            logger.warning(f"{path.name} is left out, for it cannot be drawn: {error}")

    return attempt


def draw_spectrogram(axes, spectrogram: torch.Tensor, title: str, like: torch.Tensor | None = None) -> None:
    """Three bands as the colours of one picture, the lowest band red (DLS, figure 3).

    Args:
        axes: To draw on.
        spectrogram: (3, height, width), in dB or standardised.
        title: Above the picture.
        like: Another spectrogram, whose range from dark to bright is used; None takes its own.
    """
    scale = spectrogram if like is None else like
    low, high = scale.quantile(0.05), scale.quantile(0.995)
    picture = ((spectrogram - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    axes.imshow(picture.permute(1, 2, 0).numpy(), origin="lower", aspect="auto")
    axes.set(title=title, xticks=[], yticks=[])


def draw_curves(axes, arms: dict[str, dict]) -> None:
    """Accuracy over epochs, a line per arm with a band of one standard deviation (DLS, figure 4).

    Args:
        axes: To draw on.
        arms: Name -> contents of `all_results.json` of train_classification.py, and where the accuracies are not those
            after epochs 1, 2, …, `epochs`. Without `folds`, or with a single one, there is no band.
    """
    for name, results in arms.items():
        mean = np.array(results["mean_accuracy_per_epoch"])
        epochs = results.get("epochs", np.arange(1, len(mean) + 1))
        (line,) = axes.plot(epochs, mean, marker="o", label=name)
        if len(results.get("folds", ())) > 1:
            std = np.array(results["std_accuracy_per_epoch"])
            axes.fill_between(epochs, mean - std, mean + std, color=line.get_color(), alpha=0.2)
    axes.set(xlabel="epoch of fine-tuning", ylabel="accuracy on the held-out fold", ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()


def draw_map(
    axes,
    embeddings: torch.Tensor,
    labels: np.ndarray,
    names: list[str],
    title: str = "memory bank, two principal components",
    sound: torch.Tensor | None = None,
    nearest: torch.Tensor | None = None,
) -> None:
    """Embeddings on their two principal components, a colour per class.

    Args:
        axes: To draw on.
        embeddings: (clips, dim).
        labels: (clips,), class indices, negative where a clip has none; only the colours come from them.
        names: Of the classes.
        title: Above the picture.
        sound: (dim,), another embedding, which is marked with a star.
        nearest: (k, dim), its nearest embeddings, which are ringed.
    """
    mean = embeddings.mean(dim=0)
    directions = torch.linalg.svd(embeddings - mean, full_matrices=False).Vh[:2]
    directions = F.pad(
        directions, (0, 0, 0, 2 - len(directions))
    )  # of a single clip, or a single number, there is one

    def places(vectors: torch.Tensor) -> np.ndarray:
        return ((vectors - mean) @ directions.T).T.numpy()

    x, y = places(embeddings)
    if (labels < 0).any():
        axes.scatter(x[labels < 0], y[labels < 0], s=12, color="lightgrey", label="no label")
    # More colours than ten cannot be told apart: markers tell the classes of a colour.
    colours, markers = colormaps["tab10"].colors, itertools.cycle(np.repeat(list("osD^vPX*<>"), 10))
    for label, (name, marker) in enumerate(zip(names, markers, strict=False)):
        chosen = labels == label
        axes.scatter(x[chosen], y[chosen], s=14, color=colours[label % 10], marker=marker, label=name)
    if nearest is not None:
        axes.scatter(*places(nearest), s=70, facecolors="none", edgecolors="black", label="nearest clips")
    if sound is not None:
        axes.scatter(*places(sound[None]), s=260, marker="*", color="black", edgecolors="white", label="this sound")
    axes.set(title=title, xticks=[], yticks=[])
    if len(names) <= MOST_NAMES:
        axes.legend(fontsize="x-small", ncols=max(1, -(-len(names) // 25)), loc="upper left", bbox_to_anchor=(1, 1))


@costs_no_result
def draw_accuracy(path: Path, arms: dict[str, dict], ylabel: str) -> None:
    """Accuracy over epochs, moved into place when complete.

    Args:
        path: A .png file.
        arms: See `draw_curves`.
        ylabel: What was measured.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    draw_curves(axes, arms)
    axes.set(xlabel="epoch", ylabel=ylabel)
    save(figure, path)


@costs_no_result
def draw_embedding(path: Path, embeddings: torch.Tensor, labels: np.ndarray, names: list[str], title: str) -> None:
    """`draw_map` alone in a picture, moved into place when complete."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    draw_map(figure.subplots(), embeddings, labels, names, title)
    save(figure, path)


@costs_no_result
def draw_confusion_matrix(path: Path, matrix: list[list[int]], names: list[str]) -> None:
    """Which class was taken for which, moved into place when complete.

    Args:
        path: A .png file.
        matrix: Counts, true classes by predicted ones.
        names: Of the classes.
    """
    counts = np.array(matrix)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = 2.5 + 0.32 * min(len(names), MOST_NAMES)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 20:  # with more classes the numbers would be too small to read
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize="small")
    if len(names) <= MOST_NAMES:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="recognised as", ylabel="class")
    figure.colorbar(image, label="share of the class", shrink=0.8)
    save(figure, path)


def draw_overview(path: Path, spectrograms: dict[str, torch.Tensor], arms: dict[str, dict], bank: tuple) -> None:
    """One picture of a whole experiment, moved into place when complete.

    Args:
        path: A .png file.
        spectrograms: Title -> (3, height, width).
        arms: See `draw_curves`.
        bank: Arguments of `draw_map` after the axes.
    """
    figure = Figure(figsize=(13, 7), layout="constrained")
    grid = figure.add_gridspec(2, 2 * len(spectrograms), height_ratios=(1, 2))
    for i, (title, spectrogram) in enumerate(spectrograms.items()):
        draw_spectrogram(figure.add_subplot(grid[0, 2 * i : 2 * i + 2]), spectrogram, title)
    draw_curves(figure.add_subplot(grid[1, : len(spectrograms)]), arms)
    draw_map(figure.add_subplot(grid[1, len(spectrograms) :]), *bank)
    save(figure, path)


def draw_comparison(path: Path, panels: dict[str, dict[str, dict]]) -> None:
    """The accuracy curves of several fine-tuning settings side by side, moved into place when complete.

    Args:
        path: A .png file.
        panels: Title -> arms, see `draw_curves`.
    """
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 4.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for place in axes.flat[len(panels) :]:
        place.remove()
    names = dict.fromkeys(name for arms in panels.values() for name in arms)
    colours = dict(zip(names, itertools.cycle(colormaps["tab10"].colors), strict=False))
    for place, (title, arms) in zip(axes.flat, panels.items(), strict=False):
        place.set_prop_cycle(color=[colours[name] for name in arms])  # the same in every panel
        draw_curves(place, arms)
        place.set_title(title)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    unfinished = path.with_suffix(".unfinished.png")
    figure.savefig(unfinished, dpi=110)
    unfinished.replace(path)
