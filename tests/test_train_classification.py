"""train_classification.py through the command line: most runs in this process, those that are killed in others."""

import gc
import json
import multiprocessing
import shutil

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import transformers
from packaging import version
from safetensors.torch import load_file
from scripts import SMALL, Forked, fail, succeed, train
from timm.models.densenet import DenseNet
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, pipeline

from datasets_scripts import ClipIdentities, decode_audio, load_corpus, train_test_folds
from dls_sounds.page.analysis import TrainedFolder
from dls_training.closed_form import ridge_classifier, self_trained_classifier
from dls_training.folds import make_folds
from dls_training.record import Record, Stage
from hub_cards.publishing import finished_run
from modeling_dls import ESResNetConfig
from modeling_dls.convert_esresnet_checkpoint import main as convert_imagenet
from train_classification import arm_of, losses


def results_of(folder):
    return json.loads((folder / "all_results.json").read_text())


@pytest.fixture(scope="module")
def options(sound_folder):
    """In fp32, so that a test can compute the same predictions a clip at a time."""
    common = [*SMALL, "--corpus", f"audiofolder={sound_folder}", "--mixed_precision", "no"]
    return [*common, "--num_train_epochs", "3", "--learning_rate", "3e-3"]


@pytest.fixture(scope="module")
def pretrained(sound_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained") / "npid"
    common = [*SMALL, "--corpus", f"audiofolder={sound_folder}", "--num_train_epochs", "2"]
    # In this process, which goes on, the run's decoding processes would be left to the garbage collector.
    succeed("train_npid.py", *common, "--dataloader_num_workers", "0", "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def all_folds(options, pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "all"
    succeed("train_classification.py", *options, "--model_name_or_path", pretrained, "--output_dir", folder)
    return folder


@pytest.mark.gpu
def test_cross_validation(all_folds, sound_folder):
    results = results_of(all_folds)
    assert results["arm"] == "npid" and results["corpus"] == "audiofolder" and results["seed"] == 0
    assert results["command"].startswith("train_classification.py --preset tiny")
    assert [stage.facts["task"] for stage in Record.read(all_folds).stages] == ["npid", "classification"]
    assert Record.read(all_folds).stages[0].facts["clips"] == {"audiofolder": 40}
    curves = np.array([results["folds"][fold]["accuracy_per_epoch"] for fold in ("1", "2")])
    assert curves.shape == (2, 3) and curves.min() >= 0 and curves.max() <= 1
    np.testing.assert_allclose(results["mean_accuracy_per_epoch"], curves.mean(axis=0))
    np.testing.assert_allclose(results["std_accuracy_per_epoch"], curves.std(axis=0))
    root, first = (load_file(all_folds / name / "model.safetensors") for name in (".", "fold-1"))
    assert all(torch.equal(root[key], first[key]) for key in root)
    card = (all_folds / "README.md").read_text()
    assert "fold 1 held out" in card and f"{curves.mean(axis=0)[-1]:.3f} ±" in card


def test_reported_accuracy_is_that_of_the_saved_model(all_folds, sound_folder):
    """Scored again, a clip at a time, with nothing of the training code."""
    corpus = load_corpus("audiofolder", sound_folder)
    for fold in (1, 2):
        accuracy = accuracy_clip_by_clip(all_folds / f"fold-{fold}", train_test_folds(corpus, fold)[1])
        assert accuracy == results_of(all_folds)["folds"][str(fold)]["accuracy_per_epoch"][-1]


def clip_by_clip(folder, clips):
    """A saved model, and what its backbone makes of each clip as its feature extractor gives it: (clips, size)."""
    model = AutoModelForAudioClassification.from_pretrained(folder).eval()
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    features = []
    for clip in clips:
        samples, rate = decode_audio(clip["audio"])
        samples = np.repeat(samples[0], 44100 // rate) if rate == 44100 else resample(samples, rate)
        with torch.no_grad():
            found = model.esresnet(**extractor(samples, sampling_rate=44100, return_tensors="pt"))
        features.append(found.pooler_output[0])
    return model, torch.stack(features)


def accuracy_clip_by_clip(folder, test):
    model, features = clip_by_clip(folder, test)
    return (model.classifier(features).argmax(dim=1).numpy() == test["label"][:]).mean()


def resample(samples, rate):
    import torchaudio

    return torchaudio.functional.resample(torch.from_numpy(samples), rate, 44100)


@pytest.mark.gpu
def test_learns(options, tmp_path):
    """Four classes an octave apart are learned from scratch within a few epochs."""
    succeed(
        "train_classification.py", *options, "--fold", "2", "--num_train_epochs", "20",
        "--lr_scheduler_type", "cosine", "--output_dir", tmp_path / "run",
    )  # fmt: skip
    results = results_of(tmp_path / "run")
    assert results["arm"] == "scratch" and list(results["folds"]) == ["2"]
    assert results["mean_accuracy_per_epoch"][-1] >= 0.8
    model = AutoModelForAudioClassification.from_pretrained(tmp_path / "run")
    assert model.config.id2label == {i: f"class-{i}" for i in range(4)}


@pytest.mark.gpu
def test_killed_within_and_between_folds(options, pretrained, all_folds, tmp_path):
    """Resumed, every fold ends as in the uninterrupted run; a finished fold is not run again."""
    command = [*options, "--model_name_or_path", pretrained, "--output_dir", tmp_path / "run"]
    command += ["--checkpointing_steps", "1"]
    resume = ["--resume_from_checkpoint", "latest"]
    for wanted in ("fold-1/checkpoint-2", "fold-2/checkpoint-2"):
        with Forked(tmp_path / "log", train, "train_classification.py", [*command, *resume]) as process:
            process.wait_for((tmp_path / "run" / wanted).exists)
    log = succeed("train_classification.py", *command, *resume)
    assert "fold 1 was finished before" in log
    for fold in ("fold-1", "fold-2"):
        first, second = (load_file(f / fold / "model.safetensors") for f in (tmp_path / "run", all_folds))
        assert all(torch.equal(first[key], second[key]) for key in first)
    for key in ("mean_accuracy_per_epoch", "std_accuracy_per_epoch"):
        assert results_of(tmp_path / "run")[key] == results_of(all_folds)[key]


@pytest.mark.gpu
def test_precise_batch_norm(options, sound_folder, tmp_path):
    """What is scored has the statistics that are saved; the running ones are scored beside, and trained on with."""
    common = [*options, "--fold", "2", "--learning_rate", "1e-3", "--augmentation", "spectrogram"]
    command = [*common, "--precise_bn", "--checkpointing_steps", "1", "--output_dir", tmp_path / "precise"]
    with Forked(tmp_path / "log", train, "train_classification.py", command) as process:
        process.wait_for((tmp_path / "precise" / "checkpoint-4").exists)
    succeed("train_classification.py", *command, "--resume_from_checkpoint", "latest")
    succeed("train_classification.py", *common, "--output_dir", tmp_path / "running")
    found, running = results_of(tmp_path / "precise"), results_of(tmp_path / "running")
    assert found["folds"]["2"]["running_accuracy_per_epoch"] == running["folds"]["2"]["accuracy_per_epoch"]
    assert found["mean_running_accuracy_per_epoch"] == running["mean_accuracy_per_epoch"]
    test = train_test_folds(load_corpus("audiofolder", sound_folder), 2)[1]
    assert accuracy_clip_by_clip(tmp_path / "precise", test) == found["mean_accuracy_per_epoch"][-1]
    precise, lagging = (load_file(tmp_path / name / "model.safetensors") for name in ("precise", "running"))
    differing = {key.rpartition(".")[2] for key in precise if not torch.equal(precise[key], lagging[key])}
    assert differing <= {"running_mean", "running_var", "num_batches_tracked"} and "running_var" in differing


def test_precise_batch_norm_is_that_of_all_training_clips(options, sound_folder, tmp_path):
    """Of a single batch of all of them, the first batch norm's mean is that of what the stem's convolution gives."""
    common = [*options, "--augmentation_strength", "0", "--augmentation", "spectrogram", "--keep_spectrograms"]
    command = [*common, "--per_device_train_batch_size", "40", "--num_train_epochs", "1", "--fold", "none"]
    succeed("train_classification.py", *command, "--precise_bn", "--output_dir", tmp_path / "run")
    model = AutoModelForAudioClassification.from_pretrained(tmp_path / "run").eval()
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "run")
    outputs = []
    stem = model.esresnet.embedder.embedder
    stem.convolution.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    for clip in load_corpus("audiofolder", sound_folder):
        samples, rate = decode_audio(clip["audio"])
        samples = samples[0] if rate == 44100 else resample(samples, rate)
        values = extractor(samples, sampling_rate=44100, return_tensors="pt")["input_values"]
        with torch.no_grad():
            model(values)
    mean = torch.cat(outputs).mean(dim=(0, 2, 3))
    # Half of the clips are played backwards in training, which a convolution with strides notices.
    torch.testing.assert_close(stem.normalization.running_mean, mean, atol=0.05 * mean.std().item(), rtol=0)


def test_precise_batch_norm_has_something_to_do(tmp_path):
    for kept in ("--freeze_backbone", "--freeze_batch_norm"):
        message = fail("train_classification.py", "--model_name_or_path", tmp_path, kept, "--precise_bn")
        assert f"--precise_bn estimates the statistics that {kept} keeps" in message


def test_init_scratch_keeps_only_the_settings(options, pretrained, tmp_path):
    """The same network and signal settings as the checkpoint's, other weights: those of a run without checkpoint."""
    checkpoint = shutil.copytree(pretrained, tmp_path / "imagenet")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"initial_weights": "imagenet"}))
    common = [*options, "--fold", "1", "--max_train_steps", "2"]
    scratch = ["--model_name_or_path", checkpoint, "--init", "scratch"]
    succeed("train_classification.py", *common, *scratch, "--output_dir", tmp_path / "a")
    succeed("train_classification.py", *common, "--output_dir", tmp_path / "b")
    assert results_of(tmp_path / "a")["arm"] == "scratch" and len(Record.read(tmp_path / "a").stages) == 1
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert AutoModelForAudioClassification.from_pretrained(tmp_path / "a").config.initial_weights is None


def test_few_labels(options, tmp_path):
    """Two clips of each of four classes are trained on, and all of the held-out fold is scored."""
    few = ["--fold", "1", "--labels_per_class", "2", "--max_train_steps", "1"]
    log = succeed("train_classification.py", *options, *few, "--output_dir", tmp_path / "run")
    assert "8 clips to train on, 20 held out" in log
    assert results_of(tmp_path / "run")["folds"]["1"]["training_clips"] == 8


@pytest.mark.gpu
def test_freeze_backbone(options, pretrained, tmp_path):
    """Only the classifier moves: not even the backbone's batch-norm statistics do."""
    frozen = ["--model_name_or_path", pretrained, "--freeze_backbone", "--fold", "1"]
    succeed("train_classification.py", *options, *frozen, "--output_dir", tmp_path / "run")
    before, after = load_file(pretrained / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    backbone = [key for key in after if key.startswith("esresnet.")]
    assert backbone and all(torch.equal(before[key], after[key]) for key in backbone)


def test_decoding_processes_end_with_their_fold(options, tmp_path, monkeypatch):
    """Where they were left to the garbage collector, torch waited five seconds for each."""
    before = set(multiprocessing.active_children())
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)  # accelerate calls it
    gc.disable()
    try:
        succeed("train_classification.py", *options, "--dataloader_num_workers", "2", "--output_dir", tmp_path / "run")
        assert set(multiprocessing.active_children()) <= before
    finally:
        gc.enable()


def test_reinit_stages(options, pretrained, tmp_path):
    """The last stage and the attention after it start anew, by the seed; all before is the checkpoint's."""
    anew = [
        "--model_name_or_path", pretrained, "--reinit_stages", "1", "--freeze_backbone", "--fold", "1",
        "--max_train_steps", "1",
    ]  # fmt: skip
    for name in ("run", "again"):
        succeed("train_classification.py", *options, *anew, "--output_dir", tmp_path / name)
    before, *after = (
        load_file(folder / "model.safetensors") for folder in (pretrained, tmp_path / "run", tmp_path / "again")
    )
    last = f"esresnet.stages.{len(ESResNetConfig.from_pretrained(pretrained).depths) - 1}."
    kernels = [name for name, weight in before.items() if name.startswith("esresnet.") and weight.ndim == 4]
    changed = [name for name in kernels if not torch.equal(before[name], after[0][name])]
    assert changed and changed == [name for name in kernels if name.startswith((last, "esresnet.attention."))]
    assert all(torch.equal(weight, after[1][name]) for name, weight in after[0].items())


def test_fine_tunes_for_another_label_set(options, all_folds, tmp_path):
    """A classifier of four classes is a start for three."""
    corpus = options[options.index("--corpus") + 1].partition("=")[2]
    sounds = tmp_path / "sounds"
    shutil.copytree(corpus, sounds)
    lines = (sounds / "metadata.csv").read_text().splitlines()
    kept = [line for line in lines if "class-3" not in line]
    for line in set(lines) - set(kept):
        (sounds / line.split(",")[0]).unlink()
    (sounds / "metadata.csv").write_text("\n".join(kept) + "\n")
    succeed(
        "train_classification.py", *SMALL, "--corpus", f"audiofolder={sounds}", "--model_name_or_path", all_folds,
        "--fold", "1", "--max_train_steps", "1", "--output_dir", tmp_path / "run",
    )  # fmt: skip
    assert AutoModelForAudioClassification.from_pretrained(tmp_path / "run").config.num_labels == 3


def test_imagenets_densenet_is_pretrained_and_fine_tuned(sound_folder, tmp_path):
    """Each takes what the one before wrote, as the preset's network, and says where its weights came from."""
    torch.save(DenseNet(growth_rate=16).state_dict(), tmp_path / "densenet.pth")
    arguments = [tmp_path / "densenet.pth", tmp_path / "imagenet", "--preset", "densenet_small"]
    assert convert_imagenet([str(argument) for argument in arguments]) == 0
    options = [*SMALL, "--preset", "densenet_small", "--corpus", f"audiofolder={sound_folder}"]
    options += ["--max_train_steps", "2"]
    from_imagenet = ["--model_name_or_path", tmp_path / "imagenet", "--output_dir", tmp_path / "npid"]
    succeed("train_npid.py", *options, *from_imagenet, "--learning_rate", "0")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("imagenet", "npid"))
    learnt = [key for key in first if key.endswith(("weight", "bias"))]
    assert learnt and all(torch.equal(first[key], second[f"esresnet.{key}"]) for key in learnt)
    from_npid = ["--model_name_or_path", tmp_path / "npid", "--fold", "1", "--output_dir", tmp_path / "classifier"]
    succeed("train_classification.py", *options, *from_npid)
    assert results_of(tmp_path / "classifier")["arm"] == "imagenet+npid"
    model = AutoModelForAudioClassification.from_pretrained(tmp_path / "classifier")
    assert model.config.growth_rate == 16 and model.config.num_labels == 4
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "classifier")
    assert extractor.spec_width == 128 and extractor.do_normalize
    for name in ("npid", "classifier"):
        assert "first weights came from ImageNet." in (tmp_path / name / "README.md").read_text()
    assert "Pre-trained on unlabelled audio" in (tmp_path / "classifier" / "README.md").read_text()


@pytest.mark.parametrize(
    ("init", "initial_weights", "task", "arm"),
    [
        ("scratch", None, None, "scratch"),
        ("pretrained", None, None, "pretrained"),
        ("pretrained", None, "npid", "npid"),
        ("pretrained", "imagenet", None, "imagenet"),
        ("pretrained", "imagenet", "npid", "imagenet+npid"),
    ],
)
def test_the_arm_is_what_the_network_had_learned_before(init, initial_weights, task, arm):
    config, nothing = ESResNetConfig(initial_weights=initial_weights), np.zeros((0, 16), np.uint8)
    clips = ClipIdentities(nothing, np.zeros((0, 2)), nothing)
    parent = Record((Stage({"task": task}, heard=clips if task else None),))
    assert arm_of(init, config, parent) == arm


def test_bad_input(options, sound_folder, tmp_path):
    script, output = "train_classification.py", ["--output_dir", tmp_path / "run"]
    assert "--fold 7" in fail(script, *options, "--fold", "7", *output)
    nowhere = ["--model_name_or_path", tmp_path / "nowhere"]
    assert "nowhere: there is no such folder" in fail(script, *options, *nowhere, *output)
    assert "--init" in fail(script, *options, "--init", "pretrained", *output)
    assert "--freeze_backbone" in fail(script, *options, "--freeze_backbone", *output)
    assert "--reinit_stages" in fail(script, *options, "--reinit_stages", "1", *output)
    assert "--corpus" in fail(script, *options, "--corpus", "synthetic", *output)
    unlabelled = tmp_path / "unlabelled"
    unlabelled.mkdir()
    for path in sound_folder.glob("*.wav"):
        shutil.copy(path, unlabelled)
    without_corpus = [*SMALL, "--corpus", f"audiofolder={unlabelled}"]
    assert "no labels" in fail(script, *without_corpus, *output)
    for label in "abc":
        (unlabelled / label).mkdir()
    for i, path in enumerate(sorted(unlabelled.glob("*.wav"))):
        path.rename(unlabelled / ("ab"[i % 2] if i else "c") / path.name)
    one_of_c = fail(script, *without_corpus, *output)
    assert "all clips of c are from one recording" in one_of_c and "--fold none" in one_of_c
    assert "--label_pattern" in fail(script, "--no_folder_labels", *output)
    assert "at least 1, not 0" in fail(script, *options, "--fold", "0", *output)


def by_class(sound_folder, folder, names=lambda clip: f"{clip:02d}"):
    """The same sounds without a table: a folder for each class."""
    for clip in range(40):
        path = folder / f"class-{clip % 4}" / f"{names(clip)}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sound_folder / f"{clip:02d}.wav", path)
    return folder


def test_everything_is_trained_on_and_nothing_measured(pretrained, sound_folder, tmp_path):
    """With --fold none, also resumed: a model, results, a card and a record that claim no accuracy."""
    sounds = by_class(sound_folder, tmp_path / "sounds")
    options = [*SMALL, "--corpus", f"audiofolder={sounds}", "--model_name_or_path", pretrained, "--fold", "none"]
    options += ["--mixed_precision", "no"]
    options += ["--classifier_init", "ridge", "--num_train_epochs", "2", "--checkpointing_steps", "1"]
    command = [*options, "--output_dir", tmp_path / "run"]
    with Forked(tmp_path / "log", train, "train_classification.py", command) as process:
        process.wait_for((tmp_path / "run" / "checkpoint-6").exists)
    log = succeed("train_classification.py", *command, "--resume_from_checkpoint", "latest")
    assert "all clips: 40 clips to train on, none held out" in log and "ccuracy" not in log
    results = results_of(tmp_path / "run")
    assert results["folds"] == {} and results["training_clips"] == 40 and len(results["loss_per_epoch"]) == 2
    assert not [key for key in results if "accuracy" in key or "confusion" in key or key.startswith("test")]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Nothing was measured: all 40 labelled clips were trained on" in card and "model-index" not in card
    assert "held-out" not in card and "0 clips" not in card
    succeed("train_classification.py", *options, "--output_dir", tmp_path / "whole")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert finished_run(tmp_path / "run")[0] == results
    shown = TrainedFolder(tmp_path / "run", [])
    assert len(shown.class_names) == 4 and len(shown.examples) == 4 and "class-1" in shown.examples[1]
    log = succeed("train_classification.py", *command, "--resume_from_checkpoint", "latest")
    assert "all clips was finished before" in log
    # What it learned from cannot be what it is measured on.
    measured = [*SMALL, "--corpus", f"audiofolder={sounds}", "--model_name_or_path", tmp_path / "run"]
    assert "was trained on held-out clips" in fail(
        "train_classification.py", *measured, "--output_dir", tmp_path / "m"
    )
    assert "belongs to a different run" in fail(
        "train_classification.py", *command, "--fold", "1", "--resume_from_checkpoint", "latest"
    )


def test_folds_are_made_where_there_are_none(sound_folder, tmp_path):
    """Grouped by recording, said in log, results and card; clips that have no label are left out."""
    sounds = by_class(sound_folder, tmp_path / "sounds", lambda clip: f"{'xyz'[clip // 4 % 3]}-{clip:02d}")
    (sounds / "labels.csv").write_text(
        "file_name,start,end,label\n"
        + "".join(f"{path.relative_to(sounds)},,,{path.parent.name}\n" for path in sorted(sounds.glob("*/*"))[:-2])
        + "class-3/x-39.wav,0.1,0.3,class-3\n"
    )
    options = [
        *SMALL,
        "--corpus",
        f"audiofolder={sounds}",
        "--label_pattern",
        "(?P<source>[xyz])-",
        "--max_train_steps",
    ]
    log = succeed("train_classification.py", *options, "1", "--output_dir", tmp_path / "run")
    assert "audiofolder has no folds: 3 were made, stratified by class and grouped by recording" in log
    assert "39 clips have labels, 2 have none" in log
    results = results_of(tmp_path / "run")
    assert results["made_folds"] == 3 and list(results["folds"]) == ["1", "2", "3"]
    assert results["left_out"] == {"without_label": 2}
    assert sum(fold["test_clips"] for fold in results["folds"].values()) == 39
    card = (tmp_path / "run" / "README.md").read_text()
    assert "3 were made, stratified by class" in card and "Left out: 2 clips without a label." in card
    again = ["--resume_from_checkpoint", "latest", "--output_dir", tmp_path / "run"]
    assert "fold 3 was finished before" in succeed("train_classification.py", *options, "1", *again)
    few = ["--fold", "4", "--output_dir", tmp_path / "four"]
    assert "--fold 4: audiofolder has folds 1, 2, 3" in fail("train_classification.py", *options, "1", *few)


@pytest.mark.parametrize("seed", range(20))
def test_made_folds_keep_recordings_together_and_every_class_in_several(seed):
    random = np.random.default_rng(seed)
    recordings = np.concatenate([np.arange(4), np.arange(4), random.integers(0, 4, 12)])  # a class each
    sources = random.permutation(np.repeat(np.arange(20), random.integers(1, 9, 20)))
    folds = make_folds(recordings[sources], sources.astype(str), list("abcd"), "mine")
    assert all(len(set(folds[sources == source])) == 1 for source in range(20))
    assert all(len(set(folds[recordings[sources] == label])) > 1 for label in range(4))
    counts = [len(set(sources[recordings[sources] == label])) for label in range(4)]
    assert set(folds) <= set(range(1, min(5, *counts) + 1)) and len(set(folds)) > 1
    np.testing.assert_array_equal(folds, make_folds(recordings[sources], sources.astype(str), list("abcd"), "mine"))


def test_a_blank_fold_is_always_trained_on_and_a_class_in_one_fold_alone_is_refused(sound_folder, tmp_path):
    sounds = shutil.copytree(sound_folder, tmp_path / "sounds")
    lines = (sounds / "metadata.csv").read_text().splitlines()
    (sounds / "metadata.csv").write_text("\n".join([*lines[:-8], *(line[:-1] for line in lines[-8:])]) + "\n")
    options = [*SMALL, "--corpus", f"audiofolder={sounds}", "--max_train_steps", "1"]
    log = succeed("train_classification.py", *options, "--output_dir", tmp_path / "run")
    assert "fold 1: 24 clips to train on, 16 held out" in log and list(results_of(tmp_path / "run")["folds"]) == [
        "1",
        "2",
    ]
    text = (sounds / "metadata.csv").read_text().replace("class-3,1", "class-3,2").replace("class-3,\n", "class-3,2\n")
    (sounds / "metadata.csv").write_text(text)
    message = fail("train_classification.py", *options, "--output_dir", tmp_path / "other")
    assert "fold 2: all clips of class-3 are in this fold" in message and "--fold none" in message


# --- Yes or no for each class ---

HEADER = "file_name,start,end,label,present\n"


@pytest.fixture(scope="module")
def nights(tmp_path_factory):
    """Eight recordings of 4 s: pulses of either of two pitches, both, neither; and a stretch that is not of one."""
    folder, random, rows = tmp_path_factory.mktemp("nights") / "in", np.random.default_rng(0), []
    folder.mkdir()
    time = np.arange(11025) / 22050
    pulses = {
        name: 0.3 * np.sin(2 * np.pi * pitch * time) * (np.sin(2 * np.pi * 6 * time) > 0)
        for name, pitch in (("owl", 400), ("frog", 3000))
    }
    for night in range(8):
        sound = 0.01 * random.standard_normal(8 * 11025)
        for place, heard in enumerate([("owl",), ("frog",), ("owl", "frog"), (), ("owl",), ("frog",), (), ("frog",)]):
            for name in heard:
                sound[place * 11025 : (place + 1) * 11025] += pulses[name]
            lines = [(name, 1) for name in heard or ("Background",)] if place < 7 else [("owl", 0)]
            rows += [f"{night}.wav,{place / 2},{place / 2 + 0.5},{name},{present}" for name, present in lines]
        soundfile.write(folder / f"{night}.wav", sound, 22050)
    (folder / "labels.csv").write_text(HEADER + "\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def yes_no(nights, tmp_path_factory):
    """Results of cross-validation over made folds, in closed form, and its log."""
    folder = tmp_path_factory.mktemp("yes_no") / "run"
    options = [*SMALL, "--corpus", f"audiofolder={nights}", "--mixed_precision", "no"]
    options += ["--classifier_init", "ridge", "--num_train_epochs", "0"]
    return folder, succeed("train_classification.py", *options, "--output_dir", folder)


def test_each_class_is_answered_with_yes_or_no(yes_no, nights):
    folder, log = yes_no
    assert "each class is answered with yes or no, for 8 clips are of several classes, 16 of none" in log
    assert "64 clips have labels, 8 have none" in log and "5 were made" in log
    results, config = results_of(folder), json.loads((folder / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert list(config["thresholds"]) == ["frog", "owl"] == list(config["label2id"])
    assert results["mean_macro_f1"] > 0.9 and min(results["average_precision"].values()) > 0.9
    assert results["background_hours"] == pytest.approx(16 * 0.5 / 3600)
    alarms = sum(fold["false_alarms"] for fold in results["folds"].values())
    assert results["false_alarms_per_hour"] == pytest.approx(alarms / results["background_hours"])
    assert "confusion_matrix" not in results and not (folder / "confusion_matrix.png").exists()
    card = (folder / "README.md").read_text()
    assert f"| owl | {config['thresholds']['owl']:.3f} |" in card and "logits.sigmoid().mean(0)" in card
    assert f"Macro-F1: {results['mean_macro_f1']:.3f} ±" in card and "in the 8 s of held-out clips" in card
    assert "type: f1" in card and "whatever it hears" not in card and "Which classes it confuses" not in card


def test_answers_that_are_reported_are_those_of_the_saved_model(yes_no, nights):
    """Scored again, a clip at a time, by transformers' pipeline."""
    folder, _ = yes_no
    (number, fold), *_ = results_of(folder)["folds"].items()
    # Before 5.23 transformers' pipeline takes every network for one of classes that exclude one another.
    told = {} if version.parse(transformers.__version__) >= version.parse("5.23") else {"function_to_apply": "sigmoid"}
    classify = pipeline("audio-classification", model=str(folder / f"fold-{number}"))
    thresholds = classify.model.config.thresholds
    alarms, known, right = 0, 0, 0
    held_out = held_out_recordings(folder / f"fold-{number}", nights)
    for row in load_corpus("audiofolder", nights):
        if row["source_id"] not in held_out or not (row["labels"] or row["absent_labels"]):
            continue
        samples, rate = decode_audio(row["audio"], row["clip_start"], row["clip_end"])
        found = classify({"array": samples[0], "sampling_rate": rate}, **told)
        scores = {each["label"]: each["score"] for each in found}
        yes = {label for label, score in scores.items() if score >= thresholds[label]}
        wrong = yes & set(row["absent_labels"]) if not row["labels"] else yes ^ set(row["labels"])
        known, right = known + 1, right + (not wrong)
        alarms += len(yes) if len(row["absent_labels"]) == 2 else 0
    assert known == fold["test_clips"] and right / known == pytest.approx(fold["accuracy_at_start"])
    assert alarms == fold["false_alarms"]


def held_out_recordings(folder, nights) -> set[str]:
    """Those of which the run has heard no stretch."""
    heard = Record.read(folder).own.heard
    corpus = load_corpus("audiofolder", nights).filter(lambda row: row["clip_end"] < np.inf)
    is_heard = ClipIdentities.of(corpus).shared_with(heard)
    return {source for source, own in zip(corpus["source_id"][:], is_heard, strict=True) if not own}


def test_losses_of_answers():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
    answers = torch.tensor([[1, 0, 1], [-1, 1, -1]])
    found = losses(logits, answers)
    known = torch.tensor([[1.0, 1, 1], [0, 1, 0]])
    expected = -(answers * logits.sigmoid().log() + (1 - answers) * (1 - logits.sigmoid()).log())
    torch.testing.assert_close(found, (expected * known).sum(dim=1) / 3)
    torch.testing.assert_close(found[0], F.binary_cross_entropy_with_logits(logits[0], answers[0].float()))
    labels = torch.tensor([2, 0])
    assert torch.equal(losses(logits, labels), F.cross_entropy(logits, labels, reduction="none"))


def test_thresholds_survive_a_kill_and_end_with_another_label_set(nights, sound_folder, tmp_path):
    options = [*SMALL, "--corpus", f"audiofolder={nights}", "--fold", "none", "--classifier_init", "ridge"]
    command = [*options, "--num_train_epochs", "2", "--checkpointing_steps", "1", "--output_dir", tmp_path / "run"]
    with Forked(tmp_path / "log", train, "train_classification.py", command) as process:
        process.wait_for((tmp_path / "run" / "checkpoint-2").exists)
    succeed("train_classification.py", *command, "--resume_from_checkpoint", "latest")
    succeed("train_classification.py", *options, "--num_train_epochs", "0", "--output_dir", tmp_path / "start")
    resumed, start = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("run", "start"))
    assert resumed["thresholds"] == start["thresholds"]
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"| owl | {start['thresholds']['owl']:.3f} |" in card and "Nothing was measured" in card
    succeed(
        "train_classification.py", *SMALL, "--corpus", f"audiofolder={sound_folder}", "--fold", "1",
        "--max_train_steps", "1", "--model_name_or_path", tmp_path / "run", "--output_dir", tmp_path / "other",
    )  # fmt: skip
    other = json.loads((tmp_path / "other" / "config.json").read_text())
    assert "thresholds" not in other and other.get("problem_type") is None
    assert set(results_of(tmp_path / "other")["per_class_accuracy"]) == {f"class-{i}" for i in range(4)}


def test_one_class_and_its_absence(nights, tmp_path):
    """A class is enough where something is known not to be of it; without that, it is refused."""
    sounds = shutil.copytree(nights, tmp_path / "sounds")
    lines = [
        f"{night}.wav,{start},{start + 0.5},owl,{present}"
        for night in range(4)
        for start, present in ((0, 1), (1.5, 0))
    ]
    (sounds / "labels.csv").write_text(HEADER + "\n".join(lines) + "\n")
    command = [*SMALL, "--corpus", f"audiofolder={sounds}", "--classifier_init", "ridge", "--num_train_epochs", "0"]
    log = succeed("train_classification.py", *command, "--output_dir", tmp_path / "run")
    assert "0 clips are of several classes, 4 of none" in log
    assert results_of(tmp_path / "run")["mean_macro_f1"] > 0.9
    for present in ("owl,1", "background,1", "owl,0"):
        lines = [f"{night}.wav,0,0.5,{present}" for night in range(4)]
        (sounds / "labels.csv").write_text(HEADER + "\n".join(lines) + "\n")
        message = fail("train_classification.py", *command, "--output_dir", tmp_path / "refused")
        assert "has no labels, or one class only" in message and "background, noise, other, silence are no" in message


def test_few_labels_are_some_of_each_class_and_some_of_none(nights, tmp_path):
    succeed(
        "train_classification.py", *SMALL, "--corpus", f"audiofolder={nights}", "--fold", "none", "--labels_per_class",
        "3", "--max_train_steps", "1", "--output_dir", tmp_path / "run",
    )  # fmt: skip
    assert 7 <= results_of(tmp_path / "run")["training_clips"] <= 9
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Yes is a score of 0.5 or more" in card and "thresholds" not in json.loads(
        (tmp_path / "run" / "config.json").read_text()
    )


@pytest.mark.parametrize("seed", range(5))
def test_folds_of_clips_of_several_classes(seed):
    random = np.random.default_rng(seed)
    answers, sources = random.integers(-1, 2, (60, 4)), np.repeat(np.arange(20), 3)
    folds = make_folds(answers, sources.astype(str), list("abcd"), "mine")
    assert all(len(set(folds[sources == source])) == 1 for source in range(20))
    assert set(folds) == set(range(1, 6)) and all(len(set(folds[answers[:, own] == 1])) > 1 for own in range(4))


# --- The closed-form classifier ---


@pytest.mark.parametrize("init", ["pretrained", "scratch"])
def test_closed_form_classifier_alone(init, options, pretrained, sound_folder, tmp_path):
    """Its accuracy is the saved model's, and its weights are ridge regression on the clips' features as they are."""
    succeed(
        "train_classification.py", *options, "--model_name_or_path", pretrained, "--init", init, "--fold", "2",
        "--classifier_init", "ridge", "--num_train_epochs", "0", "--output_dir", tmp_path / "run",
    )  # fmt: skip
    results = results_of(tmp_path / "run")
    fold = results["folds"]["2"]
    assert fold["accuracy_per_epoch"] == results["mean_accuracy_per_epoch"] == []
    assert results["mean_accuracy_at_start"] == fold["accuracy_at_start"] > 0.25
    assert 0 < fold["seconds_at_start"] <= fold["seconds"]
    clips, test = train_test_folds(load_corpus("audiofolder", sound_folder), 2)
    assert fold["accuracy_at_start"] == accuracy_clip_by_clip(tmp_path / "run", test)
    model, features = clip_by_clip(tmp_path / "run", clips)
    weight, bias = ridge_classifier(features, torch.tensor(clips["label"][:]), model.config.num_labels)
    logits = F.linear(features, weight, bias)
    assert torch.allclose(model.classifier(features), logits, atol=1e-2 * logits.abs().max().item())
    card = (tmp_path / "run" / "README.md").read_text()
    told = "of the closed-form classifier, ridge regression on the features; 1 fold(s), one seed."
    assert f"{told} {fold['accuracy_at_start']:.3f}" in card
    assert "closed-form classifier's weights" in card and "last epoch" not in card
    beginning = {
        "pretrained": "Then its classifier was fitted, in closed form, to",
        "scratch": "Random weights, and a",
    }
    assert beginning[init] in card and "ine-tuned" not in card and "Trained from scratch" not in card


@pytest.mark.gpu
def test_training_goes_on_from_the_closed_form_classifier(options, pretrained, tmp_path):
    common = [*options, "--model_name_or_path", pretrained, "--fold", "2", "--classifier_init", "ridge"]
    for name, extra in (("alone", ["--num_train_epochs", "0"]), ("still", ["--learning_rate", "0"]), ("on", [])):
        succeed("train_classification.py", *common, *extra, "--freeze_batch_norm", "--output_dir", tmp_path / name)
    alone, still, on = (results_of(tmp_path / name)["folds"]["2"] for name in ("alone", "still", "on"))
    assert alone["accuracy_at_start"] == still["accuracy_at_start"] == on["accuracy_at_start"]
    # With frozen statistics and a rate of zero, nothing moves.
    assert still["accuracy_per_epoch"] == [alone["accuracy_at_start"]] * 3
    first, last = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "still"))
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert len(on["accuracy_per_epoch"]) == len(on["seconds_per_epoch"]) == 3
    assert on["seconds_at_start"] < on["seconds_per_epoch"][0] < on["seconds_per_epoch"][2] <= on["seconds"] + 1
    rows = [line for line in (tmp_path / "on" / "README.md").read_text().splitlines() if line.startswith("| 0 |")]
    assert rows == [f"| 0 | {on['accuracy_at_start']:.3f} |"]
    trained = load_file(tmp_path / "on" / "model.safetensors")
    assert not torch.equal(trained["classifier.weight"], first["classifier.weight"])
    frozen = [name for name in first if "running_" in name]
    assert frozen and all(torch.equal(trained[name], first[name]) for name in frozen)


ALONE = ["--classifier_init", "ridge", "--num_train_epochs", "0"]


def test_self_training_hears_what_has_no_label_to_learn_from(options, pretrained, sound_folder, tmp_path):
    """All that few labels leave over, and nothing of the held-out fold; the card and the record tell them apart."""
    run = [*options, "--model_name_or_path", pretrained, "--fold", "2", *ALONE, "--labels_per_class", "2"]
    log = succeed("train_classification.py", *run, "--self_training_rounds", "1", "--output_dir", tmp_path / "run")
    assert "8 clips to train on, 12 without a label to learn from, 20 held out" in log
    fold = results_of(tmp_path / "run")["folds"]["2"]
    assert (fold["training_clips"], fold["unlabelled_clips"]) == (8, 12)
    clips, test = train_test_folds(load_corpus("audiofolder", sound_folder), 2)
    record, heard = Record.read(tmp_path / "run"), ClipIdentities.of(clips)
    assert record.heard(ClipIdentities.of(test)) == 20  # in the pre-training
    assert sum(record.labels_seen(heard).values()) == 8 and not record.labels_seen(ClipIdentities.of(test))
    assert record.own.heard.shared_with(heard).all() and len(record.own.heard) == 20
    model, features = clip_by_clip(tmp_path / "run", clips)
    labels, labelled = torch.tensor(clips["label"][:]), torch.from_numpy(heard.shared_with(record.own.labelled))
    weight, bias = self_trained_classifier(features[labelled], labels[labelled], features[~labelled], 4, 1)
    logits = F.linear(features, weight, bias)
    assert torch.allclose(model.classifier(features), logits, atol=1e-2 * logits.abs().max().item())
    card = (tmp_path / "run" / "README.md").read_text()
    assert "from 8 labelled clips, and labelled up to 1 times as many of each class by itself, out of 12" in card
    succeed("train_npid.py", *SMALL, "--corpus", f"audiofolder={sound_folder}", "--model_name_or_path",
            tmp_path / "run", "--max_train_steps", "1", "--output_dir", tmp_path / "next")  # fmt: skip
    assert "8 of audiofolder, and 12 without their labels" in (tmp_path / "next" / "README.md").read_text()


def test_self_training_on_ones_own_unlabelled_files(sound_folder, tmp_path):
    """Those of the recordings that are held out are not among what is heard."""
    sounds = by_class(sound_folder, tmp_path / "sounds", lambda clip: f"{'xyz'[clip // 4 % 3]}-{clip:02d}")
    files = sorted(sounds.glob("*/*"))
    unlabelled = files[::5]
    lines = [f"{path.relative_to(sounds)},{'' if path in unlabelled else path.parent.name}" for path in files]
    (sounds / "metadata.csv").write_text("\n".join(["file_name,label", *lines]) + "\n")
    command = [*SMALL, "--corpus", f"audiofolder={sounds}", "--label_pattern", "(?P<source>[xyz])-", *ALONE]
    command += ["--self_training_rounds", "2"]
    succeed("train_classification.py", *command, "--output_dir", tmp_path / "run")
    results = results_of(tmp_path / "run")
    assert results["left_out"] == {"without_label": 0}
    for number, fold in results["folds"].items():
        (held_out,) = {path.name[0] for path in files} - {
            name[0] for name in heard_names(tmp_path / "run" / f"fold-{number}", files)
        }
        assert fold["unlabelled_clips"] == sum(path.name[0] != held_out for path in unlabelled)
    everything = [*command, "--fold", "none", "--output_dir", tmp_path / "all"]
    succeed("train_classification.py", *everything)
    assert results_of(tmp_path / "all")["unlabelled_clips"] == 8


def heard_names(folder, files):
    """Of which of the files the last training heard something."""
    heard = set(map(bytes, Record.read(folder).own.heard.content))
    clips = load_corpus("audiofolder", files[0].parents[1], label_pattern="(?P<source>[xyz])-")
    return [
        clip["audio"]["path"].rpartition("/")[2]
        for clip, content in zip(clips, map(bytes, ClipIdentities.of(clips).content), strict=True)
        if content in heard
    ]


def test_self_training_that_does_nothing_is_refused(options, nights, sound_folder, tmp_path):
    rounds = ["--self_training_rounds", "2", "--output_dir", tmp_path / "run"]
    assert "add --classifier_init ridge" in fail("train_classification.py", *options, *rounds)
    message = fail("train_classification.py", *options, *ALONE, *rounds)
    assert "needs clips without a label, and --corpus audiofolder leaves none" in message
    yes_no = [*SMALL, "--corpus", f"audiofolder={nights}", *ALONE]
    assert "each class is answered with yes or no" in fail("train_classification.py", *yes_no, *rounds)


def test_closed_form_options_that_do_nothing_are_refused():
    message = fail("train_classification.py", "--num_train_epochs", "0")
    assert "--num_train_epochs 0 trains nothing" in message and "--classifier_init ridge" in message
    message = fail("train_classification.py", "--freeze_batch_norm")
    assert "--freeze_batch_norm needs statistics" in message and "--classifier_init ridge" in message
    assert "--num_train_epochs 0 trains nothing" in fail("train_npid.py", "--num_train_epochs", "0")


def test_batch_norm_statistics_of_a_random_network_are_means(options, pretrained, tmp_path):
    """Of a single batch of training clips: exactly what one forward pass says, and nothing of the initial values."""
    succeed(
        "train_classification.py", *options, "--model_name_or_path", pretrained, "--init", "scratch", "--fold", "2",
        "--classifier_init", "ridge", "--num_train_epochs", "0", "--labels_per_class", "2",
        "--per_device_train_batch_size", "100", "--output_dir", tmp_path / "run",
    )  # fmt: skip
    state = load_file(tmp_path / "run" / "model.safetensors")
    counted = [tensor for name, tensor in state.items() if name.endswith("num_batches_tracked")]
    assert counted and all(count == 1 for count in counted)
    mean = state["esresnet.embedder.embedder.normalization.running_mean"]
    variance = state["esresnet.embedder.embedder.normalization.running_var"]
    # The stem sees standardised decibels: with the usual momentum, a tenth of one batch, variances would be near 0.9.
    assert ((variance - 0.9).abs() > 0.2).all() and mean.abs().max() > 0.1
