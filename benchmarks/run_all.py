"""Runs every benchmark of speed, one after the other, and puts what was measured into the documents.

    python benchmarks/run_all.py --esc10 /data/ESC-10
    python benchmarks/run_all.py --report       # only the documents, from the CSVs

Without ESC-10 the generated corpus is used. The tables of those that take longer, or measure something else (memory,
long_recordings, precision, memory_bank, load_corpora, planted_events, device, gpu, readouts, self_training), are
written from the CSVs that are there; so is precision.png.
"""

import argparse
import re
import subprocess
import sys
import time
from importlib import import_module

from measuring import REPOSITORY, markdown, read_table

BENCHMARKS = (
    "start_up",
    "spectrogram",
    "training_step",
    "embedding",
    "search",
    "labelling",
    "prediction",
    "pretraining",
)
DOCUMENTS = [
    REPOSITORY / "docs" / f"{name}.md"
    for name in ("speed", "scaling", "datasets", "own_recordings", "labelling", "device", "training")
]
MARKED = re.compile(r"(<!-- (\w+)\.csv -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(document: str) -> str:
    """The document with every marked table as its CSV has it."""
    folder = REPOSITORY / "benchmarks"
    return MARKED.sub(
        lambda found: found[1] + markdown(folder / f"{found[2]}.csv", import_module(found[2])) + found[3], document
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--esc10", help="the 400 real clips")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the documents")
    args = parser.parse_args()
    corpus = ["--corpus", f"esc10={args.esc10}" if args.esc10 else "synthetic"]
    options = {"training_step": ["--rounds", 3], **dict.fromkeys(("embedding", "pretraining"), corpus)}
    for name in BENCHMARKS if not args.report else ():
        print(f"\n== {name}", flush=True)
        started = time.perf_counter()
        command = [sys.executable, REPOSITORY / "benchmarks" / f"{name}.py", *options.get(name, [])]
        subprocess.run([str(word) for word in command], check=True)
        print(f"({time.perf_counter() - started:.0f} s)", flush=True)
    precision = REPOSITORY / "benchmarks" / "precision.csv"
    import_module("precision").picture(read_table(precision), precision.with_suffix(".png"))
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
