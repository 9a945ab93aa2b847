"""`dls export` and run_onnx.py, against torch: the same numbers, in a process that cannot import it."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from golden import deterministic as golden
from scripts import fail, succeed
from sound_networks import LENGTH, RATE, save, write_recordings

from datasets_scripts.corpus import SOUND_EXTENSIONS
from dls_sounds import exporting, run_onnx
from dls_sounds.network import Classifier
from dls_sounds.spectrogram_graph import GraphSpectrogram
from dls_training.closed_form import ridge_classifier
from dls_training.waveforms import stream_windows
from modeling_dls import ESResNetConfig, ESResNetFeatureExtractor, ESResNetForAudioClassification

onnx = pytest.importorskip("onnx")
LABELS = {0: "dog", 1: "rain, heavy", 2: 'a "cat"', 3: "owl"}
# What the runner must not need: it is run as if these were not there.
ABSENT = ("torch", "torchaudio", "transformers", "datasets", "onnx", "scipy", "modeling_dls", "dls_sounds")
MEMORY = 150e6  # bytes


def save_classifier(folder: Path, **config) -> Path:
    names = {name: number for number, name in LABELS.items()}
    return save(ESResNetForAudioClassification, folder, num_labels=4, id2label=LABELS, label2id=names, **config)


def export(model: Path, output: Path, *options) -> Path:
    succeed("dls", "export", model, "--output", output, *options)
    return output


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("models") / "one", pooling="statistics", pooler_act="asinh")


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    return export(model, tmp_path_factory.mktemp("exported") / "x.onnx")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return write_recordings(tmp_path_factory.mktemp("recordings") / "in")


def start(exported: Path, *options, **popen_options) -> subprocess.Popen:
    """`python run_onnx.py` with the copy beside the file, where nothing else of the project can be imported."""
    without = "".join(f"sys.modules[{name!r}] = None; " for name in ABSENT)
    runner = exported.with_name("run_onnx.py")
    code = f"import sys, runpy; {without}sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, runner, exported, *options]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | popen_options
    return subprocess.Popen([str(word) for word in command], env=environment, cwd=exported.parent, **pipes)


def run(exported: Path, *options, sound: bytes = b"") -> tuple[list[dict], str]:
    """Rows of the table that it prints, numbers read, and what it says."""
    process = start(exported, *options, stdin=subprocess.PIPE)
    printed, said = process.communicate(sound, timeout=300)
    assert process.returncode == 0, said.decode()
    rows = csv.DictReader(printed.decode().splitlines())
    return [row | {name: float(row[name]) for name in ("start", "end", "score")} for row in rows], said.decode()


def refused(path: Path, *options, capsys) -> str:
    """What the runner says, in one line, of what it cannot do."""
    assert run_onnx.main([str(path), *map(str, options)]) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and said.startswith("error: "), said
    return said


def pcm(samples: np.ndarray) -> bytes:
    return np.rint(samples * 32767).astype("<i2").tobytes()


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("small_mel", {}),
        ("esresnet18", {}),
        ("tiny", {"n_fft": 1023, "win_length": 400, "hop_length": 401}),
        ("tiny", {"n_fft": 743, "win_length": 600, "hop_length": 97, "resize_mode": "bilinear"}),
        ("tiny", {"spec_height": None, "spec_width": None}),
    ],
)
def test_spectrograms_of_matrices_are_the_extractors(preset, changes):
    extractor = ESResNetFeatureExtractor.from_preset(preset, **changes)
    waveforms = 0.1 * torch.randn(3, 2, 20001, generator=torch.Generator().manual_seed(0))
    waveforms[0] *= 1e-3
    waveforms[1] += torch.sin(0.1 * torch.arange(20001))
    found = GraphSpectrogram(extractor, 20001)(waveforms)
    torch.testing.assert_close(found, extractor.spectrogram(waveforms), atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def recommended(tmp_path_factory):
    """The recommended recipe's network with random weights, and its export."""
    folder = tmp_path_factory.mktemp("recommended")
    torch.manual_seed(0)
    network = ESResNetForAudioClassification(ESResNetConfig.from_preset("small_mel", num_labels=50))
    network.save_pretrained(folder / "model")
    extractor = ESResNetFeatureExtractor.from_preset("small_mel", max_length=220500, audio_channels=1)
    extractor.save_pretrained(folder / "model")
    export(folder / "model", folder / "x.onnx")
    return folder


def largest_difference(folder: Path, waveforms: np.ndarray) -> float:
    """Between the logits of torch and of onnxruntime, in largest logits."""
    trained, network = Classifier(str(folder / "model"), None, "no"), run_onnx.Network(folder / "x.onnx")
    expected = trained.outputs(torch.from_numpy(waveforms)[:, None]).logits.numpy()
    return float((abs(network(waveforms)[0] - expected).max(axis=1) / abs(expected).max(axis=1)).max())


@pytest.mark.slow
def test_logits_of_the_golden_waveforms_are_torchs(recommended):
    mono = [golden.waveform(case).reshape(-1, 220500)[0] for case in golden.CASES if case.endswith("5s")]
    assert largest_difference(recommended, np.stack(mono).astype(np.float32)) <= 1e-4


@pytest.mark.slow
def test_logits_of_real_clips_are_torchs(recommended, shared_dir):
    trained = Classifier(str(recommended / "model"), None, "no")
    files = sorted((shared_dir / "data" / "ESC-50" / "audio").iterdir())[::200][:10]
    clips = [exporting.first_window(trained, {"audio": {"bytes": None, "path": str(file)}})[0] for file in files]
    assert largest_difference(recommended, np.stack(clips)) <= 1e-4


@pytest.mark.parametrize(
    "options", [["--top_k", "4"], ["--overlap", "0.5"], ["--threshold", "0.2", "--overlap", "0.75"]]
)
def test_the_table_is_that_of_dls_predict_where_torch_cannot_be_imported(
    options, exported, model, recordings, tmp_path
):
    exact = ["--mixed_precision", "no", *options]
    succeed("dls", "predict", recordings, "--model", model, "--output", tmp_path / "y.csv", *exact)
    with (tmp_path / "y.csv").open(newline="", encoding="utf-8") as file:
        expected = list(csv.DictReader(file))
    rows, said = run(exported, recordings, *options)
    assert [(row["file"], row["label"]) for row in rows] == [(row["file"], row["label"]) for row in expected]
    for column, tolerance in (("start", 1e-6), ("end", 1e-6), ("score", 1e-5)):
        found, right = [row[column] for row in rows], [float(row[column]) for row in expected]
        np.testing.assert_allclose(found, right, atol=tolerance)
    assert {row["file"] for row in rows} >= {"a.wav", "b/c.flac", "g.wav"}
    assert "broken.wav" in said and "2 of 8 files cannot be read" in said


def test_files_are_those_that_the_project_takes_for_sounds():
    assert run_onnx.EXTENSIONS == SOUND_EXTENSIONS


@pytest.mark.parametrize("samples", [100, 4000, 4399, 4401, 8399, 8401, 12000, 30001])
@pytest.mark.parametrize("step", [4000, 2000, 300])
def test_windows_are_those_of_the_project(samples, step):
    sound = np.random.default_rng(0).standard_normal((1, samples)).astype(np.float32)
    blocks = [sound[:, start : start + 700] for start in range(0, samples, 700)]
    found = list(run_onnx.windows(blocks, LENGTH, step))
    tensors = (torch.from_numpy(block) for block in blocks)
    expected = [
        pair for places, each in stream_windows(tensors, LENGTH, step) for pair in zip(places, each, strict=True)
    ]
    assert [(window.start, window.end) for window in found] == [place for place, _ in expected]
    for window, (_, values) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(window.values, values.numpy())


@pytest.mark.parametrize(
    ("source", "target"), [(48000, 44100), (16000, 44100), (44100, 8000), (192000, 16000), (7, 5)]
)
def test_resampling_is_torchaudios(source, target):
    sound = np.random.default_rng(0).standard_normal((2, 30011)).astype(np.float32)
    blocks = (sound[:, start : start + 1013] for start in range(0, 30011, 1013))
    found = np.concatenate(list(run_onnx.resampled(blocks, source, target)), axis=1)
    expected = torchaudio.functional.resample(torch.from_numpy(sound).double(), source, target).numpy()
    np.testing.assert_allclose(found, expected, atol=5e-6)


def test_an_hour_from_standard_input_takes_no_more_memory_than_a_minute(exported):
    noise = pcm(0.1 * np.random.default_rng(0).standard_normal(60 * RATE).clip(-9, 9))
    process = start(exported, "-", "--top_k", "1", stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    peaks = []
    for _ in range(60):
        process.stdin.write(noise)
        status = Path(f"/proc/{process.pid}/status").read_text()
        peaks.append(1024 * int(status.split("VmHWM:")[1].split()[0]))
    process.stdin.close()
    assert process.wait(timeout=120) == 0, process.stderr.read().decode()
    assert peaks[-1] - peaks[1] < 5e6
    assert peaks[-1] <= MEMORY


def test_rows_of_a_stream_come_while_it_goes_on(exported):
    process = start(exported, "-", "--top_k", "1", stdin=subprocess.PIPE)
    assert process.stdout.readline() == b"file,start,end,label,score\n"
    process.stdin.write(pcm(np.zeros(3 * LENGTH)))
    process.stdin.flush()
    assert process.stdout.readline().startswith(b"-,0.0,0.5,")
    process.kill()
    process.communicate()


def test_streams_that_are_not_as_they_should_be(exported):
    sound = pcm(0.3 * np.sin(0.3 * np.arange(2 * LENGTH)))
    whole, _ = run(exported, "-", "--top_k", "4", sound=sound)
    cut, said = run(exported, "-", "--top_k", "4", sound=sound + b"\x01")
    assert cut == whole and "ended within a sample, after 16001 bytes" in said
    other, said = run(exported, "-", "--sampling_rate", "4000", sound=sound)
    assert other[-1]["end"] == 2 and "standard input has 4000 Hz: nothing above 2000 Hz" in said
    silence, _ = run(exported, "-", "--top_k", "4", sound=bytes(2 * 180 * RATE))
    assert len(silence) == 4 * 360 and np.isfinite([row["score"] for row in silence]).all()
    process = start(exported, "-", stdin=subprocess.DEVNULL)
    assert "ended before its first sample" in process.communicate(timeout=60)[1].decode()
    assert process.returncode == 2


@pytest.mark.parametrize("sample", [1e30, -1e30, np.nan, np.inf])
def test_samples_that_no_sound_has_are_a_message(sample, exported, tmp_path, capsys):
    sound = np.zeros(2 * LENGTH)
    sound[5000] = sample
    soundfile.write(tmp_path / "bad.wav", sound, RATE, "FLOAT")
    soundfile.write(tmp_path / "good.wav", np.where(np.isfinite(sound), 0.1, 0.1), RATE, "FLOAT")
    assert run_onnx.main([str(exported), str(tmp_path), "--top_k", "4"]) == 0
    found = capsys.readouterr()
    assert "bad.wav: holds samples that no sound has" in found.err
    assert "good.wav" in found.out and "bad.wav" not in found.out and "nan" not in found.out


def write_labels(folder: Path, classes: int, clips: int) -> Path:
    """Tones, of a pitch for each class."""
    folder.mkdir()
    random, lines = np.random.default_rng(0), ["file_name,start,end,label,present"]
    for number in range(clips):
        pitch = 300 * 1.3 ** (number % classes) * random.uniform(0.95, 1.05)
        sound = 0.2 * np.sin(2 * np.pi * pitch * np.arange(LENGTH) / RATE) + 0.01 * random.standard_normal(LENGTH)
        soundfile.write(folder / f"{number}.wav", sound, RATE)
        lines.append(f"{number}.wav,,,class {number % classes},")
    lines += ["0.wav,0,0.2,class 1,0", "1.wav,0.1,0.4,class 1,1", "1.wav,0.1,0.4,class 0,1"]
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder / "labels.csv"


def classifier_of(path: Path) -> list[np.ndarray]:
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    return [tensors[run_onnx.WEIGHT], tensors[run_onnx.BIAS]]


def test_ten_classes_are_learned_as_torch_would(exported, tmp_path):
    labels = write_labels(tmp_path / "clips", 10, 50)
    process = start(exported, "--learn", labels, "--output", tmp_path / "y.onnx")
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 0, said
    assert "1 lines say what is not there" in said and "10 classes from 51 stretches" in said
    network = run_onnx.Network(exported)
    stretches, names = run_onnx.read_labels(str(labels))
    assert (names[-1], len(names)) == ("class 0", 51)  # the later line prevails
    features = torch.from_numpy(np.stack([run_onnx.embed(network, *each) for each in stretches]))
    classes = sorted(set(names))
    expected = ridge_classifier(features, torch.tensor([classes.index(name) for name in names]), 10)
    for found, right in zip(classifier_of(tmp_path / "y.onnx"), expected, strict=True):
        np.testing.assert_allclose(found, right.numpy(), atol=1e-4 * float(right.abs().max()))
    learned = run_onnx.Network(tmp_path / "y.onnx")
    assert learned.labels == classes and learned.facts["thresholds"] is None
    assert learned.facts["record"][-1]["task"] == "learned on the device"
    onnx.checker.check_model(onnx.load(tmp_path / "y.onnx"))
    (tmp_path / "run_onnx.py").write_bytes(exported.with_name("run_onnx.py").read_bytes())
    rows, _ = run(tmp_path / "y.onnx", tmp_path / "clips")
    assert np.mean([row["label"] == f"class {int(row['file'][:-4]) % 10}" for row in rows]) > 0.9


@pytest.mark.parametrize("clips", [5, 12])
def test_the_closed_form_in_numpy_is_that_in_torch(clips):
    """A class with a single clip, and more clips than features, are its branches."""
    random = np.random.default_rng(0)
    features, labels = random.standard_normal((clips, 8)).astype(np.float32), np.arange(clips) % 3
    expected = ridge_classifier(torch.from_numpy(features), torch.from_numpy(labels), 3)
    for found, right in zip(run_onnx.ridge_classifier(features, labels, 3), expected, strict=True):
        np.testing.assert_allclose(found, right.numpy(), atol=1e-4)


def test_eight_bits(model, recordings, tmp_path):
    labels = write_labels(tmp_path / "clips", 3, 9)
    said = succeed("dls", "export", model, "--output", tmp_path / "x.onnx", "--int8", "--calibration", labels.parent)
    assert "called the same" in said
    plain = export(model, tmp_path / "plain" / "x.onnx")
    assert (tmp_path / "x.onnx").stat().st_size < 0.5 * plain.stat().st_size
    exact, rounded = run_onnx.Network(plain), run_onnx.Network(tmp_path / "x.onnx")
    assert set(rounded.facts["int8"]) == {"clips", "same_answer"}  # the labels are none that the network knows
    waveforms = 0.1 * np.random.default_rng(0).standard_normal((4, LENGTH)).astype(np.float32)
    (expected, _), (found, own) = exact(waveforms), rounded(waveforms)
    assert 0 < abs(found - expected).max() < 0.2 * abs(expected).max()
    run_onnx.learn(rounded, str(labels), tmp_path / "learned.onnx")
    assert run_onnx.Network(tmp_path / "learned.onnx").labels == ["class 0", "class 1", "class 2"]
    weight, _ = run_onnx.ridge_classifier(np.stack([own[0], own[1]]), np.array([0, 1]), 2)
    whole, scale = run_onnx.in_four_bits(weight)
    back = whole * np.repeat(scale, run_onnx.GROUP, axis=1)[:, : weight.shape[1]]
    assert (abs(back - weight) <= 0.51 * np.repeat(scale, run_onnx.GROUP, axis=1)[:, : weight.shape[1]]).all()
    assert set(np.unique(whole)) <= set(range(-7, 8))


def test_thresholds_travel_with_the_file(tmp_path):
    thresholds = [0.9, 0.1, 0.2, 1.0]
    config = {
        "problem_type": "multi_label_classification",
        "thresholds": dict(zip(LABELS.values(), thresholds, strict=True)),
    }
    network = run_onnx.Network(export(save_classifier(tmp_path / "model", **config), tmp_path / "x.onnx"))
    assert network.facts["thresholds"] == thresholds
    holds = run_onnx.rule(network, "auto")
    assert holds(np.array([0.5, 0.5, 0.1, 0.99])).tolist() == [1]
    assert run_onnx.rule(network, 0.5)(np.array([0.5, 0.5, 0.1, 0.99])).tolist() == [0, 1, 3]


def test_two_audio_channels(tmp_path):
    folder = save_classifier(tmp_path / "model")
    ESResNetFeatureExtractor.from_pretrained(folder, audio_channels=2).save_pretrained(folder)
    network = run_onnx.Network(export(folder, tmp_path / "x.onnx"))
    waveforms = 0.1 * np.random.default_rng(0).standard_normal((3, 2, LENGTH)).astype(np.float32)
    expected = Classifier(str(folder), None, "no").outputs(torch.from_numpy(waveforms)).logits.numpy()
    np.testing.assert_allclose(network(waveforms)[0], expected, atol=1e-4 * abs(expected).max())
    np.testing.assert_allclose(network.scores(waveforms[0]).sum(), 1)


def test_a_file_that_differs_from_torch_is_not_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "LARGEST_DIFFERENCE", 0)
    said = fail("dls", "export", model, "--output", tmp_path / "out" / "x.onnx")
    assert "differ from torch's" in said
    assert not list((tmp_path / "out").iterdir())


def test_mistyped_exports(model, tmp_path):
    assert "expected the name of an .onnx file" in fail("dls", "export", model, "--output", tmp_path / "x.bin")
    assert "go together" in fail("dls", "export", model, "--output", tmp_path / "x.onnx", "--int8")
    nowhere = tmp_path / "nowhere"
    options = ["--int8", "--calibration", nowhere]
    assert f"{nowhere}: there is no such folder" in fail(
        "dls", "export", model, "--output", tmp_path / "x.onnx", *options
    )
    assert "there is no such folder" in fail("dls", "export", nowhere, "--output", tmp_path / "x.onnx")


def test_files_that_are_none_of_ours(exported, tmp_path, capsys):
    def expect(words: str, path: Path) -> None:
        assert words in refused(path, "-", capsys=capsys)

    content, bad = exported.read_bytes(), tmp_path / "bad.onnx"
    expect("No such file", tmp_path / "nothing.onnx")
    expect("directory", tmp_path)
    for size in (0, 1, 20, 1000, len(content) // 2, len(content) - 1):
        bad.write_bytes(content[:size])
        expect("bad.onnx: ", bad)
    bad.write_bytes(b"RIFF, but nothing more")
    expect("is no ONNX file", bad)
    model = onnx.load(exported)
    del model.metadata_props[:]
    onnx.save(model, bad)
    expect("has no facts of dls export", bad)
    for facts in ("[]", "{}", "no JSON", json.dumps({"layout": 1, "labels": 3})):
        onnx.helper.set_model_props(model, {run_onnx.KEY: facts})
        onnx.save(model, bad)
        expect("has no facts of dls export", bad)
    facts = run_onnx.Network(exported).facts
    onnx.helper.set_model_props(model, {run_onnx.KEY: json.dumps(facts | {"layout": 99})})
    onnx.save(model, bad)
    expect("has layout 99", bad)
    onnx.save(onnx.load(exported), bad, save_as_external_data=True, location="data", size_threshold=100)
    expect("points to data outside itself", bad)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("file_name,start\na.wav,1", "no column label"),
        ("file_name,label\na.wav,x", "has 1 classes"),
        ("file_name,label,start,end\na.wav,x,2,1\na.wav,y,0,1", "line 2: from 2 to 1 s is no stretch"),
        ("file_name,label,present\na.wav,x,maybe", "line 2: present must be 1 or 0"),
        ("file_name,label\nnowhere.wav,x\na.wav,y", "nowhere.wav"),
        ("", "no column"),
    ],
)
def test_labels_that_cannot_be_learned_from(lines, words, exported, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", np.zeros(LENGTH), RATE)
    (tmp_path / "labels.csv").write_text(lines)
    said = refused(exported, "--learn", tmp_path / "labels.csv", "--output", tmp_path / "y.onnx", capsys=capsys)
    assert words in said
    assert not (tmp_path / "y.onnx").exists()


def test_another_rate_and_window_from_training_to_the_device(sound_folder, tmp_path):
    """The half-second sounds of 8 kHz, heard at 4 kHz, a fifth of a second at a time."""
    own = ["--corpus", f"audiofolder={sound_folder}", "--per_device_train_batch_size", "8", "--report_to", "none"]
    of_a_board = ["--preset", "tiny_mel", "--sampling_rate", "4000", "--clip_seconds", "0.2"]
    succeed("train_npid.py", *own, *of_a_board, "--num_train_epochs", "1", "--output_dir", tmp_path / "npid")
    succeed(
        "train_classification.py", *own, "--model_name_or_path", tmp_path / "npid", "--classifier_init", "ridge",
        "--num_train_epochs", "0", "--fold", "1", "--output_dir", tmp_path / "classes",
    )  # fmt: skip
    exported = export(tmp_path / "classes", tmp_path / "x.onnx")
    clip, table = sound_folder / "00.wav", tmp_path / "predicted.csv"
    rows, _ = run(exported, clip, "--overlap", "0.5", "--threshold", "0")
    options = ["--mixed_precision", "no", "--overlap", "0.5", "--threshold", "0"]
    succeed("dls", "predict", clip, "--model", tmp_path / "classes", *options, "--output", table)
    with table.open(newline="") as file:
        expected = list(csv.DictReader(file))
    network = run_onnx.Network(exported)
    assert (network.rate, network.length) == (4000, 800)
    assert len(rows) == len(expected) > 1
    for row, other in zip(rows, expected, strict=True):
        assert row["label"] == other["label"]
        found = [row[name] for name in ("start", "end", "score")]
        assert found == pytest.approx([float(other[name]) for name in ("start", "end", "score")], abs=1e-3)
