"""Does bf16 train as fp32 does? Curves of both on real sounds, three seeds each: `precision.csv` and `precision.png`.

    python benchmarks/precision.py --corpus esc10=/data/ESC-10

Each seed pre-trains the small preset in either precision, and then fine-tunes from it with fold 1 held out.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from measuring import draw, finish, run, spread, start, with_spread

PRECISIONS = {"bf16": "bf16", "fp32": "no"}
PRETRAINING = [
    "--preset", "small", "--augmentation", "spectrogram", "--keep_spectrograms", "--objective", "softmax",
    "--nce_t", "0.1", "--optimizer", "adamw", "--learning_rate", "2e-3", "--lr_scheduler_type", "cosine",
    "--warmup_steps", "0.1", "--per_device_train_batch_size", "32", "--knn_interval", "10", "--report_to", "none",
]  # fmt: skip
FINE_TUNING = ["--fold", "1", "--num_train_epochs", "10", "--learning_rate", "1e-3", "--keep_waveforms",
               "--report_to", "none"]  # fmt: skip


WHAT = {
    "loss": "pre-training loss",
    "k-NN accuracy": "k-NN accuracy",
    "accuracy": "fine-tuning accuracy, fold 1",
}


def train(script: str, output: Path, *options) -> dict:
    """Runs a train script and returns its results."""
    finish(start(script, *options, "--output_dir", output))
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


def measure(args) -> list[dict]:
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(args.seeds):
            for precision in PRECISIONS:
                folder = Path(temporary) / f"{precision}-{seed}"
                lines += curves(args.corpus, precision, seed, args.epochs, folder)
    picture(lines, args.output.with_suffix(".png"))
    return lines


def picture(lines: list[dict], path: Path) -> None:
    """Curves: the median of the seeds, in a band from the smallest to the largest."""
    panels = {}
    for what, title in WHAT.items():
        curves: list[tuple] = []
        panels[title] = (curves, {})
        for precision in PRECISIONS:
            of_epoch: dict[int, list[float]] = {}
            for line in lines:
                if (line["what"], line["precision"]) == (what, precision):
                    of_epoch.setdefault(int(line["epoch"]), []).append(float(line["value"]))
            low, middle, high = zip(*((min(v), median(v), max(v)) for v in of_epoch.values()), strict=True)
            curves.append((precision, list(of_epoch), middle, (low, high)))
    draw(path, panels, "epoch")


def rows(lines: list[dict]) -> list[list[str]]:
    """What both precisions come to in the end."""
    seeds = len({line["seed"] for line in lines})
    table = [[f"at the end, median of {seeds} seeds (smallest–largest)", *PRECISIONS]]
    for what, title in WHAT.items():
        last = max(int(line["epoch"]) for line in lines if line["what"] == what)
        ends = [line for line in lines if (line["what"], line["epoch"]) == (what, str(last))]
        of = {precision: [float(x["value"]) for x in ends if x["precision"] == precision] for precision in PRECISIONS}
        shown = [with_spread(spread("value", values), "value", "{:.3f}".format) for values in of.values()]
        table.append([f"{title}, {last} epochs", *shown])
    return table


if __name__ == "__main__":
    run(measure, corpus=("synthetic", "NAME[=DIR]"), epochs=(60, "of pre-training"), seeds=3)
