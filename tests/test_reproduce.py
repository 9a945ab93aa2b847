"""reproduce.py: a miniature that is killed on its way, its report, the committed reports, and mistakes."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from scripts import ROOT, run_script
from transformers import ResNetConfig, ResNetForImageClassification

import reproduce
from datasets_scripts.command_line import run_command
from datasets_scripts.errors import UserError
from dls_comparison import paper, running
from dls_comparison.cells import CellStore
from dls_comparison.outcomes import interval
from dls_comparison.plan import read_plan
from dls_comparison.results import add_result, read_results
from dls_comparison.sections import read_yaml

EXAMPLE = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8"), re.DOTALL)[1]


def call(folder: Path, *options, printed: io.StringIO | None = None) -> tuple[int, str]:
    """Exit code and output of reproduce.py, called in this process and in a folder."""
    printed, here = printed or io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            settings = reproduce.ComparisonSettings.parsed([str(option) for option in options])
            return run_command(reproduce.main, settings), printed.getvalue()
    except SystemExit as end:
        return end.code, printed.getvalue()
    finally:
        os.chdir(here)


def run_here(command: list[str], log: Path, *_) -> tuple[int, bool]:
    """`running.run_script` without a process, whose imports take longer than what the miniature trains."""
    if command[1] == "-m":
        code, output = import_module(command[2]).main(command[3:]), ""
    else:
        code, output = run_script(command[1], *command[2:])
    with log.open("a") as file:
        file.write(output)
    return code, False


def cells_of(folder: Path) -> dict[str, dict]:
    """The lines of cells.csv, numbers and lists as what they are."""

    def value(text: str):
        try:
            return json.loads(text)
        except ValueError:
            return text

    with (folder / "cells.csv").open(newline="", encoding="utf-8") as file:
        rows = [{name: value(text) for name, text in row.items() if text} for row in csv.DictReader(file)]
    return {row["cell"]: row for row in rows}


def table(report: str, title: str) -> list[dict[str, str]]:
    """The rows of the first table behind a text of the report."""
    lines = report[report.index(title) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| "))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


class Miniature:
    """The example of docs/reproduce.md in a folder of its own."""

    def __init__(self, folder: Path, sounds: Path):
        self.folder, self.results, self.work = folder, folder / "results" / "mini", folder / "runs" / "mini"
        self.options = ["results/mini.yaml", "--corpus", f"audiofolder={sounds}"]
        (folder / "results").mkdir()
        self.write(EXAMPLE)

    def write(self, text: str) -> None:
        (self.folder / "results" / "mini.yaml").write_text(text)

    def copy(self, folder: Path) -> "Miniature":
        """The same, as far as it is done, for what the others should not see."""
        copy = Miniature(folder, self.options[-1].partition("=")[2])
        shutil.copytree(self.results, copy.results)
        shutil.copytree(self.work, copy.work)
        return copy

    def run(self, *options, **call_options) -> tuple[int, str]:
        """reproduce.py and the scripts that it runs, all in this process."""
        with mock.patch.object(running, "run_script", run_here):
            return call(self.folder, *self.options, *options, **call_options)

    def start(self, hold: str = "", stderr: int = subprocess.STDOUT) -> subprocess.Popen:
        """As a user does, in a process; a script waits for SIGTERM behind its first checkpoint below `hold`."""
        (self.folder / "sitecustomize.py").write_text(HOLD)
        paths = os.pathsep.join([str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": paths, "HOLD": hold, "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(
            [sys.executable, ROOT / "reproduce.py", *self.options], cwd=self.folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=stderr,
        )  # fmt: skip

    def wait_for(self, pattern: str, process: subprocess.Popen) -> None:
        while not list(self.work.glob(pattern)):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.005)


# What starts before any script of a test's processes. However busy the machine, a run that is to be interrupted is
# neither too early nor at its end: SignalWatch gives the signal back once it has noted it.
HOLD = """
import os, pathlib, signal, time
rename, hold = pathlib.Path.rename, os.environ.get("HOLD")

def rename_and_wait(path, target):
    moved = rename(path, target)
    if hold and f"{hold}/checkpoint-" in str(target):
        while signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            time.sleep(0.01)
    return moved

pathlib.Path.rename = rename_and_wait
"""
FIRST = "finetune.from-ridge.scratch.seed0.fold2"


def read_until(text: str, read) -> str:
    """What `read` gives, again and again, until `text` is in it."""
    printed = ""
    while not re.search(text, printed):
        printed += (part := read())
        assert part, printed
    return printed


@pytest.fixture(scope="module")
def finished(sound_folder, tmp_path_factory):
    """The miniature, killed in its first cell and terminated in a later one; and what each start printed."""
    miniature = Miniature(tmp_path_factory.mktemp("mini"), sound_folder)
    ours, terminal = os.openpty()
    killed = miniature.start(FIRST, stderr=terminal)
    os.close(terminal)
    printed = {"killed": read_until(r"fold 2/epoch \d+/8: .*clips/s\]", lambda: os.read(ours, 4096).decode())}
    miniature.wait_for(f"{FIRST}/checkpoint-*", killed)
    killed.kill()
    killed.communicate()
    os.close(ours)
    terminated = miniature.start("pretrain.dls.seed0")
    miniature.wait_for("pretrain.dls.seed0/checkpoint-*", terminated)
    seen = io.StringIO()

    def terminate():
        """Once the run in this process has seen that it has to wait; or it never will."""
        deadline = time.monotonic() + 300
        while "waiting for another run to leave" not in seen.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        terminated.send_signal(signal.SIGTERM)

    with ThreadPoolExecutor() as threads:
        threads.submit(terminate)
        code, printed["finished"] = miniature.run(printed=seen)
    printed["terminated"] = terminated.communicate(timeout=300)[0]
    assert terminated.returncode == 143, printed["terminated"]
    assert code == 0, printed["finished"]
    return miniature, printed


def test_goes_on_after_a_kill(finished):
    """Killed, terminated, or waiting for another: every cell is run to its end, and none twice."""
    miniature, printed = finished
    assert f"[1/7] {FIRST} (goes on)" in printed["terminated"]
    assert "SIGTERM: saved; the same command goes on from here" in printed["terminated"]
    assert "waiting for another run to leave" in printed["finished"]
    assert "[1/6] pretrain.dls.seed0 (goes on)" in printed["finished"]
    assert re.search(r"\[6/6\] .*: \d+ (s|min) so far, about \d+ s left", printed["finished"])
    for name in (FIRST, "pretrain.dls.seed0"):
        log = (miniature.work / f"{name}.log").read_text()
        assert log.startswith("$ python train_") and "going on from" in log
        results = json.loads((miniature.work / name / "all_results.json").read_text())
        seconds = results["seconds"] if "history" in results else results["folds"]["2"]["seconds"]
        assert cells_of(miniature.results)[name]["wall_seconds"] > seconds
    assert not list(miniature.work.glob("*/**/checkpoint-*")) and not list(miniature.results.rglob(".*"))
    assert sorted(path.name for path in miniature.results.iterdir()) == ["README.md", "accuracy.png", "cells.csv"]


def test_second_run_does_nothing(finished):
    miniature, _ = finished
    files = [path for path in miniature.results.rglob("*") if path.is_file()]
    (miniature.results / ".unfinished.left").mkdir()
    before = {path: path.read_bytes() for path in files}
    code, output = miniature.run()
    assert code == 0 and "[1/" not in output
    assert {path: path.read_bytes() for path in files} == before
    assert not list(miniature.results.rglob(".*")), "what a killed run left is cleared away"


def test_cells_say_what_was_run(finished):
    """The recorded command is the one that was run, and pre-training left out what it had to."""
    miniature, _ = finished
    cells = cells_of(miniature.results)
    assert len(cells) == 7
    assert cells["pretrain.dls-train.seed0.fold2"]["command"] == (
        "python train_npid.py --corpus audiofolder=DIR --preset tiny --clip_seconds 0.5 "
        "--per_device_train_batch_size 8 --report_to none --num_train_epochs 2 --exclude_fold audiofolder=2 --seed 0 "
        "--output_dir runs/mini/pretrain.dls-train.seed0.fold2"
    )
    sounds = miniature.options[-1]
    log = (miniature.work / "pretrain.dls-train.seed0.fold2.log").read_text()
    assert log.startswith(f"$ python train_npid.py --corpus {sounds} --preset tiny")
    written = (miniature.results / "cells.csv").read_text() + (miniature.results / "README.md").read_text()
    assert str(miniature.folder) not in written and sounds.partition("=")[2] not in written
    assert cells["pretrain.dls-train.seed0.fold2"]["excluded_folds"] == {"audiofolder": [2]}
    assert cells["pretrain.dls.seed0"]["epochs"] == [0, 4, 8] and cells[FIRST]["epochs"] == list(range(9))
    heard = {name: cell["test_clips_heard_in_pretraining"] for name, cell in cells.items() if "folds" in cell}
    assert heard == {
        FIRST: [None],
        "finetune.from-ridge.dls.seed0.fold2": [20],
        "finetune.from-ridge.dls-train.seed0.fold2": [0],
    }
    assert all(cell["commit"] and cell["wall_seconds"] > 0 for cell in cells.values())


def test_other_work_folders_add_to_the_same_results(finished, tmp_path):
    """As on another machine: what is there stays, in the order of the plan."""
    copy = finished[0].copy(tmp_path)
    names = list(cells_of(copy.results))
    lines = (copy.results / "cells.csv").read_text().splitlines(keepends=True)
    (copy.results / "cells.csv").write_text("".join([*lines[:1], *lines[2:]]))
    code, output = copy.run("--work_dir", "elsewhere")
    assert code == 0 and f"[1/1] {FIRST} (new)" in output, output
    assert (
        list(cells_of(copy.results)) == names and "7 of 8 cells are done" in (copy.results / "README.md").read_text()
    )
    assert (copy.folder / "elsewhere" / f"{FIRST}.log").exists()


def test_report_of_the_miniature(finished):
    miniature, printed = finished
    report = (miniature.results / "README.md").read_text()
    cells = cells_of(miniature.results)
    seconds = sum(cell["wall_seconds"] for cell in cells.values())
    took = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    assert f"7 of 8 cells are done; one after the other they took {took}." in report
    skipped = "weights/imagenet is neither here nor to be had from the Hub"
    assert f"ImageNet is skipped: {skipped}" in printed["finished"]
    # What is not on this machine may be on another, and the report is the same on both.
    assert (
        "Skipped" not in report and "- Not run yet, or failed: `finetune.from-ridge.imagenet.seed0.fold2`." in report
    )
    rows = table(report, "## Search")
    for row, name in zip(rows, ("base", "embedding_dim=16"), strict=True):
        knn = cells[f"search.{name}.seed0"]["knn_accuracy"]["audiofolder"]
        assert row["k-NN before"] == f"{knn[0]:.3f}" and row["k-NN after"].strip("*") == f"{knn[-1]:.3f}"
    assert rows[1]["change"] == "`--embedding_dim 16`"
    assert report.count("(the 5 nearest clips vote, each with exp(similarity / 0.1))") == 2
    difference = float(rows[1]["k-NN after"].strip("*")) - float(rows[0]["k-NN after"].strip("*"))
    assert float(rows[1]["difference to the base"]) == pytest.approx(difference, abs=2e-3)
    heard = {row["arm"]: row["held-out clips heard"] for row in table(report, "Accuracy on the held-out fold")}
    assert heard == {
        "from scratch": "nothing heard", "DLS (transductive)": "20 of 20", "DLS (training folds only)": "0 of 20",
    }  # fmt: skip
    assert (miniature.results / "accuracy.png").stat().st_size > 10_000


def test_only_what_changed_is_run_again(finished, tmp_path):
    """And a cell that fails is reported, and stops those only that start from it."""
    copy = finished[0].copy(tmp_path)
    hopeless = "--learning_rate 1e30 --mixed_precision no --num_train_epochs 2"
    copy.write(EXAMPLE.replace("    options: --num_train_epochs 2", f"    options: {hopeless}"))
    code, output = copy.run()
    assert code == 1
    assert "[1/2] pretrain.dls-train.seed0.fold2 (again: the plan has changed)" in output
    assert "failed with exit code 2" in output and "lower --learning_rate" in output
    assert "[2/2] finetune.from-ridge.dls-train.seed0.fold2 (again: the plan has changed)" in output
    assert "not started: it needs pretrain.dls-train.seed0.fold2" in output
    report = (copy.results / "README.md").read_text()
    assert "5 of 8 cells are done" in report and "training folds only" not in table(report, "Accuracy on")
    missing = "`pretrain.dls-train.seed0.fold2`, `finetune.from-ridge.dls-train.seed0.fold2`"
    assert missing in report or ", ".join(reversed(missing.split(", "))) in report
    log = "runs/mini/pretrain.dls-train.seed0.fold2.log"
    assert f"see {log}" in output and "lower --learning_rate" in (copy.folder / log).read_text()


def test_weights_that_are_gone_are_made_again(finished, tmp_path):
    """Deleted with --delete_weights, all but those that unfinished cells start from."""
    copy = finished[0].copy(tmp_path)
    copy.write(
        EXAMPLE.replace("name: from-ridge", "name: again").replace("[scratch, dls, dls-train,", "[scratch, dls,")
    )
    code, output = copy.run("--only", "search.*", "--delete_weights")
    assert code == 0 and "[1/" not in output
    assert (copy.work / "pretrain.dls.seed0").is_dir()
    left = [path.name for path in copy.work.iterdir() if path.is_dir()]  # a pattern's last / says it from 3.11 on
    assert not [name for name in left if name.startswith(("search.", "pretrain.dls-train."))]
    imagenet = copy.folder / "weights" / "imagenet"
    shutil.copytree(copy.work / "pretrain.dls.seed0", imagenet)
    (copy.work / "pretrain.dls.seed0" / "model.safetensors").unlink()
    code, output = copy.run("--dry_run")
    assert code == 0
    assert re.findall(r"^(\S+) \((.*)\)$", output, re.MULTILINE) == [
        ("finetune.again.scratch.seed0.fold2", "new"),
        ("pretrain.dls.seed0", "again: its weights are gone"),
        ("finetune.again.dls.seed0.fold2", "new"),
        ("finetune.again.imagenet.seed0.fold2", "new"),
    ]
    assert "--model_name_or_path weights/imagenet" in output, "an ESResNet folder is used as it is"


def test_imagenet_weights_are_converted(sound_folder, tmp_path):
    """Where they are no ESResNet's: by a cell of its own, from which its arm then starts."""
    miniature = Miniature(tmp_path, sound_folder)
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**sizes)).save_pretrained(tmp_path / "weights" / "imagenet")
    only = ["--only", "finetune.*.imagenet.*"]
    code, output = miniature.run(*only)
    assert code == 0 and "[1/2] imagenet (new)" in output, output
    cells = cells_of(miniature.results)
    convert = "python -m modeling_dls.convert_esresnet_checkpoint weights/imagenet runs/mini/imagenet --preset tiny"
    fine_tune = cells["finetune.from-ridge.imagenet.seed0.fold2"]
    assert cells["imagenet"]["command"] == convert and fine_tune["starts_from"] == "imagenet"
    assert "--model_name_or_path runs/mini/imagenet" in fine_tune["command"]
    report = (miniature.results / "README.md").read_text()
    assert table(report, "Seconds until")[0]["with its pre-training"] == "trained elsewhere"
    shutil.rmtree(tmp_path / "weights")
    code, output = miniature.run(*only, "--dry_run")
    assert code == 0 and "0 cell(s) to run" in output and "skipped" not in output


def test_cells_in_several_processes(sound_folder, tmp_path):
    """Of a launcher that starts as many as it is told; what was typed stands in the CSV."""
    miniature = Miniature(tmp_path, sound_folder)
    only = ["--only", "finetune.from-ridge.scratch.*", "--num_processes", "2"]
    code, output = call(miniature.folder, *miniature.options, *only)
    assert code == 0, output
    (cell,) = cells_of(miniature.results).values()
    assert cell["command"].startswith("torchrun --nproc_per_node 2 train_classification.py --corpus audiofolder=DIR")
    assert "2 process(es)" in (miniature.work / f"{FIRST}.log").read_text()


def test_ends_in_time(finished, tmp_path):
    copy = finished[0].copy(tmp_path)
    copy.write(EXAMPLE.replace("--num_train_epochs 8 --knn_interval 4", "--num_train_epochs 100000"))
    code, output = call(copy.folder, *copy.options, "--only", "pretrain.dls.*", "--max_minutes", "0.02")
    assert code == 0 and "0.02 minutes are over; the same command goes on from here" in output
    assert "`pretrain.dls.seed0`" in (copy.results / "README.md").read_text(), "it is not run yet"
    assert json.loads((copy.work / "pretrain.dls.seed0.json").read_text())["seconds"] > 0


MISTAKES = [
    ("corpus: audiofolder\n", "", ": corpus: is missing"),
    ("corpus: audiofolder\n", "corpus: esc10\n", ": corpus: there is no 'esc10'; choose from audiofolder"),
    ("audiofolder: my_recordings", "fsd50k: /data", ": corpora.fsd50k: there is no such corpus; choose from esc10"),
    ("folds: [2]", "folds: [two]", ": folds: must be a list of different whole numbers from 1, not ['two']"),
    ("folds: [2]", "folds: [[2], {a: 1}]", ": folds: must be a list of different whole numbers from 1, not [[2], {'a"),
    ("folds: [2]", f"folds: [{10**30}]", ": folds: must be a list of different whole numbers from 1, not [1000000"),
    ("folds: [2]", f"folds: {10**30}", ": folds: must be from 2 to 1000, not 1000000"),
    ("target: 0.6", "target: 2001-13-45", " is no YAML: month must be in 1..12"),
    ("target: 0.6", f"target: {'[' * 5000}", " is no YAML: maximum recursion depth exceeded"),
    ("folds: [2]\n", "", ": pretraining.dls-train.folds: the file must say how many folds audiofolder has"),
    ("target: 0.6", "target: high", ": target: must be a number, not 'high'"),
    ("target: 0.6", "goal: 0.6", ": goal: is unknown"),
    ("title: A", "title: [A", ", line 2: "),
    ("arms: [scratch, dls, ", "arms: [scratch, dlss, ", ": fine_tuning[0].arms: there is no 'dlss'"),
    ("arms: [scratch, dls, ", "arms: [dls, dls, ", ": fine_tuning[0].arms: must name one thing or several, each once"),
    ("- name: from-ridge", "- names: from-ridge", ": fine_tuning[0].name: is missing"),
    ("    folds: all", "    folds: each", ": pretraining.dls-train.folds: there is no 'each'"),
    ("    folds: all", "    folds: all\n    folds: all", ", line 17: 'folds' is there twice"),
    ("    folds: all", "    start: dls-train", ": pretraining.dls-train.start: there is no 'dls-train'"),
    ("    folds: all", "    seeds: 3", ": pretraining.dls-train.seeds: must be a list, not 3"),
    ("  dls-train:\n", "  dls/train:\n", ": pretraining: 'dls/train' is no name"),
    ("{pretraining: dls-train,", "{pretraining: other,", ": arms.dls-train.pretraining: there is no 'other'"),
    ("{pretraining: dls-train,", "{pretraining: ,", ": arms.dls-train.pretraining: is missing"),
    ("--num_train_epochs 8 --knn", "--seed 3 --knn", ": pretraining.dls.options: --seed is what keys of this file"),
    ("label: ImageNet}", "seeds: [1]}", ": fine_tuning[0].seeds: arm imagenet is for seeds [1], none of which is"),
    ("label: DLS (training folds only)", "label: from scratch", ": arms.dls-train.label: another arm is called 'from"),
    ("options: --num_train_epochs 1", "options: --a 'b", ": search.options: No closing quotation"),
    ("  vary:", "  varry:", ": search.vary: is missing"),
    ("--embedding_dim: [16]", "embedding_dim: [16]", ": search.vary.embedding_dim: is no option of train_npid.py"),
    ("--embedding_dim: [16]", "--embedding_dim: [1/6]", ": search.vary.--embedding_dim: values can have letters"),
]  # fmt: skip


@pytest.mark.parametrize("right, wrong, message", MISTAKES)
def test_mistakes_in_the_file(right, wrong, message, tmp_path):
    assert EXAMPLE.count(right) == 1
    file = tmp_path / "plan.yaml"
    file.write_text(EXAMPLE.replace(right, wrong))
    with pytest.raises(UserError) as error:
        read_plan(file, {})
    assert str(error.value).startswith(f"{file}{message}") and "\n" not in str(error.value)


def test_pretraining_that_hears_none_of_the_labelled_corpus(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text(DECLARED.replace("{corpora: [urbansound8k]}", "{corpora: [esc10, urbansound8k], folds: excluded}"))
    (cell,) = [cell for cell in read_plan(file, {}).cells if cell.name == "pretrain.other.seed0"]
    left_out = [word for fold in range(1, 6) for word in ("--exclude_fold", f"esc10={fold}")]
    assert cell.options == [*left_out, "--seed", "0"]
    file.write_text(DECLARED.replace("{corpora: [urbansound8k]}", "{corpora: [urbansound8k], folds: excluded}"))
    with pytest.raises(UserError, match=r"pretraining\.other\.folds: its corpora do not include esc10"):
        read_plan(file, {})


def test_arm_of_some_seeds(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text(DECLARED.replace("{pretraining: further}", "{pretraining: further, seeds: [2, 0]}"))
    cells = [cell for cell in read_plan(file, {}).cells if cell.facts.get("setting") == "default"]
    assert sorted(cell.facts["seed"] for cell in cells if cell.facts["arm"] == "further") == [0, 2]
    assert sorted(cell.facts["seed"] for cell in cells if cell.facts["arm"] == "dls") == [0, 1, 2]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.yaml cannot be read: No such file"):
        read_plan(tmp_path / "nowhere.yaml", {})


def test_mistakes_are_answered_before_anything_is_run(sound_folder, tmp_path):
    miniature = Miniature(tmp_path, sound_folder)

    def answer(*options):
        code, output = call(tmp_path, *(options or miniature.options))
        assert code == 2 and "Traceback" not in output, output
        assert not miniature.results.exists() and not miniature.work.exists()
        return output.splitlines()[-1]

    assert answer("results") == (
        "reproduce.py: error: results: expected a .yaml file, beside which a folder of its name can be"
    )
    assert answer("results/mini.yaml", "--max_minutes", "nan").endswith(
        "error: argument --max_minutes: must be a finite number, not 'nan'"
    )
    assert answer("results/mini.yaml", "--corpus", "esc50=/data").startswith(
        "error: --corpus esc50: results/mini.yaml has audiofolder"
    )
    assert "corpora.audiofolder: there is no ./sounds here" in answer(*miniature.options[:2], "audiofolder=./sounds")
    assert "--only nothing: there is no such cell" in answer(*miniature.options, "--only", "nothing")
    miniature.write(EXAMPLE.replace("--classifier_init ridge", "--classifier_init rigde"))
    expected = "results/mini.yaml: options of fine_tuning[0] (from-ridge), arm scratch: argument --classifier_init: "
    assert answer().startswith(f"error: {expected}invalid choice: 'rigde'")
    miniature.write("- a list")
    assert answer() == "error: results/mini.yaml: must have keys, not ['a list']"


def test_mistakes_in_a_process(tmp_path):
    """As a user meets them."""
    ended = subprocess.run(
        [sys.executable, ROOT / "reproduce.py", "nowhere.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (2, "error: nowhere.yaml cannot be read: No such file or directory\n")


# The report, from numbers that were made up: three seeds, five folds, everything that a file can declare.

DECLARED = """
corpora: {esc10: , urbansound8k: /data/UrbanSound8K}
corpus: esc10
target: 0.6
pretraining:
  dls: {corpora: [esc10], seeds: [0, 1, 2]}
  dls-train: {corpora: [esc10], folds: all, seeds: [0, 1]}
  other: {corpora: [urbansound8k]}
  both: {corpora: [esc10], start: imagenet}
  further: {corpora: [esc10], start: other}
arms:
  scratch: {pretraining: none}
  dls: {pretraining: dls, label: DLS}
  dls-train: {pretraining: dls-train}
  further: {pretraining: further}
  imagenet: {pretraining: imagenet}
  both: {pretraining: both}
fine_tuning:
  - {name: default, arms: [scratch, dls, dls-train, further, imagenet, both], seeds: [0, 1, 2]}
  - {name: head, arms: [scratch, dls], options: --classifier_init ridge --num_train_epochs 0}
search: {corpora: [esc10], seeds: [0, 1], options: --nce_t 0.4, grid: true, vary: {--nce_t: [0.4, 0.1], --nce_k: [16]}}
"""
EPOCHS = 6


def made_up(cell, random: np.random.Generator) -> dict:
    """A result as CellStore.finish makes it."""
    result = {
        "cell": cell.name, "key": cell.key, "kind": cell.kind, **cell.facts, "network": {"depths": [1]},
        "starts_from": cell.start and cell.start.name, "wall_seconds": random.uniform(50, 500), "options": {},
        "hardware": "abacus", "threads": 2, "precision": "no", "commit": "1", "versions": "a 1",
    }  # fmt: skip
    if cell.kind in ("pretrain", "search"):
        knn = {corpus: [random.integers(80) / 80 for _ in range(2)] for corpus in dict.fromkeys(cell.corpora)}
        fold = cell.facts["fold"]
        return result | {
            "epochs": [0, 9], "knn_accuracy": knn, "clips": dict.fromkeys(knn, 400),
            "knn": {"k": 5, "sigma": "the run's temperature"}, "excluded_folds": {"esc10": [fold]} if fold else {},
        }  # fmt: skip
    folds = [cell.facts["fold"]] if cell.facts["fold"] else list(FOLDS)
    heard = 80 if cell.facts["arm"] == "dls" else None
    result |= {
        "folds": folds,
        "test_clips": [80] * len(folds),
        "test_clips_heard_in_pretraining": [heard] * len(folds),
    }
    if cell.facts["setting"] == "head":
        result["epochs"] = [0]
        accuracy, seconds = [[random.integers(80) / 80] for _ in folds], [[random.uniform(1, 9)] for _ in folds]
    else:
        result["epochs"] = list(range(1, EPOCHS + 1))
        level = 0.2 + 0.1 * len(cell.facts["arm"]) / 4
        accuracy = [
            [round(80 * (level + random.uniform(0, 0.1 * i))) / 80 for i in range(EPOCHS)] for _ in folds
        ]  # fmt: skip
        seconds = [np.cumsum(random.uniform(5, 9, EPOCHS)).tolist() for _ in folds]
    if cell.facts["arm"] in ("scratch", "dls") and cell.facts["setting"] == "default":
        result["running_accuracy"] = [[random.integers(80) / 80 for _ in range(EPOCHS)] for _ in folds]
    return result | {"accuracy": accuracy, "seconds": seconds}


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The folder of the report, and the cells' results; one fold of one seed of one arm has not been run."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "all.yaml").write_text(DECLARED)
    random = np.random.default_rng(5)
    cells = read_plan(folder / "all.yaml", {}).cells
    for cell in reversed(cells):
        of_imagenet = cell.kind == "imagenet" or cell.facts.get("arm") == "imagenet"
        if not of_imagenet and cell.name != "finetune.default.dls-train.seed2.fold4":
            add_result(folder / "all" / "cells.csv", made_up(cell, random), [cell.name for cell in cells])
    code, output = call(folder, folder / "all.yaml", "--report")
    assert code == 0, output
    return folder / "all", cells_of(folder / "all")


def fold_results(cells: dict[str, dict], setting: str, arm: str) -> dict[tuple[int, int], dict]:
    found = [c for c in cells.values() if (c["kind"], c.get("setting"), c.get("arm")) == ("finetune", setting, arm)]
    return {
        (cell["seed"], fold): {"accuracy": cell["accuracy"][i], "seconds": cell["seconds"][i]}
        for cell in found
        for i, fold in enumerate(cell["folds"])
    }


SEEDS = {"scratch": (0, 1, 2), "dls": (0, 1, 2), "dls-train": (0, 1), "further": (0, 1, 2), "both": (0, 1, 2)}
FOLDS = (1, 2, 3, 4, 5)


def test_accuracies_are_those_of_the_cells(reported):
    folder, cells = reported
    report = (folder / "README.md").read_text()
    rows = {row["arm"]: row for row in table(report, "## default")}
    assert list(rows) == ["scratch", "DLS", "dls-train", "further", "both"]
    for arm, seeds in SEEDS.items():
        runs, row = fold_results(cells, "default", arm), rows["DLS" if arm == "dls" else arm]
        for epoch, column in ((1, "epoch 1"), (2, "epoch 2"), (3, "epoch 3"), (6, "epoch 6 (last)")):
            by_fold = [sum(runs[s, f]["accuracy"][epoch - 1] for s in seeds) / len(seeds) for f in FOLDS]
            mean = sum(by_fold) / 5
            spread = (sum((value - mean) ** 2 for value in by_fold) / 5) ** 0.5
            # Within half a digit, which a sum in another order, as Python 3.12's, may round another way.
            shown = [float(number) for number in row[column].split(" ± ")]
            assert shown == pytest.approx([mean, spread], abs=0.0005001)
        assert row["seeds × folds"] == f"{len(seeds)} × 5"
    assert rows["DLS"]["held-out clips heard"] == "400 of 400" and rows["both"]["held-out clips heard"] == "unknown"
    assert "Not run yet, or failed: `finetune.default.dls-train.seed2.fold4`." in report
    assert "Skipped: imagenet, because all.yaml names no ImageNet weights (imagenet.path)" in report
    assert "Skipped: pre-training both" not in report, "it is done"
    assert "more than pre-training" not in report


def test_differences_are_paired(reported):
    folder, cells = reported
    rows = {row["arm"]: row for row in table((folder / "README.md").read_text(), "Accuracy less that")}
    scratch = fold_results(cells, "default", "scratch")
    means = [np.mean([run["accuracy"][epoch] for run in scratch.values()]) for epoch in range(EPOCHS)]
    for arm, seeds in SEEDS.items():
        if arm == "scratch":
            continue
        runs, row = fold_results(cells, "default", arm), rows["DLS" if arm == "dls" else arm]
        early = {
            (s, f): sum(runs[s, f]["accuracy"][e] - scratch[s, f]["accuracy"][e] for e in range(3)) / 3
            for s in seeds
            for f in FOLDS
        }
        assert float(row["difference"]) == pytest.approx(sum(early.values()) / len(early), abs=6e-4)
        if len(seeds) == 2:
            assert row["95 % interval"] == "too few seeds or folds"
        else:
            ends = [float(end) for end in row["95 % interval"].split(" to ")]
            table_of = np.array([[early[s, f] for f in FOLDS] for s in seeds])
            assert ends == pytest.approx(interval(table_of), abs=6e-4)
        reached = np.mean([runs[s, f]["accuracy"][2] for s in seeds for f in FOLDS])
        assert row["accuracy after epoch 3"] == f"{reached:.3f}"
        first = next((str(epoch) for epoch, mean in enumerate(means, 1) if mean >= reached), "not within 6")
        assert row["which “scratch” reaches after epoch"] == first


def test_running_statistics_stand_beside(reported):
    """In tables of their own, for each arm and each difference."""
    folder, cells = reported
    report = (folder / "README.md").read_text().partition("## default")[2].partition("\n## ")[0]
    beside = report.partition("**The same weights with the running statistics of training**")[2]
    rows = {row["arm"]: row for row in table(beside, "")}
    running = {
        arm: np.mean(
            [cells[f"finetune.default.{arm}.seed{seed}"]["running_accuracy"] for seed in (0, 1, 2)], axis=(0, 1)
        )
        for arm in ("scratch", "dls")
    }
    assert rows["DLS"]["epoch 1"].startswith(f"{running['dls'][0]:.3f} ±")
    assert rows["scratch"]["epoch 6 (last)"].startswith(f"{running['scratch'][-1]:.3f} ±")
    differences = {row["arm"]: row for row in table(beside, "| arm | difference")}
    early = np.mean(running["dls"][:3]) - np.mean(running["scratch"][:3])
    assert float(differences["DLS"]["difference"]) == pytest.approx(early, abs=6e-4)


@pytest.mark.parametrize("shape", [(3, 4), (3, 5), (5, 5)])
def test_interval_covers_what_it_says(shape):
    """Simulated: whether runs differ by seeds, by folds, by both, or by neither, 95 % or more contain the truth."""
    random, (seeds, folds), trials = np.random.default_rng(0), shape, 2000
    for by_seed, by_fold in ((0, 0), (1, 0), (0, 1), (1, 1), (3, 0.3), (0.3, 3)):
        draws = random.standard_normal((trials, *shape))
        draws += by_seed * random.standard_normal((trials, seeds, 1)) + by_fold * random.standard_normal(
            (trials, 1, folds)
        )
        ends = np.array([interval(values) for values in draws])
        covered = np.mean((ends[:, 0] <= 0) & (ends[:, 1] >= 0))
        assert covered > 0.95 - 3 * np.sqrt(0.95 * 0.05 / trials), (by_seed, by_fold)
        assert covered < 0.998, "an interval that always covers says nothing"


def test_without_scratch_the_first_arm_is_what_others_are_compared_with(reported, tmp_path):
    folder, cells = reported
    shutil.copytree(folder, tmp_path / "all")
    notes = "notes: What this is about."
    text = DECLARED.replace("arms: [scratch, dls, dls-train,", "arms: [dls, dls-train,")
    (tmp_path / "all.yaml").write_text(f"{notes}\n{text}")
    assert call(tmp_path, tmp_path / "all.yaml", "--report")[0] == 0
    report = (tmp_path / "all" / "README.md").read_text()
    rows = {row["arm"]: row for row in table(report, "Accuracy less that of “DLS”")}
    assert "DLS" not in rows and "\nWhat this is about.\n" in report
    dls, train = (fold_results(cells, "default", arm) for arm in ("dls", "dls-train"))
    pairs = [(train[s, f], dls[s, f]) for s in SEEDS["dls-train"] for f in FOLDS]
    early = [np.mean(a["accuracy"][:3]) - np.mean(b["accuracy"][:3]) for a, b in pairs]
    assert float(rows["dls-train"]["difference"]) == pytest.approx(np.mean(early), abs=6e-4)


def test_seconds_to_the_target(reported):
    folder, cells = reported
    rows = {row["arm"]: row for row in table((folder / "README.md").read_text(), "Seconds until the accuracy")}

    def in_words(seconds):
        seconds = sorted(seconds)
        middle = (seconds[(len(seconds) - 1) // 2] + seconds[len(seconds) // 2]) / 2
        reached = sum(np.isfinite(seconds))
        return f"{f'{middle:.0f} s' if np.isfinite(middle) else 'not reached'} ({reached} of {len(seconds)})"

    before = {
        "scratch": lambda seed, fold: 0,
        "dls": lambda seed, fold: cells[f"pretrain.dls.seed{seed}"]["wall_seconds"],
        "dls-train": lambda seed, fold: cells[f"pretrain.dls-train.seed{seed}.fold{fold}"]["wall_seconds"],
        "further": lambda *_: (
            cells["pretrain.other.seed0"]["wall_seconds"] + cells["pretrain.further.seed0"]["wall_seconds"]
        ),
    }
    outcomes = set()
    for arm, seeds in SEEDS.items():
        runs, row = fold_results(cells, "default", arm), rows["DLS" if arm == "dls" else arm]
        own = {}
        for key in ((s, f) for s in seeds for f in FOLDS):
            epochs = zip(runs[key]["accuracy"], runs[key]["seconds"], strict=True)
            own[key] = min([seconds for accuracy, seconds in epochs if accuracy >= 0.6], default=np.inf)
        assert row["fine-tuning"] == in_words(own.values())
        whole = "trained elsewhere" if arm == "both" else in_words(own[k] + before[arm](*k) for k in own)
        assert row["with its pre-training"] == whole
        outcomes.add("not reached" in row["fine-tuning"])
    assert outcomes == {True, False}, "both cases occur"


def test_other_tables(reported):
    folder, cells = reported
    report = (folder / "README.md").read_text()
    for row in table(report, "Closed-form classifier"):
        runs = fold_results(cells, "head", row["arm"].lower())
        accuracy = [run["accuracy"][0] for run in runs.values()]
        assert row["accuracy"] == f"{np.mean(accuracy):.3f} ± {np.std(accuracy):.3f}"
        assert row["seconds a fold"] == f"{np.median([run['seconds'][0] for run in runs.values()]):.1f}"
    rows = {row["pre-training"]: row for row in table(report, "## Pre-training")}
    assert "each with exp(similarity / the run's temperature))" in report, "cells from before there was one sigma"
    for name, row in rows.items():
        runs = [cell for cell in cells.values() if cell["kind"] == "pretrain" and cell["pretraining"] == name]
        corpus = "urbansound8k" if name == "other" else "esc10"
        for column, entry in (("before", 0), ("after", -1)):
            knn = [run["knn_accuracy"][corpus][entry] for run in runs]
            spread = f" ± {np.std(knn):.3f}" if len(runs) > 1 else ""
            assert row[column] == f"{np.mean(knn):.3f}{spread}"
        assert row["folds"] == ("1 left out" if name == "dls-train" else "all heard (transductive)")
        assert row["runs"] == str(len(runs)) == {"dls": "3", "dls-train": "10"}.get(name, "1")
        (shown,) = {sum(run["clips"].values()) * run["epochs"][-1] for run in runs}
        assert row["clips × epochs"] == str(shown)
    rows = {row["change"].strip("`"): row for row in table(report, "## Search")}
    names = {"none (the base)": "base", "--nce_k 16": "nce_k=16", "--nce_t 0.1, --nce_k 16": "nce_t=0.1,nce_k=16"}
    assert list(rows) == list(names)
    after = {
        change: [cells[f"search.{name}.seed{seed}"]["knn_accuracy"]["esc10"][-1] for seed in (0, 1)]
        for change, name in names.items()
    }
    base = after.pop("none (the base)")
    best = max(np.mean(base), *map(np.mean, after.values()))
    for change, knn in after.items():
        assert float(rows[change]["difference to the base"]) == pytest.approx(np.mean(knn) - np.mean(base), abs=6e-4)
        assert rows[change]["k-NN after"].startswith("**") == (np.mean(knn) == best)
    assert table(report, "## Where it ran")[0]["cells"] == str(len(cells))


def test_what_else_differs_is_said(reported, tmp_path):
    """Another network, or options that changed under the same words (a recipe, between two commits); not one that
    other cells are too old to have, and that has its default.
    """
    folder = shutil.copytree(reported[0], tmp_path / "all")
    shutil.copy(reported[0].with_suffix(".yaml"), tmp_path)
    options = {"learning_rate": 1, "reinit_stages": 0}
    for name, change in {"dls": {"network": {"depths": [2]}}, "scratch": {"options": options}}.items():
        result = read_results(folder / "cells.csv")[f"finetune.default.{name}.seed0"]
        add_result(folder / "cells.csv", result | change, [])
    assert call(tmp_path, tmp_path / "all.yaml", "--report")[0] == 0
    report = (folder / "README.md").read_text()
    differing = report.partition("**Arms differ in more than pre-training:**\n\n")[2].partition("\n\n")[0]
    expected = ["network or spectrogram: depths is [1] or [2]", "default: --learning_rate is 1 or null"]
    assert differing.splitlines() == [f"- {difference}" for difference in expected]


@pytest.mark.parametrize(
    "damage",
    ["<<<<<<< HEAD", "finetune.default.dls.seed0,finetune,0", '"', "finetune.default.dls.seed0,finetune,,,,[,,"],
)
def test_a_damaged_line_is_named(damage, reported, tmp_path):
    """And no result is lost or made up because of it."""
    folder = shutil.copytree(reported[0], tmp_path / "all")
    shutil.copy(reported[0].with_suffix(".yaml"), tmp_path)
    lines = (folder / "cells.csv").read_text().splitlines()
    before = "\n".join([*lines[:4], damage, *lines[4:]])
    (folder / "cells.csv").write_text(before)
    code, output = call(tmp_path, "all.yaml", "--report")
    assert code == 2 and re.match(
        r"error: all/cells\.csv, line \d+, is not as reproduce\.py wrote it \(.+\): mend", output
    )
    assert (folder / "cells.csv").read_text() == before


IMPOSSIBLE = {
    "kind": ["", "pretraining"],
    **{name: [""] for name in ("arm", "setting", "key", "network", "options", "excluded_folds", "knn")},
    "accuracy": ["", "0.5", '[["x"]]', "[[NaN]]", "[[1.01]]", "[[-0.1]]", "[[0.5, 0.5]]", "[[0.5], [0.5]]"],
    "seconds": ["", "[[-1.0]]", "[[Infinity]]", "[[]]"],
    "epochs": ["[0, 1]", "{}", "0", '["first"]'],
    "folds": ["", "[1]", "[2, 3]", "2"],
    "test_clips": ["[80, 80]", "[-80]", "80"],
    "test_clips_heard_in_pretraining": ["[81]", "[0, 0]", '["none"]'],
    "wall_seconds": ["", "[]", "-1", "true times"],
    "seed": ["", "[0]", "-1"],
    "clips": ["", "[80]", '{"audiofolder": [80]}'],
    "knn_accuracy": ["", "[0.5]", '{"audiofolder": [0.5, 0.5]}', '{"audiofolder": [50.0]}'],
    "running_accuracy": ["[[0.5]]"],
}


@pytest.mark.parametrize(
    ("column", "value"), [(column, value) for column in IMPOSSIBLE for value in IMPOSSIBLE[column]]
)
def test_numbers_that_cannot_have_been_measured_are_no_figures(column, value, tmp_path):
    """A line that a hand has changed, of a closed-form classifier with one fold or of a pre-training."""
    run = {"key": "1", "seed": 0, "wall_seconds": 9.5, "epochs": [0], "network": {}, "options": {}}
    fine_tuned = run | {
        "cell": "a", "kind": "finetune", "arm": "dls", "setting": "head", "fold": 2, "folds": [2], "test_clips": [80],
        "test_clips_heard_in_pretraining": [80], "accuracy": [[1.0]], "seconds": [[3.0]],
    }  # fmt: skip
    pretrained = run | {
        "cell": "b", "kind": "pretrain", "pretraining": "all", "clips": {"audiofolder": 80}, "excluded_folds": {},
        "knn": {}, "knn_accuracy": {"audiofolder": [0.5]},
    }  # fmt: skip
    whole, changed = tmp_path / "whole" / "cells.csv", tmp_path / "changed.csv"
    for result in (fine_tuned, pretrained):
        add_result(whole, result, [])
    assert read_results(whole) == {"a": fine_tuned, "b": pretrained}
    with whole.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[0 if column in fine_tuned or column not in pretrained else 1][column] = value
    with changed.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(UserError, match=r"changed\.csv, line [23], is not as reproduce\.py wrote it \(.+\): mend"):
        read_results(changed)


def test_a_cell_that_stands_twice_is_refused(reported, tmp_path):
    """As where both sides of a merge were kept: which of them was measured last, nobody knows."""
    folder = shutil.copytree(reported[0], tmp_path / "all")
    shutil.copy(reported[0].with_suffix(".yaml"), tmp_path)
    lines = (folder / "cells.csv").read_text().splitlines()
    (folder / "cells.csv").write_text("\n".join([*lines, lines[3]]))
    code, output = call(tmp_path, "all.yaml", "--report")
    assert code == 2 and f"line {len(lines) + 1}, is not as" in output and "another line of its cell" in output


# What is committed.


@pytest.mark.parametrize("file", sorted((ROOT / "results").glob("*.yaml")), ids=lambda file: file.stem)
def test_committed_plans_are_commands_that_the_scripts_take(file, tmp_path):
    """Those that wait for a machine or for time, too."""
    everywhere = dict.fromkeys(read_yaml(file).content["corpora"], str(tmp_path))
    store = CellStore(read_plan(file, everywhere), tmp_path)
    running.check_commands(store, store.plan.cells)
    assert {cell.kind for cell in store.plan.cells} >= {"pretrain", "finetune"}


def test_the_papers_claims_are_answered_by_the_reports():
    assert (ROOT / "docs" / "paper.md").read_text(encoding="utf-8") == paper.document()


def raw_cells(name: str) -> dict[str, dict]:
    """A report's numbers, read by nothing of ours."""
    with (ROOT / "results" / name / "cells.csv").open(newline="") as file:
        return {row["cell"]: row for row in csv.DictReader(file)}


CLOSED_FORM_AIMS = {
    "closed-form": ("closed form, all labels", ""),
    "closed-form-asinh": ("closed form, all labels", "with `--pooler_act asinh`: "),
    "5-labels": ("closed form, 5 labels a class", ""),
    "5-labels-asinh": ("closed form, 5 labels a class", "with `--pooler_act asinh`: "),
    "5-labels-self-trained": ("closed form, 5 labels a class", "with self-training: "),
}


@pytest.mark.parametrize(("name", "where"), [("esc50", ""), ("esc50_rows", ", 64 rows a band")])
def test_what_was_aimed_at_is_beside_the_raw_numbers(name, where):
    cells = raw_cells(name)

    def mean(column, *keys, **facts):
        values = [json.loads(row[column]) for row in cells.values() if facts.items() <= row.items()]
        for key in keys:
            values = [value[key] for value in values]
        return f"{np.mean(values):.3f}" if values else None

    aims = {row["what"]: row["reached"] for row in table(paper.document(), "## What was aimed at")}
    for setting, (what, words) in CLOSED_FORM_AIMS.items():
        reached = f"; {aims[what + where]}"
        accuracy = mean("accuracy", arm="dls", setting=setting)  # (folds, 1 epoch: the closed form)
        assert f"; {words}DLS {accuracy} (" in reached if accuracy else words not in reached
        unheard = {"arm": "dls-training-folds", "setting": setting}
        if sum(unheard.items() <= row.items() for row in cells.values()) == 4:  # (a cell for each fold, or not told)
            assert f"DLS, training folds only {mean('accuracy', **unheard)} (" in reached
    neighbours = mean("knn_accuracy", "esc50", -1, kind="pretrain", pretraining="training-folds")
    assert aims[f"k-NN, the tested fold not heard{where}"].startswith(neighbours or "not run yet")


def test_what_was_heard_is_beside_the_raw_numbers():
    cells, document = raw_cells("esc50"), paper.document()
    less = [
        np.mean(json.loads(cells[f"finetune.closed-form.{arm}.seed0"]["accuracy"]))
        for arm in ("dls-other-corpora", "scratch")
    ]
    assert f"DLS, folds 2 to 5 not heard {less[0] - less[1]:+.3f}; with 5 labels" in document
    clips = {name: cells[f"pretrain.{name}.seed0"] for name in ("other-corpora", "all-sound")}
    shown = [sum(json.loads(row["clips"]).values()) * json.loads(row["epochs"])[-1] for row in clips.values()]
    assert f"showed {shown[0] / shown[1]:.2f} times as many clips" in document


@pytest.mark.parametrize("name", sorted(path.parent.name for path in (ROOT / "results").glob("*/cells.csv")))
def test_committed_reports_are_what_their_numbers_say(name, tmp_path):
    """From the YAML file and the CSV alone, wherever they are."""
    committed, made = ROOT / "results" / name, tmp_path / "results" / name
    made.mkdir(parents=True)
    shutil.copy(committed.with_suffix(".yaml"), made.parent)
    shutil.copy(committed / "cells.csv", made)
    assert call(tmp_path, made.with_suffix(".yaml"), "--report")[0] == 0
    assert {path.name for path in made.iterdir()} == {path.name for path in committed.iterdir()}
    assert (made / "README.md").read_bytes() == (committed / "README.md").read_bytes()
    assert (made / "cells.csv").read_bytes() == (committed / "cells.csv").read_bytes()
    if (made / "accuracy.png").exists():
        with Image.open(made / "accuracy.png") as ours, Image.open(committed / "accuracy.png") as theirs:
            assert ours.size == theirs.size
            if ours.info["Software"] == theirs.info["Software"]:  # another matplotlib may smooth lines otherwise
                assert np.array_equal(ours, theirs)
