"""What is written down is true: README commands and snippets run, cards repeat the run's own numbers."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from huggingface_hub import ModelCard
from scripts import ROOT, SMALL, start, succeed

from hub_cards import write_card

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run_readme_command(command: str, cwd: Path) -> None:
    """A train command of the README, as it stands but for its length."""
    words = shlex.split(command)
    launcher, script, options = words[:2], words[2], words[3:]
    assert launcher == ["accelerate", "launch"]
    process = start(
        [sys.executable, "-m", "accelerate.commands.launch", ROOT / script, *options, "--max_train_steps", "2"],
        cwd=cwd,
    )
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output


@pytest.mark.slow
def test_readme_from_recordings_to_pipeline(shared_dir, sound_folder, tmp_path):
    """The commands and snippets of "Use", in order, in an empty folder with the inputs that they name."""
    commands = [block.strip() for block in blocks("bash") if "accelerate launch" in block]
    assert len(commands) == 2
    shutil.copytree(sound_folder, tmp_path / "my_recordings")
    (tmp_path / "ESC-10").symlink_to(shared_dir / "data" / "ESC-10")
    for command in commands:
        run_readme_command(command, tmp_path)
    samples = 0.1 * np.random.default_rng(0).standard_normal(5 * 44100)
    soundfile.write(tmp_path / "clip.wav", samples, 44100)
    (embedding,) = [block.strip() for block in blocks("bash") if "embed.py" in block]
    words = shlex.split(embedding)
    assert words[:2] == ["python", "embed.py"]
    process = start([sys.executable, ROOT / words[1], *words[2:]], cwd=tmp_path)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and (tmp_path / "embeddings.parquet").is_file(), output
    snippets = blocks("python")
    assert len(snippets) == 2
    for snippet in snippets:
        process = start([sys.executable, "-c", snippet], cwd=tmp_path)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
        assert "'score'" in output or "torch.Size([1, 10])" in output


def test_speed_tables_are_the_benchmarks():
    """Nobody typed a number in: the tables are what benchmarks/report.py makes of the CSVs."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import report

    document = report.DOCUMENT.read_text(encoding="utf-8")
    assert len(report.MARKED.findall(document)) == 6 and report.filled(document) == document
    damaged = document.replace(" | ", " | 1 ", 1)
    assert report.filled(damaged) == document


def test_readme_names_what_exists():
    for name in re.findall(r"^([\w./-]+?)/?  +\S", blocks("")[-1], flags=re.MULTILINE):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"make ([\w-]+)", README):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), target
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


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
    measured = {result.dataset_config: result.metric_value for result in card.data.eval_results}
    assert measured == {f"fold-{fold}": r["accuracy_per_epoch"][-1] for fold, r in results["folds"].items()}
    for epoch in range(2):
        cells = [results["folds"][fold]["accuracy_per_epoch"][epoch] for fold in ("1", "2")]
        cells += [results["mean_accuracy_per_epoch"][epoch], results["std_accuracy_per_epoch"][epoch]]
        assert f"| {epoch + 1} | {' | '.join(f'{cell:.3f}' for cell in cells)} |" in card.text
    assert results["command"] in card.text and "left out: {'audiofolder': [2]}" in card.text
    assert [results["folds"][fold]["test_clips_heard_in_pretraining"] for fold in ("1", "2")] == [20, 0]
    assert "Transductive: 20 of the 40 held-out clips were in the pre-training" in card.text
    assert "{{" not in card.text and "None" not in card.text


def test_card_of_a_pretraining(fine_tuned):
    folder = fine_tuned.parent / "npid"
    results = json.loads((folder / "all_results.json").read_text())
    text = (folder / "README.md").read_text()
    assert "{'audiofolder': [2]} were left out" in text and "20 clips of audiofolder" in text
    rows = [entry for entry in results["history"] if "knn_accuracy" in entry]
    table = "\n".join(f"| {e['epoch']} | {e['knn_accuracy']['audiofolder']:.3f} |" for e in rows)
    assert table in text


def test_card_leaves_out_what_is_unknown(fine_tuned, tmp_path):
    """Outside a checkout there is no commit: the card does not mention one."""
    for name in ("all_results.json", "config.json", "preprocessor_config.json"):
        shutil.copy(fine_tuned / name, tmp_path)
    results = json.loads((tmp_path / "all_results.json").read_text())
    results["environment"]["commit"] = None
    (tmp_path / "all_results.json").write_text(json.dumps(results))
    write_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "code at" not in text and "None" not in text


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
