"""Datasets of the Hub's as corpora: from Parquet with the sound inside, and from a folder with splits; no network."""

import shutil

import datasets
import pyarrow.parquet
import pytest
from scripts import SMALL, fail, succeed

from datasets_scripts import corpus_report, decode_audio, load_corpus
from datasets_scripts.errors import CorpusError


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def parquet(sound_folder, tmp_path):
    """As ashraq/esc50 is: one split, sound inside, a column of folds counted from 0 here, and a class in words."""
    clips = range(40)
    rows = {
        "sound": [{"bytes": (sound_folder / f"{clip:02d}.wav").read_bytes(), "path": f"{clip}.wav"} for clip in clips],
        "category": [f"class|{clip % 4}" for clip in clips],
        "part": [clip // 4 % 2 for clip in clips],
        "loudness": [0.5 for _ in clips],
        "parts": [["a"] for _ in clips],
    }
    features = datasets.Features(
        {
            "sound": datasets.Audio(decode=False), "category": datasets.Value("string"),
            "part": datasets.Value("int64"), "loudness": datasets.Value("float64"),
            "parts": datasets.List(datasets.Value("string")),
        }
    )  # fmt: skip
    folder = tmp_path / "parquet"
    folder.mkdir()
    table = pyarrow.Table.from_pydict(rows, schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, folder / "train.parquet")
    return folder


@pytest.fixture
def splits(sound_folder, tmp_path):
    """An audiofolder of `datasets`' own: SPLIT/CLASS/FILE."""
    folder = tmp_path / "splits"
    for clip in range(24):
        place = folder / ("train" if clip < 16 else "test") / f"class-{clip % 4}"
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(sound_folder / f"{clip:02d}.wav", place)
    return folder


NAMES = {"audio_column_name": "sound", "label_column_name": "category", "fold_column_name": "part"}


def test_parquet_with_columns_by_name(parquet, sound_folder):
    dataset = load_corpus("hub", parquet, **NAMES)
    assert dataset.features["label"].names == [f"class|{label}" for label in range(4)]
    assert dataset["label"][:] == [clip % 4 for clip in range(40)]
    assert dataset["fold"][:] == [clip // 4 % 2 + 1 for clip in range(40)]
    assert corpus_report(dataset)["corpus"] == "hub"
    samples, rate = decode_audio(dataset[7]["audio"])
    expected, _ = decode_audio({"bytes": None, "path": str(sound_folder / "07.wav")})
    assert rate == 8000 and (samples == expected).all()
    assert load_corpus("hub", parquet, **NAMES)["digest"][:] == dataset["digest"][:]


def test_splits_but_train_are_folds(splits):
    dataset = load_corpus("hub", splits)
    assert dataset.features["label"].names == [f"class-{label}" for label in range(4)]
    assert sorted(dataset["fold"][:]) == [0] * 16 + [1] * 8


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({}, r"parquet: has no column 'audio' with sound; --audio_column_name can name one of sound"),
        (NAMES | {"audio_column_name": "part"}, r"has no column 'part' with sound"),
        (
            NAMES | {"label_column_name": "clas"},
            r"has no column 'clas'; --label_column_name can name one of sound",
        ),
        (NAMES | {"label_column_name": "loudness"}, r"'loudness' must hold one class a clip"),
        (NAMES | {"label_column_name": "parts"}, r"'parts' must hold one class a clip"),
        (NAMES | {"fold_column_name": "category"}, r"'category' must hold folds as whole numbers, not 'class\|"),
        (NAMES | {"dataset_config_name": "other"}, r"load_dataset cannot load it \(.*--dataset_config_name"),
    ],
)
def test_mistakes(parquet, names, message):
    with pytest.raises(CorpusError, match=message):
        load_corpus("hub", parquet, **names)
    assert not list(parquet.parent.glob("cache/dls_hub/.*"))


def test_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError, match=r"^nobody/nothing: load_dataset cannot load it"):
        load_corpus("hub", "nobody/nothing")
    with pytest.raises(CorpusError, match="hub needs a dataset's Hub id"):
        load_corpus("hub")


def test_fine_tuning_on_splits(splits, tmp_path):
    """The test split is held out; the options are refused where they would mean nothing."""
    output = ["--output_dir", tmp_path / "run"]
    succeed("train_classification.py", *SMALL, "--corpus", f"hub={splits}", "--max_train_steps", "2", *output)
    assert (tmp_path / "run" / "fold-1" / "model.safetensors").is_file()
    assert "are for --corpus hub=ID" in fail("train_classification.py", "--label_column_name", "category", *output)
