"""What the Space says of sounds, for folders of real small runs; its page, where Gradio is installed."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from packaging.requirements import Requirement
from scripts import SMALL, succeed
from transformers import pipeline

from datasets_scripts import decode_audio
from datasets_scripts.errors import AudioError, CorpusError, UserError
from dls_sounds.page import analysis as analysis_module
from dls_sounds.page.analysis import NEIGHBOURS, TrainedFolder
from dls_sounds.page.pictures import map_figure, spectrogram_figure, time_line_figure
from dls_training.memory_bank import BANK_FILE, MemoryBank
from dls_training.nearest_neighbours import weighted_knn
from dls_training.report import draw_map
from hub_cards.__main__ import main
from hub_cards.publishing import finished_run
from modeling_dls.feature_extraction_esresnet import evaluation_windows

RATE = 8000  # of `sound_folder`


@pytest.fixture(scope="module")
def runs(sound_folder, tmp_path_factory):
    """A pre-training that left out fold 2, and a classifier that came from it."""
    folder = tmp_path_factory.mktemp("space")
    common = [*SMALL, "--corpus", f"audiofolder={sound_folder}", "--mixed_precision", "no"]
    pretraining = ["--exclude_fold", "2", "--num_train_epochs", "4", "--output_dir", folder / "npid"]
    succeed("train_npid.py", *common, *pretraining)
    fine_tuning = ["--fold", "2", "--num_train_epochs", "1", "--output_dir", folder / "classifier"]
    succeed("train_classification.py", *common, *fine_tuning, "--model_name_or_path", folder / "npid")
    return folder


@pytest.fixture(scope="module")
def classifier(runs):
    return TrainedFolder(runs / "classifier", [])


@pytest.fixture(scope="module")
def pretrained(runs):
    return TrainedFolder(runs / "npid", [])


def changed(source, target, **options):
    """A copy of a run's folder whose recorded options differ."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoint-*"))
    results = json.loads((target / "all_results.json").read_text())
    results["options"] |= options
    (target / "all_results.json").write_text(json.dumps(results))
    return target


def sound(path, seconds, rate=RATE, channels=1, **options):
    samples = 0.1 * np.random.default_rng(0).standard_normal((round(seconds * rate), channels))
    soundfile.write(path, samples, rate, **options)
    return str(path)


def test_labels_are_the_pipelines(runs, classifier, tmp_path):
    """For a clip of the length that the network takes."""
    path = sound(tmp_path / "clip.wav", 0.5, 44100, subtype="FLOAT")
    samples, rate = soundfile.read(path, dtype="float32")
    classify = pipeline("audio-classification", model=str(runs / "classifier"), trust_remote_code=True)
    expected = {answer["label"]: answer["score"] for answer in classify({"array": samples, "sampling_rate": rate})}
    found = classifier.analyse(path)
    assert set(found.scores) == {f"class-{number}" for number in range(4)}
    assert found.scores == pytest.approx(expected, abs=1e-5)
    assert not found.cut and found.seconds == 0.5 and len(found.windows) == 1


def test_neighbours_are_the_bank_s(runs, sound_folder, classifier, pretrained, tmp_path):
    """Against a search by hand; and a clip finds itself where the bank holds what the network says of it."""
    bank = MemoryBank.load(runs / "npid" / BANK_FILE)
    assert len(pretrained.memory.known) == len(bank) == 20
    path = str(sound_folder / "08.wav")  # of fold 1, class 0
    found = pretrained.analyse(path)
    distances = 1 - bank.vectors @ found.embedding
    expected = distances.sort().values[:NEIGHBOURS]
    np.testing.assert_allclose([n.distance for n in found.neighbours], expected, atol=1e-5)
    assert [n.row for n in found.neighbours] == distances.argsort()[:NEIGHBOURS].tolist()
    samples, _ = decode_audio(pretrained.memory.audio(found.neighbours[0].row))
    assert samples.shape == (1, 4000)
    # The classifier asks the pre-training's network, not its own.
    assert torch.equal(classifier.analyse(path).embedding, found.embedding)

    copy = changed(runs / "npid", tmp_path / "exact")
    (row,) = [row for row in range(20) if pretrained.memory.audio(row)["path"] == path]
    bank.vectors[row] = found.embedding
    bank.save(copy / BANK_FILE)
    nearest = TrainedFolder(copy, []).analyse(path).neighbours[0]
    assert nearest.row == row and nearest.distance < 1e-5 and nearest.label == "class-0"
    digest = nearest.name.removeprefix("audiofolder/")
    assert re.fullmatch("[0-9a-f]{32}", digest)


def test_labels_of_a_pretraining_are_votes(sound_folder, pretrained):
    memory = pretrained.memory
    for clip in (0, 5, 6, 15):
        found = pretrained.analyse(str(sound_folder / f"{clip:02d}.wav"))
        assert sum(found.scores.values()) == pytest.approx(1)
        labels = torch.from_numpy(memory.labels)
        expected = int(weighted_knn(found.embedding[None], memory.vectors, labels, 4))
        assert max(found.scores, key=found.scores.get) == memory.classes[expected]


def test_neighbours_vote_as_the_run_s_results_say(runs, sound_folder, pretrained, tmp_path):
    """Not by its temperature."""
    path = str(sound_folder / "08.wav")
    hot = TrainedFolder(changed(runs / "npid", tmp_path / "hot", nce_t=100.0), [])
    assert hot.votes == pretrained.votes == {"k": 5, "sigma": 0.1}
    assert hot.analyse(path).scores == pretrained.analyse(path).scores
    single = changed(runs / "npid", tmp_path / "single")
    results = json.loads((single / "all_results.json").read_text()) | {"knn": {"k": 1, "sigma": 0.1}}
    (single / "all_results.json").write_text(json.dumps(results))
    assert max(TrainedFolder(single, []).analyse(path).scores.values()) == pytest.approx(1)


def test_long_sounds(classifier, monkeypatch, tmp_path):
    """The mean over windows, as evaluation has it; the loudest is shown; only the beginning of a very long one."""
    quiet, loud = np.full(4000, 0.01), np.ones(4000)
    samples = np.concatenate([quiet, quiet, loud, quiet, quiet[:1500]])
    samples = samples * np.random.default_rng(0).standard_normal(len(samples)) * 0.2
    path = str(tmp_path / "long.wav")
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    found = classifier.analyse(path)
    times = [[window.start, window.end] for window in found.windows]
    np.testing.assert_allclose(times, [[0, 0.5], [0.5, 1], [1, 1.5], [1.5, 2], [1.6875, 2.1875]], atol=1e-4)
    assert found.loudest == 2 and found.windows[2].decibel == pytest.approx(20 * np.log10(0.2), abs=1)
    network = classifier.network
    windows = evaluation_windows(network.waveform(path), network.extractor.max_length)
    with torch.no_grad():
        expected = network.model(network.extractor.spectrogram(windows)).logits.softmax(-1).mean(dim=0)
    np.testing.assert_allclose(list(found.scores.values()), expected, atol=1e-6)
    assert torch.equal(classifier.spectrogram(path, 2), network.extractor.spectrogram(windows[2]))
    assert torch.equal(found.spectrogram, classifier.spectrogram(path, 2)), "the loudest window's"
    monkeypatch.setattr(analysis_module, "MAX_SECONDS", 1.0)
    cut = classifier.analyse(path)
    assert cut.cut and cut.seconds == 1.0 and len(cut.windows) == 2
    assert cut.windows[0] == found.windows[0], "the second hears a little of the loud third, in resampling"


def test_every_kind_of_sound(classifier, pretrained, tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(6000), RATE)
    soundfile.write(tmp_path / "sample.wav", np.array([0.5]), RATE)
    paths = [str(tmp_path / name) for name in ("silence.wav", "sample.wav")]
    paths += [sound(tmp_path / f"{rate}.flac", 0.3, rate) for rate in (11025, 48000, 44101)]
    paths += [sound(tmp_path / f"{channels}.wav", 0.6, 22050, channels) for channels in (2, 6)]
    for trained in (classifier, pretrained):
        for path in paths:
            found = trained.analyse(path)
            assert sum(found.scores.values()) == pytest.approx(1) and len(found.neighbours) == NEIGHBOURS
            assert found.embedding.isfinite().all()


def test_bad_files(classifier, tmp_path):
    (tmp_path / "text.wav").write_text("these are words, not a sound")
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "video.mp4").write_bytes(b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(500))
    soundfile.write(tmp_path / "none.wav", np.zeros(0), RATE)
    soundfile.write(tmp_path / "nan.wav", np.array([0.1, np.nan] * 3000), RATE, subtype="FLOAT")
    for name in ("text.wav", "empty.wav", "video.mp4", "none.wav", "nan.wav", "absent.wav"):
        path = str(tmp_path / name)
        with pytest.raises(AudioError) as caught:
            classifier.analyse(path)
        words = analysis_module.in_words(caught.value, path)
        assert words.startswith(f"{name}: ") and str(tmp_path) not in words


def test_what_is_missing_is_said_and_the_rest_works(runs, sound_folder, tmp_path):
    path = str(sound_folder / "00.wav")
    scratch = changed(runs / "classifier", tmp_path / "scratch", init="scratch")
    lost = changed(runs / "classifier", tmp_path / "lost", model_name_or_path=str(tmp_path / "nowhere"))
    no_bank = changed(runs / "classifier", tmp_path / "nobank", model_name_or_path=str(runs / "classifier"))
    for folder, words in ((scratch, "from scratch"), (lost, "nowhere is not there"), (no_bank, f"no {BANK_FILE}")):
        trained = TrainedFolder(folder, [])
        assert len(trained.missing) == 1 and words in trained.missing[0]
        found = trained.analyse(path)
        assert found.scores and not found.neighbours and found.embedding is None and trained.examples

    corpora = [["audiofolder", str(tmp_path / "gone")], ["esc10", None]]
    moved = changed(runs / "npid", tmp_path / "moved", corpus=corpora)
    trained = TrainedFolder(moved, [])
    words = " ".join(trained.missing)
    assert "gone: no such folder" in words and "--corpus audiofolder=DIR" in words and "--corpus esc10=DIR" in words
    assert "Labels: none" in words and not trained.examples
    found = trained.analyse(path)
    assert not found.scores and not found.neighbours and found.embedding is not None
    assert map_figure(trained.memory, found).axes[0].get_title().startswith("20 clips")
    with pytest.raises(CorpusError, match="gone"):
        TrainedFolder(moved, [("audiofolder", str(tmp_path / "gone"))])
    given = TrainedFolder(moved, [("audiofolder", str(sound_folder))])
    assert len(given.memory.known) == 20 and len(given.analyse(path).neighbours) == NEIGHBOURS


def test_examples_come_from_the_held_out_fold(classifier, pretrained):
    for trained in (classifier, pretrained):
        assert trained.examples_from == "audiofolder, fold 2, which was held out"
        assert [label for label, _ in trained.examples] == [f"class-{number}" for number in range(4)]
        assert [int(Path(audio["path"]).stem) for _, audio in trained.examples] == [4, 5, 6, 7]


def test_pictures(classifier, tmp_path):
    path = sound(tmp_path / "long.wav", 1.6)
    found = classifier.analyse(path)
    figure = map_figure(classifier.memory, found)
    star = next(c for c in figure.axes[0].collections if c.get_label() == "this sound")
    memory = classifier.memory
    centred = memory.vectors - memory.vectors.mean(dim=0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
    expected = directions @ (found.embedding - memory.vectors.mean(dim=0))
    np.testing.assert_allclose(star.get_offsets()[0], expected, atol=1e-5)
    rings = next(c for c in figure.axes[0].collections if c.get_label() == "nearest clips")
    assert len(rings.get_offsets()) == NEIGHBOURS
    line = time_line_figure(found).axes[0].lines[0]
    np.testing.assert_allclose(line.get_xdata(), [0.25, 0.75, 1.25, 1.35], atol=1e-4)
    assert len(spectrogram_figure(torch.rand(2, 3, 8, 16), 0.0, 0.5).axes) == 2


def test_map_of_unlabelled_clips():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    draw_map(axes, torch.randn(6, 4), np.array([0, 0, 1, -1, -1, -1]), ["a", "b"])
    drawn = {c.get_label(): len(c.get_offsets()) for c in axes.collections}
    assert drawn == {"no label": 3, "a": 2, "b": 1}


def test_many_channels_are_bounded(pretrained, tmp_path, monkeypatch):
    """Of all channels together no more is decoded than of ten minutes of stereo."""
    path = sound(tmp_path / "wide.flac", 2.0, channels=8)
    assert not pretrained.analyse(path).cut
    monkeypatch.setattr(analysis_module, "MAX_SAMPLES", 8 * RATE)
    analysis = pretrained.analyse(path)
    assert analysis.cut and analysis.seconds == pytest.approx(1.0, abs=0.01)


def test_folder_that_is_no_run(tmp_path):
    for content in (None, "{}", "not JSON", '{"task": "other"}'):
        if content is not None:
            (tmp_path / "all_results.json").write_text(content)
        with pytest.raises(UserError, match="not the output of a finished run"):
            TrainedFolder(tmp_path, [])


def test_without_gradio(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "dls_sounds.page.app", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["space", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: the page needs Gradio: pip install -e '.[space]'\n"


def test_the_page_is_for_this_machine_alone(monkeypatch):
    pytest.importorskip("gradio")
    from dls_sounds.page import app

    launched = {}

    class Blocks:
        def queue(self, **_):
            return self

        def launch(self, **options):
            launched.update(options)
            raise OSError

    monkeypatch.setattr(app, "build", lambda *_: Blocks())
    with pytest.raises(UserError, match="--port 7860 cannot be used"):
        app.serve(None, [], 7860)
    assert launched["server_name"] == "127.0.0.1" and launched["share"] is False


def test_command_names_what_is_wrong(tmp_path, capsys):
    pytest.importorskip("gradio")
    assert main(["space", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {tmp_path} is not the output")


def test_page(classifier, tmp_path):
    """Every output has its value or is hidden; what a clip is called cannot add markup; a bad file has a message."""
    pytest.importorskip("gradio")
    from dls_sounds.page.app import Page, build

    page = Page(classifier, tmp_path / "sounds")
    page.sounds.mkdir()
    blocks = build(page)
    (event,) = [e for e in blocks.fns.values() if len(e.outputs) == 8]
    path = sound(tmp_path / "long.wav", 1.6)
    outputs = page.analysed(path)
    assert len(outputs) == len(event.outputs)
    assert [update["visible"] for update in outputs[:-1]] == [False, True, True, True, True, True, True]
    assert outputs[3]["value"].count("<audio") == NEIGHBOURS
    files = re.findall(r"file=([^']+)'", outputs[3]["value"])
    assert all(soundfile.info(file).duration == 0.5 for file in files)
    (tmp_path / "<b>text.wav").write_text("words")
    problem, *rest = page.analysed(str(tmp_path / "<b>text.wav"))
    assert "cannot be read as a sound" in problem["value"] and "&lt;b&gt;text.wav" in problem["value"]
    assert not any(update["visible"] for update in rest[:-1])
    assert not any(update["visible"] for update in page.analysed(None)[:-1])


@pytest.fixture(scope="module")
def space(runs, tmp_path_factory) -> Path:
    """The folder that `space --output_dir` writes of the classifier."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("written") / "space"
    assert main(["space", str(runs / "classifier"), "--output_dir", str(folder)]) == 0
    return folder


def test_what_a_space_holds(space, runs, sound_folder):
    """The model as it is published, what configures a Space, and nothing of the clips."""
    from gradio import __version__ as gradio_version

    _, front_matter, text = (space / "README.md").read_text().split("---\n", 2)
    settings = yaml.safe_load(front_matter)
    assert settings["sdk"] == "gradio" and settings["sdk_version"] == gradio_version
    assert settings["app_file"] == "app.py" and "4 classes of audiofolder" in settings["title"]
    assert "license" not in settings and "none is claimed" in text and "class-3" in text
    published = finished_run(runs / "classifier")[2]
    assert {path.name: path.read_bytes() for path in (space / "model").iterdir()} == {
        name: file.read_bytes() for name, file in published.items()
    }
    requirements = (space / "requirements.txt").read_text().splitlines()
    assert {Requirement(line).name for line in requirements} >= {"gradio", "torch", "transformers"}
    assert not {"pytest", "selenium"} & {Requirement(line).name for line in requirements}
    clips = {path.read_bytes() for path in sound_folder.glob("*.wav")}
    assert not clips & {path.read_bytes() for path in space.rglob("*") if path.is_file()}
    assert (space / "LICENSE").is_file() and "__pycache__" not in {path.name for path in space.rglob("*")}


def test_a_space_answers(space, runs, tmp_path):
    """Moved, with nothing of the checkout or the run at hand: asked over HTTP, as the page in a browser does."""
    there = tmp_path / "moved"
    shutil.copytree(space, there)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=there, env=environment | {"GRADIO_SERVER_PORT": str(port)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        printed = []
        while not (printed and "open http" in printed[-1]):
            printed.append(process.stdout.readline())
            assert printed[-1], "".join(printed)
        assert f"open http://0.0.0.0:{port} " in printed[-1]
        assert not [line for line in printed if "--corpus" in line or "pre-training" in line], "for its author alone"
        clip = sound(tmp_path / "clip.wav", 0.5)
        (update,) = [each for each in asked(f"http://127.0.0.1:{port}", clip) if is_label(each)]
    finally:
        process.terminate()
        process.wait(timeout=60)
    found = {answer["label"]: answer["confidence"] for answer in update["value"]["confidences"]}
    assert found == pytest.approx(TrainedFolder(runs / "classifier", []).analyse(clip).scores, abs=1e-5)


def is_label(update) -> bool:
    """Whether an output's update is that of the label's probabilities."""
    return isinstance(update, dict) and isinstance(update.get("value"), dict) and "confidences" in update["value"]


def asked(address: str, path: str) -> list:
    """The updates of a page's outputs for a sound that a visitor uploads."""
    import httpx

    with httpx.Client(base_url=address, timeout=120, trust_env=False) as client:
        with open(path, "rb") as file:
            (uploaded,) = client.post("/gradio_api/upload", files={"files": file}).json()
        (event,) = [each for each in client.get("/config").json()["dependencies"] if len(each["outputs"]) == 8]
        session = {"session_hash": "visitor"}
        data = {"path": uploaded, "orig_name": "clip.wav", "meta": {"_type": "gradio.FileData"}}
        question = {"data": [data], "fn_index": event["id"], **session}
        client.post("/gradio_api/queue/join", json=question).raise_for_status()
        with client.stream("GET", "/gradio_api/queue/data", params=session) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data: ") or "{}")
                if message.get("msg") == "process_completed":
                    assert message["success"], message
                    return message["output"]["data"]
    raise AssertionError("no answer came")


def test_no_space_where_there_is_none(space, runs, tmp_path, capsys):
    """Of a pre-training, in a folder of something else, with clips; a Space is replaced as a whole."""

    def refused(*words) -> str:
        assert main(["space", *map(str, words)]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "has no classes of its own" in refused(runs / "npid", "--output_dir", tmp_path / "new")
    (tmp_path / "diary.txt").write_text("mine")
    assert "holds something else" in refused(runs / "classifier", "--output_dir", tmp_path)
    words = [runs / "classifier", "--output_dir", tmp_path / "new", "--corpus", f"audiofolder={runs}"]
    assert "no clips go into the folder" in refused(*words)
    assert (tmp_path / "diary.txt").is_file() and not (tmp_path / "new").exists()
    old = shutil.copytree(space, tmp_path / "old")
    (old / "model" / "stale.txt").write_text("of an earlier run")
    assert main(["space", str(runs / "classifier"), "--output_dir", str(old)]) == 0
    assert not (old / "model" / "stale.txt").exists() and (old / "app.py").is_file()
