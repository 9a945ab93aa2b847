"""Twenty thousand files, one in a hundred broken: what is good is all there, and memory does not grow with them.

`make test-soak` runs it.
"""

import contextlib
import csv
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from scripts import ROOT, start
from sound_networks import save

from modeling_dls import ESResNetForAudioClassification

pytestmark = pytest.mark.soak
FEW, MANY = 200, 20_000
BROKEN = {
    "is empty": b"",
    "truncated, damaged": b"RIFF\x00\x00\x00\x00WAVE",
    "not a sound file": b"no sound at all" * 40,
}
MOST_GROWTH = 100_000_000  # bytes, from few to many files
MOST_OWN = 1_000_000_000  # bytes, of memory that the system cannot take back


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    folder, random = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    for number in range(MANY):
        path = folder / f"{number // FEW:03}" / f"{number:05}.wav"
        path.parent.mkdir(exist_ok=True)
        if number % 100 == 50:
            path.write_bytes(list(BROKEN.values())[number // 100 % len(BROKEN)])
        else:
            soundfile.write(path, 0.1 * random.standard_normal(4000), 8000)
    return folder


def peaks_of(process: subprocess.Popen) -> tuple[int, int]:
    """Bytes that a process had at most, once it has ended well: in all, and of its own.

    What is not its own are pages of files, most of them torch's libraries: the system drops those as it likes.
    """
    most = own = 0
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError):  # it may end in between
            status = Path(f"/proc/{process.pid}/status").read_text()
            now, anonymous = (
                1024 * int(status.partition(f"{field}:")[2].split()[0]) for field in ("VmHWM", "RssAnon")
            )
            most, own = max(most, now), max(own, anonymous)
        time.sleep(0.1)
    assert process.returncode == 0
    return most, own


@pytest.mark.parametrize(("command", "suffix"), [("embed", ".parquet"), ("predict", ".csv")])
def test_many_files(command, suffix, sounds, tmp_path):
    model, peaks = save(ESResNetForAudioClassification, tmp_path / "model"), []
    for name, folder in (("few", sounds / "000"), ("many", sounds)):
        output = tmp_path / f"{name}{suffix}"
        words = ["-m", "dls_sounds", command, folder, "--model", model, "--output", output]
        with (tmp_path / "log").open("w") as log:
            peaks.append(peaks_of(start([sys.executable, *words], cwd=ROOT, stdout=log)))
    for files, (most, own) in zip((FEW, MANY), peaks, strict=True):
        print(f"{command}, {files} files: at most {most / 1e9:.2f} GB, of these {own / 1e9:.2f} of its own")
    assert peaks[1][0] - peaks[0][0] < MOST_GROWTH
    assert peaks[1][1] < MOST_OWN
    if suffix == ".csv":
        with output.open(newline="") as file:
            found = [row["file"] for row in csv.DictReader(file)]
    else:
        found = pq.read_table(output)["file"].to_pylist()
    names = [(f"{number // FEW:03}/{number:05}.wav", number % 100 == 50) for number in range(MANY)]
    assert found == [name for name, is_broken in names if not is_broken]
    with (tmp_path / "many.unreadable.csv").open(newline="") as file:
        refused = {row["file"]: row["reason"] for row in csv.DictReader(file)}
    assert list(refused) == [name for name, is_broken in names if is_broken]
    for number, reason in enumerate(refused.values()):
        assert list(BROKEN)[number % len(BROKEN)] in reason
