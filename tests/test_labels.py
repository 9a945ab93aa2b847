"""Labels as people have them: in tables, folders and names, of files and of stretches."""

import json
import logging
import os
import unicodedata

import numpy as np
import pytest
import soundfile
from corpora_trees import wav, write_table
from scripts import SMALL, succeed

from datasets_scripts import corpus_report, cut_into_windows, decode_audio, load_corpus, train_test_folds
from datasets_scripts.__main__ import main as datasets_scripts
from datasets_scripts.errors import CorpusError


@pytest.fixture
def load(tmp_path):
    def load(root=tmp_path / "s", **options):
        return load_corpus("audiofolder", root, cache_dir=tmp_path / "cache", **options)

    return load


def make_folder(root, names, seconds=0.5):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(wav(seconds, rate=1000, seed=number))
    return root


def labels_of(dataset):
    """{source_id, with the stretch's start where it is one: label}"""
    names = dataset.features["label"].names
    return {
        row["source_id"] + (f"@{row['clip_start']:g}" if row.get("clip_end", np.inf) < np.inf else ""): (
            None if row["label"] is None else names[row["label"]]
        )
        for row in dataset
    }


def folds_of(dataset):
    return dict(zip(dataset["source_id"][:], dataset["fold"][:], strict=True))


# --- Folders ---


@pytest.mark.parametrize(
    ("names", "labels", "folds"),
    [
        (["train/dog/1", "train/cat/1", "test/dog/1", "test/cat/1"], "dog cat dog cat", [0, 0, 1, 1]),
        (["Train/dog/1", "valid/cat/1", "test/dog/1"], "dog cat dog", [0, 2, 1]),
        (["fold1/dog/1", "fold1/cat/1", "fold2/dog/1", "fold2/cat/2"], "dog cat dog cat", [1, 1, 2, 2]),
        (["fold0/dog/1", "fold0/cat/1", "fold1/dog/1", "fold1/cat/2"], "dog cat dog cat", [1, 1, 2, 2]),
        (["dog/train/1", "dog/eval/1", "cat/train/1", "cat/eval/1"], "dog dog cat cat", [0, 2, 0, 2]),
        (["all/my/dog/1", "all/my/cat/1", "all/my/cat/deep/2"], "dog cat cat", [0, 0, 0]),
        (["data/train/dog/1", "data/train/cat/1", "data/dev/dog/1"], "dog cat dog", [0, 0, 2]),
        (["train/1", "train/2", "test/1"], "", [0, 0, 1]),
        (["train/1", "bus/1", "car/1"], "train bus car", [0, 0, 0]),
    ],
)
def test_folders_that_are_splits_or_around_the_corpus_are_no_classes(names, labels, folds, load, tmp_path):
    names = [f"{name}.wav" for name in names]
    dataset = load(make_folder(tmp_path / "s", names))
    assert labels_of(dataset) == dict(zip(names, labels.split() or [None] * 3, strict=True))
    assert folds_of(dataset) == dict(zip(names, folds, strict=True))


def test_what_was_inferred_is_said_at_every_load_and_can_be_denied(load, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    make_folder(tmp_path / "s", ["train/dog/1.wav", "train/cat/1.wav", "test/dog/1.wav"])
    for _ in range(2):
        caplog.clear()
        load()
        assert "classes: cat (1), dog (2)" in caplog.text and "folder test is fold 1" in caplog.text
        assert "folder train is never held out" in caplog.text and "--no_folder_labels" in caplog.text
    denied = load(folder_labels=False)
    assert set(labels_of(denied).values()) == {None} and set(denied["fold"][:]) == {0}


def test_folders_that_systems_make_are_no_classes(load, tmp_path):
    of_systems = ["$RECYCLE.BIN/S-1-5/x.wav", "dog/@eaDir/a.wav/x.wav", "System Volume Information/x.wav"]
    make_folder(tmp_path, ["dog/a.wav", "cat/b.wav", *of_systems])
    assert labels_of(load(tmp_path)) == {"cat/b.wav": "cat", "dog/a.wav": "dog"}


@pytest.mark.parametrize("fold", ["1" + "0" * 30, "9" * 5000, "1.5"])
def test_folds_that_no_corpus_has(fold, load, tmp_path):
    make_folder(tmp_path, ["a.wav"])
    (tmp_path / "metadata.csv").write_text(f"file_name,fold\na.wav,{fold}\n")
    with pytest.raises(CorpusError, match=r"metadata\.csv: column fold must hold whole numbers up to 2147483647") as e:
        load(tmp_path)
    assert len(str(e.value)) < 500


def test_a_stray_file_is_named(load, tmp_path, caplog):
    root = make_folder(tmp_path / "s", ["dog/1.wav", "dog/2.wav", "cat/1.wav", "cat/2.wav", "stray.wav"])
    assert set(labels_of(load(root)).values()) == {None}
    assert "1 files in no folder" in caplog.text and "stray.wav" in caplog.text


def test_copies_with_different_labels_have_none_and_are_named(load, tmp_path, caplog):
    root = make_folder(tmp_path / "s", ["cat/1.wav", "cat/2.wav", "dog/1.wav"])
    (root / "dog" / "2.wav").write_bytes((root / "cat" / "1.wav").read_bytes())
    assert labels_of(load(root)) == {"cat/1.wav": None, "cat/2.wav": "cat", "dog/1.wav": "dog"}
    assert "cat/1.wav (cat) and dog/2.wav (dog)" in caplog.text


def test_formats_that_cannot_be_read_are_named_with_the_way_to_convert_them(load, tmp_path, caplog):
    root = make_folder(tmp_path / "s", ["dog/1.wav", "cat/1.wav", "cat/2.bwf"])
    soundfile.write(root / "dog/2.rf64", np.random.default_rng(9).uniform(-0.5, 0.5, 500), 1000, format="RF64")
    (root / "mouse").mkdir()
    for name in ("1.m4a", "2.WMA"):
        (root / "mouse" / name).write_bytes(b"\0\0\0\x20ftypM4A ")
    dataset = load(root)
    assert dataset.features["label"].names == ["cat", "dog"] and len(dataset) == 4
    assert "2 files in a format that cannot be read" in caplog.text and "ffmpeg -i" in caplog.text
    assert "mouse/1.m4a, mouse/2.WMA" in caplog.text and "1 classes without a clip: mouse" in caplog.text
    for path in root.glob("*/*.[wbr]*"):
        path.unlink()
    with pytest.raises(CorpusError, match=r"2 in other formats: mouse/1.m4a.*ffmpeg"):
        load(root)


def test_labels_in_file_names(load, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    names = ["clearthroat002.wav", "dog12_a.wav", "dog12_b.wav", "7.wav"]
    make_folder(tmp_path / "s", [f"{folder}/{name}" for folder, name in zip("abab", names, strict=True)])
    dataset = load(label_pattern=r"(?P<source>(?P<label>[a-z]+)\d+)")
    assert labels_of(dataset) == {"clearthroat002": "clearthroat", "dog12": "dog", "b/7.wav": None}
    assert dataset["source_id"][:].count("dog12") == 2
    assert "the folders' names are no labels; labels from files' names by" in caplog.text
    assert "1 files whose names do not match the label pattern: b/7.wav" in caplog.text
    for pattern, words in [("(?P<label>[a-z", "no regular expression"), ("[a-z]+", r"\(\?P<label>"),
                           ("(?P<label>xyz)", "is found in no file's name")]:  # fmt: skip
        with pytest.raises(CorpusError, match=words):
            load(label_pattern=pattern)
    with pytest.raises(CorpusError, match="esc10 has no option label_pattern"):
        load_corpus("esc10", tmp_path, label_pattern="(?P<label>a)")


# --- Metadata ---


def test_metadata_lines_and_metadata_in_subfolders(load, tmp_path):
    make_folder(tmp_path / "s", ["train/1.wav", "train/2.wav", "test/1.wav"])
    rows = [{"file_name": "1.wav", "label": "a", "more": [1]}, {"file_name": "2.wav", "label": "b"}]
    (tmp_path / "s/train/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_table(tmp_path / "s/test/Metadata.csv", [{"file_name": "1.wav", "label": "b"}])
    assert sorted(labels_of(load()).items()) == [("test/1.wav", "b"), ("train/1.wav", "a"), ("train/2.wav", "b")]
    assert folds_of(load()) == {"train/1.wav": 0, "train/2.wav": 0, "test/1.wav": 1}
    (tmp_path / "s/train/metadata.jsonl").write_text('{"file_name": "1.wav"}\n[2]\n')
    with pytest.raises(CorpusError, match=r"metadata\.jsonl, line 2: is no JSON object"):
        load()
    (tmp_path / "s/train/metadata.jsonl").write_text('{"file_name": "1.wav", "label": ["a", "b"]}\n')
    with pytest.raises(CorpusError, match="line 1: label must be one class"):
        load()
    (tmp_path / "s/train/metadata.jsonl").rename(tmp_path / "s/train/old.metadata.jsonl")  # is no such table
    with pytest.raises(CorpusError, match="2 present but not listed"):
        load()


def test_names_match_in_another_unicode_form_with_backslashes_and_absolute(load, tmp_path):
    names = [unicodedata.normalize("NFD", "Vögel/ä.wav"), "b/ü.wav", "b/c.wav"]
    root = make_folder(tmp_path / "s", names)
    written = ["Vögel\\ä.wav", unicodedata.normalize("NFD", "b/ü.wav"), str(root / "b" / "c.wav")]
    rows = [{"file_name": name, "label": label} for name, label in zip(written, "xyx", strict=True)]
    write_table(root / "metadata.csv", rows)
    assert labels_of(load()) == dict(zip(names, "xyx", strict=True))


def test_awkward_names_pass_through_or_are_named(load, tmp_path):
    names = ["a,b.wav", 'c"d.wav', "e\nf.wav"]
    root = make_folder(tmp_path / "s", names)
    write_table(root / "metadata.csv", [{"file_name": name, "label": "xyz"[i]} for i, name in enumerate(names)])
    assert labels_of(load()) == dict(zip(names, "xyz", strict=True))
    (root / "metadata.csv").write_text("file_name,label\na,b.wav,x\n")
    with pytest.raises(CorpusError, match="line 2: more values than columns; quote"):
        load()
    (root / "metadata.csv").unlink()
    (root / "g\nh.wav").write_bytes(b"")
    os.rename(root / "a,b.wav", os.fsencode(root) + b"/V\xf6gel.wav")
    with pytest.raises(CorpusError, match="2 unreadable") as error:
        load()
    assert "\n" not in str(error.value) and "V\\xf6gel.wav" in str(error.value)
    assert len(load(skip_unreadable=True)) == 2


def test_a_blank_fold_is_never_held_out(load, tmp_path):
    rows = [("a", 1), ("a", 2), ("a", ""), ("b", 1), ("b", 2), ("b", "")]
    make_folder(tmp_path / "s", [f"{number}.wav" for number in range(6)])
    write_table(
        tmp_path / "s/metadata.csv",
        [{"file_name": f"{number}.wav", "label": label, "fold": fold} for number, (label, fold) in enumerate(rows)],
    )
    train, test = train_test_folds(load(), 1)
    assert (train["source_id"][:], test["source_id"][:]) == ([f"{n}.wav" for n in (1, 2, 4, 5)], ["0.wav", "3.wav"])
    with pytest.raises(CorpusError, match="no fold 0: this corpus has folds 1, 2"):
        train_test_folds(load(), 0)


# --- Stretches ---

HEADER = "file_name,start,end,label,present\n"


def write_labels(root, text):
    (root / "labels.csv").write_text(text)
    return root


def test_labelled_stretches_are_clips_beside_their_files(load, tmp_path):
    root = make_folder(tmp_path / "s", ["a.wav", "sub/b.wav", "c.wav"], seconds=4)
    lines = ["a.wav,0,1,dog,1", "a.wav,1,2.5,dog,1", "a.wav,1,2.5,cat,1", "a.wav,3,4,dog,0", "sub/b.wav,,,cat,1"]
    lines += ["a.wav,0,1,dog,0", "a.wav,0,1,cat,1", "c.wav,0,4,dog,"]  # a correction: later rows prevail
    dataset = load(write_labels(root, HEADER + "\n".join(lines) + "\n"))
    assert labels_of(dataset) == {
        "a.wav": None, "c.wav": "dog", "sub/b.wav": "cat", "a.wav@0": "cat", "a.wav@1": None, "a.wav@3": None,
    }  # fmt: skip
    (both,) = [row for row in dataset if row["clip_start"] == 1]
    assert (both["labels"], both["absent_labels"], both["num_frames"]) == (["dog", "cat"], [], 1500)
    (negative,) = [row for row in dataset if row["clip_start"] == 3]
    assert (negative["labels"], negative["absent_labels"]) == ([], ["dog"])
    assert len(set(dataset["clip_id"][:])) == len(dataset) == 6
    samples, _ = decode_audio(both["audio"], both["clip_start"], both["clip_end"])
    assert samples.shape[1] == both["num_frames"]
    windows, _ = cut_into_windows(dataset, 1.0)
    assert len(windows) == 4 + 4 + 4 + 1 + 2 + 1


def test_labels_go_with_metadata(load, tmp_path):
    root = make_folder(tmp_path / "s", ["a.wav", "b.wav"], seconds=2)
    write_table(root / "metadata.csv", [
        {"file_name": "a.wav", "label": "dog", "fold": 1, "source_id": "r"},
        {"file_name": "b.wav", "label": "cat", "fold": 2, "source_id": ""},
    ])  # fmt: skip
    dataset = load(write_labels(root, HEADER + "a.wav,0.5,1,cat,1\nb.wav,,,cat,0\nb.wav,,,dog,1\n"))
    assert labels_of(dataset) == {"r": "dog", "b.wav": "dog", "r@0.5": "cat"}
    assert dataset["fold"][:] == [1, 2, 1]


def test_raven_selection_tables(load, tmp_path):
    root = make_folder(tmp_path / "s", ["a.wav", "x/b.wav"], seconds=4)
    (root / "a.Table.1.selections.txt").write_text(
        "Selection\tView\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\tSpecies\n"
        '1\tWaveform 1\t0.5\t1.5\t0\tGreat "tit\n1\tSpectrogram 1\t0.5\t1.5\t0\tGreat "tit\n'
        "2\tSpectrogram 1\t2\t4.02\t0\trobin\n3\tSpectrogram 1\t3\t3.5\t0\t\n"
    )
    (root / "all.selections.txt").write_text(
        "Begin Time (s)\tEnd Time (s)\tBegin File\tFile Offset (s)\tAnnotation\n5\t6\tb.wav\t1\trobin\n"
    )
    dataset = load(root)
    assert labels_of(dataset) == {
        "a.wav": None, "x/b.wav": None, "a.wav@0.5": 'Great "tit', "a.wav@2": "robin", "x/b.wav@1": "robin",
    }  # fmt: skip
    (root / "all.selections.txt").write_text("Begin Time (s)\tEnd Time (s)\n1\t2\n")
    with pytest.raises(CorpusError, match=r"all\.selections\.txt: no column with the class"):
        load(root)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (HEADER + "a.wav,0,1,x,1\na.wav,3,9,x,1\n", ["labels.csv, line 3: 3 to 9 s of a.wav, which has 4.000 s"]),
        (HEADER + "a.wav,2,1,x,1\n", ["labels.csv, line 2: from 2 to 1 s is no stretch"]),
        (HEADER + "a.wav,-1,1,x,1\n", ["labels.csv, line 2: from -1 to 1 s is no stretch"]),
        (HEADER + 'a.wav,"0,5",1,x,1\n', ["line 2: times must be numbers of seconds", "'0,5'"]),
        (HEADER + "a.wav,0,nan,x,1\n", ["line 2: times must be numbers"]),
        (HEADER + "a.wav,0,1,x,maybe\n", ["line 2: present must be 1, or 0", "'maybe'"]),
        (HEADER + "a.wav,0,1,,1\n", ["line 2: no value for label"]),
        (HEADER + "gone.wav,0,1,x,1\n", ["1 listed but absent: gone.wav (labels.csv, line 2)"]),
        (HEADER.replace(",", ";") + "a.wav;0;1;x;1\n", ["no column file_name", "separate columns by commas"]),
        ("file_name,begin,end,label\na.wav,0,1,x\n", ["no column start; expected file_name, start, end, label"]),
        ((HEADER + "a.wav,0,1,x,1\n").encode("utf-16"), ["labels.csv", "save it as UTF-8"]),
        ((HEADER + "a.wav,0,1,x,1\n").encode("utf-16-le"), ["labels.csv", "save it as UTF-8"]),
        ((HEADER + "a.wav,0,1,Käuzchen,1\n").encode("latin-1"), ["labels.csv", "save it as UTF-8"]),
    ],
)
def test_wrong_labels_are_named(content, words, load, tmp_path):
    root = make_folder(tmp_path / "s", ["a.wav"], seconds=4)
    (root / "labels.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CorpusError) as error:
        load(root)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


# --- None of the classes ---


@pytest.mark.parametrize("folder", ["background", "Noise", "OTHER", "silence"])
def test_a_folder_of_background_is_the_absence_of_all_classes(folder, load, tmp_path, caplog):
    make_folder(tmp_path / "s", ["dog/a.wav", "cat/b.wav", f"{folder}/c.wav", f"{folder}/d.wav"])
    with caplog.at_level(logging.INFO, "dls"):
        dataset = load()
    assert "2 clips are of none of the classes (background, noise, other, silence)" in caplog.text
    assert dataset.features["label"].names == ["cat", "dog"]
    assert labels_of(dataset) == {
        "dog/a.wav": "dog",
        "cat/b.wav": "cat",
        f"{folder}/c.wav": None,
        f"{folder}/d.wav": None,
    }
    assert [
        (row["labels"], row["absent_labels"]) for row in dataset.sort("source_id").to_list() if row["label"] is None
    ] == [([], ["cat", "dog"])] * 2
    assert not corpus_report(dataset)["empty_classes"]


@pytest.mark.parametrize(
    ("lines", "present", "absent"),
    [
        (["background,1"], [], ["cat", "dog"]),
        (["dog,1", "background,1"], [], ["cat", "dog"]),
        (["background,1", "dog,1"], ["dog"], []),
        (["background,1", "dog,0"], [], ["cat", "dog"]),
        (["dog,0", "Silence,1"], [], ["cat", "dog"]),
        (["background,1", "noise,0"], [], []),
        (["dog,1", "noise,0"], ["dog"], []),
        (["dog,1", "dog,0"], [], ["dog"]),
        (["dog,0", "dog,1", "cat,1"], ["dog", "cat"], []),
    ],
)
def test_of_answers_that_contradict_one_another_the_last_counts(lines, present, absent, load, tmp_path):
    root = make_folder(tmp_path / "s", ["a.wav"], seconds=4)
    others = ["a.wav,0,1,dog,1", "a.wav,1,2,cat,1"]
    dataset = load(write_labels(root, HEADER + "\n".join([*others, *(f"a.wav,2,3,{line}" for line in lines)]) + "\n"))
    (row,) = [row for row in dataset if row["clip_start"] == 2]
    assert (row["labels"], row["absent_labels"]) == (present, absent)


def test_classes_that_are_never_alone_and_classes_that_are_never_there(load, tmp_path, caplog):
    root = make_folder(tmp_path / "s", ["a.wav"], seconds=4)
    dataset = load(write_labels(root, HEADER + "a.wav,0,1,dog,1\na.wav,0,1,cat,1\na.wav,1,2,fox,0\n"))
    assert dataset.features["label"].names == ["cat", "dog"]
    assert corpus_report(dataset)["empty_classes"] == ["fox"] and "classes without a clip: fox" in caplog.text


def test_copies_with_different_labels_are_not_of_several_classes(load, tmp_path):
    make_folder(tmp_path / "s", ["dog/a.wav", "cat/b.wav", "background/c.wav"])
    (tmp_path / "s/cat/copy.wav").write_bytes((tmp_path / "s/dog/a.wav").read_bytes())
    (tmp_path / "s/background/again.wav").write_bytes((tmp_path / "s/cat/b.wav").read_bytes())
    (tmp_path / "s/cat/d.wav").write_bytes(wav(0.5, rate=1000, seed=9))
    (tmp_path / "s/dog/e.wav").write_bytes(wav(0.5, rate=1000, seed=10))
    dataset = load()
    assert len(corpus_report(dataset)["conflicts"]) == 2
    assert sorted(map(tuple, dataset["labels"][:])) == [(), (), (), ("cat",), ("dog",)]
    assert sorted(map(tuple, dataset["absent_labels"][:])) == [(), (), (), (), ("cat", "dog")]


def test_describe_draws_and_counts_stretches(tmp_path, capsys):
    root = make_folder(tmp_path / "s", ["a1.wav", "b2.wav"], seconds=4)
    arguments = ["describe", "audiofolder", "--data_dir", str(root), "--picture", str(tmp_path / "p.png")]
    assert datasets_scripts([*arguments, "--label_pattern", r"(?P<label>[a-z])\d"]) == 0
    assert "labels from files' names by (?P<label>[a-z])" in capsys.readouterr().out
    write_labels(root, HEADER + "a1.wav,1,2,x,1\nb2.wav,2,3,y,1\n")
    assert datasets_scripts([*arguments, "--no_folder_labels"]) == 0
    shown = capsys.readouterr().out
    assert "| x | 1 | 1 |" in shown and "- labels from labels.csv" in shown and (tmp_path / "p.png").exists()
    assert corpus_report(load_corpus("audiofolder", root))["inferred"] == ["labels from labels.csv"]


def test_stretches_survive_an_export_and_are_pretrained_on(load, tmp_path):
    root = write_labels(make_folder(tmp_path / "s", ["a.wav", "b.wav"], seconds=2), HEADER + "a.wav,1,2,x,1\n")
    dataset, export = load(root), tmp_path / "export"
    assert datasets_scripts(["export", "audiofolder", "--data_dir", str(root), "--output_dir", str(export)]) == 0
    again = load(export)
    assert again.remove_columns("audio").to_list() == dataset.remove_columns("audio").to_list()
    assert decode_audio(again[2]["audio"], again[2]["clip_start"], again[2]["clip_end"])[0].shape == (1, 1000)
    options = [*SMALL, "--corpus", f"audiofolder={root}", "--windows", "0.5", "--max_train_steps", "1"]
    log = succeed("train_npid.py", *options, "--output_dir", tmp_path / "run")
    assert "10 windows of 0.5 s, of 3 files" in log
