"""embed.py through the command line, against a network that is asked for one window at a time."""

import csv
import os
import resource

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import torch.nn.functional as F
from scripts import Forked, fail, succeed, train

import embed
from modeling_dls import (
    ESResNetConfig,
    ESResNetFeatureExtractor,
    ESResNetForAudioClassification,
    ESResNetForInstanceDiscrimination,
    ESResNetModel,
)

RATE, LENGTH = 8000, 4000
# Lengths in samples of 8 kHz; the long ones have several windows.
LENGTHS = {"a.wav": 4000, "b/c.flac": 2500, "b/d.wav": 9000, "e.ogg": 4100, "f.wav": 30000}


def save(head, folder, **config):
    torch.manual_seed(0)
    model = head(ESResNetConfig.from_preset("tiny", embedding_dim=16, **config)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as if it had been trained
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
    model.save_pretrained(folder)
    settings = {"sampling_rate": RATE, "n_fft": 1024, "win_length": 400, "hop_length": 100}
    ESResNetFeatureExtractor.from_preset("tiny", max_length=LENGTH, audio_channels=1, **settings).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return save(ESResNetForInstanceDiscrimination, tmp_path_factory.mktemp("models") / "npid")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return save(ESResNetForAudioClassification, tmp_path_factory.mktemp("models") / "classes", num_labels=3)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    (folder / "b").mkdir()
    random = np.random.default_rng(0)
    for name, samples in LENGTHS.items():
        soundfile.write(folder / name, 0.1 * random.standard_normal(samples), RATE)
    stereo = 0.1 * random.standard_normal((22050, 2))
    soundfile.write(folder / "g.wav", stereo, 44100)
    (folder / "broken.wav").write_bytes(b"RIFF, but nothing more")
    (folder / "empty.flac").write_bytes(b"")
    (folder / "notes.txt").write_text("not a sound")
    return folder


def run(recordings, model, output, *options):
    log = succeed("embed.py", recordings, "--model", model, "--output", output, "--mixed_precision", "no", *options)
    return log, pq.read_table(output)


def slow_vectors(model, extractor, path):
    """[(start in s, (dim,))] of each window, one after the other."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    assert rate == RATE
    mono, starts = samples.mean(axis=1), [0]
    while starts[-1] + LENGTH < len(mono) - 0.1 * LENGTH:
        starts.append(min(starts[-1] + LENGTH, len(mono) - LENGTH))
    found = []
    for start in starts:
        window = mono[start : start + LENGTH] if len(mono) > 1.1 * LENGTH else mono
        with torch.no_grad():
            outputs = model(**extractor(window, sampling_rate=RATE, return_tensors="pt"))
        vector = outputs.embeddings if hasattr(outputs, "embeddings") else outputs.pooler_output
        found.append((start / RATE, vector[0]))
    return found


def test_a_row_per_file(recordings, pretrained, tmp_path):
    log, table = run(recordings, pretrained, tmp_path / "out.parquet", "--batch_size", "4")
    assert table.column_names == ["file", "start", "end", "embedding"]
    files = table["file"].to_pylist()
    assert files == ["a.wav", "b/c.flac", "b/d.wav", "e.ogg", "f.wav", "g.wav"]
    seconds = [*(samples / RATE for samples in LENGTHS.values()), 0.5]
    np.testing.assert_allclose(table["end"].to_pylist(), seconds)
    assert set(table["start"].to_pylist()) == {0.0}
    model = ESResNetForInstanceDiscrimination.from_pretrained(pretrained).eval()
    extractor = ESResNetFeatureExtractor.from_pretrained(pretrained)
    vectors = dict(zip(files, table["embedding"].to_pylist(), strict=True))
    for name in LENGTHS:
        windows = [vector for _, vector in slow_vectors(model, extractor, recordings / name)]
        expected = F.normalize(torch.stack(windows).mean(dim=0), dim=0)
        np.testing.assert_allclose(vectors[name], expected.numpy(), atol=2e-5)
    assert "2 of 8 files cannot be read" in log and "6 rows" in log and "clips/s" in log
    with open(tmp_path / "out.unreadable.csv", newline="") as file:
        listed = {row["file"]: row["reason"] for row in csv.DictReader(file)}
    assert set(listed) == {"broken.wav", "empty.flac"} and "is empty (0 bytes)" in listed["empty.flac"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "out.unreadable.csv"]


def test_a_row_per_window(recordings, classifier, tmp_path):
    """And of a classifier, the features before its head."""
    _, table = run(recordings, classifier, tmp_path / "out.parquet", "--windows", "--batch_size", "3")
    assert table.column_names == ["file", "start", "end", "embedding"]
    model, extractor = ESResNetModel.from_pretrained(classifier), ESResNetFeatureExtractor.from_pretrained(classifier)
    rows = table.to_pylist()
    for name in LENGTHS:
        own = [row for row in rows if row["file"] == name]
        expected = slow_vectors(model.eval(), extractor, recordings / name)
        assert [row["start"] for row in own] == [start for start, _ in expected]
        ends = [*(start + 0.5 for start, _ in expected[:-1]), LENGTHS[name] / RATE]
        np.testing.assert_allclose([row["end"] for row in own], ends)
        for row, (_, vector) in zip(own, expected, strict=True):
            np.testing.assert_allclose(row["embedding"], vector.numpy(), rtol=1e-4, atol=1e-4)


def test_options(recordings, pretrained, tmp_path):
    _, pooled = run(recordings, pretrained, tmp_path / "p.parquet", "--layer", "pooled", "--clip_seconds", "1")
    assert pooled.schema.field("embedding").type.list_size == 128
    _, unit = run(recordings, pretrained, tmp_path / "u.parquet")
    assert unit.schema.field("embedding").type.list_size == 16
    half = tmp_path / "h.parquet"
    succeed("embed.py", recordings, "--model", pretrained, "--output", half, "--mixed_precision", "bf16")
    in_bf16, in_fp32 = (np.array(table["embedding"].to_pylist()) for table in (pq.read_table(half), unit))
    assert (in_bf16 * in_fp32).sum(axis=1).min() > 0.99 and not np.array_equal(in_bf16, in_fp32)


def test_decoding_processes_change_nothing(recordings, pretrained):
    """As on a GPU: several processes, each with every n-th file, still in order; nor do threads."""
    extractor = ESResNetFeatureExtractor.from_pretrained(pretrained)
    found = []
    for at_a_time, num_workers in ((1, 0), (3, 0), (2, 3)):
        groups = embed.Recordings(recordings, extractor, at_a_time)
        found.append(list(torch.utils.data.DataLoader(groups, batch_size=None, num_workers=num_workers)))
    assert len(found[0]) == 8
    for one, *others in zip(*found, strict=True):
        for other in others:
            assert one[0] == other[0] and str(one[1]) == str(other[1])
            assert all(map(torch.equal, one[2:], other[2:]))


def test_names_that_are_no_text(pretrained, recordings, tmp_path):
    """Nothing is lost for them, neither what can be read nor what cannot."""
    (tmp_path / "in").mkdir()
    for name, source in ((b"\xff.wav", "a.wav"), (b"\xfe.wav", "broken.wav"), (b"a\nb, c.wav", "b/d.wav")):
        (tmp_path / "in" / os.fsdecode(name)).write_bytes((recordings / source).read_bytes())
    _, table = run(tmp_path / "in", pretrained, tmp_path / "out.parquet")
    assert table["file"].to_pylist() == ["a\nb, c.wav", "\\udcff.wav"]
    with open(tmp_path / "out.unreadable.csv", newline="", encoding="utf-8") as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["\\udcfe.wav"]


def test_bad_input_leaves_what_was_there(recordings, classifier, pretrained, tmp_path):
    output, elsewhere = tmp_path / "out.parquet", tmp_path / "empty"
    output.write_text("earlier work")
    elsewhere.mkdir()
    end = ["--output", output]
    assert "is not a folder" in fail("embed.py", tmp_path / "nothing", "--model", pretrained, *end)
    assert "holds no sound files" in fail("embed.py", elsewhere, "--model", pretrained, *end)
    (elsewhere / "broken.wav").write_bytes(b"no sound")
    assert "none of the 1 files can be read" in fail("embed.py", elsewhere, "--model", pretrained, *end)
    assert "--model" in fail("embed.py", recordings, "--model", tmp_path / "no model", *end)
    projection = ["--layer", "projection", *end]
    assert "--layer pooled" in fail("embed.py", recordings, "--model", classifier, *projection)
    short = ["--clip_seconds", "0.05", *end]
    assert "--clip_seconds 0.05" in fail("embed.py", recordings, "--model", pretrained, *short)
    under_a_file = ["--output", output / "below.parquet"]
    assert "cannot be written" in fail("embed.py", recordings, "--model", pretrained, *under_a_file)
    assert output.read_text() == "earlier work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out.parquet"]


def embed_and_print_peak(*options) -> int:
    """Embeds, and prints the MB of this process at its largest."""
    code = train("embed.py", options)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return code


def peak(folder, model) -> float:
    """MB of embed.py at its largest, over the files of a folder."""
    options = [folder, "--model", model, "--output", f"{folder}.parquet"]
    with Forked(folder.with_suffix(".log"), embed_and_print_peak, *options) as process:
        code, output = process.end()
    assert code == 0 and pq.read_table(f"{folder}.parquet").num_rows == len(list(folder.iterdir())), output
    return float(output.split()[-1])


def test_memory_does_not_grow_with_the_folder(pretrained, tmp_path):
    """Twenty times as many files: less than 40 MB more, of which their samples alone would be 150 MB."""
    few, many = tmp_path / "few", tmp_path / "many"
    random = np.random.default_rng(0)
    for folder, count in ((few, 20), (many, 400)):
        folder.mkdir()
        for number in range(count):
            soundfile.write(folder / f"{number}.wav", 0.1 * random.standard_normal(12 * RATE), RATE)
    assert peak(many, pretrained) < peak(few, pretrained) + 40


def test_memory_does_not_grow_with_a_file(pretrained, tmp_path):
    """An hour less than 40 MB more than a minute, of which its samples alone would be 115 MB."""
    for name, minutes in (("short", 1), ("long", 60)):
        (tmp_path / name).mkdir()
        sound = 0.1 * np.random.default_rng(0).standard_normal(minutes * 60 * RATE)
        soundfile.write(tmp_path / name / "a.flac", sound, RATE)
    assert peak(tmp_path / "long", pretrained) < peak(tmp_path / "short", pretrained) + 40
