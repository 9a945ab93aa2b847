"""What a recording of hours costs, beside the same sound in files of five seconds.

    python benchmarks/long_recordings.py

Anonymous and shared memory at its peak (see memory.py), of train_npid.py with --windows over one epoch and of embed.py
with --windows; and the k-NN accuracy of both ways of pre-training on labelled recordings of several minutes.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import REPOSITORY, measured_on, write_table
from memory import peak_mib
from pretraining import finish, train

SECONDS = 5.0
RATE = 44100


def write_both(folder: Path, recordings: list[tuple[str, int, list]]) -> tuple[Path, Path]:
    """Recordings (label, fold, their five-second parts) as long files and as cut ones, each with a metadata.csv."""
    import numpy as np
    import soundfile

    long, cut = folder / "long", folder / "cut"
    tables = {long: [], cut: []}
    for place in tables:
        place.mkdir()
    for number, (label, fold, parts) in enumerate(recordings):
        with soundfile.SoundFile(long / f"{number:03d}.wav", "w", RATE, 1, "PCM_16") as file:
            for part, samples in enumerate(parts):
                samples = np.round(samples * 32767).astype(np.int16)
                file.write(samples)
                soundfile.write(cut / f"{number:03d}-{part:05d}.wav", samples, RATE, subtype="PCM_16")
                tables[cut].append((f"{number:03d}-{part:05d}.wav", label, fold))
        tables[long].append((f"{number:03d}.wav", label, fold))
    for place, rows in tables.items():
        with (place / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("file_name", "label", "fold"), *rows])
    return long, cut


def night(hours: float):
    """Noise whose level and colour change, in parts of five seconds."""
    import numpy as np

    random = np.random.default_rng(0)
    for _ in range(round(hours * 3600 / SECONDS)):
        samples = random.standard_normal(round(SECONDS * RATE), dtype=np.float32)
        yield 0.1 * random.uniform(0.1, 1) * np.convolve(samples, np.ones(random.integers(1, 9)) / 3, "same")


def classes(clips_per_recording: int):
    """Recordings of the generated corpus: for each class and fold its clips one after the other."""
    from datasets_scripts import decode_audio, load_corpus

    corpus = load_corpus("synthetic")
    names = corpus.features["label"].names
    for label, name in enumerate(names):
        for fold in (1, 2):
            rows = [i for i, own in enumerate(corpus["label"]) if own == label][fold - 1 :: 2][:clips_per_recording]
            yield name, fold, [decode_audio(corpus[row]["audio"])[0][0] for row in rows]


def pretrain(folder: Path, output: Path, *options) -> subprocess.Popen:
    environment = {"HF_DATASETS_CACHE": str(output.parent / "cache")}
    return train("--corpus", f"audiofolder={folder}", "--output_dir", output, *options, environment=environment)


def embed(folder: Path, model: Path, output: Path) -> subprocess.Popen:
    command = [sys.executable, REPOSITORY / "embed.py", folder, "--model", model, "--output", output, "--windows"]
    return subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"), help="default: %(default)s")
    parser.add_argument("--hours", type=float, default=3.0, help="of the long recording (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="of pre-training for k-NN (default: %(default)s)")
    args = parser.parse_args()
    provenance, lines = measured_on(), []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        (place / "night").mkdir()
        long, cut = write_both(place / "night", [("", 0, night(args.hours))])
        for folder in (long, cut):
            (folder / "metadata.csv").unlink()  # it has no labels
        once = ["--num_train_epochs", 1]
        ways = {"one file": (long, ["--windows", SECONDS]), "files of 5 s": (cut, [])}
        peaks = {}
        for way, (folder, windows) in ways.items():
            model = place / folder.name
            peaks["pre-training", way] = peak_mib(pretrain(folder, model, *once, *windows))
            peaks["embedding", way] = peak_mib(embed(folder, place / "long", place / f"{folder.name}.parquet"))
        for (what, way), peak in peaks.items():
            lines.append({"what": f"{what}, {args.hours:g} h in {way}", "rate": peak, "unit": "MiB"})
        for what in ("pre-training", "embedding"):
            more = (peaks[what, "one file"] - peaks[what, "files of 5 s"]) * 2**20 / 1e6
            what = f"{what}, one file less files of 5 s"
            lines.append({"what": what, "rate": more, "unit": "MB", "reach": "<= 150 MB"})
        (place / "classes").mkdir()
        long, cut = write_both(place / "classes", list(classes(20)))
        for way, (folder, windows) in {
            "long files": (long, ["--windows", SECONDS]),
            "files of 5 s": (cut, []),
        }.items():
            output = place / f"knn-{folder.name}"
            finish(pretrain(folder, output, "--num_train_epochs", args.epochs, *windows))
            history = json.loads((output / "all_results.json").read_text())["history"]
            knn = history[-1]["knn_accuracy"]["audiofolder"]
            lines.append({"what": f"k-NN accuracy, pre-trained on {way}", "rate": knn, "unit": ""})
    write_table(args.output, lines, provenance)


if __name__ == "__main__":
    main()
