"""How long UrbanSound8K takes to load and to read, and how much memory: the table of docs/datasets.md.

    python benchmarks/load_corpora.py --output benchmarks/load_corpora.json

A complete tree with the official names, counts and folds is made of noise (8732 files, 4 s, 22.05 kHz, 16 bit, mono).
Every measurement is a process of its own, so that its peak memory is its own, and all run one after another on the
same files, which the operating system has in memory by then; "cold" means that nothing was prepared before. With
--data_dir a real copy is measured instead.
"""

import argparse
import csv
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))


def make_tree(root: Path) -> None:
    """The official layout; the five official crossings of the folds are left out."""
    from datasets_scripts.corpora.urbansound8k import UrbanSound8K

    rng = np.random.default_rng(0)
    names = list(UrbanSound8K.class_sizes)
    labels = rng.permutation(
        [label for label, size in enumerate(UrbanSound8K.class_sizes.values()) for _ in range(size)]
    )
    folds = [fold for fold, size in UrbanSound8K.fold_sizes.items() for _ in range(size)]
    noise = (rng.standard_normal(1 << 20) * 3000).astype(np.int16)
    (root / "metadata").mkdir(parents=True)
    with open(root / "metadata" / "UrbanSound8K.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["slice_file_name", "fsID", "start", "end", "salience", "fold", "classID", "class"])
        for number, (label, fold) in enumerate(zip(labels.tolist(), folds, strict=True)):
            name, folder = f"{1000 + number}-{label}-0-0.wav", root / "audio" / f"fold{fold}"
            folder.mkdir(parents=True, exist_ok=True)
            start = number * 97 % (len(noise) - 88200)
            soundfile.write(folder / name, noise[start : start + 88200], 22050, subtype="PCM_16")
            table.writerow([name, 1000 + number, 0.0, 4.0, 1, fold, label, names[label]])


def read_plainly(root: Path, cache: Path) -> int:
    """The yardstick: what anyone would write."""
    files = sorted((root / "audio").rglob("*.wav"))
    for path in files:
        soundfile.read(path, dtype="float32")
    return len(files)


def load(root: Path, cache: Path) -> int:
    from datasets_scripts import load_corpus

    return len(load_corpus("urbansound8k", root, cache_dir=cache))


def load_and_read(root: Path, cache: Path) -> int:
    from datasets_scripts import decode_audio, load_corpus

    dataset = load_corpus("urbansound8k", root, cache_dir=cache)
    for audio in dataset["audio"]:
        decode_audio(audio)
    return len(dataset)


def load_and_read_in_workers(root: Path, cache: Path) -> int:
    import torch
    from torch.utils.data import DataLoader

    from datasets_scripts import decode_audio, load_corpus

    dataset = load_corpus("urbansound8k", root, cache_dir=cache).select_columns("audio")
    dataset = dataset.with_transform(
        lambda rows: {"samples": [torch.from_numpy(decode_audio(audio)[0]) for audio in rows["audio"]]}
    )

    # Clips of different lengths and channels cannot be stacked; end to end they travel as one shared tensor.
    def end_to_end(rows):
        return torch.cat([row["samples"].flatten() for row in rows])

    for _ in DataLoader(dataset, batch_size=32, num_workers=os.cpu_count(), collate_fn=end_to_end):
        pass
    return len(dataset)


# In this order: the second finds nothing prepared, the others find what it left.
MEASUREMENTS = {
    "plain soundfile loop": read_plainly,
    "load_corpus, cold (checks and decodes every file)": load,
    "load_corpus, cached": load,
    "load_corpus, cached, and decode every clip": load_and_read,
    "the same in a DataLoader, one worker per core": load_and_read_in_workers,
}


def measure(name: str, root: Path, cache: Path) -> dict:
    """Run one measurement in this process. Times leave Python's imports out."""
    import datasets_scripts  # noqa: F401 (imported before the clock starts)

    if "DataLoader" in name:
        import torch.utils.data  # noqa: F401
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    clips = MEASUREMENTS[name](root, cache)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "measurement": name,
        "clips": clips,
        "seconds": round(seconds, 2),
        "clips_per_second": round(clips / seconds),
        "peak_mib": round(peak / 1024),
        "peak_mib_before": round(before / 1024),
        "peak_mib_of_a_worker": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
    }


def as_table(results: dict) -> str:
    """The results in Markdown."""
    lines = [
        "| | seconds | clips/s | peak memory, MiB | of which after the imports, MiB |",
        "| --- " + "| ---: " * 4 + "|",
    ]
    for row in results["results"]:
        own = row["peak_mib"] - row["peak_mib_before"]
        worker = f" (worker: {row['peak_mib_of_a_worker']})" if row["peak_mib_of_a_worker"] else ""
        lines.append(
            f"| {row['measurement']} | {row['seconds']:.2f} | {row['clips_per_second']:,} "
            f"| {row['peak_mib']}{worker} | {own} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data_dir", type=Path, help="a complete UrbanSound8K; default: one is made of noise (1.5 GB)"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--measure", nargs=3, metavar=("NAME", "ROOT", "CACHE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, root, cache = arguments.measure
        print(json.dumps(measure(name, Path(root), Path(cache))))
        return
    load_average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as place:
        root = arguments.data_dir or Path(place) / "UrbanSound8K"
        if arguments.data_dir is None:
            make_tree(root)
        read_plainly(root, Path(place))  # so that the first measurement does not pay for the disk
        results = []
        for name in MEASUREMENTS:
            command = [sys.executable, __file__, "--measure", name, str(root), f"{place}/cache"]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            results.append(json.loads(output.stdout.splitlines()[-1]))
            print(results[-1], file=sys.stderr)
    # Only now: a process's peak memory counts what its parent had when it was started.
    import torch

    from dls_training.runtime import hardware, source_commit

    machine = {
        "hardware": hardware(torch.device("cpu")),
        "python": platform.python_version(),
        "commit": source_commit(),
        "load_average_before": load_average,
    }
    made = {"files": "real" if arguments.data_dir else "noise, 4 s, 22.05 kHz, 16 bit, mono", "machine": machine}
    summary = made | {"results": results}
    if arguments.output:
        arguments.output.write_text(json.dumps(summary, indent=2) + "\n")
    print(as_table(summary))


if __name__ == "__main__":
    main()
