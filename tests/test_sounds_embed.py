"""`dls embed` and `dls search` through the command line, against a network that is asked for one window at a time."""

import csv
import os
import resource
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import torch.nn.functional as F
from scripts import Forked, fail, run_script, succeed, train
from sound_networks import LENGTHS, RATE, save, slow_outputs, write_recordings

from dls_sounds.index import Index
from dls_sounds.searching import nearest
from modeling_dls import ESResNetForAudioClassification, ESResNetForInstanceDiscrimination, ESResNetModel

FP32 = ("--mixed_precision", "no")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return save(ESResNetForInstanceDiscrimination, tmp_path_factory.mktemp("models") / "npid")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return save(ESResNetForAudioClassification, tmp_path_factory.mktemp("models") / "classes", num_labels=3)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return write_recordings(tmp_path_factory.mktemp("recordings") / "in")


def run(recordings, model, output, *options):
    log = succeed("dls", "embed", recordings, "--model", model, "--output", output, *FP32, *options)
    return log, pq.read_table(output)


def test_a_row_per_file(recordings, pretrained, tmp_path):
    log, table = run(recordings, pretrained, tmp_path / "out.parquet", "--batch_size", "4")
    assert table.column_names == ["file", "start", "end", "embedding"]
    files = table["file"].to_pylist()
    assert files == ["a.wav", "b/c.flac", "b/d.wav", "e.ogg", "f.wav", "g.wav"]
    seconds = [*(samples / RATE for samples in LENGTHS.values()), 0.5]
    np.testing.assert_allclose(table["end"].to_pylist(), seconds)
    assert set(table["start"].to_pylist()) == {0.0}
    model = ESResNetForInstanceDiscrimination.from_pretrained(pretrained).eval()
    vectors = dict(zip(files, table["embedding"].to_pylist(), strict=True))
    for name in LENGTHS:
        windows = [outputs.embeddings[0] for _, _, outputs in slow_outputs(model, pretrained, recordings / name)]
        expected = F.normalize(torch.stack(windows).mean(dim=0), dim=0)
        np.testing.assert_allclose(vectors[name], expected.numpy(), atol=2e-5)
    assert "2 of 8 files cannot be read" in log and "6 rows" in log
    with open(tmp_path / "out.unreadable.csv", newline="") as file:
        listed = {row["file"]: row["reason"] for row in csv.DictReader(file)}
    assert set(listed) == {"broken.wav", "empty.flac"} and "is empty (0 bytes)" in listed["empty.flac"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "out.unreadable.csv"]


@pytest.mark.parametrize(("options", "step"), [((), 4000), (("--overlap", "0.6"), 1600)])
def test_a_row_per_window(options, step, recordings, classifier, tmp_path):
    """And of a classifier, the features before its head."""
    output = tmp_path / "out.parquet"
    _, table = run(recordings, classifier, output, "--batch_size", "3", *options, "--windows")
    assert table.column_names == ["file", "start", "end", "embedding"]
    model = ESResNetModel.from_pretrained(classifier).eval()
    rows = table.to_pylist()
    for name in LENGTHS:
        own = [row for row in rows if row["file"] == name]
        expected = slow_outputs(model, classifier, recordings / name, step=step)
        np.testing.assert_allclose([row["start"] for row in own], [start / RATE for start, _, _ in expected])
        np.testing.assert_allclose([row["end"] for row in own], [end / RATE for _, end, _ in expected])
        for row, (_, _, outputs) in zip(own, expected, strict=True):
            np.testing.assert_allclose(row["embedding"], outputs.pooler_output[0].numpy(), rtol=1e-4, atol=1e-4)
    facts = Index(output).facts
    assert facts["seconds"] == 0.5 and facts["root"] == str(recordings) and facts["model"] == str(classifier)


def test_options(recordings, pretrained, tmp_path):
    _, pooled = run(recordings, pretrained, tmp_path / "p.parquet", "--layer", "pooled", "--windows", "1")
    assert pooled.schema.field("embedding").type.list_size == 128
    assert len([row for row in pooled.to_pylist() if row["file"] == "f.wav"]) == 4  # of 3.75 s
    _, unit = run(recordings, pretrained, tmp_path / "u.parquet")
    assert unit.schema.field("embedding").type.list_size == 16
    half = tmp_path / "h.parquet"
    succeed("dls", "embed", recordings, "--model", pretrained, "--output", half, "--mixed_precision", "bf16")
    in_bf16, in_fp32 = (np.array(table["embedding"].to_pylist()) for table in (pq.read_table(half), unit))
    assert (in_bf16 * in_fp32).sum(axis=1).min() > 0.99 and not np.array_equal(in_bf16, in_fp32)


def test_statistics_are_pooled_in_full_precision(recordings, tmp_path):
    """What follows the convolutions is not rounded to bf16, which would be seen at once in scores."""
    model = save(ESResNetForInstanceDiscrimination, tmp_path / "model", pooling="statistics")
    vectors = []
    for precision in ("no", "bf16"):
        output = tmp_path / f"{precision}.parquet"
        options = ["--layer", "pooled", "--mixed_precision", precision]
        succeed("dls", "embed", recordings, "--model", model, "--output", output, *options)
        vectors.append(np.array(pq.read_table(output)["embedding"].to_pylist(), np.float32))
    assert np.count_nonzero(vectors[1].view(np.uint32) & 0xFFFF) > vectors[1].size / 2  # bf16 has none of these bits
    np.testing.assert_allclose(*vectors, rtol=0.1, atol=0.1)


def test_names_that_are_no_text(pretrained, recordings, tmp_path):
    """Nothing is lost for them, neither what can be read nor what cannot."""
    (tmp_path / "in").mkdir()
    for name, source in ((b"\xff.wav", "a.wav"), (b"\xfe.wav", "broken.wav"), (b'a\nb, "c.wav', "b/d.wav")):
        (tmp_path / "in" / os.fsdecode(name)).write_bytes((recordings / source).read_bytes())
    output = tmp_path / "out.parquet"
    _, table = run(tmp_path / "in", pretrained, output)
    assert table["file"].to_pylist() == ['a\nb, "c.wav', "\\udcff.wav"]
    with open(tmp_path / "out.unreadable.csv", newline="", encoding="utf-8") as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["\\udcfe.wav"]
    query = tmp_path / "in" / os.fsdecode(b"\xff.wav")
    succeed("dls", "search", query, "--index", output, "--output", tmp_path / "found.csv", *FP32)
    with open(tmp_path / "found.csv", newline="", encoding="utf-8") as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["\\udcff.wav", 'a\nb, "c.wav']


def test_formats_that_cannot_be_read_are_listed(pretrained, recordings, tmp_path):
    """With the way to convert them; not passed over without a word."""
    folder = copies(recordings, tmp_path / "in", "a.wav")
    (folder / "b.M4A").write_bytes(b"of a telephone")
    log, table = run(folder, pretrained, tmp_path / "out.parquet")
    assert table["file"].to_pylist() == ["a.wav"] and "1 of 2 files cannot be read" in log
    with open(tmp_path / "out.unreadable.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["file"] == "b.M4A" and "ffmpeg -i" in row["reason"]


def test_without_a_model_the_checkouts_own_is_taken(recordings, tmp_path):
    succeed("dls", "embed", recordings, "--output", tmp_path / "out.parquet")
    index = Index(tmp_path / "out.parquet")
    assert Path(index.facts["model"]).parts[-2:] == ("checkpoints", "small_mel")
    assert index.facts["layer"] == "projection" and index.num_rows == 6


def test_bad_input_leaves_what_was_there(recordings, classifier, pretrained, tmp_path, monkeypatch):
    output, elsewhere = tmp_path / "out.parquet", tmp_path / "empty"
    elsewhere.mkdir()
    end = ["--output", output]
    assert "there is no such file or folder" in fail("dls", "embed", tmp_path / "nothing", "--model", pretrained, *end)
    assert "holds no sound files" in fail("dls", "embed", elsewhere, "--model", pretrained, *end)
    (elsewhere / "broken.wav").write_bytes(b"no sound")
    assert "none of the 1 files can be read" in fail("dls", "embed", elsewhere, "--model", pretrained, *end)
    assert "--model" in fail("dls", "embed", recordings, "--model", tmp_path / "no model", *end)
    monkeypatch.setattr("dls_sounds.embedding.PRETRAINED", tmp_path / "an installed package has none")
    assert "--model: must be given" in fail("dls", "embed", recordings, *end)
    projection = ["--layer", "projection", *end]
    assert "--layer pooled" in fail("dls", "embed", recordings, "--model", classifier, *projection)
    short = ["--windows", "0.05", *end]
    assert "--windows 0.05" in fail("dls", "embed", recordings, "--model", pretrained, *short)
    overlap = ["--overlap", "0.5", *end]
    assert "--overlap says how --windows" in fail("dls", "embed", recordings, "--model", pretrained, *overlap)
    assert "is a folder" in fail("dls", "embed", recordings, "--model", pretrained, "--output", elsewhere)
    assert not output.exists()
    output.write_text("earlier work")
    assert "cannot be read as an index" in fail("dls", "embed", recordings, "--model", pretrained, *end)
    under_a_file = ["--output", output / "below.parquet"]
    assert "cannot be written" in fail("dls", "embed", recordings, "--model", pretrained, *under_a_file)
    assert output.read_text() == "earlier work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out.parquet"]


# An index that grows


def copies(recordings, folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes((recordings / name).read_bytes())
    return folder


def test_new_files_join(recordings, pretrained, classifier, tmp_path):
    folder, output = copies(recordings, tmp_path / "in", "a.wav", "f.wav"), tmp_path / "out.parquet"
    options = ["--windows", "--overlap", "0.5"]
    _, before = run(folder, pretrained, output, *options)
    log = succeed("dls", "embed", folder, "--output", output, *FP32, *options)  # the index knows its model
    assert "nothing to add" in log and pq.read_table(output).equals(before)
    copies(recordings, folder, "e.ogg")
    elsewhere = copies(recordings, tmp_path / "elsewhere", "g.wav")
    log, table = run(folder, pretrained, output, *options, elsewhere)
    assert "2 new files" in log
    assert table.slice(0, len(before)).equals(before)
    assert set(table["file"].to_pylist()[len(before) :]) == {"e.ogg", "../elsewhere/g.wav"}
    content = output.read_bytes()
    for other, message in (
        ([save(ESResNetForInstanceDiscrimination, tmp_path / "other", seed=1), *options], "another model"),
        ([classifier, *options], "pooled vectors"),
        ([pretrained], "windows of 0.5 s with an overlap of 0.5, and this would be projection vectors of whole files"),
        ([pretrained, "--windows", "0.25", "--overlap", "0.5"], "windows of 0.25 s"),
        ([pretrained, *options, "--layer", "pooled"], "pooled"),
    ):
        assert message in fail("dls", "embed", recordings, "--output", output, *FP32, "--model", *other)
    assert output.read_bytes() == content


def test_an_index_whose_files_have_moved(recordings, pretrained, tmp_path):
    folder, output = copies(recordings, tmp_path / "in", "a.wav", "f.wav"), tmp_path / "out.parquet"
    run(folder, pretrained, output)
    folder = folder.rename(tmp_path / "moved")
    copies(recordings, folder, "e.ogg")
    log = succeed("dls", "search", folder / "f.wav", "--index", output, *FP32, "--output", tmp_path / "found.csv")
    assert "no longer in" in log and (tmp_path / "found.csv").read_text().splitlines()[1].startswith("f.wav,")
    assert "there is no such file, neither here nor in" in fail("dls", "search", "a.wav", "--index", output)
    log, table = run(folder, pretrained, output)
    assert "is gone" in log and table["file"].to_pylist() == ["a.wav", "f.wav", "e.ogg"]
    assert Index(output).root == folder


# What is killed goes on


def test_a_killed_run_goes_on(pretrained, tmp_path, monkeypatch):
    """And gives the same file, byte for byte; what was done before is not done again."""
    folder = tmp_path / "in"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(1100):  # three parts
        soundfile.write(folder / f"{number:04d}.wav", 0.1 * random.standard_normal(2000), RATE)
    output, whole = tmp_path / "out.parquet", tmp_path / "whole.parquet"
    options = [folder, "--model", pretrained, *FP32]
    succeed("dls", "embed", *options, "--output", whole)
    parts = tmp_path / f".{output.name}.parts"
    with Forked(tmp_path / "log", train, "dls", ["embed", *options, "--output", output]) as process:
        process.wait_for(lambda: list(parts.glob("*.parquet")))
    assert not output.exists() and parts.exists()
    for leftover in (parts / ".unfinished.abc", parts / ".unfinished.def"):  # of a kill while it wrote
        leftover.mkdir(exist_ok=True)
        (leftover / "000001.parquet").write_text("half")
    log = succeed("dls", "embed", *options, "--output", output)
    assert "parts were done before" in log and output.read_bytes() == whole.read_bytes()
    assert not parts.exists()


def test_other_work_begins_anew(recordings, pretrained, tmp_path):
    """Parts of a run that was stopped are used for the same work only."""
    output = tmp_path / "out.parquet"
    parts = tmp_path / f".{output.name}.parts"
    parts.mkdir()
    (parts / "plan.json").write_text('{"digest": "of something else"}')
    (parts / "000000.parquet").write_text("of something else")
    log, _ = run(recordings, pretrained, output)
    assert "done before" not in log and not parts.exists()


# Search


def test_search(recordings, pretrained, classifier, tmp_path):
    """Cosine similarities of whatever vectors, best first; a query is a file, or a stretch of one."""
    for model, layer in ((pretrained, "embeddings"), (classifier, "pooler_output")):
        output, found = tmp_path / f"{layer}.parquet", tmp_path / "found.csv"
        _, table = run(recordings, model, output, "--windows", "--overlap", "0.5")
        succeed("dls", "search", "f.wav", "--start", "1", "--end", "1.5", "--index", output, "--top_k", "7", *FP32,
                "--output", found)  # fmt: skip
        vectors = np.array(table["embedding"].to_pylist())
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        places = list(zip(*(table[name].to_pylist() for name in ("file", "start", "end")), strict=True))
        similarity = vectors @ vectors[places.index(("f.wav", 1.0, 1.5))]
        order = np.argsort(-similarity)[:7]
        with found.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0]) == ["file", "start", "end", "similarity"]
        assert [(row["file"], float(row["start"]), float(row["end"])) for row in rows] == [places[i] for i in order]
        np.testing.assert_allclose([float(row["similarity"]) for row in rows], similarity[order], atol=1e-4)


def test_search_prints(recordings, pretrained, tmp_path, capsys):
    output = tmp_path / "out.parquet"
    run(recordings, pretrained, output)
    capsys.readouterr()
    code, _ = run_script("dls", "search", recordings / "b" / "d.wav", "--index", output, "--top_k", "100", *FP32)
    lines = capsys.readouterr().out.splitlines()
    assert code == 0 and len(lines) == 7 and lines[1].startswith("b/d.wav,0.0,1.125,")


@pytest.mark.parametrize("layer", ["projection", "pooled"])
def test_nearest_is_exact(layer, tmp_path, monkeypatch):
    """Over many blocks, with ties, whose order is that of the rows."""
    import pyarrow as pa

    from dls_sounds import index as indexes
    from dls_sounds.tables import write_parquet

    random, dim = np.random.default_rng(0), 8
    vectors = random.integers(-2, 3, (1000, dim)).astype(np.float32)
    if layer == "projection":
        vectors = np.round(F.normalize(torch.tensor(vectors)).numpy(), 3)
    facts = {"layer": layer, "root": "", "model": "", "digest": "", "seconds": 1, "overlap": 0}
    schema = indexes.schema(dim, facts)
    numbers = np.arange(1000.0)
    columns = [pa.array(map(str, range(1000))), numbers, numbers + 1]
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), type=schema.field("embedding").type)
    table = pa.table([*columns, column], schema=schema)
    write_parquet(tmp_path / "x.parquet", schema, table.to_batches(64), 64)
    index = Index(tmp_path / "x.parquet")
    assert index.num_blocks == 16
    lengths = np.linalg.norm(vectors, axis=1) if layer == "pooled" else np.ones(1000)
    for top_k in (1, 10, 300, 2000):
        query = vectors[7]
        similarity = (vectors @ (query / np.linalg.norm(query))) / lengths.clip(1e-12)
        rows, found = nearest(index, query, top_k)
        expected = np.lexsort((np.arange(1000), -np.round(similarity, 5)))[:top_k]
        np.testing.assert_allclose(found, similarity[expected], atol=1e-5)
        assert len(rows) == min(top_k, 1000) and len(set(rows.tolist())) == len(rows)
        assert index.places(rows)["file"].to_pylist() == list(map(str, rows))


def test_search_says_what_is_wrong(recordings, pretrained, classifier, tmp_path):
    output = tmp_path / "out.parquet"
    model = save(ESResNetForInstanceDiscrimination, tmp_path / "model")
    run(recordings, model, output)
    query = recordings / "a.wav"
    assert "there is no such file" in fail("dls", "search", query, "--index", tmp_path / "none.parquet")
    pq.write_table(pq.read_table(output).replace_schema_metadata(), tmp_path / "plain.parquet")
    assert "is no index" in fail("dls", "search", query, "--index", tmp_path / "plain.parquet")
    other = save(ESResNetForInstanceDiscrimination, tmp_path / "other", seed=1)
    same_weights = save(ESResNetForInstanceDiscrimination, tmp_path / "same", pooler_act="asinh")
    for another in (other, same_weights):
        assert "made by another model" in fail("dls", "search", query, "--index", output, "--model", another)
    assert "ends after 0.500 s" in fail("dls", "search", query, "--index", output, "--start", "2", "--end", "3")
    assert "a start before the end" in fail("dls", "search", query, "--index", output, "--start", "2", "--end", "2")
    assert "broken.wav" in fail("dls", "search", recordings / "broken.wav", "--index", output)
    model.rename(tmp_path / "moved")
    assert "say with --model where it is now" in fail("dls", "search", query, "--index", output)
    succeed("dls", "search", query, "--index", output, "--model", tmp_path / "moved")


# Memory


def embed_and_print_peak(*options) -> int:
    """Embeds, and prints the MB of this process at its largest."""
    code = train("dls", ["embed", *options])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return code


def peak(folder, model) -> float:
    """MB of dls embed at its largest, over the files of a folder."""
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
