"""The whole way in a few minutes: pre-train without labels, fine-tune, compare with scratch, classify a clip.

    make demo

Everything comes from sounds that are generated here; no download, no account. It writes DEMO_DIR (default:
demo_output) with the models, their cards and overview.png.
"""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from datasets_scripts.command_line import run_command
from datasets_scripts.errors import UserError
from datasets_scripts.options import Options, option, path

HERE = Path(__file__).parent
PRETRAINING = ["--recipe", "recommended", "--num_train_epochs", "60", "--knn_interval", "20", "--report_to", "none"]
# A new classifier and all layers, so that both arms show how fast they learn; the recipe's closed form would be there
# at once.
FINE_TUNING = [
    "--recipe", "recommended", "--classifier_init", "random", "--no-freeze_batch_norm", "--precise_bn",
    "--learning_rate", "2.5e-4",
    "--fold", "1", "--labels_per_class", "8", "--num_train_epochs", "10", "--report_to", "none",
]  # fmt: skip


@dataclass(kw_only=True)
class Settings(Options):
    """The whole way in a few minutes: pre-train without labels, fine-tune, compare with scratch, classify a clip."""

    SCRIPT: ClassVar[str] = "demo.py"

    output_dir: Path = option(
        Path("demo_output"), path, "for everything; an earlier demo's is replaced", positional=True, metavar="DEMO_DIR"
    )


def run(title: str, script: str, *options) -> None:
    """Runs a train script as a user would.

    Raises:
        UserError: if it fails, which it has then said itself.
    """
    print(f"\n== {title}\n$ python {script} {' '.join(map(str, options))}", flush=True)
    if code := subprocess.run([sys.executable, HERE / script, *options], check=False).returncode:
        raise UserError(f"the demo ends here: {script} ended with exit code {code}")


def side_by_side(arms: dict[str, dict]) -> str:
    """The arms' accuracies, an epoch a line."""
    names = list(arms)
    lines = [f"{'epoch':>5}  " + "  ".join(f"{name:>16}" for name in names)]
    curves = zip(*(arms[name]["mean_accuracy_per_epoch"] for name in names), strict=True)
    for epoch, accuracies in enumerate(curves, start=1):
        lines.append(f"{epoch:>5}  " + "  ".join(f"{accuracy:>16.3f}" for accuracy in accuracies))
    return "\n".join(lines)


def draw(output_dir: Path, arms: dict[str, dict]) -> None:
    """overview.png: what the network sees, how fast it learned, and where the clips lie."""
    import numpy as np
    import torch

    from datasets_scripts import load_corpus
    from dls_training.memory_bank import BANK_FILE, MemoryBank
    from dls_training.report import draw_overview
    from dls_training.waveforms import read_waveform
    from modeling_dls import ESResNetFeatureExtractor

    corpus = load_corpus("synthetic")
    names = corpus.features["label"].names
    labels = np.array(corpus["label"][:])
    extractor = ESResNetFeatureExtractor(audio_channels=1)
    shown = [int(np.flatnonzero(labels == label)[0]) for label in range(4)]
    spectrograms = {
        names[labels[row]]: extractor.spectrogram(read_waveform(corpus[row]["audio"], extractor)[0]).to(torch.float32)
        for row in shown
    }
    bank = MemoryBank.load(output_dir / "pretrained" / BANK_FILE)
    draw_overview(output_dir / "overview.png", spectrograms, arms, (bank.vectors, labels, names))


def classify(folder: Path) -> None:
    """One clip that the model has not seen with its label, through transformers' pipeline."""
    from transformers import pipeline
    from transformers.utils import logging as transformers_logging

    from datasets_scripts import decode_audio, load_corpus, train_test_folds

    transformers_logging.disable_progress_bar()
    clip = train_test_folds(load_corpus("synthetic"), 1)[1][0]
    samples, rate = decode_audio(clip["audio"])
    classifier = pipeline("audio-classification", model=str(folder), trust_remote_code=True)
    names = load_corpus("synthetic").features["label"].names
    print(f"\n== A clip of the held-out fold ({clip['clip_id']}, in truth: {names[clip['label']]})")
    for answer in classifier({"array": samples[0], "sampling_rate": rate}, top_k=3):
        print(f"   {answer['label']:>12} {answer['score']:.3f}")


def main(settings: Settings) -> None:
    """Runs the demo, and prints what it shows.

    Raises:
        UserError: if one of the train scripts fails.
    """
    started, output_dir = time.perf_counter(), settings.output_dir
    pretrained, dls, scratch = (output_dir / part for part in ("pretrained", "dls", "scratch"))
    for folder in (pretrained, dls, scratch):
        shutil.rmtree(folder, ignore_errors=True)
    run(
        "1. Pre-training: 400 generated sounds, no labels. Every clip is its own class.",
        "train_npid.py", *PRETRAINING, "--output_dir", pretrained,
    )  # fmt: skip
    fine_tuning = ["train_classification.py", *FINE_TUNING, "--model_name_or_path", pretrained, "--output_dir"]
    run("2. Fine-tuning from it, with labels of 80 clips; fold 1 is held out.", *fine_tuning, dls)
    run("3. The same network from scratch, for comparison.", *fine_tuning, scratch, "--init", "scratch")

    folders = {"pre-trained": dls, "from scratch": scratch}
    arms = {name: json.loads((folder / "all_results.json").read_text()) for name, folder in folders.items()}
    print(f"\n== Accuracy on the held-out fold\n{side_by_side(arms)}")
    draw(output_dir, arms)
    classify(dls)
    print(
        f"\n{output_dir}/overview.png shows spectrograms, both curves and the embedding; {dls} is a model folder with "
        f"a card (README.md).\nTook {time.perf_counter() - started:.0f} s after installation."
    )


if __name__ == "__main__":
    sys.exit(run_command(main, Settings.parsed()))
