"""What `dls export` and run_onnx.py come to: size, accuracy, latency of a clip on one core, memory, learning.

    python benchmarks/device.py --esc50 /data/ESC-50 --networks small_mel=runs/esc50 tiny_mel=runs/tiny_esc50

Each network is an output folder of `train_classification.py --corpus esc50=… --fold all`. Its models of folds 2 to 5
(1 is for choosing) are exported and run on the fold that they have not heard, 8 bits calibrated on the others' clips.
Time and memory are those of the first fold's model: of a process that runs on one core and cannot import torch.
"""

import copy
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import number, run, with_spread

ROUNDS = 100
CLASSES, CLIPS = 10, 50  # that are learned
# What the runner needs: the newest releases, and onnxruntime before it was half as large again.
NEEDED = ("onnxruntime", "numpy", "soundfile"), ("onnxruntime<1.27", "numpy", "soundfile")
# Prints seconds a clip.
TIMED = """
import sys, time
sys.modules["torch"] = None
sys.path.insert(0, sys.argv[1])
import numpy as np, run_onnx
network = run_onnx.Network(sys.argv[2])
rate, blocks = run_onnx.file_blocks(sys.argv[3], network.channels)
clip = np.concatenate(list(blocks), axis=1)[:, : network.length]
for _ in range(int(sys.argv[4])):
    started = time.perf_counter()
    network.scores(clip)
    print(time.perf_counter() - started)
"""
# The runner, and then the most memory that it took, in KiB. Not getrusage's: that knows the parent's, too.
WATCHED = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0], file=sys.stderr)
"""


def write_exports(run_folder: Path, corpus, folds_run: list[int], folder: Path) -> tuple[int, dict[str, list[float]]]:
    """Both files of each fold; returns the number of parameters, and accuracies of each kind, fold by fold."""
    import numpy as np

    from dls_sounds import exporting, run_onnx
    from dls_sounds.network import Classifier

    folds, names = np.array(corpus["fold"]), corpus.features["label"].names
    accuracies = {"fp32": [], "int8": []}
    for fold in folds_run:
        trained = Classifier(str(run_folder / f"fold-{fold}"), None, "no")
        (folder / str(fold)).mkdir(parents=True)
        model, own = exporting.to_onnx(trained), exporting.facts(trained)
        path = {kind: folder / str(fold) / f"{kind}.onnx" for kind in accuracies}
        exporting.write(copy.deepcopy(model), own, path["fp32"])
        exporting.check(trained, run_onnx.Network(path["fp32"]))
        others = np.flatnonzero(folds != fold)
        chosen = others[np.linspace(0, len(others) - 1, exporting.CALIBRATION_CLIPS).round().astype(int)]
        heard = (exporting.first_window(trained, corpus[int(row)]) for row in chosen)
        exporting.write(exporting.quantised(model, heard, folder), own, path["int8"])
        networks = {kind: run_onnx.Network(path[kind]) for kind in accuracies}
        right = {kind: [] for kind in accuracies}
        for row in np.flatnonzero(folds == fold):
            clip = corpus[int(row)]
            waveform = exporting.first_window(trained, clip)
            for kind, network in networks.items():
                right[kind].append(trained.labels[network(waveform)[0].argmax()] == names[clip["label"]])
        for kind, answers in right.items():
            accuracies[kind].append(float(np.mean(answers)))
        print(f"{run_folder.name}, fold {fold}: {accuracies}", file=sys.stderr, flush=True)
    return sum(weight.numel() for weight in type(trained.model)(trained.config).parameters()), accuracies


def alone(code: str, *words) -> subprocess.CompletedProcess:
    """Python code in a process of its own, on one core."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, env=environment | limits, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done


def measured_file(path: Path, clip: Path, labels: Path) -> dict[str, float]:
    """Milliseconds a clip (median, smallest, largest), MB of the runner at its peak, seconds of learning."""
    runner = Path(__file__).resolve().parents[1] / "dls_sounds" / "run_onnx.py"
    seconds = list(map(float, alone(TIMED, runner.parent, path, clip, ROUNDS).stdout.split()))[ROUNDS // 10 :]
    peak = int(alone(WATCHED, runner, path, clip).stderr.split()[-1]) * 1024 / 1e6
    started = time.perf_counter()
    alone(WATCHED, runner, path, "--learn", labels, "--output", path.with_name("learned.onnx"))
    learning = time.perf_counter() - started
    own = {"ms": statistics.median(seconds), "ms_min": min(seconds), "ms_max": max(seconds)}
    return {name: 1000 * value for name, value in own.items()} | {"peak_mb": peak, "learning_s": learning}


def write_clips(corpus, folder: Path) -> tuple[Path, Path]:
    """Five clips of each of ten classes, and what labels them; the first clip, and the labels."""
    folder.mkdir()
    names, taken, lines = corpus.features["label"].names, {}, []
    for row in corpus:
        label = names[row["label"]]
        if taken.get(label, 0) < CLIPS // CLASSES and (label in taken or len(taken) < CLASSES):
            taken[label] = taken.get(label, 0) + 1
            source = Path(row["audio"]["path"])
            (folder / source.name).write_bytes(source.read_bytes())
            lines.append((source.name, label))
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_name", "label"), *lines])
    return folder / lines[0][0], folder / "labels.csv"


def installed_mb(requirements: tuple[str, ...]) -> float:
    """What the runner needs beside Python, from the package index."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--quiet", "--disable-pip-version-check", "--no-compile", "--target", folder]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, *requirements], check=True)
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 1e6


def measure(args) -> list[dict]:
    from datasets_scripts import load_corpus

    installed = [  # first: what needs the package index must not cost the minutes of the rest
        {"what": f"{', '.join(needed)} and what they need, installed", "file_mb": installed_mb(needed)}
        for needed in NEEDED
    ]
    corpus, lines = load_corpus("esc50", args.esc50), []
    with tempfile.TemporaryDirectory() as temporary:
        clip, labels = write_clips(corpus, Path(temporary) / "clips")
        for named in args.networks:
            name, _, folder = named.partition("=")
            exports = Path(temporary) / name
            parameters, accuracies = write_exports(Path(folder), corpus, args.folds, exports)
            for kind, of_folds in accuracies.items():
                path = exports / str(args.folds[0]) / f"{kind}.onnx"
                lost = statistics.mean(b - a for a, b in zip(of_folds, accuracies["fp32"], strict=True))
                line = {
                    "what": name,
                    "kind": kind,
                    "folds": " ".join(map(str, args.folds)),
                    "parameters": parameters,
                    "file_mb": path.stat().st_size / 1e6,
                }
                line |= {"accuracy": statistics.mean(of_folds), "lost": lost}
                lines.append(line | measured_file(path, clip, labels))
    return [*lines, *installed]


def rows(lines: list[dict]) -> list[list[str]]:
    """The table of the document."""
    shown = [["network", "weights", "file", "accuracy", "a clip of 5 s", "peak memory", "learning 10 classes"]]
    for line in lines:
        row = [line["what"], "", f"{number(line['file_mb'])} MB"]
        if "kind" in line:
            row[1] = f"{int(line['parameters']) / 1e6:.2f} M, {line['kind']}"
            row += [
                f"{float(line['accuracy']):.4f}"
                + (f" ({-float(line['lost']):+.4f})" if line["kind"] == "int8" else "")
            ]
            row += [
                f"{with_spread(line, 'ms')} ms",
                f"{number(line['peak_mb'])} MB",
                f"{number(line['learning_s'])} s",
            ]
        shown.append([*row, *[""] * (7 - len(row))])
    return shown


if __name__ == "__main__":
    run(
        measure, esc50=("ESC-50", "the 2,000 real clips"), networks=(["small_mel=runs/esc50"], "NAME=FOLDER"),
        folds=([2, 3, 4, 5], "of which accuracy is the mean"),
    )  # fmt: skip
