"""What a recording of hours costs, beside the same sound in files of five seconds.

    python benchmarks/long_recordings.py

Anonymous and shared memory at its peak (see memory.py), of train_npid.py with --windows over one epoch and of
dls embed with --windows; and the k-NN accuracy of both ways of pre-training on labelled recordings of several minutes.
"""

import csv
import json
import subprocess
import tempfile
from pathlib import Path

from measuring import finish, run, start
from memory import peak_mib
from pretraining import train

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
    corpus = ["--corpus", f"audiofolder={folder}", "--output_dir", output]
    return train(*corpus, *options, HF_DATASETS_CACHE=str(output.parent / "cache"))


def peaks(place: Path, hours: float) -> list[dict]:
    """Memory that one recording takes, and the same sound in short files."""
    long, cut = write_both(place, [("", 0, night(hours))])
    lines, mib = [], {}
    for way, folder, windows in (("one file", long, ["--windows", SECONDS]), ("files of 5 s", cut, [])):
        (folder / "metadata.csv").unlink()  # it has no labels
        model = place / f"network-{folder.name}"
        mib["pre-training", way] = peak_mib(pretrain(folder, model, "--num_train_epochs", 1, *windows))
        embedding = ["--model", model, "--output", place / f"{folder.name}.parquet", "--windows"]
        mib["embedding", way] = peak_mib(start("dls", "embed", folder, *embedding))
        for what in ("pre-training", "embedding"):
            lines.append({"what": f"{what}, {hours:g} h in {way}", "rate": mib[what, way], "unit": "MiB"})
    for what in ("pre-training", "embedding"):
        more = (mib[what, "one file"] - mib[what, "files of 5 s"]) * 2**20 / 1e6
        what = f"{what}, one file less files of 5 s"
        lines.append({"what": what, "rate": more, "unit": "MB", "reach": "<= 150 MB"})
    return lines


def accuracies(place: Path, epochs: int) -> list[dict]:
    """k-NN accuracy after pre-training on labelled recordings, and on the same sound in short files."""
    long, cut = write_both(place, list(classes(20)))
    lines = []
    for way, folder, windows in (("long files", long, ["--windows", SECONDS]), ("files of 5 s", cut, [])):
        output = place / f"network-{folder.name}"
        finish(pretrain(folder, output, "--num_train_epochs", epochs, *windows))
        history = json.loads((output / "all_results.json").read_text())["history"]
        knn = history[-1]["knn_accuracy"]["audiofolder"]
        lines.append({"what": f"k-NN accuracy, pre-trained on {way}", "rate": knn, "unit": ""})
    return lines


def measure(args) -> list[dict]:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        return peaks(Path(one), args.hours) + accuracies(Path(other), args.epochs)


if __name__ == "__main__":
    run(measure, hours=(3.0, "of the long recording"), epochs=(20, "of pre-training for k-NN"))
