"""Does bf16 train as fp32 does? Curves of both on real sounds, three seeds each: `precision.csv` and `precision.png`.

    python benchmarks/precision.py --corpus esc10=/data/ESC-10

Each seed pre-trains the small preset in either precision, and then fine-tunes from it with fold 1 held out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import REPOSITORY, measured_on, spread, write_table

PRECISIONS = {"bf16": "bf16", "fp32": "no"}
PRETRAINING = [
    "--preset", "small", "--augmentation", "spectrogram", "--keep_spectrograms", "--objective", "softmax",
    "--nce_t", "0.1", "--optimizer", "adamw", "--learning_rate", "2e-3", "--lr_scheduler_type", "cosine",
    "--warmup_steps", "0.1", "--per_device_train_batch_size", "32", "--knn_interval", "10", "--report_to", "none",
]  # fmt: skip
FINE_TUNING = ["--fold", "1", "--num_train_epochs", "10", "--learning_rate", "1e-3", "--keep_waveforms",
               "--report_to", "none"]  # fmt: skip


def train(script: str, output: Path, *options) -> dict:
    """Runs a train script and returns its results."""
    command = [sys.executable, REPOSITORY / script, *options, "--output_dir", output]
    subprocess.run([str(word) for word in command], check=True, stderr=subprocess.DEVNULL)
    return json.loads((output / "all_results.json").read_text())


def curves(corpus: str, precision: str, seed: int, epochs: int, folder: Path) -> list[dict]:
    """Lines of one run: what, precision, seed, epoch, value."""
    common = ["--corpus", corpus, "--mixed_precision", PRECISIONS[precision], "--seed", seed]
    started = time.perf_counter()
    npid = train("train_npid.py", folder / "npid", *common, *PRETRAINING, "--num_train_epochs", epochs)
    tuned = train(
        "train_classification.py", folder / "tuned", *common, *FINE_TUNING, "--model_name_or_path", folder / "npid"
    )
    values = [("loss", entry["epoch"], entry["loss"]) for entry in npid["history"] if "loss" in entry]
    for entry in npid["history"]:
        values += [("k-NN accuracy", entry["epoch"], knn) for knn in entry.get("knn_accuracy", {}).values()]
    values += [("accuracy", epoch, value) for epoch, value in enumerate(tuned["mean_accuracy_per_epoch"], start=1)]
    print(f"{precision}, seed {seed}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return [
        {"what": what, "precision": precision, "seed": seed, "epoch": epoch, "value": value}
        for what, epoch, value in values
    ]


def draw(lines: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    titles = {
        "loss": "pre-training loss",
        "k-NN accuracy": "k-NN accuracy",
        "accuracy": "fine-tuning accuracy, fold 1",
    }
    for axis, (what, title) in zip(axes, titles.items(), strict=True):
        for colour, precision in enumerate(PRECISIONS):
            for seed in sorted({line["seed"] for line in lines}):
                own = [x for x in lines if (x["what"], x["precision"], x["seed"]) == (what, precision, seed)]
                label = precision if seed == lines[0]["seed"] else None
                axis.plot([x["epoch"] for x in own], [x["value"] for x in own], color=f"C{colour}", label=label)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", default="synthetic", metavar="NAME[=DIR]", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"), help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=60, help="of pre-training (default: 60)")
    parser.add_argument("--seeds", type=int, default=3, help="default: 3")
    args = parser.parse_args()
    provenance = measured_on()
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(args.seeds):
            for precision in PRECISIONS:
                folder = Path(temporary) / f"{precision}-{seed}"
                lines += curves(args.corpus, precision, seed, args.epochs, folder)
    draw(lines, args.output.with_suffix(".png"))
    last = {x["what"]: max(y["epoch"] for y in lines if y["what"] == x["what"]) for x in lines}
    for what, epoch in last.items():
        for precision in PRECISIONS:
            ends = [x["value"] for x in lines if (x["what"], x["precision"], x["epoch"]) == (what, precision, epoch)]
            print(f"{what} at the end, {precision}: {spread('value', ends)}")
    write_table(args.output, lines, provenance)


if __name__ == "__main__":
    main()
