"""How the memory of train_npid.py grows with the corpus.

    python benchmarks/memory.py

Anonymous and shared memory (RssAnon + RssShmem) of the process and all its children at their peak, in a run of one
epoch over 800 and over 8,000 generated clips of a second.
"""

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

from measuring import measured_on, write_table
from pretraining import finish, train


def make_clips(folder: Path, count: int) -> None:
    """Second-long clips of noise, each another one."""
    import numpy as np
    import soundfile

    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        samples = 0.1 * random.standard_normal(44100, dtype=np.float32)
        soundfile.write(folder / f"{number:05d}.wav", samples, 44100, subtype="PCM_16")


def memory_mib(pid: int) -> float:
    """RssAnon + RssShmem of a process and of all that it has started."""
    total = 0.0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(("RssAnon", "RssShmem")):
                total += int(line.split()[1]) / 1024
        children = [c for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return total
    return total + sum(memory_mib(int(child)) for child in children)


def run_once(folder: Path, options: list, environment: dict) -> subprocess.Popen:
    """One epoch over a folder of second-long clips."""
    return train(*options, "--corpus", f"audiofolder={folder}", "--clip_seconds", 1, "--num_train_epochs", 1,
                 "--output_dir", tempfile.mkdtemp(dir=folder.parent), environment=environment)  # fmt: skip


def peak_mib(process: subprocess.Popen) -> float:
    """The most that a process has had until it ended well."""
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, memory_mib(process.pid))
        time.sleep(0.05)
    finish(process)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"), help="default: %(default)s")
    parser.add_argument("--clips", type=int, nargs=2, default=[800, 8000], help="default: 800 8000")
    args = parser.parse_args()
    provenance, lines = measured_on(), []
    with tempfile.TemporaryDirectory() as folder:
        few, many = (Path(folder) / str(count) for count in args.clips)
        make_clips(few, args.clips[0])
        make_clips(many, args.clips[1])
        for kept in ([], ["--keep_spectrograms"], ["--keep_waveforms"]):
            environment = {"HF_DATASETS_CACHE": str(Path(folder) / "cache")}
            peaks = [peak_mib(run_once(clips, kept, environment)) for clips in (few, many)]
            how = kept[0] if kept else "decoding in every epoch"
            for count, peak in zip(args.clips, peaks, strict=True):
                lines.append({"what": f"peak memory, {count} clips, {how}", "rate": peak, "unit": "MiB"})
            growth = (peaks[1] - peaks[0]) * 2**20 / 1e6
            lines.append({"what": f"growth, {how}", "rate": growth, "unit": "MB", "reach": "<= 100 MB"})
    write_table(args.output, lines, provenance)


if __name__ == "__main__":
    main()
