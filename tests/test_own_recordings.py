"""docs/own_recordings.md: its commands, in order, on sounds that are generated for its tables."""

import csv
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from scripts import ROOT, succeed

from datasets_scripts.__main__ import main as corpora
from dls_sounds.__main__ import main as dls

TUTORIAL = (ROOT / "docs" / "own_recordings.md").read_text(encoding="utf-8")
RATE, SECONDS = 22050, 20
PITCHES = {"owl": 400, "frog": 2500}


def blocks() -> list[tuple[str, str]]:
    """(language, content) of each."""
    return re.findall(r"```(\w+)\n(.*?)```", TUTORIAL, flags=re.DOTALL)


def generate(folder: Path, rows: list[dict]) -> None:
    """Nights in which is heard what the tables say: pulses of a class's pitch, in noise."""
    random = np.random.default_rng(0)
    for name in {row["file_name"] for row in rows}:
        sound = 0.01 * random.standard_normal(RATE * SECONDS)
        for row in (row for row in rows if row["file_name"] == name and row["label"] in PITCHES):
            place = slice(int(row["start"]) * RATE, int(row["end"]) * RATE)
            time = np.arange(place.stop - place.start) / RATE
            sound[place] += 0.3 * np.sin(2 * np.pi * PITCHES[row["label"]] * time) * (np.sin(2 * np.pi * 3 * time) > 0)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, sound, RATE)


def detected(found: list[dict], row: dict) -> set[str]:
    """Labels of detections in the middle of a labelled stretch."""
    middle = (float(row["start"]) + float(row["end"])) / 2
    of_file = [each for each in found if each["file"] == row["file_name"]]
    return {each["label"] for each in of_file if float(each["start"]) <= middle < float(each["end"])}


def run(command: str) -> None:
    """As it stands, but for its launcher and the length of the pre-training."""
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "datasets_scripts"]:
        assert not corpora(words[3:])
    elif words[0] == "dls":
        assert not dls(words[1:])
    else:
        assert words[:2] == ["accelerate", "launch"]
        succeed(*words[2:], *(["--num_train_epochs", "3"] if words[2] == "train_npid.py" else []))


@pytest.mark.slow
def test_from_a_folder_to_detections_a_correction_and_a_second_round(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (first, more) = (content for language, content in blocks() if language == "csv")
    rows = list(csv.DictReader((first + more).splitlines()))
    generate(tmp_path / "recordings", rows)
    labels = tmp_path / "recordings" / "labels.csv"
    for language, content in blocks():
        if language == "csv":
            labels.write_text((labels.read_text() if labels.exists() else "") + content)
        else:
            for command in content.splitlines():
                run(command)
    assert pq.read_table("recordings.parquet").num_rows == 5 * SECONDS // 5
    assert "Nothing was measured" in Path("runs/mine/README.md").read_text()
    assert "were made, stratified by class" in Path("runs/tested/README.md").read_text()
    for name in ("detections.csv", "detections-2.csv"):
        found = list(csv.DictReader(Path(name).read_text().splitlines()))
        assert set(found[0]) == {"file", "start", "end", "label", "score"}
        assert {row["label"] for row in found} == set(PITCHES)
        answers = {
            (row["file_name"], row["start"]): row["label"] in detected(found, row)
            or (row["label"] not in PITCHES and not detected(found, row))
            for row in rows
        }  # fmt: skip
        assert np.mean(list(answers.values())) > 0.8, answers
