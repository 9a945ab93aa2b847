"""Every corpus from its folder: schema, folds, truth checks, caching, combining."""

import csv
import logging
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from corpora_trees import (
    linked_copy,
    make_dcase2013,
    make_esc10,
    make_esc50,
    make_urbansound8k,
    replace,
    wav,
    write_table,
)
from scripts import Forked, outputs

import datasets_scripts.builder
from datasets_scripts import combine_corpora, corpus_report, decode_audio, load_corpus, train_test_folds
from datasets_scripts.corpora.esc import ESC10_CLASSES, ESC50_CLASSES
from datasets_scripts.errors import AudioError, CorpusError

REPOSITORY = Path(__file__).resolve().parents[1]
MAKERS = {"esc10": make_esc10, "esc50": make_esc50, "urbansound8k": make_urbansound8k, "dcase2013": make_dcase2013}


@pytest.fixture(scope="session")
def trees(tmp_path_factory):
    """Complete trees by corpus, made once."""
    made = {}

    def tree(name):
        if name not in made:
            made[name] = MAKERS[name](tmp_path_factory.mktemp("trees") / name)
        return made[name]

    return tree


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def counts(dataset, column):
    return Counter(dataset[column][:])


# ------------------------------------------------------------------------------------------------- complete corpora


@pytest.mark.parametrize(
    ("name", "clips", "folds", "own"),
    [
        ("esc10", 400, {1: 80, 2: 80, 3: 80, 4: 80, 5: 80}, {"esc10", "take"}),
        ("esc50", 2000, {1: 400, 2: 400, 3: 400, 4: 400, 5: 400}, {"esc10", "take"}),
        (
            "urbansound8k",
            8732,
            dict(enumerate([873, 888, 925, 990, 936, 823, 838, 806, 816, 837], 1)),
            {"salience", "start", "end"},
        ),
        ("dcase2013", 200, {1: 100, 2: 100}, {"subset"}),
    ],
)
def test_complete_tree(name, clips, folds, own, trees, cache):
    dataset = load_corpus(name, trees(name), cache_dir=cache)
    report = corpus_report(dataset)
    assert len(dataset) == clips == len(set(dataset["clip_id"][:]))
    assert counts(dataset, "fold") == folds
    common = {
        "audio",
        "label",
        "fold",
        "clip_id",
        "source_id",
        "digest",
        "sampling_rate",
        "num_channels",
        "num_frames",
    }
    assert set(dataset.column_names) == common | own
    assert dataset.features["audio"] == datasets.Audio(decode=False)
    assert not any(value for key, value in report.items() if key not in ("corpus", "clips"))
    for index in (0, clips // 2, clips - 1):
        row = dataset[index]
        samples, rate = decode_audio(row["audio"])
        assert row["audio"]["bytes"] is None, "files are referred to, not copied"
        assert (samples.shape, rate) == ((row["num_channels"], row["num_frames"]), row["sampling_rate"])


def test_official_class_order(trees, cache):
    us8k = "air_conditioner car_horn children_playing dog_bark drilling engine_idling gun_shot jackhammer siren"
    dcase = "bus busystreet office openairmarket park quietstreet restaurant supermarket tube tubestation"
    esc10 = "dog rooster rain sea_waves crackling_fire crying_baby sneezing clock_tick helicopter chainsaw"
    for name, expected in {"urbansound8k": f"{us8k} street_music", "dcase2013": dcase, "esc10": esc10}.items():
        assert load_corpus(name, trees(name), cache_dir=cache).features["label"].names == expected.split()
    names = load_corpus("esc50", trees("esc50"), cache_dir=cache).features["label"].names
    assert [names.index(n) for n in esc10.split()] == [0, 1, 10, 11, 12, 20, 21, 38, 40, 41]
    assert len(names) == 50


def test_esc10_is_the_same_from_both_layouts(trees, cache):
    new = load_corpus("esc10", trees("esc50"), cache_dir=cache)
    old = load_corpus("esc10", trees("esc10"), cache_dir=cache)
    assert new.features == old.features
    assert counts(new, "label") == counts(old, "label") == dict.fromkeys(range(10), 40)
    row = new[0]
    assert row["clip_id"] == "{}-{}-{}".format(row["fold"], row["source_id"], row["take"])
    assert ESC10_CLASSES[row["label"]] == ESC50_CLASSES[int(Path(row["audio"]["path"]).stem.split("-")[3])]


def test_dcase_parts_share_file_names_but_not_identities(trees, cache):
    dataset = load_corpus("dcase2013", trees("dcase2013"), cache_dir=cache)
    assert {"development/bus01", "evaluation/bus01"} <= set(dataset["clip_id"][:])
    assert set(zip(dataset["subset"][:], dataset["fold"][:], strict=True)) == {("development", 1), ("evaluation", 2)}


@pytest.mark.parametrize("name", MAKERS)
def test_folder_around_the_root_is_accepted(name, trees, tmp_path, cache):
    linked_copy(trees(name), tmp_path / "outer" / "some name-master")
    assert len(load_corpus(name, tmp_path / "outer", cache_dir=cache)) > 0


# -------------------------------------------------------------------------------------------------- planted defects


def edit_table(path, change):
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    changed = change(rows)
    path.unlink()
    write_table(path, rows if changed is None else changed)


def drop_file(root):
    (root / "audio" / "1-10000-A-0.wav").unlink()


def add_file(root):
    (root / "audio" / "1-99999-A-0.wav").write_bytes(wav(5))


def drop_row_and_file(root):
    drop_file(root)
    edit_table(root / "meta/esc50.csv", lambda rows: rows[1:])


def set_value(column, value):
    return lambda root: edit_table(root / "meta/esc50.csv", lambda rows: rows[0].update({column: value}))


def move_clip_to_another_fold(root):
    (root / "audio" / "1-10000-A-0.wav").rename(root / "audio" / "2-10000-A-0.wav")
    edit_table(root / "meta/esc50.csv", lambda rows: rows[0].update(filename="2-10000-A-0.wav", fold=2))


def write(content):
    return lambda root: replace(root / "audio" / "1-10000-A-0.wav", content)


@pytest.mark.parametrize(
    ("defect", "expected"),
    [
        (drop_file, ["1 listed but absent", "1-10000-A-0.wav", "fold 1: 399", "class dog: 39", "allow_partial"]),
        (add_file, ["1 present but not listed", "1-99999-A-0.wav"]),
        (drop_row_and_file, ["1999 clips instead of 2000", "fold 1: 399", "class dog: 39"]),
        (move_clip_to_another_fold, ["fold 1: 399 clips instead of 400", "fold 2: 401"]),
        (set_value("category", "cat"), ["1-10000-A-0.wav", "'cat'", "target 0 is dog"]),
        (set_value("fold", "3"), ["1-10000-A-0.wav contradicts its row", "fold 3"]),
        (set_value("fold", "one"), ["esc50.csv", "fold must hold whole numbers", "'one'"]),
        (set_value("esc10", "maybe"), ["'maybe'", "True or False"]),
        (set_value("filename", "../../etc/passwd"), ["../../etc/passwd", "is not named"]),
        (lambda root: edit_table(root / "meta/esc50.csv", lambda rows: [*rows, rows[0]]), ["listed twice"]),
        (lambda root: replace(root / "meta/esc50.csv", "name,class\na.wav,dog\n"), ["no column filename"]),
        (lambda root: replace(root / "meta/esc50.csv", b"\xff\xfe\x00bad"), ["esc50.csv", "UTF-8"]),
        (lambda root: replace(root / "meta/esc50.csv", ""), ["esc50.csv", "no column"]),
        (write(b""), ["1 unreadable", "1-10000-A-0.wav", "0 bytes", "skip_unreadable"]),
        (write(wav(5)[:300]), ["1 unreadable", "1-10000-A-0.wav", "truncated"]),
        (write(wav(5)[:-1]), ["1 unreadable", "1-10000-A-0.wav: is truncated: 4.990 of 5.000 s decode"]),
        (write(b"this is text, not sound" * 40), ["1 unreadable", "1-10000-A-0.wav", "not a sound file"]),
        (write(wav(4.5)), ["1 wrong duration", "1-10000-A-0.wav (4.500 s, expected 4.95 to 5.05 s)"]),
    ],
)
def test_defect_is_found_and_named(defect, expected, trees, tmp_path, cache):
    root = linked_copy(trees("esc50"), tmp_path / "ESC-50")
    defect(root)
    with pytest.raises(CorpusError) as error:
        load_corpus("esc50", root, cache_dir=cache)
    for words in [*expected, str(root)]:
        assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_esc10_of_an_esc50_tree_looks_at_its_own_files_only(trees, tmp_path, cache):
    root = linked_copy(trees("esc50"), tmp_path / "ESC-50")
    next((root / "audio").glob("*-2.wav")).unlink()  # a pig
    assert len(load_corpus("esc10", root, cache_dir=cache)) == 400
    next((root / "audio").glob("*-0.wav")).unlink()  # a dog
    with pytest.raises(CorpusError, match="1 listed but absent"):
        load_corpus("esc10", root, cache_dir=cache)


def test_defects_in_the_other_corpora(trees, tmp_path, cache):
    us8k = linked_copy(trees("urbansound8k"), tmp_path / "us8k")
    table = us8k / "metadata" / "UrbanSound8K.csv"
    edit_table(table, lambda rows: rows[5].update({"class": "siren", "classID": "3"}))
    with pytest.raises(CorpusError, match="contradicts its row"):
        load_corpus("urbansound8k", us8k, cache_dir=cache)

    esc10 = linked_copy(trees("esc10"), tmp_path / "esc10")
    (esc10 / "002 - Rain" / "note.wav").write_bytes(wav(5))
    next((esc10 / "009 - Rooster").iterdir()).unlink()
    with pytest.raises(CorpusError, match=r"present but not listed: 002 - Rain/note\.wav.*class rooster: 39"):
        load_corpus("esc10", esc10, cache_dir=cache)

    dcase = linked_copy(trees("dcase2013"), tmp_path / "dcase")
    (dcase / "scenes_stereo" / "bus01.flac").write_bytes(wav(30, 100))
    with pytest.raises(CorpusError, match="both clip development/bus01"):
        load_corpus("dcase2013", dcase, cache_dir=cache)
    (dcase / "scenes_stereo" / "bus01.flac").unlink()
    for path in (dcase / "scenes_stereo_testset").iterdir():
        path.unlink()
    with pytest.raises(CorpusError, match="100 clips instead of 200, fold 2: 0 clips instead of 100"):
        load_corpus("dcase2013", dcase, cache_dir=cache)


def test_partial_copy_on_purpose_says_what_it_lacks(trees, tmp_path, cache, caplog):
    root = linked_copy(trees("esc50"), tmp_path / "ESC-50")
    drop_file(root)
    add_file(root)
    for attempt in ("prepared", "cached"):
        caplog.clear()
        dataset = load_corpus("esc50", root, allow_partial=True, cache_dir=cache)
        assert "1-10000-A-0.wav" in caplog.text, attempt
    report = corpus_report(dataset.select(range(3)))
    assert report["missing"] == ["audio/1-10000-A-0.wav"]
    assert report["unlisted"] == ["audio/1-99999-A-0.wav"]
    assert "1999 clips instead of 2000" in report["shortfalls"]
    assert len(dataset) == report["clips"] == 1999


def test_unreadable_files_are_skipped_on_request(trees, tmp_path, cache, caplog):
    root = linked_copy(trees("esc50"), tmp_path / "ESC-50")
    write(b"")(root)
    dataset = load_corpus("esc50", root, skip_unreadable=True, cache_dir=cache)
    assert len(dataset) == 1999
    assert corpus_report(dataset)["skipped"] == ["audio/1-10000-A-0.wav: is empty (0 bytes)"]
    assert "1 unreadable files left out: audio/1-10000-A-0.wav" in caplog.text


@pytest.mark.parametrize("name", [*MAKERS, "audiofolder"])
def test_folder_that_is_absent_empty_or_something_else(name, tmp_path, cache):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("nothing to hear")
    (tmp_path / "file.txt").write_text("nothing to hear")
    for folder in ("absent", "empty", "other", "file.txt"):
        with pytest.raises(CorpusError, match=folder):
            load_corpus(name, tmp_path / folder, cache_dir=cache)


def test_wrong_names_and_options(cache):
    with pytest.raises(CorpusError, match=r"no corpus 'esc51'.*esc10, esc50, urbansound8k, dcase2013"):
        load_corpus("esc51")
    with pytest.raises(CorpusError, match="esc10 has no option clips_per_class"):
        load_corpus("esc10", "/nowhere", clips_per_class=3)
    with pytest.raises(CorpusError, match="audiofolder needs data_dir"):
        load_corpus("audiofolder")
    with pytest.raises(CorpusError, match="num_classes must be from 1 to"):
        load_corpus("synthetic", num_classes=99, cache_dir=cache)


NEW_CORPUS = """
from datasets_scripts.corpus import Clip, FolderCorpus, Listing, sound_files


class Farm(FolderCorpus):
    name, title, layout, marks = "farm", "A farm", "barn/*.wav", ("barn",)
    columns = {"species": "string"}
    class_sizes = {"cow": 1, "hen": 1}

    @staticmethod
    def published_identity(path, clip_id=None):
        return f"farm/{clip_id}" if clip_id else None

    def read(self, root):
        return Listing([Clip(p, p.stem, 1, p.stem, p.stem, {"species": p.stem}) for p in sound_files(root)])
"""
LOAD_IT = """
import sys
from datasets_scripts import CORPUS_NAMES
print(*CORPUS_NAMES, *sorted({"datasets", "numpy", "soundfile", "torch"} & set(sys.modules)))
from datasets_scripts import ClipIdentities, load_corpus
dataset = load_corpus("farm", sys.argv[1], cache_dir=sys.argv[2])
print(dataset["species"][:], dataset.features["label"].names, ClipIdentities.of(dataset).is_published.all())
"""


def test_a_new_corpus_is_one_file(tmp_path):
    shutil.copytree(REPOSITORY / "datasets_scripts", tmp_path / "datasets_scripts")
    (tmp_path / "datasets_scripts" / "corpora" / "farm.py").write_text(NEW_CORPUS)
    root = make_folder(tmp_path / "sounds", ["barn/cow.wav", "barn/hen.wav"])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", LOAD_IT, root, tmp_path / "cache"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    names = "esc10 esc50 urbansound8k dcase2013 synthetic audiofolder hub farm"  # and nothing heavy was imported
    assert ended.stdout == f"{names}\n['cow', 'hen'] ['cow', 'hen'] True\n", ended.stderr


# ------------------------------------------------------------------------------------------------------- own sounds


def make_folder(root, files):
    for number, name in enumerate(files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(wav(0.5, seed=number))
    return root


def test_audiofolder_takes_labels_from_folders(tmp_path, cache):
    names = ["späte Vögel/a b.WAV", "späte Vögel/deep/er/c.wav", "auto/x.wav", ".hidden/y.wav", "auto/._x.wav"]
    root = make_folder(tmp_path / "my sounds", names)
    (root / "readme.txt").write_text("ignored")
    dataset = load_corpus("audiofolder", root, cache_dir=cache)
    assert dataset.features["label"].names == ["auto", "späte Vögel"]
    assert dataset["source_id"][:] == ["auto/x.wav", "späte Vögel/a b.WAV", "späte Vögel/deep/er/c.wav"]
    assert dataset["label"][:] == [0, 1, 1]
    assert dataset["fold"][:] == [0, 0, 0]
    assert dataset["clip_id"][:] == dataset["digest"][:]
    with pytest.raises(CorpusError, match="no folds"):
        train_test_folds(dataset, 1)


def test_audiofolder_without_class_folders_has_no_labels(tmp_path, cache):
    dataset = load_corpus("audiofolder", make_folder(tmp_path / "s", ["a.wav", "b/c.wav"]), cache_dir=cache)
    assert dataset.features["label"].names == []
    assert dataset["label"][:] == [None, None]


def test_audiofolder_metadata_gives_labels_and_folds(tmp_path, cache):
    root = make_folder(tmp_path / "s", ["one.wav", "sub/two.wav", "three.wav"])
    rows = [
        {"file_name": "three.wav", "label": "cat", "fold": "2", "source_id": "r1", "note": "kept out"},
        {"file_name": "one.wav", "label": "dog", "fold": "1", "source_id": "", "note": ""},
        {"file_name": "sub/two.wav", "label": "cat", "fold": "1", "source_id": "r2", "note": ""},
    ]
    write_table(root / "metadata.csv", rows)
    dataset = load_corpus("audiofolder", root, cache_dir=cache)
    assert dataset["source_id"][:] == ["r1", "one.wav", "r2"]
    assert [dataset.features["label"].int2str(label) for label in dataset["label"][:]] == ["cat", "dog", "cat"]
    train, test = train_test_folds(dataset, 2)
    assert (train["source_id"][:], test["source_id"][:]) == (["one.wav", "r2"], ["r1"])
    write_table(root / "metadata.csv", [*rows, {**rows[0], "file_name": "gone.wav"}])
    with pytest.raises(CorpusError, match=r"1 listed but absent: gone\.wav"):
        load_corpus("audiofolder", root, cache_dir=cache)
    write_table(root / "metadata.csv", [rows[0] | {"fold": "0"}, *rows[1:]])
    with pytest.raises(CorpusError, match=r"numbered from 1, found 0 for three\.wav"):
        load_corpus("audiofolder", root, cache_dir=cache)


def test_audiofolder_keeps_one_of_identical_files(tmp_path, cache, caplog):
    root = make_folder(tmp_path / "s", ["a.wav", "b.wav"])
    (root / "z.wav").write_bytes((root / "a.wav").read_bytes())
    dataset = load_corpus("audiofolder", root, cache_dir=cache)
    assert dataset["source_id"][:] == ["a.wav", "b.wav"]
    assert corpus_report(dataset)["duplicates"] == ["z.wav (same as a.wav)"]
    assert "1 files left out" in caplog.text


def test_audiofolder_table_that_points_outside_and_link_to_nothing(tmp_path, cache):
    root = make_folder(tmp_path / "s", ["a.wav"])
    make_folder(tmp_path, ["secret.wav"])
    write_table(root / "metadata.csv", [{"file_name": "../secret.wav", "label": "x"}])
    with pytest.raises(CorpusError, match=r"1 listed but absent: \.\./secret\.wav"):
        load_corpus("audiofolder", root, cache_dir=cache)
    (root / "metadata.csv").unlink()
    (root / "b.wav").symlink_to(tmp_path / "gone.wav")
    with pytest.raises(CorpusError, match=r"1 unreadable: b\.wav: the file does not exist"):
        load_corpus("audiofolder", root, cache_dir=cache)
    (root / "b.wav").unlink()
    (root / "b.wav").symlink_to("b.wav")
    with pytest.raises(CorpusError, match=r"1 unreadable: b\.wav: cannot be read \(Too many levels"):
        load_corpus("audiofolder", root, cache_dir=cache)


def test_audiofolder_follows_links_but_not_in_circles(tmp_path, cache):
    root = make_folder(tmp_path / "s", ["a.wav"])
    make_folder(tmp_path / "elsewhere", ["b.wav", "c.wav"])
    (root / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    assert load_corpus("audiofolder", root, cache_dir=cache).num_rows == 2  # b.wav has the content of a.wav


# ---------------------------------------------------------------------------------------------------------- decoding


def test_every_common_format_decodes(tmp_path, cache):
    rate = 8000
    truth = (0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate))[:, None].repeat(2, 1)
    truth[:, 1] *= -0.5
    import soundfile

    kinds = [("WAV", s) for s in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM")]
    kinds += [("WAVEX", s) for s in ("PCM_16", "PCM_24", "FLOAT")]
    kinds += [("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16")]
    for form, subtype in kinds:
        suffix = "wav" if form == "WAVEX" else form.lower()
        soundfile.write(tmp_path / f"{form}-{subtype}.{suffix}", truth, rate, format=form, subtype=subtype)
    dataset = load_corpus("audiofolder", tmp_path, cache_dir=cache)
    assert len(dataset) == len(kinds)
    for row in dataset:
        samples, found = decode_audio(row["audio"])
        assert samples.dtype == np.float32
        assert found == row["sampling_rate"]
        assert samples.shape == (2, row["num_frames"])
        if found == rate and len(truth) == samples.shape[1]:  # lossy formats may resample or pad
            assert np.abs(samples[:, 2000:6000] - truth[2000:6000].T).max() < 0.1, row["source_id"]


def spoiled(kind):
    import io

    import soundfile

    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 44100).astype(np.float32)
    if kind in ("nan", "inf"):
        samples[1000] = float(kind)
        kind = "FLOAT"
    file = io.BytesIO()
    form = {"FLOAT": "WAV"}.get(kind, kind)
    soundfile.write(file, samples, 44100, format=form, subtype="FLOAT" if kind == "FLOAT" else None)
    return file.getvalue()


# Named, because a test's name must be the same in every process, and libsndfile puts random bytes into Ogg files.
SPOILED = {
    "empty": (b"", "is empty"),
    "text": (b"text " * 100, "not a sound file"),
    "no samples": (wav(0), "holds no samples"),
    **{
        f"{kind} without its last 10000": (spoiled(kind)[:-10_000], "trunc") for kind in ("WAV", "AIFF", "MP3", "FLAC")
    },
    "OGG's first 5000": (spoiled("OGG")[:5000], "trunc"),
    "nan": (spoiled("nan"), "NaN or infinite"),
    "inf": (spoiled("inf"), "NaN or infinite"),
}


@pytest.mark.parametrize(("content", "words"), SPOILED.values(), ids=SPOILED)
def test_spoiled_file_is_refused_by_name(content, words, tmp_path, cache):
    path = tmp_path / "voice memo.wav"
    path.write_bytes(content)
    for audio in ({"bytes": None, "path": str(path)}, {"bytes": content, "path": path.name}):
        with pytest.raises(AudioError, match=r"voice memo\.wav") as error:
            decode_audio(audio)
        assert words in str(error.value)
    with pytest.raises(CorpusError, match=r"1 unreadable: .*voice memo\.wav"):
        load_corpus("audiofolder", tmp_path, cache_dir=cache)
    with pytest.raises(CorpusError, match="none of the 1 sound files can be read"):
        load_corpus("audiofolder", tmp_path, skip_unreadable=True, cache_dir=cache)


def test_wav_whose_length_was_not_known_is_whole():
    """Programs that write to a pipe put the largest number there is into the header."""
    content = bytearray(wav(1, 8000))
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    assert decode_audio({"bytes": bytes(content), "path": None})[0].shape == (1, 8000)


def test_file_that_vanishes_after_loading(tmp_path, cache):
    dataset = load_corpus("audiofolder", make_folder(tmp_path / "s", ["a.wav", "b.wav"]), cache_dir=cache)
    (tmp_path / "s" / "a.wav").unlink()
    with pytest.raises(AudioError, match=r"a\.wav: the file does not exist"):
        decode_audio(dataset[0]["audio"])


# ------------------------------------------------------------------------------------------------------------ caching


def test_cache_is_used_and_renewed(tmp_path, cache, monkeypatch):
    root = make_folder(tmp_path / "s", ["a.wav", "b.wav"])
    opened = []
    inspect = datasets_scripts.builder.inspect_audio
    monkeypatch.setattr(datasets_scripts.builder, "inspect_audio", lambda path: opened.append(path) or inspect(path))
    load_corpus("audiofolder", root, cache_dir=cache)
    assert len(opened) == 2
    load_corpus("audiofolder", root, cache_dir=cache)
    assert len(opened) == 2, "prepared data were not used again"
    time = (root / "a.wav").stat().st_mtime_ns
    (root / "a.wav").write_bytes(wav(0.5, seed=77))  # same name, same size
    os.utime(root / "a.wav", ns=(time + 10, time + 10))
    changed = load_corpus("audiofolder", root, cache_dir=cache)
    assert len(opened) == 4, "a changed file went unnoticed"
    make_folder(tmp_path / "t", ["a.wav", "b.wav"])
    other = load_corpus("audiofolder", tmp_path / "t", cache_dir=cache)
    assert set(other["digest"][:]) != set(changed["digest"][:]), "two folders share a cache"


def count_clips(folder: Path, cache: Path) -> None:
    print(len(load_corpus("dcase2013", folder, cache_dir=cache)))


def test_two_processes_prepare_at_once(tmp_path, trees):
    logs = [tmp_path / f"{number}.log" for number in range(2)]
    runs = [Forked(log, count_clips, trees("dcase2013"), tmp_path / "cache") for log in logs]
    assert [output.split()[-1] for output in outputs(runs)] == ["200", "200"]


def test_cache_that_cannot_be_written(tmp_path):
    root = make_folder(tmp_path / "s", ["a.wav"])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CorpusError, match="HF_DATASETS_CACHE"):
        load_corpus("audiofolder", root, cache_dir=tmp_path / "file" / "cache")


# ------------------------------------------------------------------------------------------------- folds and combining


def test_folds_split_every_clip_once(trees, cache):
    dataset = load_corpus("esc50", trees("esc50"), cache_dir=cache)
    train, test = train_test_folds(dataset, 3)
    assert (len(train), len(test)) == (1600, 400)
    assert set(test["fold"][:]) == {3}
    assert not set(train["clip_id"][:]) & set(test["clip_id"][:])
    assert not set(train["source_id"][:]) & set(test["source_id"][:])
    with pytest.raises(CorpusError, match="no fold 6: this corpus has folds 1, 2, 3, 4, 5"):
        train_test_folds(dataset, 6)


def test_recordings_across_folds_are_reported(trees, tmp_path, cache, caplog):
    """UrbanSound8K has five such recordings officially; one more is pointed out, ESC has none."""
    assert corpus_report(load_corpus("esc50", trees("esc50"), cache_dir=cache))["crossings"] == {}
    root = linked_copy(trees("urbansound8k"), tmp_path / "us8k")
    table = root / "metadata" / "UrbanSound8K.csv"
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    first = {fold: [row for row in rows if row["fold"] == str(fold)] for fold in range(1, 11)}
    wanted = [(1, 4), (1, 4), (1, 8), (1, 9), (2, 7), (5, 6)]
    for number, (fold, other) in enumerate(wanted):
        row, source = first[other][40 * number], first[fold][40 * number]["fsID"]
        name = f"{source}-{row['classID']}-9-{number}.wav"
        folder = root / "audio" / f"fold{other}"
        (folder / row["slice_file_name"]).rename(folder / name)
        row.update(fsID=source, slice_file_name=name)
    table.unlink()
    write_table(table, rows)
    with caplog.at_level(logging.WARNING):
        report = corpus_report(load_corpus("urbansound8k", root, cache_dir=cache))
    assert sorted(map(tuple, report["crossings"].values())) == sorted(wanted)
    assert report["unexpected_crossings"] == ["folds 5 and 6: 1 recordings are in both, officially 0"]
    assert "folds 5 and 6" in caplog.text


def test_combining_removes_what_is_there_twice(trees, tmp_path, cache):
    esc50 = load_corpus("esc50", trees("esc50"), cache_dir=cache)
    esc10 = load_corpus("esc10", trees("esc50"), cache_dir=cache)
    mine = make_folder(tmp_path / "mine", ["a.wav", "b.wav"])
    yours = make_folder(tmp_path / "yours", ["dog/a.wav", "cat/x.wav", "cat/z.wav"])
    folders = [load_corpus("audiofolder", folder, cache_dir=cache) for folder in (mine, yours)]
    combined, report = combine_corpora(
        [("esc10", esc10), ("esc50", esc50), ("mine", folders[0]), ("yours", folders[1])]
    )
    assert report["clips"] == {"esc10": 400, "esc50": 1600, "mine": 2, "yours": 1}
    assert report["removed"] == 402
    assert report["removed_pairs"] == [
        {"kept_in": "esc10", "removed_from": "esc50", "clips": 400},
        {"kept_in": "mine", "removed_from": "yours", "clips": 2},
    ]
    assert counts(combined, "corpus") == report["clips"]
    assert set(combined.column_names) == {"audio", "corpus", "label", "fold", "clip_id", "source_id", "digest"}
    assert combined.features["label"] == datasets.Value("int64")
    assert combined[2000]["label"] is None
    with pytest.raises(CorpusError, match="no corpus report"):
        corpus_report(combined)
    assert corpus_report(esc50)["clips"] == 2000
    kept = {(row["corpus"], row["clip_id"]) for row in combined.remove_columns("audio")}
    assert len(kept) == len(combined) == 2003


def test_excluded_folds_do_not_come_back_under_another_name(trees, cache):
    """ESC-10's fold 1 is held out: its clips are not taken from ESC-50 either, whichever corpus comes first."""
    corpora = [(name, load_corpus(name, trees("esc50"), cache_dir=cache)) for name in ("esc50", "esc10")]
    for order in (corpora, corpora[::-1]):
        combined, report = combine_corpora(order, {"esc10": {1}})
        held_out = {row["clip_id"] for row in corpora[1][1].remove_columns("audio") if row["fold"] == 1}
        assert len(held_out) == 80 and not held_out & set(combined["clip_id"][:])
        assert len(combined) == 2000 - 80
        assert {"kept_in": "esc10 held out", "removed_from": "esc50", "clips": 80} in report["removed_pairs"]


def test_esc_clips_are_the_same_by_identity_not_by_content(trees, cache):
    """The two published editions of a clip differ as files."""
    old = load_corpus("esc10", trees("esc10"), cache_dir=cache)
    new = load_corpus("esc50", trees("esc50"), cache_dir=cache)
    same = [old[i]["clip_id"] for i in (0, 7)]
    renamed = new.remove_columns("clip_id").add_column("clip_id", [*same, *new["clip_id"][2:]])
    _, report = combine_corpora([("esc10", old), ("esc50", renamed)])
    assert report["removed"] == 2


# ----------------------------------------------------------------------------------------------------------- synthetic


def test_synthetic_clips_do_not_depend_on_what_else_is_asked_for(cache):
    few = load_corpus(
        "synthetic", clips_per_class=2, clip_seconds=0.5, num_classes=3, sampling_rate=8000, cache_dir=cache
    )
    many = load_corpus("synthetic", clips_per_class=6, clip_seconds=0.5, sampling_rate=8000, cache_dir=cache)
    other = load_corpus(
        "synthetic", clips_per_class=2, clip_seconds=0.5, num_classes=3, sampling_rate=8000, seed=1, cache_dir=cache
    )
    by_id = dict(zip(many["clip_id"][:], many["digest"][:], strict=True))
    assert len(set(by_id.values())) == len(many) == 60
    assert all(by_id[row["clip_id"]] == row["digest"] for row in few)
    assert all(by_id[row["clip_id"]] != row["digest"] for row in other)
    assert counts(many, "fold") == {1: 20, 2: 10, 3: 10, 4: 10, 5: 10}
    samples, rate = decode_audio(many[0]["audio"])
    assert (samples.shape, rate) == ((1, 4000), 8000)
    assert 0.05 < np.abs(samples).max() <= 1


def test_synthetic_is_not_solved_by_mean_spectra(cache):
    """Five-fold accuracy of a linear classifier on time-averaged log band energies; chance is 0.1."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    dataset = load_corpus("synthetic", sampling_rate=16000, clip_seconds=4, cache_dir=cache)
    frames = np.stack([decode_audio(audio)[0][0] for audio in dataset["audio"]]).reshape(400, -1, 500)
    power = (np.abs(np.fft.rfft(frames * np.hanning(500), 512)) ** 2)[..., :256].mean(1)
    bands = np.log(power.reshape(400, 64, 4).mean(-1) + 1e-9)
    labels, folds = np.array(dataset["label"][:]), np.array(dataset["fold"][:])
    scores = []
    for fold in range(1, 6):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        model.fit(bands[folds != fold], labels[folds != fold])
        scores.append(model.score(bands[folds == fold], labels[folds == fold]))
    assert 0.3 < np.mean(scores) < 0.65, scores


# ---------------------------------------------------------------------------------------------------------- real sound


def test_real_clips(shared_dir, cache):
    data = shared_dir / "data"
    esc10 = load_corpus("esc10", data / "ESC-10", cache_dir=cache)
    assert counts(esc10, "fold") == dict.fromkeys(range(1, 6), 80)
    assert counts(esc10, "label") == dict.fromkeys(range(10), 40)
    assert corpus_report(esc10)["crossings"] == {}
    with pytest.raises(CorpusError, match="100 clips instead of 2000"):
        load_corpus("esc50", data / "ESC-50-sample", cache_dir=cache)
    esc50 = load_corpus("esc50", data / "ESC-50-sample", allow_partial=True, cache_dir=cache)
    us8k = load_corpus("urbansound8k", data / "UrbanSound8K-sample", allow_partial=True, cache_dir=cache)
    assert (len(esc50), len(us8k)) == (100, 160)
    combined, report = combine_corpora([("esc10", esc10), ("esc50", esc50), ("urbansound8k", us8k)])
    assert report["removed_pairs"] == [{"kept_in": "esc10", "removed_from": "esc50", "clips": 20}]
    assert len(combined) == 640
    # Names must mean the same sound in both editions.
    names = esc10.features["label"].names
    label_of = dict(zip(esc10["clip_id"][:], esc10["label"][:], strict=True))
    for row in esc50.remove_columns("audio"):
        if row["clip_id"] in label_of:
            assert names[label_of[row["clip_id"]]] == esc50.features["label"].int2str(row["label"])
