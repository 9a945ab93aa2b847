"""Forty kills at random moments of every command that writes: nothing finished is lost, nothing half finished has a
final name, and what goes on ends as what was not killed.

`make test-soak` runs it.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from scripts import MEASURED, SMALL, Forked, train
from sound_networks import save
from test_labelling import write_index

from dls_sounds import work
from dls_sounds.index import Index
from dls_sounds.labelling import Session
from modeling_dls import ESResNetForAudioClassification

pytestmark = pytest.mark.soak
KILLS = 8  # of each of five commands
SAVING = ["--checkpointing_steps", "2", "--lr_scheduler_type", "constant", "--resume_from_checkpoint", "latest"]
READERS: dict[str, Callable[[Path], object]] = {
    ".safetensors": load_file,
    ".json": lambda path: json.loads(path.read_text(encoding="utf-8")),
    ".parquet": lambda path: pq.read_table(path).to_pylist(),
    ".csv": Path.read_bytes,
    ".md": Path.read_text,
}


def in_small_parts(command: str, *options) -> int:
    work.PART_FILES = 3  # a part of the output is what a kill can cost
    return train("dls", [command, *options])


def answer_all(folder: Path) -> int:
    """A user at the page: whatever has no answer yet gets one, and is told when it is saved."""
    session = Session(Index(folder / "index.parquet"))
    for row in range(len(session.answers("owl")), session.index.num_rows):
        session.answer(row, "owl")
        (folder / "saving").write_text(str(row + 1))
        (folder / "saving").replace(folder / "saved")
    return 0


def commands(sounds: Path, folder: Path) -> dict[str, tuple]:
    """What runs in a folder: name -> (function, *arguments)."""
    model = save(ESResNetForAudioClassification, folder.parent / "model")
    (folder / "label").mkdir(parents=True)
    write_index(folder / "label", [f"{number}.wav" for number in range(300)])
    corpus = [*SMALL, "--corpus", f"audiofolder={sounds}", *SAVING]
    recordings = [sounds, "--model", model, "--mixed_precision", "no", "--output"]
    return {
        "pretrain": (train, "train_npid.py", [*corpus, "--num_train_epochs", "8", "--output_dir", folder / "npid"]),
        "finetune": (
            train, "train_classification.py", [*corpus, "--num_train_epochs", "4", "--output_dir", folder / "classes"],
        ),
        "embed": (in_small_parts, "embed", *recordings, folder / "index.parquet"),
        "predict": (in_small_parts, "predict", *recordings, folder / "detections.csv"),
        "label": (answer_all, folder / "label"),
    }  # fmt: skip


def finished(folder: Path) -> dict[str, object]:
    """Everything under a final name, read: a half-finished file fails here."""
    paths = (path for path in sorted(folder.rglob("*")) if path.suffix in READERS)
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return {path.relative_to(folder).as_posix(): READERS[path.suffix](path) for path in paths}


def without_clocks(content: object) -> object:
    """Contents of a file without what a clock measured, and where it lies."""
    if isinstance(content, dict):
        ignored = {*MEASURED, "command", "options", "run", "environment", "output_dir", "seconds_per_epoch"}
        return {name: without_clocks(value) for name, value in content.items() if name not in ignored}
    if isinstance(content, list):
        return [without_clocks(value) for value in content]
    return content.tolist() if hasattr(content, "tolist") else content


RESULTS = {
    "pretrain": ["npid/model.safetensors", "npid/memory_bank.safetensors", "npid/all_results.json"],
    "finetune": ["classes/model.safetensors", "classes/fold-2/model.safetensors", "classes/all_results.json"],
    "embed": ["index.parquet"],
    "predict": ["detections.csv"],
    "label": ["label/sounds/labels.csv"],
}


def progress(folder: Path) -> dict[str, int]:
    """How far each command has come, in what a kill must not cost."""
    checkpoints = [int(path.name.rpartition("-")[2]) for path in (folder / "npid").glob("checkpoint-*")]
    saved = folder / "label" / "saved"
    return {
        "pretrain": max(checkpoints, default=0),
        "finetune": len(list((folder / "classes").glob("fold-*/fold_results.json"))),
        "embed": len(list(folder.glob(".index.parquet.parts/*.parquet"))),
        "predict": len(list(folder.glob(".detections.csv.parts/*.parquet"))),
        "label": int(saved.read_text() or 0) if saved.exists() else 0,
    }


@pytest.mark.parametrize("command", RESULTS)
def test_kills_at_random_moments(command, sound_folder, tmp_path):
    with Forked(tmp_path / "first", int) as process:  # the first waits for imports, which are not to be timed
        process.end()
    outcomes, hits, random = {}, 0, np.random.default_rng(list(command.encode()))
    for name in ("whole", "killed"):
        folder = tmp_path / name
        what, own = commands(sound_folder, folder)[command], RESULTS[command]
        if name == "whole":
            started = time.monotonic()
            with Forked(tmp_path / "log", *what) as process:
                code, output = process.end()
            assert code == 0, output
            seconds = time.monotonic() - started
        for kill in range(KILLS if name == "killed" else 0):
            before = progress(folder)[command]
            with Forked(tmp_path / f"log-{kill}", *what) as process:  # which ends with SIGKILL
                time.sleep(random.uniform(0, seconds / 4))  # what is done before a kill is not done again
                hits += process.is_running
            is_complete = all((folder / file).exists() for file in own) and command != "label"
            assert is_complete or progress(folder)[command] >= before
            finished(folder)
        with Forked(tmp_path / "log-end", *what) as process:
            code, output = process.end()
        assert code == 0, output
        outcomes[name] = {file: without_clocks(content) for file, content in finished(folder).items() if file in own}
        leftovers = [
            path for path in folder.rglob(".*") if "unfinished" in path.name or path.name.startswith(".checkpoint")
        ]
        assert not leftovers
    assert hits >= 3, "it had ended before most kills"
    assert outcomes["killed"].keys() == outcomes["whole"].keys() == set(own)
    assert outcomes["killed"] == outcomes["whole"]
    if command == "label":
        session = Session(Index(tmp_path / "killed" / "label" / "index.parquet"))
        assert sorted(session.answers("owl")) == list(range(300))
