"""train_npid.py through the command line: most runs in this process, those that are killed in others."""

import json
import os
import platform
import resource
import shutil
import signal
import sys
import time
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from scripts import MEASURED, ROOT, SMALL, Forked, fail, run_script, start, succeed, torchrun, train
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioXVector

import modeling_dls  # noqa: F401 (registers the Auto classes)
from datasets_scripts.__main__ import main as export_or_describe
from dls_training.runtime import keep_freed_memory

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
DECODING = ["--dataloader_num_workers", "1"]
RESUME = ["--resume_from_checkpoint", "latest"]


def results_of(folder):
    return json.loads((folder / "all_results.json").read_text())


def assert_same_outcome(folder, other):
    """Two runs ended with the same weights, bank and metrics, bit for bit."""
    for name in ("model.safetensors", "memory_bank.safetensors"):
        first, second = load_file(folder / name), load_file(other / name)
        assert first.keys() == second.keys()
        for key in first:
            assert torch.equal(first[key], second[key]), f"{name}: {key}"
    histories = [
        [{k: v for k, v in entry.items() if k not in MEASURED} for entry in results_of(f)["history"]]
        for f in (folder, other)
    ]
    assert histories[0] == histories[1]


@pytest.fixture(scope="module")
def options(sound_folder):
    return [*SMALL, "--corpus", f"audiofolder={sound_folder}", "--num_train_epochs", "4"]


@pytest.fixture(scope="module")
def uninterrupted(options, tmp_path_factory):
    """A finished run, which a process of its own decodes for, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "npid"
    tracked = [*options[: options.index("--report_to")], *options[options.index("--report_to") + 2 :]]
    log = succeed("train_npid.py", *tracked, *DECODING, "--knn_interval", "2", "--output_dir", folder)
    return folder, log


def test_plain_launch_uses_every_core(options, tmp_path):
    """Through accelerate's launcher, which would leave it one thread."""
    one_step = ["--max_train_steps", "1", *DECODING, "--output_dir", tmp_path / "run"]
    log = succeed("train_npid.py", *options, *one_step, launcher=ACCELERATE)
    first = next(line for line in log.splitlines() if "process(es)" in line)
    assert f"1 process(es) x {len(os.sched_getaffinity(0))} core(s)" in first
    assert "torch.channels_last tensors, decoding in 1 processes" in first


@pytest.mark.gpu
def test_memory_format_and_decoding_change_nothing_but_speed(uninterrupted, options, tmp_path):
    """In fp32 the first loss agrees to rounding."""
    losses = []
    contiguous = ["--memory_format", "contiguous", "--dataloader_num_workers", "0"]
    for name, changes in {"a": DECODING, "b": contiguous}.items():
        common = [*options, "--mixed_precision", "no", "--max_train_steps", "1", *changes]
        log = succeed("train_npid.py", *common, "--output_dir", tmp_path / name)
        assert ("torch.contiguous_format tensors, decoding between steps" in log) == (name == "b")
        losses.append(results_of(tmp_path / name)["history"][1]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def print_page_faults(kept: bool) -> None:
    """Of allocations that the C library could serve from what it was given back."""
    if kept:
        keep_freed_memory()
    for repetition in range(30):
        if repetition == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16 << 20)  # 64 MB
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_kept_memory_is_not_asked_for_again(tmp_path):
    faults = []
    for kept in (False, True):
        with Forked(tmp_path / f"{kept}.log", print_page_faults, kept) as process:
            faults.append(int(process.end()[1]))
    assert faults[1] < faults[0] / 10


def test_output_folder(uninterrupted, sound_folder):
    folder, log = uninterrupted
    results = results_of(folder)
    assert results["task"] == "npid" and results["clips"] == {"audiofolder": 40}
    history = results["history"]
    assert [entry["epoch"] for entry in history] == [0, 1, 2, 3, 4]
    assert [entry["epoch"] for entry in history if "knn_accuracy" in entry] == [0, 2, 4]
    assert all(0 <= entry["knn_accuracy"]["audiofolder"] <= 1 for entry in history if "knn_accuracy" in entry)
    assert "clips/s" in log and "epoch 4, step 20" in log
    bank = load_file(folder / "memory_bank.safetensors")
    assert set(bank) == {"vectors", "Z", "keys"} and bank["vectors"].shape == (40, 128) and bank["Z"] > 0
    torch.testing.assert_close(bank["vectors"].norm(dim=1), torch.ones(40))
    assert len(np.unique(bank["keys"].numpy(), axis=0)) == 40
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-15", "checkpoint-20"]
    assert list((folder / "logs").rglob("events.out.tfevents*"))
    assert f"| 4 | {history[-1]['knn_accuracy']['audiofolder']:.3f} |" in (folder / "README.md").read_text()
    assert not list(folder.glob(".*"))


@pytest.mark.gpu
def test_output_folder_loads(uninterrupted):
    folder = uninterrupted[0]
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    assert extractor.max_length == 22050 and extractor.audio_channels == 1
    inputs = extractor(np.zeros(22050, np.float32), sampling_rate=44100, return_tensors="pt")
    embeddings = AutoModelForAudioXVector.from_pretrained(folder).eval()(**inputs).embeddings
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(1))
    assert AutoModel.from_pretrained(folder).config.depths == [1, 1, 1, 1]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.gpu
def test_signal_saves_and_resumes_exactly(number, code, uninterrupted, options, tmp_path):
    """The signal falls into an epoch; the resumed run ends where the uninterrupted one did, bit for bit."""
    run = tmp_path / "run"
    command = [*options, "--knn_interval", "2", "--output_dir", run]
    stopped = [*command, *DECODING, "--checkpointing_steps", "1"]
    with Forked(tmp_path / "log", train, "train_npid.py", stopped) as process:
        process.wait_for(lambda: list(run.glob("checkpoint-*")))
        process.signal(number)
        ended, log = process.end()
    assert ended == code, log
    assert "Traceback" not in log and "--resume_from_checkpoint latest" in log
    assert not (run / "all_results.json").exists()
    log = succeed("train_npid.py", *command, *RESUME)
    assert "going on from" in log
    assert_same_outcome(run, uninterrupted[0])


def train_and_die_while_saving(options: list) -> int:
    with mock.patch("dls_training.checkpoints.write_json", lambda *_: os.kill(os.getpid(), signal.SIGKILL)):
        return train("train_npid.py", options)


@pytest.mark.gpu
def test_killed_run_resumes_exactly(uninterrupted, options, tmp_path):
    """SIGKILL while it starts, at once after a checkpoint, and while a checkpoint is being written."""
    run = tmp_path / "run"
    command = [*options, "--knn_interval", "2", "--output_dir", run, "--checkpointing_steps", "3"]
    for written in (run.is_dir, lambda: list(run.glob("checkpoint-*"))):
        with Forked(tmp_path / "log", train, "train_npid.py", [*command, *DECODING, *RESUME]) as process:
            process.wait_for(written)
    with Forked(tmp_path / "log", train_and_die_while_saving, [*command, *RESUME]) as process:
        assert process.end()[0] == -signal.SIGKILL
    assert list(run.glob(".checkpoint-*")), "it was not killed while it saved"
    succeed("train_npid.py", *command, *RESUME)
    assert_same_outcome(run, uninterrupted[0])
    assert not list(run.glob(".*")), "leftovers of the killed runs"


@pytest.mark.soak
def test_twenty_kills_change_nothing(sound_folder, tmp_path):
    """SIGKILL at twenty random moments, in start-up too: the outcome is that of an uninterrupted run, bit for bit."""
    common = [
        *SMALL, *DECODING, "--corpus", f"audiofolder={sound_folder}", "--checkpointing_steps", "3",
        "--lr_scheduler_type", "constant", "--knn_interval", "40",
    ]  # fmt: skip
    run, random = tmp_path / "run", np.random.default_rng(0)

    def newest():
        numbers = [path.name.rpartition("-")[2] for path in run.glob("checkpoint-*")]
        return max(map(int, numbers), default=0)

    reached = []
    endless = [*common, "--num_train_epochs", "10000", "--output_dir", run, *RESUME]
    for kill in range(20):
        before = newest()
        process = start([sys.executable, ROOT / "train_npid.py", *endless])
        while kill % 5 and newest() == before:  # every fifth is killed while it starts
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.3 if kill % 5 else 3))
        assert process.poll() is None, process.stdout.read()
        process.kill()
        process.communicate()
        reached.append(newest())
    assert len(set(reached)) >= 16
    ends = ["--max_train_steps", reached[-1] + 4, "--output_dir"]
    succeed("train_npid.py", *common, *ends, run, *RESUME)
    succeed("train_npid.py", *common, *ends, tmp_path / "whole")
    assert_same_outcome(run, tmp_path / "whole")


def train_on_a_full_disk(options: list) -> int:
    """A limit on file sizes, where the next checkpoint's first large file ends."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    return train("train_npid.py", options)


def test_full_disk_leaves_the_last_checkpoint(uninterrupted, options, tmp_path):
    run = tmp_path / "run"
    command = [*options, "--output_dir", run, "--knn_interval", "2"]
    with Forked(tmp_path / "log", train, "train_npid.py", [*command, "--checkpointing_steps", "1"]) as process:
        process.wait_for(lambda: list(run.glob("checkpoint-*")))
    with Forked(tmp_path / "full.log", train_on_a_full_disk, [*command, *RESUME]) as process:
        code, output = process.end()
    assert code == 2 and "Traceback" not in output, output
    assert "cannot be written" in output.splitlines()[-1] and "intact" in output.splitlines()[-1]
    assert not list(run.glob(".*"))
    succeed("train_npid.py", *command, *RESUME)
    assert_same_outcome(run, uninterrupted[0])


@pytest.mark.gpu
def test_new_clips_join(uninterrupted, options, sound_folder, tmp_path):
    """Known clips keep their rows, in whatever order they come; new ones get rows of their own."""
    new = tmp_path / "new"
    for label in ("low", "high"):
        (new / label).mkdir(parents=True)
        for clip in range(6):
            tone = np.sin(np.arange(4000) * (0.1 if label == "low" else 1.3) * (1 + clip / 20))
            soundfile.write(new / label / f"{clip}.wav", 0.1 * tone, 8000)
    common = [*options[2:], "--max_train_steps", "1", "--learning_rate", "0", "--model_name_or_path", uninterrupted[0]]
    grown = ["--corpus", f"audiofolder={new}", *common, "--output_dir", tmp_path / "grown"]
    log = succeed("train_npid.py", *grown)
    assert "40 of 52 clips are known" in log and "12 are new" in log
    results = results_of(tmp_path / "grown")
    assert results["history"][0]["known_clips"] == 40 and results["clips"] == {"audiofolder": 52}
    assert set(results["history"][0]["knn_accuracy"]) == {"audiofolder", "audiofolder-2"}
    old, bank = (load_file(folder / "memory_bank.safetensors") for folder in (uninterrupted[0], tmp_path / "grown"))
    rows = {bytes(key): vector for key, vector in zip(bank["keys"].numpy(), bank["vectors"], strict=True)}
    kept = sum(torch.equal(rows[bytes(k)], v) for k, v in zip(old["keys"].numpy(), old["vectors"], strict=True))
    assert len(rows) == 52 and kept >= 40 - 8  # one step of eight clips moved some of them
    assert bank["Z"].item() == pytest.approx(old["Z"].item() * 52 / 40)


def test_another_temperature_starts_z_anew(uninterrupted, options, tmp_path):
    """As if the bank that is taken over had no Z; its rows are kept all the same."""
    (tmp_path / "no-z").mkdir()
    for path in uninterrupted[0].glob("*.*"):
        shutil.copy(path, tmp_path / "no-z")
    bank = load_file(uninterrupted[0] / "memory_bank.safetensors")
    save_file(bank | {"Z": torch.zeros_like(bank["Z"])}, tmp_path / "no-z" / "memory_bank.safetensors")
    (tmp_path / "no-z" / "record.json").unlink()  # which would tell that this is another bank
    ends = []
    for source in (uninterrupted[0], tmp_path / "no-z"):
        run = [*options[2:], "--max_train_steps", "1", "--nce_t", "0.07", "--model_name_or_path", source]
        log = succeed("train_npid.py", *run, "--output_dir", tmp_path / f"from-{source.name}")
        assert "40 of 40 clips are known" in log
        ends.append(load_file(tmp_path / f"from-{source.name}" / "memory_bank.safetensors"))
    assert ends[0]["Z"] == ends[1]["Z"] != bank["Z"] and torch.equal(ends[0]["vectors"], ends[1]["vectors"])


def test_another_embedding_dim_starts_a_new_bank(uninterrupted, options, tmp_path):
    other = [*options[2:], "--model_name_or_path", uninterrupted[0], "--embedding_dim", "16", "--max_train_steps", "1"]
    log = succeed("train_npid.py", *other, "--output_dir", tmp_path / "run")
    assert "has vectors of 128 numbers, not 16: the memory bank starts anew" in log
    assert load_file(tmp_path / "run" / "memory_bank.safetensors")["vectors"].shape == (40, 16)


def test_a_loss_that_is_no_number_is_reported(options, tmp_path):
    run = [*options, "--learning_rate", "1e30", "--mixed_precision", "no", "--output_dir", tmp_path / "run"]
    message = fail("train_npid.py", *run, "--checkpointing_steps", "1")
    assert "lower --learning_rate" in message
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        weights = load_file(checkpoint / "model.safetensors").values()
        assert all(w.isfinite().all() for w in weights if w.is_floating_point())


def test_resume_skips_an_incomplete_checkpoint(uninterrupted, options, tmp_path):
    """The newest checkpoint lost a file's end: the one before it is taken, and the outcome is the same."""
    run = ["--output_dir", tmp_path / "run", "--knn_interval", "2"]
    succeed("train_npid.py", *options, *run)
    newest = tmp_path / "run" / "checkpoint-20"
    os.truncate(newest / "model.safetensors", 1000)
    log = succeed("train_npid.py", *options, *run, *RESUME)
    assert "checkpoint-20 is incomplete or damaged, and skipped" in log and "epoch 4, step 15" in log
    assert_same_outcome(tmp_path / "run", uninterrupted[0])


def test_longer_run_goes_on_from_a_shorter_one(uninterrupted, options, tmp_path):
    """--max_train_steps may end within an epoch; a later run may go further."""
    constant = [*options, "--lr_scheduler_type", "constant"]
    succeed("train_npid.py", *constant, "--output_dir", tmp_path / "whole")
    succeed("train_npid.py", *constant, "--output_dir", tmp_path / "parts", "--max_train_steps", "8")
    assert results_of(tmp_path / "parts")["history"][-1]["step"] == 8
    resume = ["--resume_from_checkpoint", tmp_path / "parts" / "checkpoint-8"]
    succeed("train_npid.py", *constant, "--output_dir", tmp_path / "parts", *resume)
    assert_same_outcome(tmp_path / "parts", tmp_path / "whole")


def test_every_option(sound_folder, tmp_path):
    """The options that no other test sets, each seen in its effect."""
    log = succeed(
        "train_npid.py", *SMALL, "--corpus", f"audiofolder={sound_folder}", "--output_dir", tmp_path / "run",
        "--objective", "softmax", "--nce_t", "0.2", "--embedding_dim", "16", "--bank_momentum", "0.9",
        "--exclude_fold", "audiofolder=1", "--knn_k", "3", "--audio_channels", "2", "--seed", "7",
        "--gradient_accumulation_steps", "2", "--optimizer", "adamw", "--learning_rate", "1e-3", "--weight_decay", "0",
        "--lr_scheduler_type", "linear", "--mixed_precision", "bf16", "--checkpoints_total_limit", "1",
        "--num_train_epochs", "2", "--skip_unreadable", "--allow_partial",
    )  # fmt: skip
    assert "precision bf16" in log and "20 clips" in log
    results = results_of(tmp_path / "run")
    assert results["clips"] == {"audiofolder": 20} and results["excluded_folds"] == {"audiofolder": [1]}
    assert results["history"][-1]["step"] == 4  # 20 clips in 3 batches, 2 batches a step
    assert results["history"][-1]["learning_rate"] == 0
    assert results["objective"] == "softmax" and results["seed"] == 7
    assert results["knn"] == {"k": 3, "sigma": 0.1}
    bank = load_file(tmp_path / "run" / "memory_bank.safetensors")
    assert bank["vectors"].shape == (20, 16) and bank["Z"] == 0
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "run")
    assert extractor.audio_channels == 2
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


@pytest.mark.gpu
def test_learns_to_tell_clips_apart(sound_folder, tmp_path):
    """Guessing one of 40 clips costs ln 40 = 3.69."""
    succeed(
        "train_npid.py", *SMALL, "--corpus", f"audiofolder={sound_folder}", "--output_dir", tmp_path / "run",
        "--objective", "softmax", "--nce_t", "0.1", "--optimizer", "adamw", "--learning_rate", "2e-3",
        "--num_train_epochs", "20", "--knn_interval", "20",
    )  # fmt: skip
    assert results_of(tmp_path / "run")["history"][-1]["loss"] < 3


@pytest.mark.gpu
def test_nce_options(sound_folder, tmp_path):
    """A running Z and excluded positives change the outcome; K and t are the checkpoint's identity."""
    common = [*SMALL, "--corpus", f"audiofolder={sound_folder}", "--max_train_steps", "4", "--nce_k", "4"]
    variants = {"plain": [], "running": ["--nce_z_momentum", "0.5"], "others": ["--nce_exclude_positive"]}
    banks = {}
    for name, extra in variants.items():
        succeed("train_npid.py", *common, *extra, "--output_dir", tmp_path / name)
        banks[name] = load_file(tmp_path / name / "memory_bank.safetensors")
    assert banks["plain"]["Z"] != banks["running"]["Z"]
    assert not torch.equal(banks["plain"]["vectors"], banks["others"]["vectors"])
    resume = ["--output_dir", tmp_path / "plain", "--resume_from_checkpoint", "latest", "--nce_k", "8"]
    assert "nce_k is 8 but was 4" in fail("train_npid.py", *common, *resume)


def test_trains_on_an_export(sound_folder, tmp_path):
    """--corpus NAME=folder takes what `python -m datasets_scripts export` wrote; the clips are the same ones."""
    export = ["export", "audiofolder", "--data_dir", str(sound_folder), "--output_dir", str(tmp_path / "export")]
    assert export_or_describe(export) == 0
    keys = []
    for source in (sound_folder, tmp_path / "export"):
        run = tmp_path / f"run-{len(keys)}"
        common = [*SMALL, "--corpus", f"audiofolder={source}", "--max_train_steps", "1", "--output_dir", run]
        succeed("train_npid.py", *common)
        keys.append(load_file(run / "memory_bank.safetensors")["keys"])
    assert torch.equal(*keys)


def test_starts_from_a_checkpoint(uninterrupted, options, tmp_path):
    one_step = ["--max_train_steps", "1", "--learning_rate", "0", "--weight_decay", "0"]
    without_preset = [*options[2:], *one_step, "--model_name_or_path", uninterrupted[0]]
    succeed("train_npid.py", *without_preset, "--output_dir", tmp_path / "run")
    before, after = (load_file(f / "model.safetensors") for f in (uninterrupted[0], tmp_path / "run"))
    assert torch.equal(before["projection.weight"], after["projection.weight"])


def test_two_processes_share_one_bank(sound_folder, tmp_path):
    """torchrun over gloo: one run, one bank, one set of files."""
    log = succeed(
        "train_npid.py", *SMALL, "--corpus", f"audiofolder={sound_folder}", "--num_train_epochs", "2",
        "--output_dir", tmp_path / "run", launcher=torchrun(2), env={"ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert "2 process(es) x" in log
    results = results_of(tmp_path / "run")
    assert results["environment"]["processes"] == 2 and results["history"][-1]["step"] == 6  # 40 clips, 16 a step
    assert load_file(tmp_path / "run" / "memory_bank.safetensors")["vectors"].shape == (40, 128)


@pytest.mark.slow
# A processor without bf16 takes minutes for eight clips.
@pytest.mark.parametrize(("precision", "clips"), [("no", 8), ("bf16", 2)])
def test_esresnet50_takes_a_step_at_full_resolution(precision, clips, tmp_path):
    random = np.random.default_rng(0)
    for clip in range(clips):
        soundfile.write(tmp_path / f"{clip}.wav", 0.1 * random.standard_normal(220500), 44100)
    succeed(
        "train_npid.py", "--corpus", f"audiofolder={tmp_path}", "--max_train_steps", "1", "--report_to", "none",
        "--per_device_train_batch_size", clips, "--mixed_precision", precision, "--output_dir", tmp_path / "run",
    )  # fmt: skip
    entry = results_of(tmp_path / "run")["history"][-1]
    assert entry["step"] == 1 and np.isfinite(entry["loss"])
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "run")
    assert (extractor.spec_height, extractor.spec_width) == (None, None)


def test_help_explains_defaults(capsys):
    assert run_script("train_npid.py", "--help")[0] == 0
    text = capsys.readouterr().out
    assert "The defaults are those of --recipe paper" in text and "--nce_t" in text
    assert "--recipe recommended stands for\n  --preset small_mel" in text
    assert "--spec_height 64" in text.partition("--recipe thorough stands for")[2]


def test_recipes(sound_folder, tmp_path):
    """Both scripts, one after the other; an option that is given prevails, and a checkpoint brings its network."""
    quick = ["--recipe", "recommended", "--corpus", f"audiofolder={sound_folder}", "--clip_seconds", "0.5"]
    quick += ["--max_train_steps", "2", "--report_to", "none"]
    succeed("train_npid.py", *quick, "--learning_rate", "0.002", "--output_dir", tmp_path / "npid")
    options = results_of(tmp_path / "npid")["options"]
    assert (options["recipe"], options["objective"], options["nce_t"]) == ("recommended", "softmax", 0.1)
    assert (options["preset"], options["learning_rate"], options["warmup_steps"]) == ("small_mel", 0.002, 0.3)
    assert (options["nce_k"], options["keep_spectrograms"]) == (64, True)
    config = json.loads((tmp_path / "npid" / "config.json").read_text())
    assert config["pooling"] == "statistics" and config["pooler_act"] is None
    succeed(
        "train_classification.py", *quick, "--model_name_or_path", tmp_path / "npid", "--fold", "1",
        "--pooler_act", "asinh", "--output_dir", tmp_path / "classification",
    )  # fmt: skip
    # It has no weights, so that a checkpoint can be given one.
    assert json.loads((tmp_path / "classification" / "config.json").read_text())["pooler_act"] == "asinh"
    options = results_of(tmp_path / "classification")["options"]
    assert (options["preset"], options["classifier_init"], options["augmentation_strength"]) == (None, "ridge", 0.0)
    signal = json.loads((tmp_path / "classification" / "preprocessor_config.json").read_text())
    assert signal["frequency_scale"] == "mel"
    # What a recipe says of spectrograms is not said of a checkpoint's.
    thorough = [*quick, "--recipe", "thorough"]
    succeed("train_npid.py", *thorough, "--output_dir", tmp_path / "thorough")
    for source, rows in (("npid", 32), ("thorough", 64)):
        output = tmp_path / f"from {source}"
        start = ["--model_name_or_path", tmp_path / source, "--fold", "1"]
        succeed("train_classification.py", *thorough, *start, "--output_dir", output)
        assert json.loads((output / "preprocessor_config.json").read_text())["spec_height"] == rows
        assert json.loads((output / "config.json").read_text())["pooler_act"] == "asinh"
    changed = ["--pooling", "mean", "--frequency_scale", "linear", "--spec_height", "16", "--spec_width", "40"]
    changed += ["--embedding_size", "24", "--hidden_sizes", "16,24,32,40"]
    succeed("train_npid.py", *quick, *changed, "--output_dir", tmp_path / "changed")
    config, signal = (
        json.loads((tmp_path / "changed" / f"{name}.json").read_text()) for name in ("config", "preprocessor_config")
    )
    assert (
        config["pooling"] == "mean" and config["embedding_size"] == 24 and config["hidden_sizes"] == [16, 24, 32, 40]
    )
    assert "--hidden_sizes 16,24,32,40" in results_of(tmp_path / "changed")["command"]
    assert [signal[name] for name in ("frequency_scale", "spec_height", "spec_width")] == ["linear", 16, 40]
    nowhere = ["--output_dir", tmp_path / "never"]
    for option, value, own in (("--pooling", "mean", "statistics"), ("--spec_height", "16", "32")):
        start = ["--model_name_or_path", tmp_path / "npid", *nowhere]
        message = fail("train_npid.py", *quick, option, value, *start)
        assert f"{option} {value}" in message and f"has {own}, which it was trained with" in message
        succeed("train_npid.py", *quick, option, own, *start[:2], "--output_dir", tmp_path / f"again{option}")
    message = fail("train_npid.py", *quick, "--preset", "esresnet50", "--frequency_scale", "mel", *nowhere)
    assert "--preset esresnet50 with frequency_scale changed" in message and "spec_height" in message
    message = fail("train_npid.py", *quick, "--hidden_sizes", "16,24", *nowhere)
    assert "--preset small_mel with hidden_sizes changed" in message and "equally long" in message
    # What no longer goes together is told with the way out.
    assert "--no-keep_spectrograms" in fail("train_npid.py", *quick, "--augmentation", "both")
    assert "--warmup_steps 0" in fail("train_npid.py", *quick, "--lr_scheduler_type", "constant")
    message = fail("train_npid.py", *quick, "--augmentation_strength", "2")
    assert "--augmentation_strength" in message and "between 0 and 1.5" in message


# Bad input


def test_corpus_problems(tmp_path):
    (tmp_path / "empty").mkdir()
    output = ["--output_dir", tmp_path / "run"]
    assert "nowhere" in fail("train_npid.py", *SMALL, "--corpus", f"esc10={tmp_path / 'nowhere'}", *output)
    assert "empty" in fail("train_npid.py", *SMALL, "--corpus", f"audiofolder={tmp_path / 'empty'}", *output)
    assert "layout" in fail("train_npid.py", *SMALL, "--corpus", f"esc50={tmp_path / 'empty'}", *output)
    assert "esc10" in fail("train_npid.py", *SMALL, "--corpus", "fsd50k=/data", *output)


def test_unreadable_files_are_named_or_skipped(sound_folder, tmp_path):
    """One NaN, one empty and one truncated file among good ones."""
    for path in sorted(sound_folder.glob("*.wav"))[:20]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "empty.wav").touch()
    (tmp_path / "cut.wav").write_bytes((tmp_path / "00.wav").read_bytes()[:3000])
    soundfile.write(tmp_path / "nan.wav", np.full(4000, np.nan, np.float32), 8000, subtype="FLOAT")
    common = [
        *SMALL,
        "--corpus",
        f"audiofolder={tmp_path}",
        "--max_train_steps",
        "1",
        *DECODING,
        "--output_dir",
        tmp_path / "run",
    ]
    message = run_script("train_npid.py", *common)[1]
    assert all(name in message for name in ("empty.wav", "cut.wav", "nan.wav")) and "Traceback" not in message
    log = succeed("train_npid.py", *common, "--skip_unreadable")
    assert "nan.wav" in log
    skipped = results_of(tmp_path / "run")["skipped_files"]["audiofolder"]
    assert [line.partition(": ")[0] for line in skipped] == ["cut.wav", "empty.wav", "nan.wav"]


def test_output_dir_problems(options, uninterrupted, tmp_path):
    (tmp_path / "file").write_text("precious")
    assert "--output_dir" in fail("train_npid.py", *options, "--output_dir", tmp_path / "file")
    assert "--output_dir" in fail("train_npid.py", *options, "--output_dir", tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "precious"
    before = (uninterrupted[0] / "model.safetensors").read_bytes()
    assert "holds an earlier run" in fail("train_npid.py", *options, "--output_dir", uninterrupted[0])
    assert (uninterrupted[0] / "model.safetensors").read_bytes() == before


def test_checkpoint_problems(options, uninterrupted, tmp_path):
    output = ["--output_dir", tmp_path / "run"]
    other = ["--preset", "esresnet18", "--model_name_or_path", uninterrupted[0]]
    assert "another preset" in fail("train_npid.py", *options, *other, *output)
    assert "nowhere" in fail("train_npid.py", *options[2:], "--model_name_or_path", tmp_path / "nowhere", *output)
    assert "not a complete checkpoint" in fail(
        "train_npid.py", *options, *output, "--resume_from_checkpoint", tmp_path
    )
    (tmp_path / "run").mkdir(exist_ok=True)
    resume = ["--resume_from_checkpoint", uninterrupted[0] / "checkpoint-20", *output]
    assert "seed is 9 but was 0" in fail("train_npid.py", *options, "--seed", "9", *resume)
    other_network = ["--preset", "esresnet18", *options[2:]]
    assert "belongs to a different run" in fail("train_npid.py", *other_network, *resume)


@pytest.mark.parametrize(
    "wrong, named",
    [
        (["--clip_seconds", "0"], "--clip_seconds"),
        (["--clip_seconds", "0.051", "--exclude_fold", "9"], "--exclude_fold 9"),
        (["--per_device_train_batch_size", "1"], "--per_device_train_batch_size"),
        (["--num_train_epochs", "many"], "--num_train_epochs"),
        (["--bank_momentum", "1"], "--bank_momentum"),
        (["--mixed_precision", "fp16"], "--mixed_precision fp16"),
        (["--checkpointing_steps", "0"], "--checkpointing_steps"),
        (["--warmup_steps", "5"], "--warmup_steps"),
    ],
)
def test_wrong_options_are_named(wrong, named, options, tmp_path):
    assert named in fail("train_npid.py", *options, *wrong, "--output_dir", tmp_path / "run")
