"""What `dls predict` takes for hours of sound: time and memory of the whole process.

    python benchmarks/prediction.py

WAV of 44.1 kHz, 16 bits, mono, in files of an hour; the recommended recipe's network, `small_mel`, with random
weights. Memory is anonymous and shared memory at its peak, beside that for a minute of sound (see memory.py).
"""

import tempfile
import time
from pathlib import Path

from embedding import save_network
from measuring import finish, run, start
from memory import peak_mib

RATE, MINUTE = 44100, 60
OVERLAPS = (0.0, 0.5)


def write_files(folder: Path, minutes: int, files: int) -> Path:
    """Noise whose level changes from minute to minute."""
    import numpy as np
    import soundfile

    folder.mkdir()
    noise = np.random.default_rng(0).integers(-8000, 8000, MINUTE * RATE).astype(np.int16)
    for number in range(files):
        with soundfile.SoundFile(folder / f"{number}.wav", "w", RATE, 1, "PCM_16") as file:
            for minute in range(minutes):
                file.write((noise // (1 + minute % 7)).astype(np.int16))
    return folder


def measure(args) -> list[dict]:
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        save_network("small_mel", place / "model", "ESResNetForAudioClassification")
        long = write_files(place / "long", 60, args.hours)
        short = write_files(place / "short", 1, 1)

        def predict(folder: Path, overlap: float):
            options = ["--model", place / "model", "--output", place / "table.csv", "--overlap", overlap]
            return start("dls", "predict", folder, *options)

        for overlap in OVERLAPS:
            started = time.perf_counter()
            finish(predict(long, overlap))
            rate = args.hours * 3600 / (time.perf_counter() - started)
            what = f"dls predict, {args.hours} h, overlap {overlap:g}, whole process"
            lines.append({"what": what, "rate": rate, "unit": "x real time", "reach": "" if overlap else ">= 400"})
        mib = {folder.name: peak_mib(predict(folder, 0.0)) for folder in (short, long)}
        lines += [
            {"what": "memory, a minute of sound", "rate": mib["short"], "unit": "MiB"},
            {"what": f"memory, {args.hours} h of sound", "rate": mib["long"], "unit": "MiB"},
        ]
    return lines


if __name__ == "__main__":
    run(measure, hours=(10, "of sound, 318 MB each"))
