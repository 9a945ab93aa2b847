"""What is written down is true: README commands and snippets run, cards repeat the run's own numbers."""

import ast
import io
import json
import os
import re
import shlex
import shutil
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import soundfile
from huggingface_hub import ModelCard
from scripts import ROOT, SMALL, Forked, start, succeed, train

import demo
from datasets_scripts import corpus_facts, load_corpus
from datasets_scripts.errors import UserError
from datasets_scripts.markdown import table
from dls_comparison import paper
from dls_sounds.settings import LabelSettings
from dls_training import report
from dls_training.folds import RESULTS_FILE
from dls_training.licences import licence
from dls_training.record import Record, Stage
from hub_cards import write_card
from hub_cards.__main__ import main as publish_or_serve
from modeling_dls import ESResNetFeatureExtractor, ESResNetForAudioClassification

CARDS = (ROOT / "docs" / "cards.md").read_text(encoding="utf-8")
EXAMPLE_CARD = ROOT / "docs" / "example_card"
FILES_OF_A_CARD = (
    "all_results.json", "config.json", "preprocessor_config.json", "record.json", "heard_clips.safetensors",
    "model.safetensors",
)  # fmt: skip
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run_readme_command(command: str) -> None:
    """A train command of the README, as it stands but for its launcher and its length."""
    words = shlex.split(command)
    launcher, script, options = words[:2], words[2], words[3:]
    assert launcher == ["accelerate", "launch"]
    succeed(script, *options, "--max_train_steps", "2")


# In one process that finds none of our code imported, as theirs will not; imports of all snippets are the same.
SNIPPETS = """
import json, os, sys

for folder, snippet in json.loads(sys.argv[1]):
    os.chdir(folder)
    exec(snippet, {"__name__": "__main__"})
    print("--- that was it", flush=True)
"""


def answers(*snippets: tuple[Path, str]) -> list[str]:
    """What each snippet prints in its folder."""
    process = start([sys.executable, "-c", SNIPPETS, json.dumps([(str(folder), code) for folder, code in snippets])])
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    printed = output.split("--- that was it\n")[:-1]
    assert len(printed) == len(snippets)
    return printed


@pytest.mark.slow
def test_readme_from_recordings_to_pipeline(shared_dir, sound_folder, tmp_path, monkeypatch, capsys):
    """The commands and snippets of "Use", in order, in an empty folder with the inputs that they name."""
    commands = [block.strip() for block in blocks("bash") if "accelerate launch" in block]
    assert len(commands) == 2
    shutil.copytree(sound_folder, tmp_path / "my_recordings")
    (tmp_path / "ESC-10").symlink_to(shared_dir / "data" / "ESC-10")
    monkeypatch.chdir(tmp_path)
    for command in commands:
        run_readme_command(command)
    samples = 0.1 * np.random.default_rng(0).standard_normal(5 * 44100)
    soundfile.write(tmp_path / "clip.wav", samples, 44100)
    (sounds,) = [block.strip() for block in blocks("bash") if "dls embed" in block]
    for command in sounds.splitlines():
        succeed(*shlex.split(command))
    assert (tmp_path / "recordings.parquet").is_file() and (tmp_path / "detections.csv").is_file()
    (export,) = [block.strip() for block in blocks("bash") if "dls export" in block]
    succeed(*shlex.split(export))
    assert (tmp_path / "esc10.onnx").is_file() and (tmp_path / "run_onnx.py").is_file()
    (label,) = [shlex.split(block) for block in blocks("bash") if "dls label" in block]
    assert LabelSettings.parsed(label[2:]).index.is_file()
    (publishing,) = [block.strip() for block in blocks("bash") if "hub_cards" in block]
    dry_run = shlex.split(publishing.splitlines()[1])
    assert dry_run[:4] == ["python", "-m", "hub_cards", "publish"] and dry_run[-1] == "--dry_run"
    assert publish_or_serve(dry_run[3:]) == 0 and "model.safetensors" in capsys.readouterr().out
    snippets = [*blocks("python"), *re.findall(r"```python\n(.*?)```", CARDS, flags=re.DOTALL)]
    assert len(snippets) == 3
    for output in answers(*((tmp_path, snippet) for snippet in snippets)):
        assert "'dog': " in output or "torch.Size([1, 10])" in output or re.search(r"^0\.\d+$", output, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "tables"),
    [("speed", 10), ("scaling", 2), ("datasets", 1), ("own_recordings", 1), ("labelling", 1), ("training", 2)],
)
def test_measured_tables_are_the_benchmarks(name, tables, monkeypatch):
    """Nobody typed a number in: the tables are what benchmarks/run_all.py makes of the CSVs."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    run_all = import_module("run_all")
    document = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert len(run_all.MARKED.findall(document)) == tables and run_all.filled(document) == document
    place = document.index("|", document.index(".csv -->"))
    assert run_all.filled(f"{document[:place]}| 1 {document[place:]}") == document


def test_nothing_committed_names_a_place_on_a_machine():
    texts = [path for name in ("results", "docs", "benchmarks") for path in (ROOT / name).rglob("*.*")]
    texts = [path for path in texts if path.suffix in (".md", ".csv", ".json", ".yaml", ".py")]
    assert len(texts) > 40
    for path in texts:
        assert not re.search(r"/(work|tmp|root|home)/", path.read_text(encoding="utf-8")), path


def test_every_promise_has_its_test():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 10
    for file, test in named:
        assert f"def {test}" in (ROOT / file).read_text(encoding="utf-8"), (file, test)


def test_readme_names_what_exists():
    for name in re.findall(r"^([\w./-]+?)/?  +\S", blocks("")[-1], flags=re.MULTILINE):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"make ([\w-]+)", README):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), target
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_readme_says_at_a_glance_what_was_measured():
    assert paper.with_headline(README) == README
    assert len(README.splitlines()) <= 150


@pytest.fixture(scope="module")
def fine_tuned(sound_folder, tmp_path_factory) -> Path:
    """Cross-validated from a pre-training that left out fold 2."""
    folder = tmp_path_factory.mktemp("cards")
    common = [*SMALL, "--corpus", f"audiofolder={sound_folder}", "--num_train_epochs", "2"]
    succeed("train_npid.py", *common, "--exclude_fold", "2", "--output_dir", folder / "npid")
    start_from = ["--model_name_or_path", folder / "npid", "--output_dir", folder / "classifier"]
    succeed("train_classification.py", *common, *start_from)
    return folder / "classifier"


def test_card_of_a_classifier(fine_tuned):
    results = json.loads((fine_tuned / "all_results.json").read_text())
    card = ModelCard.load(fine_tuned / "README.md")
    measured = {(r.dataset_config, r.metric_type): r.metric_value for r in card.data.eval_results}
    final = {fold: r["accuracy_per_epoch"][-1] for fold, r in results["folds"].items()}
    assert measured == {(f"fold-{fold}", "accuracy"): accuracy for fold, accuracy in final.items()} | {
        ("all-folds", "accuracy"): pytest.approx(results["mean_accuracy_per_epoch"][-1]),
        ("all-folds", "accuracy_std"): pytest.approx(results["std_accuracy_per_epoch"][-1]),
    }
    for epoch in range(2):
        cells = [results["folds"][fold]["accuracy_per_epoch"][epoch] for fold in ("1", "2")]
        cells += [results["mean_accuracy_per_epoch"][epoch], results["std_accuracy_per_epoch"][epoch]]
        assert f"| {epoch + 1} | {' | '.join(f'{cell:.3f}' for cell in cells)} |" in card.text
    assert card.data.metrics == ["accuracy"] and "base_model" not in card.data.to_dict()
    assert {(r.dataset_config, r.dataset_split) for r in card.data.eval_results} == {
        ("fold-1", "test"), ("fold-2", "test"), ("all-folds", "test")
    }  # fmt: skip
    assert "of 40 clips: if these were independent of one another, " in card.text
    assert results["command"] in card.text and "left out: {'audiofolder': [2]}" in card.text
    assert [results["folds"][fold]["test_clips_heard_in_pretraining"] for fold in ("1", "2")] == [20, 0]
    assert "Transductive: 20 of the 40 held-out clips were in the pre-training" in card.text
    assert "{{" not in card.text and "None" not in card.text
    assert card.data.license is None and "claims none" in card.text  # whose sounds these are, the run does not know
    for picture in ("accuracy", "confusion_matrix", "embedding"):
        assert f"({picture}.png)" in card.text and (fine_tuned / f"{picture}.png").stat().st_size > 5000


def test_confusion_matrix_and_accuracies_are_of_the_same_clips(fine_tuned):
    results = json.loads((fine_tuned / "all_results.json").read_text())
    matrices = {fold: np.array(run["confusion_matrix"]) for fold, run in results["folds"].items()}
    for fold, matrix in matrices.items():
        assert matrix.shape == (4, 4) and matrix.sum(axis=1).tolist() == [5, 5, 5, 5]
        assert matrix.trace() / matrix.sum() == results["folds"][fold]["accuracy_per_epoch"][-1]
    assert results["confusion_matrix"] == sum(matrices.values()).tolist()
    recognised = {f"class-{i}": row[i] / sum(row) for i, row in enumerate(results["confusion_matrix"])}
    assert results["per_class_accuracy"] == recognised


@pytest.mark.slow
def test_snippets_of_cards_run(fine_tuned, tmp_path):
    sound = 0.1 * np.random.default_rng(0).standard_normal((60000, 2)).astype(np.float32)  # stereo, several windows
    soundfile.write(tmp_path / "clip.wav", sound, 44100, subtype="FLOAT")
    snippets = []
    for folder in (fine_tuned, fine_tuned.parent / "npid"):
        (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
        snippets.append((folder, snippet.replace('"clip.wav"', repr(str(tmp_path / "clip.wav")))))
    of_classifier, of_pretraining = answers(*snippets)
    assert "tensor([[" in of_pretraining
    model = ESResNetForAudioClassification.from_pretrained(fine_tuned)
    extractor = ESResNetFeatureExtractor.from_pretrained(fine_tuned)
    starts, length = (0, 22050, 60000 - 22050), 22050  # half a second; the last one ends with the sound
    mono = sound.mean(axis=1)
    windows = extractor([mono[start : start + length] for start in starts], 44100, return_tensors="pt")
    scores = model(**windows).logits.softmax(-1).mean(0).tolist()
    found = ast.literal_eval(of_classifier.splitlines()[-1])
    assert list(found) == list(model.config.id2label.values()) and list(found.values()) == pytest.approx(
        scores, abs=1e-5
    )


@pytest.mark.slow
def test_stereo_from_pre_training_to_the_cards_snippet(sound_folder, tmp_path):
    """Each recording has another sound in its right channel; both count."""
    (tmp_path / "sounds").mkdir()
    shutil.copy(sound_folder / "metadata.csv", tmp_path / "sounds")
    for path in sorted(sound_folder.glob("*.wav")):
        left, rate = soundfile.read(path)
        soundfile.write(tmp_path / "sounds" / path.name, np.stack([left, 0.3 * left[::-1] ** 2], axis=1), rate)
    common = [*SMALL, "--corpus", f"audiofolder={tmp_path / 'sounds'}", "--audio_channels", "2"]
    succeed("train_npid.py", *common, "--num_train_epochs", "1", "--output_dir", tmp_path / "npid")
    start_from = ["--model_name_or_path", tmp_path / "npid", "--classifier_init", "ridge", "--num_train_epochs", "0"]
    succeed("train_classification.py", *common, *start_from, "--fold", "1", "--output_dir", tmp_path / "classifier")
    (snippet,) = re.findall(r"```python\n(.*?)```", (tmp_path / "classifier/README.md").read_text(), flags=re.DOTALL)
    clip = tmp_path / "sounds" / "05.wav"
    (printed,) = answers((tmp_path / "classifier", snippet.replace('"clip.wav"', repr(str(clip)))))
    found = list(ast.literal_eval(printed.splitlines()[-1]).values())
    model = ESResNetForAudioClassification.from_pretrained(tmp_path / "classifier")
    extractor = ESResNetFeatureExtractor.from_pretrained(tmp_path / "classifier")
    samples, rate = soundfile.read(clip, dtype="float32")

    def scores(channels: np.ndarray) -> list[float]:
        return model(**extractor.windows(channels, rate)).logits.softmax(-1).mean(0).tolist()

    assert found == pytest.approx(scores(samples.T), rel=1e-3, abs=0)  # however sure it is
    assert found != pytest.approx(scores(samples.T.mean(axis=0, keepdims=True)), rel=0.1, abs=0)


def test_accuracy_of_a_card_is_that_of_its_snippet(fine_tuned, sound_folder):
    model = ESResNetForAudioClassification.from_pretrained(fine_tuned)
    extractor = ESResNetFeatureExtractor.from_pretrained(fine_tuned)
    right = []
    for row in load_corpus("audiofolder", sound_folder).filter(lambda fold: fold == 1, input_columns="fold"):
        audio = row["audio"]
        file = io.BytesIO(audio["bytes"]) if audio["bytes"] else audio["path"]
        samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
        scores = model(**extractor.windows(samples.T, rate)).logits.softmax(-1).mean(0)
        right.append(scores.argmax().item() == row["label"])
    held_out = json.loads((fine_tuned / "all_results.json").read_text())["folds"]["1"]
    assert len(right) == 20 and np.mean(right) == held_out["accuracy_per_epoch"][-1]


@pytest.mark.parametrize(
    ("identifiers", "known", "expected"),
    [
        (["cc0-1.0"], True, {"license": "apache-2.0"}),
        (["cc-by-3.0", "cc0-1.0"], True, {"license": "cc-by-3.0"}),
        (["cc-by-3.0", "cc-by-nc-3.0"], True, {"license": "cc-by-nc-3.0"}),
        (
            ["cc-by-nc-4.0", "cc-by-nc-3.0"],
            True,
            {"license": "other", "license_name": "cc-by-nc-3.0-and-cc-by-nc-4.0"},
        ),
        (["cc-by-3.0", None], True, {}),
        (["other"], True, {}),
        (["cc-by-nc-4.0", None], False, {"license": "cc-by-nc-4.0"}),
        (["cc0-1.0"], False, {}),
    ],
)  # fmt: skip
def test_licence_is_never_freer_than_that_of_the_sounds(identifiers, known, expected):
    assert licence(identifiers, known) == expected


def test_card_of_non_commercial_sound(fine_tuned, tmp_path):
    """Pre-training counts as well, and so do weights of unknown origin."""
    for name in FILES_OF_A_CARD:
        shutil.copy(fine_tuned / name, tmp_path)
    pretraining, own = Record.read(tmp_path).stages

    def card_of(*stages: tuple[Stage, str]) -> ModelCard:
        """With stages whose clips are another corpus's."""
        renamed = (
            Stage(stage.facts | {"corpora": {name: FACTS.get(name) or corpus_facts(name)}}, stage.heard)
            for stage, name in stages
        )
        Record(tuple(renamed)).save(tmp_path)
        write_card(tmp_path)
        return ModelCard.load(tmp_path / "README.md")

    FACTS = {"mine": {"licence_id": "cc-by-3.0", "licence": "CC BY 3.0"}}
    card = card_of((pretraining, "esc50"), (own, "mine"))
    assert card.data.license == "cc-by-nc-3.0" and "pre-training without labels" in card.text
    assert corpus_facts("esc50")["citation"] in card.text
    # So does what came before the pre-training, and what is not known.
    card = card_of((pretraining, "esc50"), (pretraining, "synthetic"), (own, "synthetic"))
    assert card.data.license == "cc-by-nc-3.0"
    stranger = Stage({"name": "a/stranger", "task": None}, None)
    card = card_of((stranger, "synthetic"), (own, "mine"))
    assert card.data.license is None and "`a/stranger`, from which this began, had heard is not known" in card.text
    card = card_of((own, "synthetic"))
    assert card.data.license == "apache-2.0" and "apache-2.0, is that of the code" in card.text


def test_the_checkouts_network_brings_its_code(tmp_path):
    """The snippet of its card, in a process that has none of ours; its code is the package's, by links."""
    folder = ROOT / "checkpoints" / "small_mel"
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    soundfile.write(tmp_path / "clip.wav", np.zeros(44100), 44100)
    (printed,) = answers((tmp_path, snippet.replace('folder = "."', f"folder = {str(folder)!r}")))
    assert "tensor([[" in printed
    for file in folder.glob("*.py"):
        assert file.resolve() == ROOT / "modeling_dls" / file.name


def test_no_text_breaks_a_table_or_is_html():
    rows = [{"class": "a|b\nc", "<i>": "<script>alert(1)</script>"}, {"class": None, "<i>": 0.5}]
    assert table(rows).splitlines() == [
        "| class | &lt;i> |", "| --- | --- |", "| a\\|b c | &lt;script>alert(1)&lt;/script> |", "|  | 0.500 |",
    ]  # fmt: skip


def test_card_with_a_strangers_texts(fine_tuned, tmp_path):
    """Classes, titles, addresses, licences and commands of somebody else's folder are texts in one's own card."""
    for name in FILES_OF_A_CARD:
        shutil.copy(fine_tuned / name, tmp_path)
    html, link = "<script>alert(1)</script>", "[click](javascript:alert(2))"
    facts = {
        "title": f"a\n\n# {html}", "homepage": "javascript:alert(3)", "licence": f"{html}|{link}",
        "citation": f"```\n{html}\n```",
        "dataset": "you/sounds",
    }  # fmt: skip
    record = Record.read(tmp_path)
    hostile = Stage(
        record.stages[0].facts | {"name": f"`x` {html}", "corpora": {"mine": facts}, "command": "a.py; rm -rf *\n```"},
        record.stages[0].heard,
    )
    Record((hostile, record.own)).with_facts(base_model="you/npid").save(tmp_path)
    results = json.loads((tmp_path / "all_results.json").read_text())
    names = [f"a|b\n{html}", link, "c", "d"]
    results["per_class_accuracy"] = dict(zip(names, results["per_class_accuracy"].values(), strict=True))
    (tmp_path / "all_results.json").write_text(json.dumps(results))
    write_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    text = card.text
    assert card.data.base_model == "you/npid" and card.data.datasets == ["you/sounds"]
    assert "python 'a.py;' rm -rf '*'" in text and "````bibtex" in text
    inert = re.sub(r"^(`{3,})\w*\n.*?^\1$|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)  # outside code
    assert "alert(1)" in inert and "<script" not in inert
    assert "alert(2)" in inert and "](javascript" not in inert and "alert(3)" not in inert
    assert "| a\\|b &lt;script>alert(1)&lt;/script> |" in inert


def test_example_card_is_what_its_files_say(tmp_path):
    """It is generated, and every decimal in it is one of the run's."""
    for path in EXAMPLE_CARD.iterdir():
        if path.suffix in (".json", ".safetensors") or path.name == "embedding.png":
            shutil.copy(path, tmp_path)
    write_card(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (EXAMPLE_CARD / "README.md").read_text(encoding="utf-8") == text
    for picture in re.findall(r"\]\((\w+\.png)\)", text):
        assert (EXAMPLE_CARD / picture).is_file(), picture
    numbers, words = set(), []
    for path in tmp_path.glob("*.json"):
        collect(json.loads(path.read_text(encoding="utf-8")), numbers, words)
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["corpus"] == "esc10" and len(results["folds"]) == 5
    found = re.findall(r"(?<![\w.-])\d+\.\d+(?![\w.]*\d)", re.sub(r"\]\(https?://.*?\)", "]", text))
    assert len(found) > 30
    for number in found:
        said = any(number in word for word in words)
        assert said or min(abs(float(number) - value) for value in numbers) < 5.1e-4, number


def collect(content, numbers: set[float], words: list[str]) -> None:
    """Every number and every text in what was JSON."""
    if isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            collect(value, numbers, words)
    elif isinstance(content, str):
        words.append(content)
    elif content is not None:
        numbers.add(float(content))


def test_card_of_a_pretraining(fine_tuned, tmp_path):
    folder = fine_tuned.parent / "npid"
    results = json.loads((folder / "all_results.json").read_text())
    text = (folder / "README.md").read_text()
    assert "{'audiofolder': [2]} were left out" in text and "20 clips of audiofolder" in text
    rows = [entry for entry in results["history"] if "knn_accuracy" in entry]
    for picture in ("accuracy", "embedding"):
        assert f"({picture}.png)" in text and (folder / f"{picture}.png").stat().st_size > 5000
    table = "\n".join(f"| {e['epoch']} | {e['knn_accuracy']['audiofolder']:.3f} |" for e in rows)
    assert table in text
    assert results["knn"] == {"k": 5, "sigma": 0.1}
    assert "The 5 nearest clips vote, each with exp(similarity / 0.1)." in text
    del results["knn"]  # as runs were before they said it
    shutil.copytree(folder, tmp_path / "old", ignore=shutil.ignore_patterns("checkpoint-*"))
    (tmp_path / "old" / "all_results.json").write_text(json.dumps(results))
    write_card(tmp_path / "old")
    text = (tmp_path / "old" / "README.md").read_text()
    assert table in text and "nearest clips vote" not in text


def test_card_leaves_out_what_is_unknown(fine_tuned, tmp_path):
    """Outside a checkout there is no commit: the card does not mention one."""
    for name in FILES_OF_A_CARD:
        shutil.copy(fine_tuned / name, tmp_path)
    record = Record.read(tmp_path)
    record.with_facts(environment=record.own.facts["environment"] | {"commit": None}).save(tmp_path)
    write_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "embedding.png" not in text  # which was not copied
    assert "code at" not in text and "None" not in text


def test_demo_ends_where_a_script_fails(tmp_path, monkeypatch, capfd):
    (tmp_path / "train_npid.py").write_text("import sys; sys.exit('error: no')")
    monkeypatch.setattr(demo, "HERE", tmp_path)
    with pytest.raises(UserError, match=r"train_npid.py ended with exit code 1"):
        demo.main(demo.Settings(output_dir=tmp_path / "out"))
    assert "error: no" in capfd.readouterr().err


@pytest.mark.alone
def test_demo(tmp_path):
    """`make demo` after installation: both curves, the picture, the card, and a classified clip."""
    process = start([sys.executable, ROOT / "demo.py"], cwd=tmp_path)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    curves = re.findall(r"^ +(\d+) +(0\.\d+|1\.0+) +(0\.\d+|1\.0+)$", output, flags=re.MULTILINE)
    results = {
        arm: json.loads((tmp_path / "demo_output" / arm / "all_results.json").read_text())
        for arm in ("dls", "scratch")
    }
    for epoch, (number, dls, scratch) in enumerate(curves):
        assert int(number) == epoch + 1
        assert float(dls) == pytest.approx(results["dls"]["mean_accuracy_per_epoch"][epoch], abs=5.1e-4)
        assert float(scratch) == pytest.approx(results["scratch"]["mean_accuracy_per_epoch"][epoch], abs=5.1e-4)
    assert len(curves) == len(results["dls"]["mean_accuracy_per_epoch"])
    assert (tmp_path / "demo_output" / "overview.png").stat().st_size > 50_000
    assert "A clip of the held-out fold" in output
    # What it is there to show: labels go further after pre-training.
    assert np.mean(results["dls"]["mean_accuracy_per_epoch"]) > np.mean(results["scratch"]["mean_accuracy_per_epoch"])


def train_until_a_picture(script: str, options: list, picture: int) -> int:
    """Trains, and is gone as if for want of memory when that picture is begun."""
    begun, figure = iter(range(picture)), report.Figure
    report.Figure = lambda *args, **kwargs: os._exit(9) if next(begun, None) is None else figure(*args, **kwargs)
    return train(script, options)


@pytest.mark.parametrize(
    "script, written_first",
    [
        ("train_npid.py", [".", "."]),  # embedding, accuracy
        ("train_classification.py", ["fold-1", "fold-2", ".", "."]),  # each fold's embedding, accuracy, confusion
    ],
)
def test_no_picture_costs_a_result(script, written_first, sound_folder, tmp_path):
    options = [*SMALL, "--corpus", f"audiofolder={sound_folder}", "--num_train_epochs", "2"]
    options += ["--resume_from_checkpoint", "latest", "--output_dir", tmp_path / "run"]
    for picture, folder in enumerate(written_first):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        with Forked(tmp_path / f"{picture}.log", train_until_a_picture, script, options, picture) as process:
            assert process.end()[0] == 9, process.output()
        done = tmp_path / "run" / folder
        assert Record.read(done) is not None  # which reads the weights' digest, too
        assert json.loads((done / ("all_results.json" if folder == "." else RESULTS_FILE)).read_text())
        assert not (tmp_path / "run" / "README.md").exists()
        with Forked(tmp_path / f"{picture}.log", train, script, options) as process:
            assert process.end()[0] == 0, process.output()
        assert ModelCard.load(tmp_path / "run" / "README.md").data.library_name == "transformers"
