"""How long UrbanSound8K takes to load and to read, and how much memory.

    python benchmarks/load_corpora.py

A complete tree with the official names, counts and folds is made of noise (8732 files, 4 s, 22.05 kHz, 16 bit, mono).
Every measurement is a process of its own, so that its peak memory is its own, and all run one after another on the
same files, which the operating system has in memory by then; "cold" means that nothing was prepared before. With
--data_dir a real copy is measured instead.
"""

import csv
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
from measuring import apart, run


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

    options = {"batch_size": 32, "num_workers": os.cpu_count(), "multiprocessing_context": "fork"}  # as scripts do
    for _ in DataLoader(dataset, collate_fn=end_to_end, **options):
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


def measure_one(name: str, root: Path, cache: Path) -> dict:
    """In a process of its own. Times leave Python's imports out."""
    from datasets_scripts import decode_audio, load_corpus  # noqa: F401 (imported before the clock starts)

    if "DataLoader" in name:
        import torch.utils.data  # noqa: F401
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    clips = MEASUREMENTS[name](root, cache)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "what": name,
        "clips": clips,
        "seconds": round(seconds, 2),
        "clips_per_second": round(clips / seconds),
        "peak_mib": round(peak / 1024),
        "peak_mib_before": round(before / 1024),
        "peak_mib_of_a_worker": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
    }


def measure(args) -> list[dict]:
    circumstances = {"load_average_before": os.getloadavg()[0], "files": "real" if args.data_dir else "noise"}
    with tempfile.TemporaryDirectory() as place:
        root, cache = Path(args.data_dir or f"{place}/UrbanSound8K"), Path(place) / "cache"
        if not args.data_dir:
            apart(make_tree, [(root,)])  # a process's peak counts what the one that started it had
        read_plainly(root, cache)  # so that the first measurement does not pay for the disk
        return [apart(measure_one, [(name, root, cache)])[0] | circumstances for name in MEASUREMENTS]


def rows(lines: list[dict]) -> list[list[str]]:
    table = [["", "seconds", "clips/s", "peak memory, MiB", "of which after the imports, MiB"]]
    for line in lines:
        own = int(line["peak_mib"]) - int(line["peak_mib_before"])
        worker = f" (worker: {line['peak_mib_of_a_worker']})" if int(line["peak_mib_of_a_worker"]) else ""
        rate = f"{int(line['clips_per_second']):,}"
        table.append([line["what"], f"{float(line['seconds']):.2f}", rate, f"{line['peak_mib']}{worker}", f"{own}"])
    return table


if __name__ == "__main__":
    run(measure, data_dir=("", "a complete UrbanSound8K; without, one is made of noise, 1.5 GB"))
