"""How the memory of train_npid.py grows with the corpus.

    python benchmarks/memory.py

Anonymous and shared memory (RssAnon + RssShmem) of the process and all its children at their peak, in a run of one
epoch over 800 and over 8,000 generated clips of a second.
"""

import subprocess
import tempfile
import time
from pathlib import Path

from measuring import finish, run
from pretraining import train


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


def peak_mib(process: subprocess.Popen) -> float:
    """The most that a process has had until it ended well."""
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, memory_mib(process.pid))
        time.sleep(0.05)
    finish(process)
    return peak


def measure(args) -> list[dict]:
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        for count in args.clips:
            make_clips(Path(temporary) / str(count), count)
        for cached in ([], ["--keep_spectrograms"], ["--keep_waveforms"]):
            how, peaks = cached[0] if cached else "decoding in every epoch", []
            for count in args.clips:
                output = tempfile.mkdtemp(dir=temporary)
                corpus = ["--corpus", f"audiofolder={temporary}/{count}", "--clip_seconds", 1, "--num_train_epochs", 1]
                process = train(*cached, *corpus, "--output_dir", output, HF_DATASETS_CACHE=f"{temporary}/cache")
                peaks.append(peak_mib(process))
                lines.append({"what": f"peak memory, {count} clips, {how}", "rate": peaks[-1], "unit": "MiB"})
            growth = (peaks[1] - peaks[0]) * 2**20 / 1e6
            lines.append({"what": f"growth, {how}", "rate": growth, "unit": "MB", "reach": "<= 100 MB"})
    return lines


if __name__ == "__main__":
    run(measure, clips=([800, 8000], "of both corpora"))
