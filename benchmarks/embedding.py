"""Embedding a folder with embed.py, beside the network's forward pass alone; folded batch norm; latency of a clip.

    python benchmarks/embedding.py /data/ESC-10

The folder is embedded by a process that does nothing else, once warmed up by itself; its clips per second are those
that it prints, without the start of the process. The forward pass alone gets pictures that lie ready.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import REPOSITORY, Arm, ceilings, measured_on, paired, ratio_line, summarise, take_turns, write_table
from training_step import gigaflops_per_clip

BATCH = 32
PRESETS = ("esresnet50", "esresnet18")


def save_network(preset: str, folder: Path) -> None:
    """A network as train_npid.py leaves it, with random weights."""
    import torch

    from modeling_dls import ESResNetConfig, ESResNetFeatureExtractor, ESResNetForInstanceDiscrimination

    torch.manual_seed(0)
    ESResNetForInstanceDiscrimination(ESResNetConfig.from_preset(preset)).save_pretrained(folder)
    extractor = ESResNetFeatureExtractor.from_preset(preset, max_length=220500, audio_channels=1)
    extractor.save_pretrained(folder)


def folder_arm(preset: str, recordings: Path, model: Path) -> dict[str, Arm]:
    files = sum(1 for _ in recordings.rglob("*.*"))
    log = Path(f"{model}.log")

    def run():
        command = [sys.executable, REPOSITORY / "embed.py", recordings, "--model", model, "--batch_size", str(BATCH),
                   "--output", model.with_suffix(".parquet")]  # fmt: skip
        ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True)
        with log.open("a") as file:
            file.write(re.search(r"rows, ([\d.]+) clips/s", ended.stderr)[1] + "\n")

    return {f"{preset}, embed.py, whole process": Arm(run, files, "clips")}


def forward_arms(preset: str, model: Path, batches: int) -> dict[str, Arm]:
    """The network alone: as embed.py makes it ready, and as it was saved; one clip through transformers' pipeline."""
    import torch
    from transformers import pipeline

    import modeling_dls  # noqa: F401
    from embed import Embedder
    from modeling_dls import ESResNetConfig, ESResNetFeatureExtractor, ESResNetForAudioClassification

    embedder = Embedder(str(model), None, "auto", None)
    pictures = embedder.extractor.spectrogram(0.1 * torch.randn(BATCH, 1, 220500)).to(embedder.dtype)
    plain = type(embedder.model).from_pretrained(model).eval().to(memory_format=torch.channels_last)
    clip = 0.1 * torch.randn(220500).numpy()
    network = ESResNetForAudioClassification(ESResNetConfig.from_preset(preset, num_labels=10)).eval()
    extractor = ESResNetFeatureExtractor.from_preset(preset, max_length=220500, audio_channels=1)
    classify = pipeline("audio-classification", model=network, feature_extractor=extractor)

    @torch.inference_mode()
    def forward():
        for _ in range(batches):
            embedder.model(pictures)

    @torch.inference_mode()
    def unfolded():
        with torch.autocast("cpu", torch.bfloat16, enabled=embedder.precision == "bf16"):
            for _ in range(batches):
                plain(pictures.float())

    return {
        f"{preset}, forward pass alone": Arm(forward, batches * BATCH, "clips"),
        f"{preset}, forward pass, batch norm not folded": Arm(unfolded, batches * BATCH, "clips"),
        f"{preset}, pipeline, one clip, fp32": Arm(lambda: classify(clip.copy()), 1, "clips"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="five-second sounds")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    args = parser.parse_args()
    provenance = measured_on()
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        for preset in PRESETS:
            model = Path(temporary) / preset
            save_network(preset, model)
            batches = {"esresnet50": 2, "esresnet18": 20}[preset]
            makers = [
                (folder_arm, (preset, args.folder, model)),
                (forward_arms, (preset, model, batches)),
                (ceilings, ()),
            ]
            arms, seconds = take_turns(makers, args.rounds)
            lines += [line for line in summarise(arms, seconds) if line["what"].startswith(preset)]
            alone, unfolded = f"{preset}, forward pass alone", f"{preset}, forward pass, batch norm not folded"
            printed = [float(rate) for rate in Path(f"{model}.log").read_text().split()][1:]
            shares = [rate * own / arms[alone].amount for rate, own in zip(printed, seconds[alone], strict=True)]
            product = "bf16 matrix product"
            gigaflops = arms[alone].amount * gigaflops_per_clip(preset, backward=False) / arms[product].amount
            of_product = [gigaflops * best / own for own, best in paired(seconds, alone, product)]
            lines += [
                ratio_line(f"{alone}, share of the {product}", of_product),
                ratio_line(f"{preset}, embed.py as it prints / forward pass alone, in clips/s", shares, ">= 0.9"),
                ratio_line(
                    f"{preset}, folding batch norm, times faster", (b / a for a, b in paired(seconds, alone, unfolded))
                ),
            ]
    write_table(args.output, lines, provenance)


if __name__ == "__main__":
    main()
