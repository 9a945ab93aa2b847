"""The whole way in a few minutes: pre-train without labels, fine-tune, compare with scratch, classify a clip.

    make demo

Everything comes from sounds that are generated here; no download, no account. It writes DEMO_DIR (default:
demo_output) with the models, their cards and overview.png.
"""

import argparse
import json
import logging
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
PRETRAINING = ["--recipe", "recommended", "--num_train_epochs", "60", "--knn_interval", "20", "--report_to", "none"]
# A new classifier and all layers, so that both arms show how fast they learn; the recipe's closed form would be there
# at once.
FINE_TUNING = [
    "--recipe", "recommended", "--classifier_init", "random", "--no-freeze_batch_norm", "--learning_rate", "2.5e-4",
    "--fold", "1", "--labels_per_class", "8", "--num_train_epochs", "10", "--report_to", "none",
]  # fmt: skip


def run(title: str, script: str, *options: str) -> None:
    """Runs a train script as a user would, and stops the demo where it fails."""
    print(f"\n== {title}\n$ python {script} {' '.join(options)}", flush=True)
    subprocess.run([sys.executable, HERE / script, *options], check=True)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", nargs="?", type=Path, default=Path("demo_output"), metavar="DEMO_DIR")
    output_dir = parser.parse_args().output_dir
    started = time.perf_counter()
    for part in ("pretrained", "dls", "scratch"):  # of an earlier demo
        shutil.rmtree(output_dir / part, ignore_errors=True)

    folders = {arm: output_dir / arm for arm in ("pretrained", "dls", "scratch")}
    run(
        "1. Pre-training: 400 generated sounds, no labels. Every clip is its own class.",
        "train_npid.py", *PRETRAINING, "--output_dir", str(folders["pretrained"]),
    )  # fmt: skip
    start = ["--model_name_or_path", str(folders["pretrained"])]
    run(
        "2. Fine-tuning from it, with labels of 80 clips; fold 1 is held out.",
        "train_classification.py", *FINE_TUNING, *start, "--output_dir", str(folders["dls"]),
    )  # fmt: skip
    run(
        "3. The same network from scratch, for comparison.",
        "train_classification.py", *FINE_TUNING, *start, "--init", "scratch",
        "--output_dir", str(folders["scratch"]),
    )  # fmt: skip

    results = {arm: json.loads((folders[arm] / "all_results.json").read_text()) for arm in ("dls", "scratch")}
    arms = {"pre-trained": results["dls"], "from scratch": results["scratch"]}
    logging.disable(logging.INFO)
    print(f"\n== Accuracy on the held-out fold\n{side_by_side(arms)}")
    draw(output_dir, arms)
    classify(folders["dls"])
    print(
        f"\n{output_dir}/overview.png shows spectrograms, both curves and the embedding; {folders['dls']} is a model "
        f"folder with a card (README.md).\nTook {time.perf_counter() - started:.0f} s after installation."
    )


if __name__ == "__main__":
    main()
