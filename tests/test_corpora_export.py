"""The command line: export, describe, and what comes back from an export."""

import io
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import yaml
from corpora_trees import make_dcase2013, wav, write_table
from scripts import Forked

from datasets_scripts import corpus_report, decode_audio, exporting, load_corpus, train_test_folds
from datasets_scripts.__main__ import main
from datasets_scripts.errors import CorpusError

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(monkeypatch, capsys):
    """Exit code and both streams of `python -m datasets_scripts`, as in a folder of its own, with a cache there."""

    def command(*arguments, cwd: Path) -> tuple[int, str, str]:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cwd / "cache")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as error:  # argparse's own way out
            code = error.code
        return code, *capsys.readouterr()

    return command


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """DCASE2013, its tree and its export made by the command line."""
    folder = tmp_path_factory.mktemp("export")
    make_dcase2013(folder / "tree")
    command = [sys.executable, "-m", "datasets_scripts", "export", "dcase2013", "--data_dir", "tree"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [*command, "--output_dir", "out"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return folder


def test_export_loads_without_our_package(exported, tmp_path):
    program = """
import io, sys
sys.modules["datasets_scripts"] = None  # any import of it raises
import soundfile
from datasets import load_dataset
loaded = load_dataset(sys.argv[1])
dataset = loaded["train"]
row = dataset[dataset["clip_id"].index("evaluation/quietstreet01")]
held_out = load_dataset(sys.argv[1], "fold-2")
print({split: (len(rows), sorted(set(rows["fold"]))) for split, rows in held_out.items()})
print(len(set(held_out["train"]["label"][:20])) > 5)
samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]))
print(list(loaded), len(dataset), row["clip_id"], row["fold"], samples.shape, rate)
print(dataset.features["label"].int2str(row["label"]))
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program, str(exported / "out")]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    expected = ["{'train': (100, [1]), 'test': (100, [2])}", "True"]
    expected += ["['train'] 200 evaluation/quietstreet01 2 (3000, 2) 100", "quietstreet"]
    assert result.stdout.splitlines() == expected, result.stderr


def test_export_is_accepted_as_the_corpus(exported, tmp_path):
    original = load_corpus("dcase2013", exported / "tree", cache_dir=tmp_path)
    dataset = load_corpus("dcase2013", exported / "out", cache_dir=tmp_path)
    assert dataset.features == original.features
    assert dataset["digest"][:] == original["digest"][:]
    assert corpus_report(dataset) == corpus_report(original)
    assert [len(part) for part in train_test_folds(dataset, 1)] == [100, 100]
    assert (decode_audio(dataset[7]["audio"])[0] == decode_audio(original[7]["audio"])[0]).all()
    again = load_corpus("dcase2013", exported / "tree", cache_dir=tmp_path)
    assert exporting.is_export_of(exported / "out", again)
    assert not exporting.is_export_of(exported / "out", again.select(range(199)))
    with pytest.raises(CorpusError, match="an export of dcase2013, expected one of esc10"):
        load_corpus("esc10", exported / "out", cache_dir=tmp_path)


def test_card(exported):
    text = (exported / "out" / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["license"] == "other"
    fold = {number: f"data/fold-{number}.*.parquet" for number in (1, 2)}
    assert {config["config_name"]: config["data_files"] for config in header["configs"]} == {
        "default": [{"split": "train", "path": [fold[1], fold[2]]}],
        "fold-1": [{"split": "train", "path": [fold[2]]}, {"split": "test", "path": [fold[1]]}],
        "fold-2": [{"split": "train", "path": [fold[1]]}, {"split": "test", "path": [fold[2]]}],
    }
    for part in (
        "| bus | 10 | 10 | 20 |",
        "| all | 100 | 100 | 200 |",
        "giannoulis2013",
        "30.000 to 30.000",
        "100 (200",
        "Columns: `audio`, `label`, `fold`, ",
    ):
        assert part in text
    assert str(exported) not in text, "the card gives away a path of this machine"


def test_export_after_datasets_own_upload(exported, tmp_path):
    """`push_to_hub` writes a card of its own; the clips are then counted instead."""
    target = tmp_path / "out"
    shutil.copytree(exported / "out" / "data", target / "data")
    dataset = load_corpus("dcase2013", target, cache_dir=tmp_path / "cache")
    assert corpus_report(dataset) == corpus_report(load_corpus("dcase2013", exported / "out", cache_dir=tmp_path))
    with pytest.raises(CorpusError, match="not an export of esc50: columns label, esc10, take"):
        load_corpus("esc50", target, cache_dir=tmp_path / "cache")


def test_hub_id_is_handed_to_datasets(exported, tmp_path, monkeypatch):
    """No Hub here: what would be asked of it is answered from the folder."""
    load, asked = datasets.load_dataset, []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, **kw: asked.append(name) or load(str(exported / "out"), **kw)
    )
    card = exporting.DatasetCard.load
    monkeypatch.setattr(
        exporting.DatasetCard, "load", lambda name: asked.append(name) or card(exported / "out/README.md")
    )
    monkeypatch.chdir(tmp_path)
    assert len(load_corpus("dcase2013", "you/dcase2013", cache_dir=tmp_path)) == 200
    assert (asked[0], asked[-1]) == ("you/dcase2013", "you/dcase2013")


def test_spoiled_export(exported, tmp_path):
    target = tmp_path / "out"
    (target / "data").mkdir(parents=True)
    (target / "README.md").write_text((exported / "out" / "README.md").read_text())
    parquet = next((exported / "out" / "data").iterdir())
    (target / "data" / parquet.name).write_bytes(parquet.read_bytes()[:-2000])
    with pytest.raises(CorpusError, match=str(target)):
        load_corpus("dcase2013", target, cache_dir=tmp_path / "cache")


def test_audiofolder_without_labels_survives_the_export(run, tmp_path):
    for number in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number} é.wav").write_bytes(wav(0.5, 8000, 2, seed=number, subtype="PCM_24"))
    (tmp_path / "in" / "bad.wav").write_bytes(b"")
    arguments = ["export", "audiofolder", "--data_dir", "in", "--output_dir", "out"]
    code, _, said = run(*arguments, cwd=tmp_path)
    assert (code, said.count("error:")) == (2, 1)
    assert "bad.wav: is empty" in said
    assert not (tmp_path / "out").exists()
    code, _, said = run(*arguments, "--skip_unreadable", cwd=tmp_path)
    assert code == 0, said
    dataset = load_corpus("audiofolder", tmp_path / "out", cache_dir=tmp_path / "cache")
    assert (dataset["label"][:], dataset.features["label"].names) == ([None] * 3, [])
    assert corpus_report(dataset)["skipped"] == ["bad.wav: is empty (0 bytes)"]
    assert decode_audio(dataset[0]["audio"])[0].shape == (2, 4000)


def test_describe(run, tmp_path):
    for number in range(4):
        folder = tmp_path / "in" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.wav").write_bytes(wav(0.05 + number, 8000 * (1 + number % 2), seed=number))
    rows = [{"file_name": f"{'ab'[n % 2]}/{n}.wav", "label": "ab"[n % 2], "fold": n // 2 + 1} for n in range(4)]
    write_table(tmp_path / "in" / "metadata.csv", rows)
    arguments = ["describe", "audiofolder", "--data_dir", tmp_path / "in"]
    code, printed, said = run(*arguments, "--picture", "sub/p.png", cwd=tmp_path)
    assert code == 0, said
    for words in ("4 clips", "0.050 to 3.050", "8000 (2 clips), 16000 (2 clips)", "| a | 1 | 1 | 2 |", "complete"):
        assert words in printed
    from matplotlib.image import imread

    assert imread(tmp_path / "sub" / "p.png").std() > 0.01


def test_describe_picture_that_cannot_be_written(run, exported):
    (exported / "file").write_text("in the way")
    arguments = ["describe", "dcase2013", "--data_dir", exported / "tree", "--picture", exported / "file" / "p.png"]
    code, _, said = run(*arguments, cwd=exported)
    assert code == 2
    assert "the picture cannot be written" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "esc51", "--output_dir", "o"], "choose one of"),
        (["export", "esc50", "--data_dir", "no/such/folder", "--output_dir", "o"], "no/such/folder: no such folder"),
        (
            ["export", "esc50", "--data_dir", "no/such", "--output_dir", "o"],
            "no/such: no such folder or archive, and no Hub id",
        ),
        (["export", "esc50", "--data_dir", "tree", "--output_dir", "o"], "tree: not the layout of esc50"),
        (["export", "esc50", "--output_dir", "o"], "HF_HUB_OFFLINE"),
        (["export", "dcase2013", "--data_dir", "tree", "--output_dir", "tree"], "not an empty folder"),
        (["export", "dcase2013", "--data_dir", "tree", "--output_dir", "card.txt/o"], "card.txt/o: cannot be written"),
        (["describe", "synthetic", "--data_dir", "tree"], "synthetic is generated"),
        (["describe"], "the following arguments are required: name"),
        (["export", "esc10"], "--output_dir"),
    ],
)
def test_mistakes_end_in_one_message(arguments, words, run, exported):
    (exported / "card.txt").write_text("a file")
    code, _, said = run(*arguments, cwd=exported)
    assert code == 2
    assert words in said
    assert said.count("error: ") == 1
    assert not (exported / "o").exists()


def export_onto_a_full_disk(folder: Path) -> int:
    os.chdir(folder)
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return main(["export", "dcase2013", "--data_dir", "tree", "--output_dir", "full"])


def test_export_onto_a_full_disk_leaves_nothing(exported, tmp_path):
    with Forked(tmp_path / "log", export_onto_a_full_disk, exported) as process:
        code, output = process.end()
    assert code == 2
    assert "full: cannot be written (File too large)" in output
    assert "Traceback" not in output
    assert not list(exported.glob("full*"))


def test_help_needs_little_and_importing_is_light(run, tmp_path):
    program = "import sys, datasets_scripts; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    shown = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == ["False", "False"]
    assert "export" in run("--help", cwd=tmp_path)[1]


def test_real_export_and_reload(run, shared_dir, tmp_path):
    data = shared_dir / "data" / "ESC-50-sample"
    arguments = ["export", "esc50", "--data_dir", data, "--output_dir", tmp_path / "out", "--allow_partial"]
    code, _, said = run(*arguments, cwd=tmp_path)
    assert code == 0, said
    assert "100 clips instead of 2000" in (tmp_path / "out" / "README.md").read_text()
    dataset = load_corpus("esc50", tmp_path / "out", cache_dir=tmp_path / "cache")
    source = data / "audio" / dataset[5]["audio"]["path"]
    assert io.BytesIO(dataset[5]["audio"]["bytes"]).read() == source.read_bytes()
