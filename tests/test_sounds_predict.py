"""`dls predict`, against a network that is asked for one window at a time and a grid filled sample by sample."""

import csv
import io
import itertools
import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import scripts
import soundfile
import torch
from scripts import ROOT, Forked, fail, succeed, torchrun, train
from sound_networks import LENGTH, LENGTHS, RATE, save, slow_outputs, write_recordings

from dls_sounds.engine import Finding, Recording, batches, common_root, computed, decoded
from dls_sounds.network import Classifier
from dls_sounds.predicting import cells, detections
from dls_sounds.tables import RAVEN_COLUMNS
from dls_training.waveforms import in_order
from modeling_dls import ESResNetForAudioClassification, ESResNetForInstanceDiscrimination

FP32 = ("--mixed_precision", "no")
LABELS = {0: "dog", 1: "rain, heavy", 2: 'a "cat"\tmaybe', 3: "owl"}


def save_classifier(folder, **config):
    return save(ESResNetForAudioClassification, folder, num_labels=4, id2label=LABELS,
                label2id={name: number for number, name in LABELS.items()}, **config)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("models") / "one")


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("models") / "several", problem_type="multi_label_classification")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return write_recordings(tmp_path_factory.mktemp("recordings") / "in")


def predict(recordings, model, output, *options) -> list[dict]:
    """Rows of the table, numbers read."""
    succeed("dls", "predict", recordings, "--model", model, "--output", output, *FP32, *options)
    if output.suffix == ".parquet":
        return pq.read_table(output).to_pylist()
    with output.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row | {name: float(row[name]) for name in ("start", "end", "score")} for row in rows]


def slow_cells(windows: list[tuple[int, int, np.ndarray]], step: int) -> list[tuple[int, int, np.ndarray]]:
    """Means over the samples of each step, in which each window that covers a sample counts once."""
    total = windows[-1][1]
    sums, counts = np.zeros((total, len(windows[0][2]))), np.zeros((total, 1))
    for start, end, values in windows:
        sums[start:end] += values
        counts[start:end] += 1
    edges = list(range(0, total, step))
    if len(edges) > 1 and total - edges[-1] <= 0.1 * step:
        edges.pop()
    edges.append(total)
    return [(a, b, sums[a:b].sum(0) / counts[a:b].sum()) for a, b in itertools.pairwise(edges)]


def slow_detections(grid, holds) -> list[tuple]:
    """Runs of cells in which a label holds, label by label; then in order."""
    found = []
    for label in range(len(grid[0][2])):
        run = None
        for start, end, scores in [*grid, (0, 0, None)]:
            if scores is not None and label in holds(scores):
                run = (run[0], end, max(run[2], scores[label])) if run else (start, end, scores[label])
            elif run:
                found.append((run[0], run[1], label, run[2]))
                run = None
    return sorted(found, key=lambda row: (row[0], row[2]))


def slow_grid(model, recordings, name, step, length=LENGTH):
    network = ESResNetForAudioClassification.from_pretrained(model).eval()
    several = network.config.problem_type == "multi_label_classification"
    windows = [
        (start, end, (outputs.logits.sigmoid() if several else outputs.logits.softmax(-1))[0].numpy())
        for start, end, outputs in slow_outputs(network, model, recordings / name, length, step)
    ]
    return slow_cells(windows, step)


def assert_rows(rows: list[dict], name: str, expected: list[tuple]) -> None:
    own = [row for row in rows if row["file"] == name]
    labels = [LABELS[label] for _, _, label, _ in expected]
    assert [row["label"] for row in own] == labels
    for column, place in (("start", 0), ("end", 1)):
        np.testing.assert_allclose([row[column] for row in own], [row[place] / RATE for row in expected], atol=1e-6)
    np.testing.assert_allclose([row["score"] for row in own], [row[3] for row in expected], atol=2e-5)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(("overlap", "step"), [(0, 4000), (0.5, 2000), (0.3, 2800), (0.75, 1000), (0.95, 200)])
def test_scores_of_every_cell(suffix, overlap, step, recordings, model, tmp_path):
    """`--top_k` without a threshold: the mean over the windows that cover a cell, whatever their overlap."""
    rows = predict(recordings, model, tmp_path / f"out{suffix}", "--overlap", str(overlap), "--top_k", "4")
    assert list(rows[0]) == ["file", "start", "end", "label", "score"]
    for name in LENGTHS:
        expected = [
            (start, end, label, scores[label])
            for start, end, scores in slow_grid(model, recordings, name, step)
            for label in np.argsort(-scores)
        ]
        assert_rows(rows, name, expected)
    assert {row["file"] for row in rows} == {*LENGTHS, "g.wav"}


def test_the_best_label_of_each_stretch(recordings, model, tmp_path):
    """What a network with one label a sound says by default: neighbouring cells of one label are one row."""
    rows = predict(recordings, model, tmp_path / "out.csv", "--overlap", "0.75")
    for name in LENGTHS:
        grid = slow_grid(model, recordings, name, 1000)
        assert_rows(rows, name, slow_detections(grid, lambda scores: [scores.argmax()]))


@pytest.mark.parametrize(("options", "threshold"), [((), 0.5), (("--threshold", "0.45"), 0.45)])
def test_several_labels(options, threshold, recordings, several, tmp_path):
    rows = predict(recordings, several, tmp_path / "out.csv", "--overlap", "0.5", *options)
    counts = []
    for name in LENGTHS:
        grid = slow_grid(several, recordings, name, 2000)
        expected = slow_detections(grid, lambda scores: np.flatnonzero(scores >= threshold))
        assert_rows(rows, name, expected)
        counts.append(len(expected))
    assert any(counts)


def test_the_models_own_threshold(recordings, tmp_path):
    model = save_classifier(tmp_path / "model", threshold=0.3)
    rows = predict(recordings, model, tmp_path / "out.csv", "--windows", "0.25")
    for name in LENGTHS:
        grid = slow_grid(model, recordings, name, 2000, 2000)
        assert_rows(rows, name, slow_detections(grid, lambda scores: np.flatnonzero(scores >= 0.3)))
    best = predict(recordings, model, tmp_path / "best.csv", "--windows", "0.25", "--threshold", "0", "--top_k", "1")
    for name in LENGTHS:
        grid = slow_grid(model, recordings, name, 2000, 2000)
        assert_rows(best, name, slow_detections(grid, lambda scores: [scores.argmax()]))


def test_the_models_own_threshold_of_each_label(recordings, tmp_path):
    thresholds = dict(zip(LABELS.values(), (0.45, 0.5, 0.55, 0.4), strict=True))
    backwards = dict(reversed(thresholds.items()))  # names count, not places
    config = {"problem_type": "multi_label_classification", "thresholds": backwards}
    model = save_classifier(tmp_path / "model", **config)
    rows, own = predict(recordings, model, tmp_path / "out.csv", "--threshold", "auto"), list(thresholds.values())
    for name in LENGTHS:
        grid = slow_grid(model, recordings, name, LENGTH)
        assert_rows(rows, name, slow_detections(grid, lambda scores: np.flatnonzero(scores >= own)))
    assert {row["label"] for row in rows} and rows == predict(recordings, model, tmp_path / "default.csv")


EVERY_LABEL = dict.fromkeys(LABELS.values(), 0.5)
WRONG_THRESHOLDS = [{"dog": 0.5}, [0.5] * 4, 0.5, EVERY_LABEL | {"fox": 0.5}, EVERY_LABEL | {"dog": "high"}]


@pytest.mark.parametrize("thresholds", [*WRONG_THRESHOLDS, EVERY_LABEL | {"dog": 2.0}, EVERY_LABEL | {"dog": None}])
def test_thresholds_of_another_shape_are_refused(thresholds, recordings, tmp_path):
    model = save_classifier(tmp_path / "model", thresholds=thresholds)
    message = fail("dls", "predict", recordings, "--model", model, "--output", tmp_path / "out.csv", *FP32)
    assert "thresholds in its config.json must be a score from 0 to 1 for each of its 4 labels" in message


@pytest.mark.parametrize("seed", range(5))
def test_grid_and_detections_of_any_windows(seed):
    """Also where stretches of many labels overlap for long."""
    random = np.random.default_rng(seed)
    for _ in range(30):
        length, total = int(random.integers(10, 60)), int(random.integers(1, 600))
        step = int(random.integers(1, length + 1))
        starts = [0]
        while starts[-1] + length < total - 0.1 * length:
            starts.append(min(starts[-1] + step, total - length))
        ends = [*(start + length for start in starts[:-1]), total]
        windows = [(a, b, random.random(5).astype(np.float32)) for a, b in zip(starts, ends, strict=True)]
        found = list(cells((SimpleNamespace(start=a, end=b, values=v) for a, b, v in windows), step))
        expected = slow_cells(windows, step)
        assert [cell[:2] for cell in found] == [cell[:2] for cell in expected]
        np.testing.assert_allclose([cell[2] for cell in found], [cell[2] for cell in expected], atol=1e-5)
        rows = list(detections(found, lambda scores: np.flatnonzero(scores > 0.6)))
        assert rows == slow_detections(found, lambda scores: np.flatnonzero(scores > 0.6))


def test_threads_change_nothing(recordings, model):
    network = Classifier(str(model), None, "no")
    paths = sorted(path for path in recordings.rglob("*.*") if path.suffix != ".txt")
    files = [Recording(number // 3, path.name, str(path)) for number, path in enumerate(paths)]
    found = []
    for threads in (1, 3):
        windows = batches(decoded(files, network, 1500, None, threads), 4)
        found.append(list(computed(windows, network, threads)))
    assert len(found[0]) > 30 and sum(finding.error is not None for finding in found[0]) == 2
    for one, other in zip(*found, strict=True):
        assert one[:3] == other[:3] and one.error == other.error and np.array_equal(one.values, other.values)


def test_whoever_stops_asking_ends_the_threads():
    """An interrupted run does not decode the hours that remain."""
    numbers = in_order(lambda first: itertools.count(first), [0, 10, 20], 2)
    assert next(numbers) == 0
    numbers.close()  # would wait forever


def test_parts_do_not_share_batches():
    """What is computed anew after a run was stopped is computed in the same batches."""

    def chunk(part, count):
        recording = Recording(part, f"{part}", "")
        return [Finding(recording, n, n + 1) for n in range(count)], torch.zeros(count, 1, 4)

    found = list(batches([chunk(0, 3), chunk(0, 3), chunk(1, 1), chunk(2, 5)], 4))
    assert [[finding.recording.part for finding in findings] for findings, _ in found] == [
        [0] * 4, [0] * 2, [1], [2] * 4, [2],
    ]  # fmt: skip
    assert [len(windows) for _, windows in found] == [4, 2, 1, 4, 1]


# Tables


def test_raven(recordings, model, tmp_path):
    """A selection table: tabs between cells, none within them."""
    options = ["--overlap", "0.75"]
    expected = predict(recordings, model, tmp_path / "out.csv", *options)
    output = tmp_path / "out.txt"
    succeed("dls", "predict", recordings, "--model", model, "--output", output, *FP32, *options)
    header, *lines = output.read_text(encoding="utf-8").splitlines()
    assert header.split("\t") == list(RAVEN_COLUMNS)
    rows = [dict(zip(RAVEN_COLUMNS, line.split("\t"), strict=True)) for line in lines]
    assert [row["Selection"] for row in rows] == [str(number + 1) for number in range(len(expected))]
    for row, own in zip(rows, expected, strict=True):
        assert row["Begin File"] == own["file"] and row["Annotation"] == own["label"].replace("\t", "\\t")
        assert float(row["Begin Time (s)"]) == float(row["File Offset (s)"]) == own["start"]
        assert (float(row["End Time (s)"]), float(row["Score"])) == (own["end"], own["score"])
        assert (row["Low Freq (Hz)"], float(row["High Freq (Hz)"])) == ("0", RATE / 2)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".txt"])
def test_names_of_any_kind(suffix, recordings, model, tmp_path):
    folder, output = tmp_path / "in", tmp_path / f"out{suffix}"
    folder.mkdir()
    names = [b"\xff.wav", b'a\nb, "c"\t.wav', "Vögel.wav".encode(), b"-.wav", b"=1+1.wav"]
    for name in names:
        (folder / os.fsdecode(name)).write_bytes((recordings / "a.wav").read_bytes())
    (folder / os.fsdecode(b"\xfe.wav")).write_bytes(b"none")
    succeed("dls", "predict", folder, "--model", model, "--output", output)
    expected = {name.decode("utf-8", "surrogateescape").encode("utf-8", "backslashreplace").decode() for name in names}
    if suffix == ".parquet":
        found = pq.read_table(output)["file"].to_pylist()
    else:
        with output.open(newline="", encoding="utf-8") as file:
            delimiter, column = (",", "file") if suffix == ".csv" else ("\t", "Begin File")
            quoting = csv.QUOTE_MINIMAL if suffix == ".csv" else csv.QUOTE_NONE
            found = [row[column] for row in csv.DictReader(file, delimiter=delimiter, quoting=quoting)]
    if suffix == ".txt":
        expected = {name.replace("\n", "\\n").replace("\t", "\\t") for name in expected}
    assert set(found) == expected
    with (tmp_path / "out.unreadable.csv").open(newline="", encoding="utf-8") as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["\\udcfe.wav"]


def test_files_and_folders_together(recordings, model, tmp_path):
    """Names are seen from the folder that all have in common; each file is heard once."""
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "a.wav").write_bytes((recordings / "a.wav").read_bytes())
    inputs = [recordings / "b", recordings / "b" / "d.wav", recordings / "f.wav"]
    rows = predict(inputs[0], model, tmp_path / "out.csv", *inputs[1:], "--windows", "4")
    assert [row["file"] for row in rows] == ["b/c.flac", "b/d.wav", "f.wav"]
    (row,) = predict(folder / "a.wav", model, tmp_path / "one.csv")
    assert row["file"] == "a.wav"
    assert common_root([recordings, folder / "a.wav"]) == Path(os.path.commonpath([recordings, folder]))


def test_nothing_found_is_an_empty_table(recordings, model, tmp_path):
    for suffix in (".csv", ".parquet", ".txt"):
        output = tmp_path / f"out{suffix}"
        succeed("dls", "predict", recordings, "--model", model, "--output", output, "--threshold", "1")
        rows = pq.read_table(output).num_rows if suffix == ".parquet" else len(output.read_text().splitlines()) - 1
        assert rows == 0


def test_a_file_that_ends_too_soon_leaves_no_rows(model, tmp_path):
    """Not even of what had been classified before that was known."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("cut", "whole"):
        soundfile.write(folder / f"{name}.wav", 0.1 * np.random.default_rng(0).standard_normal(60 * RATE), RATE)
    content = (folder / "cut.wav").read_bytes()
    (folder / "cut.wav").write_bytes(content[: len(content) // 2])
    rows = predict(folder, model, tmp_path / "out.csv", "--top_k", "1")
    assert {row["file"] for row in rows} == {"whole.wav"} and len(rows) == 120
    assert b"cut.wav," in (tmp_path / "out.unreadable.csv").read_bytes()


# Standard input


def pcm(seconds: float, rate: int) -> tuple[np.ndarray, bytes]:
    samples = (0.1 * np.random.default_rng(0).standard_normal(round(seconds * rate)) * 32767).astype("<i2")
    return samples, samples.tobytes()


def predict_stream(data: bytes, model, output, monkeypatch, *options) -> str:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(data))))
    return succeed("dls", "predict", "-", "--model", model, "--output", output, *FP32, *options)


@pytest.mark.parametrize("rate", [RATE, 11025])
def test_standard_input(rate, model, tmp_path, monkeypatch):
    """The same as a file of the same samples, also of another rate."""
    samples, data = pcm(30.3, rate)
    soundfile.write(tmp_path / "a.wav", samples, rate)
    options = ["--overlap", "0.5", "--top_k", "2"]
    expected = predict(tmp_path / "a.wav", model, tmp_path / "file.csv", *options)
    log = predict_stream(data, model, tmp_path / "out.csv", monkeypatch, "--sampling_rate", str(rate), *options)
    assert "within a sample" not in log
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["file"] for row in rows} == {"-"} and len(rows) == len(expected) == 244
    for row, own in zip(rows, expected, strict=True):
        assert (float(row["start"]), float(row["end"]), row["label"]) == (own["start"], own["end"], own["label"])
        assert float(row["score"]) == pytest.approx(own["score"], abs=1e-4)


def test_standard_input_that_is_no_whole_number_of_samples(model, tmp_path, monkeypatch):
    _, data = pcm(2, RATE)
    expected = predict_stream(data, model, tmp_path / "whole.csv", monkeypatch)
    log = predict_stream(data + b"\x01", model, tmp_path / "out.csv", monkeypatch)
    assert f"ended within a sample, after {len(data) + 1} bytes" in log and "within a sample" not in expected
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    for nothing in (b"", b"\x01"):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(nothing))))
        message = fail("dls", "predict", "-", "--model", model, "--output", tmp_path / "none.csv")
        assert "standard input ended before its first sample" in message and not (tmp_path / "none.csv").exists()


def test_standard_input_of_a_process(model, tmp_path):
    """Through a pipe that gives odd pieces."""
    _, data = pcm(5, RATE)
    command = [sys.executable, "-m", "dls_sounds", "predict", "-", "--model", model, "--output", tmp_path / "out.csv"]
    read, write = os.pipe()
    process = scripts.start([*command, "--top_k", "1"], cwd=ROOT, stdin=read)
    os.close(read)
    with os.fdopen(write, "wb", buffering=0) as pipe:
        for place in range(0, len(data), 999):
            pipe.write(data[place : place + 999])
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 11


# Stopping, going on, several processes


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """1,300 short files (three parts), in which some are unreadable."""
    folder = tmp_path_factory.mktemp("archive")
    random = np.random.default_rng(0)
    for number in range(1300):
        path = folder / f"{number:04d}.wav"
        soundfile.write(path, 0.1 * random.standard_normal(random.integers(1500, 9000)), RATE)
        if number % 100 == 50:
            path.write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(archive, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    predict(archive, model, folder / "out.csv", "--overlap", "0.5", "--threshold", "0.3")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("parts_done", [0, 1, 2])
def test_a_killed_prediction_goes_on(parts_done, archive, model, uninterrupted, tmp_path):
    """And gives the same table, byte for byte, without a half-written one in between."""
    output = tmp_path / "out.csv"
    options = [archive, "--model", model, "--output", output, *FP32, "--overlap", "0.5", "--threshold", "0.3"]
    parts = tmp_path / ".out.csv.parts"
    with Forked(tmp_path / "log", train, "dls", ["predict", *options]) as process:
        process.wait_for(lambda: list(parts.glob("*.claimed")) and len(list(parts.glob("*.parquet"))) >= parts_done)
    assert not output.exists()
    log = succeed("dls", "predict", *options)
    assert ("were done before" in log) == bool(parts_done)
    (tmp_path / "log").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == uninterrupted


def test_what_changed_in_between_is_seen(archive, model, tmp_path):
    """Parts of other files, or of other options, are not used."""
    output = tmp_path / "out.csv"
    options = [archive, "--model", model, *FP32, "--overlap", "0.5", "--output", output]
    with Forked(tmp_path / "log", train, "dls", ["predict", *options]) as process:
        process.wait_for(lambda: list((tmp_path / ".out.csv.parts").glob("*.parquet")))
    log = succeed("dls", "predict", *options, "--top_k", "1")
    assert "done before" not in log and not (tmp_path / ".out.csv.parts").exists()


def test_one_run_at_a_time_writes_a_table(archive, model, tmp_path):
    output = tmp_path / "out.csv"
    options = [archive, "--model", model, "--output", output]
    with Forked(tmp_path / "log", train, "dls", ["predict", *options]) as process:
        process.wait_for(lambda: list((tmp_path / ".out.csv.parts").glob("*.claimed")))
        assert "is being written by another process" in fail("dls", "predict", *options)
    succeed("dls", "predict", *options)
    assert output.exists()


@pytest.mark.slow
def test_two_processes_write_one_table(archive, model, uninterrupted, tmp_path):
    options = [archive, "--model", model, *FP32, "--overlap", "0.5", "--threshold", "0.3"]
    command = [*torchrun(2), "-m", "dls_sounds", "predict", *options, "--output", tmp_path / "out.csv"]
    process = scripts.start(command, cwd=ROOT)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == uninterrupted


# Bad input


def test_bad_input(recordings, model, tmp_path):
    output = tmp_path / "out.csv"
    end = ["--model", model, "--output", output]
    pretrained = save(ESResNetForInstanceDiscrimination, tmp_path / "npid")
    elsewhere = tmp_path / "empty"
    elsewhere.mkdir()
    for words, message in (
        ([recordings, "--output", output], "--model: must be given"),
        ([*end], "INPUT: must be given"),
        ([elsewhere, *end], "empty holds no sound files"),
        ([recordings, elsewhere / "x.wav", *end], "x.wav: there is no such file or folder"),
        ([recordings / "broken.wav", recordings / "empty.flac", *end], "none of the 2 files can be read"),
        ([recordings, "--model", pretrained, "--output", output], "was not saved by train_classification.py"),
        ([recordings, "--model", tmp_path / "a" / "b" / "c", "--output", output], "there is no such folder"),
        ([recordings, "--model", model, "--output", elsewhere], "is a folder"),
        ([recordings, "--model", model, "--output", tmp_path / "out.json"], "ends in .csv, .parquet, .txt"),
        ([recordings, *end, "--windows", "0.05"], "--windows 0.05 is below one analysis window"),
        ([recordings, *end, "--overlap", "1"], "--overlap: must be at least 0 and below 1"),
        ([recordings, *end, "--threshold", "high"], "--threshold: must be a finite number"),
        ([recordings, *end, "--sampling_rate", "8000"], "--sampling_rate is that of standard input"),
        (["-", recordings, *end], "goes with no other"),
    ):
        assert message in fail("dls", "predict", *words), message
        assert not output.exists()
    assert not list(tmp_path.glob(".*"))
    below_a_file = ["--model", model, "--output", model / "config.json" / "out.csv"]
    assert "cannot be written" in fail("dls", "predict", recordings, *below_a_file)


# Memory


def predict_and_print_peak(*options) -> int:
    code = train("dls", ["predict", *options])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return code


def test_memory_does_not_grow_with_a_file(model, tmp_path):
    """An hour less than 40 MB more than a minute, of which its samples alone would be 115 MB."""
    peaks = []
    for minutes in (1, 60):
        sound = 0.1 * np.random.default_rng(0).standard_normal(minutes * 60 * RATE)
        soundfile.write(tmp_path / f"{minutes}.flac", sound, RATE)
        options = [tmp_path / f"{minutes}.flac", "--model", model, "--output", tmp_path / f"{minutes}.csv"]
        with Forked(tmp_path / "log", predict_and_print_peak, *options, "--overlap", "0.5") as process:
            code, output = process.end()
        assert code == 0, output
        peaks.append(float(output.split()[-1]))
    assert peaks[1] < peaks[0] + 40, peaks
