"""Runs every benchmark of speed, one after the other, and puts what they measured into docs/speed.md.

    python benchmarks/run_all.py --esc10 /data/ESC-10

Without ESC-10 the generated corpus is used, and a folder of it.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import REPOSITORY


def write_synthetic(folder: Path) -> None:
    """The generated corpus as files."""
    from datasets_scripts import load_corpus

    for row in load_corpus("synthetic"):
        (folder / f"{row['clip_id']}.wav").write_bytes(row["audio"]["bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--esc10", type=Path, help="the 400 real clips")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        recordings = args.esc10 or Path(temporary)
        if not args.esc10:
            write_synthetic(recordings)
        corpus = f"esc10={args.esc10}" if args.esc10 else "synthetic"
        for name, *options in (
            ["start_up"],
            ["spectrogram"],
            ["training_step", "--compile"],
            ["embedding", recordings],
            ["pretraining", "--corpus", corpus],
            ["memory"],
            ["long_recordings"],
            ["precision", "--corpus", corpus],
            ["report"],
        ):
            print(f"\n== {name}", flush=True)
            started = time.perf_counter()
            command = [sys.executable, REPOSITORY / "benchmarks" / f"{name}.py", *options]
            subprocess.run([str(word) for word in command], check=True)
            print(f"({time.perf_counter() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
