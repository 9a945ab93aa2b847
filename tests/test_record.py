"""What a run heard and what a run is: the record through both train scripts, and what reads it."""

import gc
import importlib.util
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from accelerate import Accelerator
from corpora_trees import write_table
from filelock import FileLock
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from scripts import ROOT, SETTINGS, SMALL, fail, group, outputs, succeed, train
from transformers import AutoModelForAudioClassification

import train_classification
import train_npid
from datasets_scripts import ClipIdentities, combine_corpora, load_corpus
from datasets_scripts.builder import FolderBuilder
from datasets_scripts.corpora.esc import ESC10_FOLDERS, ESC50_CLASSES
from datasets_scripts.exporting import export_corpus
from datasets_scripts.files import file_digest, json_digest, write_json
from datasets_scripts.loading import CORPORA
from dls_training import runtime
from dls_training.checkpoints import STATE_FILE
from dls_training.record import HEARD_FILE, NOT_COMPARED, RECORD_FILE, Record, Stage
from modeling_dls import ESResNetForAudioClassification

ONE_STEP = ["--max_train_steps", "1"]
RESUME = ["--resume_from_checkpoint", "latest"]


NO_FACTS = {"name": "a", "task": "npid", "with_labels": False, "seed": 0, "command": "train"} | {
    name: {} for name in ("clips", "corpora", "excluded_folds", "options", "settings", "environment")
}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def results_of(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text())


@pytest.fixture(scope="module")
def esc(tmp_path_factory) -> dict[str, Path]:
    """Forty clips of four classes as ESC-10's older edition (Ogg) and as a part of ESC-50 (WAV): other bytes each."""
    root, random, rows = tmp_path_factory.mktemp("esc"), np.random.default_rng(0), []
    (root / "esc50" / "audio").mkdir(parents=True)
    for number in range(40):
        folder, label = list(ESC10_FOLDERS.items())[number % 4]
        fold, target = number // 4 % 5 + 1, ESC50_CLASSES.index(label)
        samples = 0.1 * random.standard_normal(5 * 8000)
        (root / "esc10" / folder).mkdir(parents=True, exist_ok=True)
        soundfile.write(root / "esc10" / folder / f"{fold}-{100 + number}-A.ogg", samples, 8000)
        name = f"{fold}-{100 + number}-A-{target}.wav"
        soundfile.write(root / "esc50" / "audio" / name, samples, 8000)
        row = {"filename": name, "fold": fold, "target": target, "category": label, "esc10": True}
        rows.append(row | {"src_file": 100 + number, "take": "A"})
    write_table(root / "esc50" / "meta" / "esc50.csv", rows)
    return {name: root / name for name in ("esc10", "esc50")}


@pytest.fixture(scope="module")
def options(sound_folder):
    return [*SMALL, "--corpus", f"audiofolder={sound_folder}"]


@pytest.fixture(scope="module")
def partial(esc):
    """Options of a run on an ESC corpus that is not complete."""
    return lambda name, tree: [*SMALL, "--allow_partial", "--corpus", f"{name}={esc[tree]}", *ONE_STEP]


@pytest.fixture(scope="module")
def pretrained(options, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "npid"
    succeed("train_npid.py", *options, *ONE_STEP, "--output_dir", folder)
    return folder


# --- What a run heard ---


@pytest.mark.parametrize(
    ("corpus", "edition"), [("audiofolder", "esc10"), ("audiofolder", "esc50"), ("esc50", "esc50")]
)
def test_held_out_clips_are_known_by_their_sound(corpus, edition, partial, tmp_path):
    """Whatever the corpus was called, and however it was encoded: all 8 clips of fold 1 had been heard."""
    succeed("train_npid.py", *partial(corpus, edition), "--output_dir", tmp_path / "npid")
    start_from = ["--model_name_or_path", tmp_path / "npid", "--fold", "1", "--output_dir", tmp_path / "run"]
    succeed("train_classification.py", *partial("esc10", "esc10"), *start_from)
    assert results_of(tmp_path / "run")["folds"]["1"]["test_clips_heard_in_pretraining"] == 8
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Transductive: 8 of the 8 held-out clips were in the pre-training" in card and "None of the" not in card


@pytest.fixture(scope="module")
def grandchild(partial, tmp_path_factory) -> dict[str, Path]:
    """Pre-trained on ESC-50's clips, then on free sounds alone, then fine-tuned on ESC-10's."""
    folder = tmp_path_factory.mktemp("ancestry")
    synthetic = load_corpus("synthetic", num_classes=2, clips_per_class=5, clip_seconds=0.5, sampling_rate=8000)
    export_corpus(synthetic, CORPORA["synthetic"], folder / "free", "test")
    free = [*SMALL, "--corpus", f"synthetic={folder / 'free'}", *ONE_STEP]
    succeed("train_npid.py", *partial("esc50", "esc50"), "--output_dir", folder / "first")
    succeed("train_npid.py", *free, "--model_name_or_path", folder / "first", "--output_dir", folder / "second")
    start_from = ["--model_name_or_path", folder / "second", "--fold", "1", "--output_dir", folder / "third"]
    succeed("train_classification.py", *partial("esc10", "esc10"), *start_from)
    return {name: folder / name for name in ("first", "second", "third")}


def test_ancestry_is_carried(grandchild):
    """The second bank holds free sounds only; what the first training heard is known all the same."""
    record = Record.read(grandchild["third"])
    assert [stage.facts["task"] for stage in record.stages] == ["npid", "npid", "classification"]
    assert [list(stage.facts["corpora"]) for stage in record.stages] == [["esc50"], ["synthetic"], ["esc10"]]
    assert [len(stage.heard) for stage in record.stages] == [40, 10, 32] and record.tasks == ["npid", "classification"]
    assert [stage.facts["with_labels"] for stage in record.stages] == [False, False, True]
    assert record.own.facts["excluded_folds"] == {"esc10": [1]}
    for stage in record.stages:
        assert stage.facts["environment"]["versions"]["torch"] == torch.__version__.partition("+")[0]
        assert stage.facts["options"]["max_train_steps"] == 1 and stage.facts["seed"] == 0
    assert results_of(grandchild["third"])["arm"] == "npid"
    assert results_of(grandchild["third"])["folds"]["1"]["test_clips_heard_in_pretraining"] == 8
    checkpoint = grandchild["third"] / "checkpoint-1"
    assert [stage.facts for stage in Record.read(checkpoint).stages][:2] == [s.facts for s in record.stages[:2]]


def test_licences_of_ancestors_bind(grandchild):
    for name in ("second", "third"):
        card = ModelCard.load(grandchild[name] / "README.md")
        assert card.data.license == "cc-by-nc-3.0" and "ask for nothing" not in card.text, name
        assert "| pre-training without labels |" in card.text
    assert "40 of esc50" in card.text and "10 of synthetic" in card.text


def test_what_a_stranger_heard_is_unknown(pretrained, options, tmp_path):
    """Never "nothing": of converted weights, or of a folder that brings no record."""
    stranger = tmp_path / "stranger"
    shutil.copytree(pretrained, stranger, ignore=shutil.ignore_patterns(RECORD_FILE, HEARD_FILE, "checkpoint-*"))
    start_from = ["--model_name_or_path", stranger, "--fold", "1", *ONE_STEP, "--output_dir", tmp_path / "run"]
    succeed("train_classification.py", *options, *start_from)
    assert results_of(tmp_path / "run")["folds"]["1"]["test_clips_heard_in_pretraining"] is None
    assert results_of(tmp_path / "run")["arm"] == "pretrained"
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert "of which it is not known what it has heard" in card.text and "None of the" not in card.text
    assert card.data.license is None
    # That stays unknown, whatever follows.
    again = ["--model_name_or_path", tmp_path / "run", *ONE_STEP, "--output_dir", tmp_path / "again"]
    succeed("train_npid.py", *options, *again)
    assert not Record.read(tmp_path / "again").is_complete


def test_held_out_labels_that_were_seen_are_refused(pretrained, options, tmp_path):
    """Fold 1's classifier has seen fold 2's labels; also through a pre-training between them."""
    common = [*options, *ONE_STEP]
    first = tmp_path / "first"
    succeed(
        "train_classification.py", *common, "--model_name_or_path", pretrained, "--fold", "1", "--output_dir", first
    )
    start_from = ["--model_name_or_path", first]
    message = fail("train_classification.py", *common, *start_from, "--fold", "2", "--output_dir", tmp_path / "never")
    assert f"of 20 clips 20 by {first}" in message and "--allow_label_leakage" in message
    # Before any fold is trained, although fold 1 alone would do.
    assert "fold 2" in fail("train_classification.py", *common, *start_from, "--output_dir", tmp_path / "never")
    assert not list((tmp_path / "never").iterdir())
    succeed("train_npid.py", *common, *start_from, "--output_dir", tmp_path / "between")
    through = ["--model_name_or_path", tmp_path / "between", "--fold", "2"]
    message = fail("train_classification.py", *common, *through, "--output_dir", tmp_path / "never")
    assert f"of 20 clips 20 by {first}" in message
    succeed("train_classification.py", *common, *start_from, "--fold", "1", "--output_dir", tmp_path / "same-fold")
    asked_for = [*start_from, "--fold", "2", "--allow_label_leakage", "--output_dir", tmp_path / "leaky"]
    succeed("train_classification.py", *common, *asked_for)
    card = (tmp_path / "leaky" / "README.md").read_text()
    assert (
        f"**Label leakage**: the labels of 20 of the 20 held-out clips had been seen in the training of `{first}`"
        in card
    )
    assert results_of(tmp_path / "leaky")["folds"]["2"]["test_labels_seen_before"] == {str(first): 20}


def test_the_commit_is_this_projects_or_none(tmp_path):
    """Installed in a virtual environment inside somebody else's repository."""
    site_packages = tmp_path / "theirs" / ".venv" / "lib" / "site-packages"
    for package in ("dls_training", "datasets_scripts", "modeling_dls", "hub_cards"):
        shutil.copytree(ROOT / package, site_packages / package)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "theirs"]):
        subprocess.run(["git", *command], cwd=tmp_path / "theirs", check=True)
    there = site_packages / "dls_training" / "runtime.py"
    spec = importlib.util.spec_from_file_location("dls_training.theirs", there)
    runtime = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runtime)
    assert runtime.__file__ == str(there) and runtime.environment(Accelerator(cpu=True))["commit"] is None


def test_overlapping_stretches_are_the_same_sound():
    """Against every pair, one after the other."""
    random = np.random.default_rng(0)

    def some(count):
        stretches = [tuple(sorted(random.choice(20, 2, replace=False))) for _ in range(count)]
        stretches = [(0, np.inf) if random.random() < 0.1 else stretch for stretch in stretches]
        content, published = random.integers(0, 4, (count, 1)), random.choice([0, 0, 1, 2], (count, 1))
        digests = (column.astype(np.uint8).repeat(16, axis=1) for column in (content, published))
        return ClipIdentities(next(digests), np.array(stretches, float), next(digests))

    def overlap(a, i, b, j):
        (start, end), (other_start, other_end) = a.stretch[i], b.stretch[j]
        same_file = (a.content[i] == b.content[j]).all() and start < other_end and other_start < end
        return same_file or (a.published[i].any() and (a.published[i] == b.published[j]).all())

    for _ in range(200):
        a, b = some(7), some(5)
        assert a.shared_with(b).tolist() == [any(overlap(a, i, b, j) for j in range(5)) for i in range(7)]
    assert a[:0].shared_with(b).shape == (0,) and not a.shared_with(b[:0]).any()


def test_stretches_of_a_recording_are_clips_of_their_own(sound_folder, tmp_path):
    """Columns clip_start and clip_end: other windows are other clips, and overlapping ones count as heard."""
    corpus = load_corpus("audiofolder", sound_folder).select(range(4))

    def windows(starts):
        rows = corpus.select([0, 0, 1])
        return rows.add_column("clip_start", starts).add_column("clip_end", [start + 0.2 for start in starts])

    first, second = windows([0.0, 0.1, 0.0]), windows([0.1, 0.25, 0.3])
    combined, report = combine_corpora([("first", first), ("second", second)])
    assert report["clips"] == {"first": 3, "second": 2} and report["removed"] == 1  # 0.1 to 0.3 of the first file
    assert len({bytes(key) for key in ClipIdentities.of(combined).digests()}) == 5
    held_out, _ = combine_corpora([("first", first), ("second", second)], {"second": [1]})
    # What overlaps with the held-out 0.1-0.45 of the first file and 0.3-0.5 of the second is gone.
    assert [held_out["clip_start"][:], held_out["corpus"][:]] == [[0.0], ["first"]]
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    Record().followed_by(NO_FACTS, ClipIdentities.of(first)).save(tmp_path)
    record = Record.read(tmp_path)
    assert record.heard(ClipIdentities.of(second)) == 2 and record.heard(ClipIdentities.of(corpus)) == 2


def test_a_record_is_compact(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    random = np.random.default_rng(0).integers(0, 256, (100_000, 16), np.uint8)
    whole = np.tile((0.0, np.inf), (len(random), 1))
    Record().followed_by(NO_FACTS, ClipIdentities(random, whole, np.zeros_like(random))).save(tmp_path)
    assert (tmp_path / HEARD_FILE).stat().st_size < 16.01 * len(random)


# --- What a run is ---


def test_another_fold_is_another_run(options, pretrained, tmp_path):
    """Whether fold 1 was finished there or not; and one fold is not all folds."""
    run = [*options, "--model_name_or_path", pretrained, *ONE_STEP, "--output_dir", tmp_path / "run"]
    succeed("train_classification.py", *run, "--fold", "1")
    finished = tree(tmp_path / "run")
    message = fail("train_classification.py", *run, "--fold", "2", *RESUME)
    assert "belongs to a different run: --fold is 2 but was 1" in message
    assert "--fold is 'all'" in fail("train_classification.py", *run, *RESUME)
    assert tree(tmp_path / "run") == finished
    assert "fold 1 was finished before" in succeed("train_classification.py", *run, "--fold", "1", *RESUME)
    for path in (tmp_path / "run").iterdir():
        if path.is_file():
            path.unlink()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert f"{checkpoint} belongs to a different run: --fold is 2 but was 1" in fail(
        "train_classification.py", *run, "--fold", "2", *RESUME
    )
    elsewhere = ["--fold", "2", "--resume_from_checkpoint", checkpoint, "--output_dir", tmp_path / "elsewhere"]
    assert "--fold is 2 but was 1" in fail("train_classification.py", *run, *elsewhere)
    message = fail("train_classification.py", *run, "--resume_from_checkpoint", checkpoint)
    assert "--resume_from_checkpoint DIR is of one fold" in message
    assert "going on from" in succeed("train_classification.py", *run, "--fold", "1", *RESUME)


def test_finished_folds_are_of_the_same_run(options, tmp_path):
    """All options that differ stand in one message, and nothing that was measured is touched."""
    run = [*options, *ONE_STEP, "--output_dir", tmp_path / "run"]
    succeed("train_classification.py", *run)
    before = tree(tmp_path / "run")
    changes = {"preset": "esresnet18", "seed": "77", "learning_rate": "0.05", "labels_per_class": "2"}
    words = [word for name, value in changes.items() for word in (f"--{name}", value)]
    message = fail("train_classification.py", *run, *words, *RESUME)
    assert "fold-1 belongs to a different run" in message
    for change in (
        "--preset is 'esresnet18' but was 'tiny'", "--seed is 77 but was 0", "--learning_rate is 0.05 but was 0.00025",
        "--labels_per_class is 2 but was None",
    ):  # fmt: skip
        assert change in message
    assert tree(tmp_path / "run") == before
    # A fold that is not finished is no other: what would have been taken from the checkpoint in silence is named.
    shutil.rmtree(tmp_path / "run" / "fold-1")
    (tmp_path / "run" / "fold-2").rename(tmp_path / "run" / "fold-1")
    assert "--fold is 1 but was 2" in fail("train_classification.py", *run, *RESUME)


def parsed(module, *words) -> dict:
    return SETTINGS[module.__name__].parsed([*words]).plain()


def stage_of(options: dict) -> Stage:
    return Stage({"task": "t", "options": options, "settings": {}}, None)


# For each script every option, with two values that are not the same run.
OTHER_VALUES = {
    "clip_seconds": "2", "audio_channels": "2", "augmentation": "both", "augmentation_strength": "0.5",
    "preset": "tiny", "pooling": "statistics", "frequency_scale": "mel", "spec_height": "8", "spec_width": "8",
    "per_device_train_batch_size": "7", "gradient_accumulation_steps": "2", "optimizer": "adamw",
    "learning_rate": "0.5", "weight_decay": "0.5", "lr_scheduler_type": "esresnet", "seed": "1",
    "windows": "3", "mixed_precision": "bf16", "memory_format": "contiguous", "num_train_epochs": "3",
    "max_train_steps": "3", "embedding_size": "8", "hidden_sizes": "8,9", "sampling_rate": "8000",
    "pooler_act": "asinh",
}  # fmt: skip
OF_NPID = {
    "objective": "softmax", "nce_k": "3", "nce_t": "0.2", "nce_exclude_positive": None, "nce_z_momentum": "0.5",
    "embedding_dim": "3", "bank_momentum": "0.25", "shard_bank": None, "exclude_fold": "2", "knn_interval": "2",
    "knn_k": "2",
}  # fmt: skip
OF_CLASSIFICATION = {
    "init": "scratch", "labels_per_class": "2", "freeze_backbone": None, "freeze_batch_norm": None,
    "classifier_init": "ridge", "allow_label_leakage": None, "fold": "1",
    "precise_bn": None, "reinit_stages": "1",
}  # fmt: skip
TESTED_ELSEWHERE = {"corpus", "model_name_or_path"}


@pytest.mark.parametrize(
    ("module", "others"),
    [(train_npid, OTHER_VALUES | OF_NPID), (train_classification, OTHER_VALUES | OF_CLASSIFICATION)],
    ids=["npid", "classification"],
)
def test_every_option_is_part_of_what_a_run_is(module, others):
    """But for those that are listed, with their reasons: one that somebody adds is compared from the start."""
    common = ["--lr_scheduler_type", "cosine"]
    if module is train_classification:
        common += ["--model_name_or_path", "somewhere", "--init", "pretrained"]
    plain = parsed(module, *common)
    together = {"warmup_steps": ["--warmup_steps", "5"], "keep_spectrograms": KEEP}
    together |= {name: ["--windows", f"--{name}", "0.5"] for name in ("overlap", "silence_db")}
    if module is train_classification:
        together["self_training_rounds"] = ["--classifier_init", "ridge", "--self_training_rounds", "2"]
    assert set(plain) == set(others) | set(together) | TESTED_ELSEWHERE | NOT_COMPARED
    for name, value in others.items():
        changed = parsed(module, *common, f"--{name}", *([] if value is None else [value]))
        (difference,) = stage_of(changed).differences(stage_of(plain))
        assert difference == f"--{name} is {changed[name]!r} but was {plain[name]!r}"
    for name, words in together.items():
        changed = parsed(module, *common, *words)
        differences = stage_of(changed).differences(stage_of(plain))
        assert any(difference.startswith(f"--{name} ") for difference in differences)


KEEP = ["--keep_spectrograms", "--augmentation", "spectrogram"]


def test_length_is_part_of_a_run_where_the_rate_depends_on_it():
    for schedule, differs in (("constant", False), ("esresnet", False), ("cosine", True), ("multistep", True)):
        short, long = (
            Stage(
                {"task": "t", "options": {"lr_scheduler_type": schedule, "num_train_epochs": n}, "settings": {}}, None
            )
            for n in (3, 9)
        )
        assert bool(long.differences(short)) == differs and not long.same_length(short)


def test_a_finished_fold_goes_on_for_longer(options, tmp_path):
    """A constant rate allows that: the same as if it had been longer from the start, and reported as what it is."""
    run = [*options, "--fold", "1", "--max_train_steps"]
    for folder, steps, more in (("short", "3", []), ("short", "5", RESUME), ("whole", "5", [])):
        succeed("train_classification.py", *run, steps, *more, "--output_dir", tmp_path / folder)
    short, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("short", "whole"))
    assert all(torch.equal(short[name], whole[name]) for name in whole)
    assert results_of(tmp_path / "short")["options"]["max_train_steps"] == 5


def test_changed_clips_labels_and_parents_are_another_run(options, sound_folder, pretrained, tmp_path):
    """Named by the option that brought them; a folder that was only moved is no other."""
    sounds = shutil.copytree(sound_folder, tmp_path / "sounds")
    parent = shutil.copytree(pretrained, tmp_path / "parent")
    run = [*options[:-1], f"audiofolder={sounds}", *ONE_STEP, "--model_name_or_path", parent]
    output = ["--output_dir", tmp_path / "run"]
    succeed("train_npid.py", *run, *output)
    moved, sounds = [str(word).replace("sounds", "moved") for word in run], tmp_path / "moved"
    (tmp_path / "sounds").rename(sounds)
    succeed("train_npid.py", *moved, *output, *RESUME)
    table = (sounds / "metadata.csv").read_text()
    (sounds / "metadata.csv").write_text(table.replace("00.wav,class-0", "00.wav,class-1"))
    message = fail("train_npid.py", *moved, *output, *RESUME)
    assert "--corpus is 'audiofolder (40 clips, " in message
    (sounds / "metadata.csv").write_text(table)
    samples, rate = soundfile.read(sounds / "00.wav")
    soundfile.write(sounds / "00.wav", samples[::-1], rate)
    assert "--corpus is 'audiofolder (40 clips, " in fail("train_npid.py", *moved, *output, *RESUME)
    soundfile.write(sounds / "00.wav", samples, rate)
    other = tmp_path / "other"
    succeed("train_npid.py", *options, *ONE_STEP, "--seed", "1", "--output_dir", other)
    message = fail("train_npid.py", *moved, "--model_name_or_path", other, *output, *RESUME)
    assert "--model_name_or_path is 'weights " in message and "but was 'weights " in message


def test_precision_as_it_was_computed_is_compared(options, tmp_path):
    run = [*options, *ONE_STEP, "--output_dir", tmp_path / "run"]
    succeed("train_npid.py", *run, "--mixed_precision", "no")
    message = fail("train_npid.py", *run, "--mixed_precision", "bf16", *RESUME)
    assert "--mixed_precision is 'bf16' but was 'no'" in message


def test_where_a_run_went_on_is_added(pretrained):
    began, now = Record.read(pretrained), Record.read(pretrained)
    elsewhere = began.own.facts["environment"] | {"hardware": "another machine"}
    gone_on = now.with_facts(environment=elsewhere).continues(began)
    assert gone_on.own.facts["environment"] == began.own.facts["environment"]
    assert gone_on.own.facts["continued_in"] == [elsewhere]
    assert now.continues(gone_on).own.facts["continued_in"] == [elsewhere]
    assert "continued_in" not in now.continues(began).own.facts


# --- Bad input ---


def rewritten(folder: Path, **changes) -> None:
    """Changes what is in a record, and makes its own digest agree."""
    content = json.loads((folder / RECORD_FILE).read_text()) | changes
    del content["digest"]
    write_json(folder / RECORD_FILE, content | {"digest": json_digest(content)})


DAMAGE = {
    "cut short": (lambda folder: os.truncate(folder / RECORD_FILE, 200), "record.json is damaged"),
    "no object": (lambda folder: (folder / RECORD_FILE).write_text("[]"), "record.json is damaged"),
    "changed by hand": (
        lambda folder: (folder / RECORD_FILE).write_text((folder / RECORD_FILE).read_text().replace("40", "39")),
        "record.json is damaged or was changed by hand",
    ),
    "a stranger's stage": (lambda folder: rewritten(folder, stages=[{"task": "gan"}]), "beside it, is damaged"),
    "more clips without a label than clips": (
        lambda folder: rewritten(folder, stages=[Record.read(folder).own.facts | {"without_label": 41}]),
        "beside it, is damaged",
    ),
    "another layout": (lambda folder: rewritten(folder, layout=0), "record.json has layout 0"),
    "other weights": (
        lambda folder: save_file(
            {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()},
            folder / "model.safetensors",
        ),
        "model.safetensors is not the file that record.json belongs to",
    ),
    "other bank": (
        lambda folder: (folder / "memory_bank.safetensors").write_bytes(b"bank"),
        "memory_bank.safetensors is not the file that record.json belongs to",
    ),
    "no clips": (
        lambda folder: (folder / HEARD_FILE).unlink(),
        "heard_clips.safetensors, or record.json beside it, is damaged",
    ),
    "clips cut short": (
        lambda folder: os.truncate(folder / HEARD_FILE, 60),
        "heard_clips.safetensors is not the file",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_record_that_cannot_be_trusted_is_refused(damage, pretrained, options, tmp_path):
    folder = shutil.copytree(pretrained, tmp_path / "npid")
    spoil, expected = DAMAGE[damage]
    spoil(folder)
    before = tree(folder)
    for script, more in (("train_npid.py", []), ("train_classification.py", ["--fold", "1"])):
        start_from = ["--model_name_or_path", folder, *more, *ONE_STEP, "--output_dir", tmp_path / "run"]
        message = fail(script, *options, *start_from)
        assert expected in message and str(folder) in message
    assert tree(folder) == before


def test_a_bank_of_other_rows_or_columns_is_refused(pretrained, options, tmp_path):
    """Even where every digest was made to agree."""
    folder = shutil.copytree(pretrained, tmp_path / "npid")
    checkpoint = folder / "checkpoint-1"
    bank = load_file(checkpoint / "memory_bank.safetensors")
    others = {
        "rows of other clips": bank | {"keys": bank["keys"].flip(0)},
        "fewer rows": bank | {"keys": bank["keys"][1:].clone(), "vectors": bank["vectors"][1:].clone()},
        "other columns": bank | {"vectors": bank["vectors"][:, :64].clone()},
    }
    for other in others.values():
        save_file(other, checkpoint / "memory_bank.safetensors")
        files = json.loads((checkpoint / RECORD_FILE).read_text())["files"]
        rewritten(
            checkpoint, files=files | {"memory_bank.safetensors": file_digest(checkpoint / "memory_bank.safetensors")}
        )
        state = json.loads((checkpoint / STATE_FILE).read_text())
        state = {
            "progress": state["progress"],
            "files": {name: file_digest(checkpoint / name) for name in state["files"]},
        }
        write_json(checkpoint / STATE_FILE, state | {"digest": json_digest(state)})
        message = fail("train_npid.py", *options, *ONE_STEP, "--output_dir", folder, *RESUME)
        assert "memory_bank.safetensors has rows of other clips than this run, or other columns" in message


def test_folders_of_an_earlier_version_load_and_are_not_gone_on_with(pretrained, options, tmp_path):
    folder = shutil.copytree(pretrained, tmp_path / "npid")
    for part in (folder, folder / "checkpoint-1"):
        for name in (RECORD_FILE, HEARD_FILE):
            (part / name).unlink()
    state = json.loads((folder / "checkpoint-1" / STATE_FILE).read_text())
    sizes = dict.fromkeys(state["files"], 1)
    write_json(
        folder / "checkpoint-1" / STATE_FILE, {"progress": state["progress"], "run": {"seed": 0}, "files": sizes}
    )
    before = tree(folder)
    run = [*options, *ONE_STEP, "--output_dir", folder, *RESUME]
    assert "checkpoint-1 was written by an earlier version" in fail("train_npid.py", *run)
    shutil.rmtree(folder / "checkpoint-1")
    assert "npid was written by an earlier version" in fail("train_npid.py", *run)
    assert tree(folder) == {name: content for name, content in before.items() if "checkpoint" not in name}
    assert AutoModelForAudioClassification.from_pretrained(folder).config.depths == [1, 1, 1, 1]


def test_a_run_killed_while_it_puts_results_into_place_goes_on(pretrained, options, tmp_path):
    """The record comes last: without it, what else is there is put into place once more."""
    folder = shutil.copytree(pretrained, tmp_path / "npid")
    before = tree(folder)
    (folder / RECORD_FILE).unlink()
    succeed("train_npid.py", *options, *ONE_STEP, "--output_dir", folder, *RESUME)
    after = tree(folder)
    assert after.keys() == before.keys() and after["model.safetensors"] == before["model.safetensors"]


# --- Process matters ---


def test_only_one_folds_network_is_in_memory(options, monkeypatch, tmp_path):
    alive = []
    train = train_classification.FoldRun.train

    def counting(run):
        gc.collect()
        alive.append(sum(isinstance(thing, ESResNetForAudioClassification) for thing in gc.get_objects()))
        return train(run)

    monkeypatch.setattr(train_classification.FoldRun, "train", counting)
    succeed("train_classification.py", *options, *ONE_STEP, "--output_dir", tmp_path / "run")
    assert alive == [alive[0]] * 2


def prepare_and_train(cache: Path, options: list) -> int:
    datasets.config.HF_DATASETS_CACHE = str(cache)
    return train("train_npid.py", options)


def test_a_long_preparation_does_not_kill_the_other_processes(sound_folder, tmp_path):
    """Longer than processes wait for one another: they wait for the lock of what is prepared."""
    sounds, cache = shutil.copytree(sound_folder, tmp_path / "sounds"), tmp_path / "cache"
    builder = FolderBuilder(CORPORA["audiofolder"], sounds.resolve(), False, False, str(cache))
    lock = Path(builder.cache_dir).as_posix().replace("/", "_") + ".lock"
    run = ["--corpus", f"audiofolder={sounds}", "--distributed_timeout", "10", "--output_dir", tmp_path / "run"]
    with FileLock(cache / lock):
        processes = group(tmp_path / "logs", 2, prepare_and_train, cache, [*SMALL, *ONE_STEP, *run])
        processes[0].wait_for((tmp_path / "run").is_dir)  # made just before the corpora are loaded
        time.sleep(15)
    outputs(processes)


def test_a_checkpoints_own_length_and_channels_hold(options, tmp_path):
    """What the command does not say is as the network was trained; what it says is told."""
    short = ["--clip_seconds", "0.3", "--audio_channels", "2", *ONE_STEP]
    succeed("train_npid.py", *options, *short, "--output_dir", tmp_path / "npid")
    bare = [word for word in options if word not in ("--clip_seconds", "0.5", "--preset", "tiny")]
    start_from = [*bare, *ONE_STEP, "--model_name_or_path", tmp_path / "npid", "--fold", "1"]

    def signal(name):
        found = json.loads((tmp_path / name / "preprocessor_config.json").read_text())
        return found["max_length"], found["audio_channels"]

    log = succeed("train_classification.py", *start_from, "--output_dir", tmp_path / "own")
    assert signal("own") == signal("npid") == (13230, 2) and "was trained with" not in log
    other = ["--clip_seconds", "0.4", "--audio_channels", "1"]
    log = succeed("train_classification.py", *start_from, *other, "--output_dir", tmp_path / "other")
    assert signal("other") == (17640, 1)
    assert "--clip_seconds 0.4: " in log and "was trained with 0.3" in log and "--audio_channels 1: " in log


# --- What a hostile newcomer found ---


def test_stages_of_one_name_do_not_hide_one_another(options, pretrained, sound_folder, tmp_path):
    """Runs that are always moved to the same place: the older one's labels count as well."""
    others = tmp_path / "others"
    shutil.copytree(sound_folder, others)
    for path in others.glob("*.wav"):
        samples, rate = soundfile.read(path)
        soundfile.write(path, samples[::-1], rate)
    current, source = tmp_path / "current", pretrained
    for sounds in (sound_folder, others):
        run = [*options[:-1], f"audiofolder={sounds}", *ONE_STEP, "--fold", "1", "--output_dir", tmp_path / "run"]
        succeed("train_classification.py", *run, "--model_name_or_path", source)
        shutil.rmtree(current, ignore_errors=True)
        source = (tmp_path / "run").rename(current)
    message = fail(
        "train_classification.py", *options, *ONE_STEP, "--fold", "2", "--model_name_or_path", current,
        "--output_dir", tmp_path / "leaked",
    )  # fmt: skip
    assert f"of 20 clips 20 by {current}" in message


def test_another_runs_checkpoints_are_not_joined(options, tmp_path):
    for name, seed in (("a", "0"), ("b", "9")):
        run = [*options, "--num_train_epochs", "2", "--seed", seed, "--output_dir", tmp_path / name]
        succeed("train_npid.py", *run)
    for path in (tmp_path / "b").iterdir():
        if path.is_file():
            path.unlink()
    before = tree(tmp_path / "b")
    resume = ["--resume_from_checkpoint", tmp_path / "a" / "checkpoint-5", "--output_dir", tmp_path / "b"]
    message = fail("train_npid.py", *options, "--num_train_epochs", "2", *resume)
    assert "belongs to a different run: --seed is 0 but was 9" in message and tree(tmp_path / "b") == before


def test_names_like_escs_are_not_escs(tmp_path):
    """Numbers and a letter may be anybody's file names; the same ones in two folders are different sounds."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number in range(3):
            sound = 0.1 * np.random.default_rng([ord(folder), number]).standard_normal(800)
            soundfile.write(tmp_path / folder / f"1-{number}-A.wav", sound, 8000)
    corpus = load_corpus("audiofolder", tmp_path)
    assert combine_corpora([("audiofolder", corpus)])[1]["clips"] == {"audiofolder": 6}
    assert not ClipIdentities.of(corpus).is_published.any()


def test_a_finished_run_without_checkpoints_keeps_its_length(options, tmp_path):
    run = [*options, "--fold", "1", "--output_dir", tmp_path / "run", "--max_train_steps"]
    succeed("train_classification.py", *run, "2")
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    before = tree(tmp_path / "run")
    assert "finished run of another length" in fail("train_classification.py", *run, "1", *RESUME)
    assert tree(tmp_path / "run") == before
    assert "fold 1 was finished before" in succeed("train_classification.py", *run, "2", *RESUME)


def test_weights_that_a_record_is_not_of(pretrained, options, tmp_path):
    """Of another format, or gone."""
    folder = shutil.copytree(pretrained, tmp_path / "npid")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    start_from = ["--model_name_or_path", folder, *ONE_STEP, "--fold", "1", "--output_dir", tmp_path / "run"]
    message = fail("train_classification.py", *options, *start_from)
    assert "model.safetensors is missing, that record.json belongs to" in message


def test_a_model_is_not_trained_over(pretrained, options, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(pretrained, folder, ignore=shutil.ignore_patterns(RECORD_FILE, "checkpoint-*", "all_results.json"))
    before = tree(folder)
    over = ["--model_name_or_path", folder, "--output_dir", folder, *ONE_STEP]
    assert "holds an earlier run" in fail("train_npid.py", *options, *over)
    assert "was written by an earlier version" in fail("train_npid.py", *options, *over, *RESUME)
    assert tree(folder) == before


@pytest.mark.parametrize("content", ['{"accuracy', "{}"])
def test_damaged_results_of_a_fold_are_measured_again(content, options, tmp_path):
    run = [*options, *ONE_STEP, "--output_dir", tmp_path / "run"]
    succeed("train_classification.py", *run)
    expected = results_of(tmp_path / "run")["folds"]
    (tmp_path / "run" / "fold-1" / "fold_results.json").write_text(content)
    (tmp_path / "run" / "fold-1" / "checkpoint-100").write_text("not a folder")
    succeed("train_classification.py", *run, *RESUME)
    found = results_of(tmp_path / "run")["folds"]
    assert found["1"]["accuracy_per_epoch"] == expected["1"]["accuracy_per_epoch"] and found["2"] == expected["2"]


def test_the_commit_says_whether_the_source_differs_from_it(tmp_path):
    for name in ("dls_training/runtime.py", "docs/speed.md", "README.md", "benchmarks/step.csv", "hub_cards/card.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name.endswith("md") else Path(runtime.__file__).read_text())

    def git(*words):
        author = ["-c", "user.name=you", "-c", "user.email=you@example.org"]
        return subprocess.run(
            ["git", *author, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    def source_commit():
        spec = importlib.util.spec_from_file_location("dls_training.copied", tmp_path / "dls_training" / "runtime.py")
        copied = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copied)
        return copied.source_commit()

    assert source_commit() is None  # no repository
    git("init")
    assert source_commit() is None  # not of it
    git("add", ".")
    git("commit", "--message", "all")
    commit = git("rev-parse", "--short", "HEAD").strip()
    assert source_commit() == commit
    for measured in ("docs/speed.md", "README.md", "benchmarks/step.csv"):
        (tmp_path / measured).write_text("measured")
    assert source_commit() == commit
    (tmp_path / "hub_cards" / "card.md").write_text("changed")
    assert source_commit() == f"{commit}+"
