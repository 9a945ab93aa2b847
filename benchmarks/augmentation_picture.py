"""Draws what each augmentation does to one clip, alone and all together, as the network sees it.

    python benchmarks/augmentation_picture.py

Writes docs/augmentation.png, from a clip of the generated corpus.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: a canvas that needs no screen
import matplotlib.pyplot as plt
import torch
from measuring import REPOSITORY

from datasets_scripts import load_corpus
from dls_training.augmentation import SpectrogramAugmentation, WaveformAugmentation
from dls_training.waveforms import read_waveform
from modeling_dls import ESResNetFeatureExtractor

NOTHING = {
    "min_time": 1.0, "min_frequency": 1.0, "max_mix": 0.0, "gain_db": 0.0, "max_time_mask": 0.0,
    "max_frequency_mask": 0.0,
}  # fmt: skip
# Each range alone, as strong as training draws it.
ALONE = {
    "crop in time": ("min_time",),
    "crop in frequency": ("min_frequency",),
    "another clip mixed in": ("max_mix",),
    "gain": ("gain_db",),
    "masks": ("max_time_mask", "max_frequency_mask"),
}
COLUMNS = 3


def pictures(seed: int, preset: str) -> dict[str, torch.Tensor]:
    """Title -> (3, height, width), standardised."""
    rows = load_corpus("synthetic").select([0, 1])
    extractor = ESResNetFeatureExtractor.from_preset(preset, audio_channels=1)
    clips = torch.nn.utils.rnn.pad_sequence(
        [read_waveform(row["audio"], extractor)[0] for row in rows], batch_first=True
    )[:, None]
    size, partner = (extractor.spec_height, extractor.spec_width), torch.tensor([1, 0])
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(2, SpectrogramAugmentation.NUM_DRAWS, generator=generator, dtype=torch.float64)
    draws[:, 4] = 0.9  # forwards

    fine = extractor.power(clips, SpectrogramAugmentation.OVERSAMPLING)
    shown = {"the clip": extractor.spectrogram(clips)[0, 0]}
    default = vars(SpectrogramAugmentation())
    for title, names in ALONE.items():
        settings = NOTHING | {name: default[name] for name in names}
        shown[title] = extractor.decibel(SpectrogramAugmentation(**settings)(fine, draws, size, partner))[0, 0]
    backwards = draws.clone()
    backwards[:, 4] = 0.1
    shown["time inversion"] = extractor.decibel(SpectrogramAugmentation(**NOTHING)(fine, backwards, size))[0, 0]
    shown["all together"] = extractor.decibel(SpectrogramAugmentation()(fine, draws, size, partner))[0, 0]
    lengths = torch.full((2,), clips.shape[-1])
    moves = torch.tensor([[0.9, 0.1, 0.8]] * 2, dtype=torch.float64)  # forwards, shortened, late in its padding
    view = WaveformAugmentation(clips.shape[-1])(clips, lengths, moves)
    shown["waveform: scaled, padded"] = extractor.spectrogram(view)[0, 0]
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs" / "augmentation.png")
    parser.add_argument("--preset", default="small_mel")
    parser.add_argument("--seed", type=int, default=3, help="of the random numbers")
    args = parser.parse_args()
    shown = pictures(args.seed, args.preset)
    rows = -(-len(shown) // COLUMNS)
    plt.rcParams["font.size"] = 14
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(12, 2.5 * rows), layout="constrained")
    usual = shown["the clip"]
    low, high = usual.quantile(0.05).item(), usual.quantile(0.995).item()
    for panel in axes.flat[len(shown) :]:
        panel.remove()
    for panel, (title, spectrogram) in zip(axes.flat, shown.items(), strict=False):
        # The bands one above the other, in which time and pitch are easier to follow than as three colours.
        panel.imshow(spectrogram.flatten(0, 1).numpy(), "magma", origin="lower", aspect="auto", vmin=low, vmax=high)
        panel.set(title=title, xticks=[], yticks=[])
    axes.flat[0].set(xlabel="time", ylabel="pitch")
    figure.savefig(args.output, dpi=70)
    print(f"{args.output}: {len(shown)} pictures")


if __name__ == "__main__":
    main()
