"""Embedding a folder with embed.py, beside the network's forward pass alone; folded batch norm; latency of a clip.

    python benchmarks/embedding.py --corpus esc10=/data/ESC-10

The folder is embedded by a process that does nothing else, once warmed up by itself; its clips per second are those
that it prints, without the start of the process. The forward pass alone gets pictures that lie ready.
"""

import re
import tempfile
from pathlib import Path

from measuring import Arm, ceilings, finish, paired, ratio_line, run, start, summarise, take_turns
from training_step import gigaflops_per_clip

BATCH = 32
PRESETS = {"esresnet50": 2, "esresnet18": 20}  # and batches of the forward pass alone


def save_network(preset: str, folder: Path) -> None:
    """A network as train_npid.py leaves it, with random weights."""
    import torch

    from modeling_dls import ESResNetConfig, ESResNetFeatureExtractor, ESResNetForInstanceDiscrimination

    torch.manual_seed(0)
    ESResNetForInstanceDiscrimination(ESResNetConfig.from_preset(preset)).save_pretrained(folder)
    extractor = ESResNetFeatureExtractor.from_preset(preset, max_length=220500, audio_channels=1)
    extractor.save_pretrained(folder)


def sounds(corpus: str, folder: Path) -> Path:
    """The corpus's folder; the generated corpus is written into one."""
    from datasets_scripts import load_corpus
    from datasets_scripts.options import named_source

    name, source = named_source(corpus)
    if source is None:
        folder.mkdir()
        for row in load_corpus(name):
            (folder / f"{row['clip_id']}.wav").write_bytes(row["audio"]["bytes"])
    return Path(source or folder)


def folder_arm(preset: str, recordings: Path, model: Path) -> dict[str, Arm]:
    files = sum(1 for _ in recordings.rglob("*.*"))

    def embed():
        options = ["--model", model, "--batch_size", BATCH, "--output", model.with_suffix(".parquet")]
        log = finish(start("embed.py", recordings, *options))
        with Path(f"{model}.log").open("a") as file:
            file.write(re.search(r"rows, ([\d.]+) clips/s", log)[1] + "\n")

    return {f"{preset}, embed.py, whole process": Arm(embed, files, "clips")}


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


def measure(args) -> list[dict]:
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        recordings = sounds(args.corpus, Path(temporary) / "sounds")
        for preset, batches in PRESETS.items():
            model = Path(temporary) / preset
            save_network(preset, model)
            makers = [
                (folder_arm, (preset, recordings, model)),
                (forward_arms, (preset, model, batches)),
                (ceilings, ()),
            ]
            arms, seconds = take_turns(makers, args.rounds)
            alone, unfolded = f"{preset}, forward pass alone", f"{preset}, forward pass, batch norm not folded"
            printed = [float(rate) for rate in Path(f"{model}.log").read_text().split()][1:]
            shares = [rate * own / arms[alone].amount for rate, own in zip(printed, seconds[alone], strict=True)]
            product = "bf16 matrix product"
            gigaflops = arms[alone].amount * gigaflops_per_clip(preset, backward=False) / arms[product].amount
            of_product = [gigaflops * best / own for own, best in paired(seconds, alone, product)]
            folding = (without / own for own, without in paired(seconds, alone, unfolded))
            lines += [
                *(line for line in summarise(arms, seconds) if line["what"].startswith(preset)),
                ratio_line(f"{alone}, share of the {product}", of_product),
                ratio_line(f"{preset}, embed.py as it prints / forward pass alone, in clips/s", shares, ">= 0.9"),
                ratio_line(f"{preset}, folding batch norm, times faster", folding),
            ]
    return lines


if __name__ == "__main__":
    run(measure, corpus=("synthetic", "NAME[=DIR] of five-second sounds"), rounds=3)
