"""Clips that are decoded once and kept on disk, and the cache that runs share."""

import fcntl
import gc
import json
import logging
import os
import shutil
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from scripts import MEASURED, SMALL, Forked, fail, outputs, succeed
from test_augmentation import slow_picture
from test_input_pipeline import (
    LENGTH,
    RATE,
    SPLITS,
    evaluation_loader,
    make_extractor,
    make_rows,
    mixed_views,
    options,
    training_loader,
)

from datasets_scripts import load_corpus
from datasets_scripts.errors import UserError
from dls_training import clips, waveforms
from dls_training.augmentation import SpectrogramAugmentation, WaveformAugmentation
from dls_training.cache import CachedFolder, use_file
from dls_training.clips import ClipStore
from dls_training.input_pipeline import ViewMaker, draw_numbers
from dls_training.record import Record
from dls_training.waveforms import read_waveform
from modeling_dls.feature_extraction_esresnet import evaluation_windows

LENGTHS = (2500, 100, 2000, 9000, 40)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    return tmp_path / "dls_cache"


def keeping(rows, extractor, max_gigabytes=1.0, **changes) -> ClipStore:
    changes = {"keep_spectrograms": True, **changes}
    return ClipStore([rows], extractor, options(cache_gigabytes=max_gigabytes, **changes))


def folders(cache) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The files that have been opened, once for each time."""
    opened, seen = waveforms.opened_sound, []
    monkeypatch.setattr(waveforms, "opened_sound", lambda audio: (seen.append(audio["path"]), opened(audio))[1])
    return seen


# --- What is kept ---


@pytest.mark.parametrize("audio_channels", [1, 2])
def test_kept_is_the_power_of_every_window(cache, audio_channels):
    rows, extractor = make_rows(LENGTHS), make_extractor(audio_channels)
    store = keeping(rows, extractor)
    assert store.windows.tolist() == [2, 1, 1, 5, 1]
    number = 0
    for clip, row in enumerate(rows):
        windows = evaluation_windows(read_waveform(row["audio"], extractor).contiguous(), LENGTH)
        for place, window in enumerate(windows):
            fine = store.for_training(np.array([clip]), np.array([(place + 0.5) / len(windows)]))["signal"][0]
            assert fine.shape == (audio_channels, 3, 16, 21) and fine.dtype == torch.bfloat16
            torch.testing.assert_close(fine.float(), extractor.power(window, 2), rtol=2**-8, atol=0)
            exact = store.for_evaluation(np.array([clip]), np.array([place]))["signal"][0]
            torch.testing.assert_close(exact, extractor.power(window), rtol=1e-6, atol=0)
            number += 1
    assert number == store.windows.sum()


def test_every_window_is_as_likely(cache):
    store, draws = keeping(make_rows((9000,)), make_extractor()), np.random.default_rng(0).random(5000)
    found = store.for_training(np.zeros(5000, int), draws)["signal"][:, 0, 0, 0, 0].float().numpy()
    _, counts = np.unique(found, return_counts=True)
    assert len(counts) == 5 and counts.min() > 900


def test_training_views_come_from_kept_spectrograms(cache):
    """Cell by cell: each clip with its predecessor in the order of the whole epoch, whichever batch that falls to."""
    rows, extractor = make_rows(LENGTHS), make_extractor()
    args = options(keep_spectrograms=True, augmentation="spectrogram", per_device_train_batch_size=2)
    loader, store = training_loader(rows, extractor, args), keeping(rows, extractor)
    loader.sampler.set_epoch(4)
    make_views = ViewMaker(extractor, "spectrogram", from_spectrograms=True)
    augment, order, seen = SpectrogramAugmentation(), np.random.default_rng([3, 4]).permutation(5).tolist(), []

    def picture(index, partner):
        draws = draw_numbers(3, 4, index)
        power = store.for_training(np.array([index]), draws[:1])["signal"][0].double().numpy()
        return slow_picture(power, partner, draws[1 + WaveformAugmentation.NUM_DRAWS :], augment, (8, 16))

    for batch in loader:
        views = make_views(batch)
        assert views.shape == (len(batch["index"]), 1, 3, 8, 16)
        for view, index in zip(views, batch["index"].tolist(), strict=True):
            _, partner = picture(order[order.index(index) - 1], 0)
            expected = torch.from_numpy(picture(index, partner)[0]).float()
            torch.testing.assert_close(view, extractor.decibel(expected), rtol=1e-4, atol=1e-3)
        assert batch["labels"].tolist() == [index % 3 for index in batch["index"].tolist()]
        seen += batch["index"].tolist()
    assert seen == order[:4]  # one of five waits: batches of two


def test_mixed_views_of_kept_spectrograms_do_not_depend_on_the_split(cache):
    rows, extractor = make_rows((2500, 100, 2000, 9000, 40, 3000, 2600, 1999, 2001)), make_extractor()
    whole = mixed_views(rows, extractor, 2, keep_spectrograms=True)
    for split in SPLITS:
        views = mixed_views(rows, extractor, 2, **split, keep_spectrograms=True)
        for index in set(views) & set(whole):
            torch.testing.assert_close(views[index], whole[index], rtol=0, atol=1e-6)


@pytest.mark.parametrize("keep", ["keep_spectrograms", "keep_waveforms"])
def test_evaluation_is_the_same_from_what_is_kept(cache, keep):
    """Long clips with several windows included."""
    rows, extractor = make_rows(LENGTHS), make_extractor(do_normalize=True)
    pictures = []
    for changes in ({}, {keep: True}):
        make_views = ViewMaker(extractor, from_spectrograms=changes.get("keep_spectrograms", False))
        batches = list(evaluation_loader(rows, extractor, options(**changes)))
        assert {name for batch in batches for name in batch} == {"index", "labels", "signal", "lengths"}
        pictures.append(torch.cat([make_views.unchanged(batch) for batch in batches]))
    assert torch.equal(*pictures)


@pytest.mark.parametrize("audio_channels", [1, 2])
def test_kept_waveforms_are_the_decoded_ones(cache, audio_channels):
    rows, extractor = make_rows((*LENGTHS, 90_000)), make_extractor(audio_channels, sampling_rate=RATE - 1000)
    store = keeping(rows, extractor, keep_spectrograms=False, keep_waveforms=True)
    for row, found in zip((3, 0, 4, 4, 1), store.read([(row, 0, 10**6) for row in (3, 0, 4, 4, 1)]), strict=True):
        assert torch.equal(found, read_waveform(rows[row]["audio"], extractor))
    (found,) = store.read([(5, 0, 10**6)])  # written a stretch at a time
    torch.testing.assert_close(found, read_waveform(rows[5]["audio"], extractor), rtol=0, atol=1e-6)


def test_loaders_give_the_same_from_kept_waveforms(cache):
    rows, extractor = make_rows(LENGTHS), make_extractor()
    decoded, kept = (
        list(training_loader(rows, extractor, options(keep_waveforms=keep, per_device_train_batch_size=2)))
        for keep in (False, True)
    )
    assert len(decoded) == len(kept) > 1
    for one, other in zip(decoded, kept, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_each_clip_is_decoded_once_for_all_folds(cache, decoded, sound_folder, tmp_path):
    """One cache for training and evaluation, whatever part of a corpus a fold takes; and none for a second run."""
    common = [
        *SMALL,
        "--corpus",
        f"audiofolder={sound_folder}",
        "--max_train_steps",
        "1",
        "--dataloader_num_workers",
        "0",
    ]
    common += ["--augmentation", "spectrogram", "--keep_spectrograms"]
    succeed("train_classification.py", *common, "--output_dir", tmp_path / "folds")
    assert len(decoded) == len(set(decoded)) == 40 and len(folders(cache)) == 1
    succeed("train_npid.py", *common, "--output_dir", tmp_path / "npid")
    assert len(decoded) == 40 and len(folders(cache)) == 1


def test_corpora_are_kept_apart_and_read_together(cache):
    parts, extractor = [make_rows(LENGTHS), make_rows((700, 2200, 5000))], make_extractor()
    both = ClipStore(parts, extractor, options(keep_spectrograms=True))
    assert len(folders(cache)) == 2 and len(both) == 8
    alone = [keeping(part, extractor) for part in parts]
    assert len(folders(cache)) == 2
    rows, windows = np.array([7, 0, 5, 3, 6]), np.array([1, 1, 0, 4, 0])
    found = both.for_evaluation(rows, windows)["signal"]
    for picture, row, window in zip(found, rows, windows, strict=True):
        store, own = (alone[0], row) if row < 5 else (alone[1], row - 5)
        assert torch.equal(picture, store.for_evaluation(np.array([own]), np.array([window]))["signal"][0])
    assert both.rows_of(parts[1].select([2, 0])).tolist() == [7, 5]


def test_other_clips_or_settings_are_kept_anew(cache):
    rows, extractor = make_rows(LENGTHS), make_extractor()
    keeping(rows, extractor)
    others = [
        (rows.select([1, 0, 2, 3, 4]), extractor),
        (rows, make_extractor(n_fft=512)),
        (rows, make_extractor(max_length=LENGTH + 1)),
        (rows, make_extractor(2)),
    ]
    for number, other in enumerate(others, 2):
        keeping(*other)
        assert len(folders(cache)) == number
    keeping(rows, extractor)
    assert len(folders(cache)) == 5


# --- The cache ---


def fill(size: int):
    def write(folder: Path) -> dict:
        (folder / "data").write_bytes(bytes(size))
        return {"size": size}

    return write


def test_space_is_bounded(cache, caplog):
    """Two of three fit; who was used last stays, and so does who is in use."""
    kept = {name: CachedFolder(name, fill(1000), 1.0) for name in ("first", "second")}
    for name, when in (("first", 2), ("second", 1)):
        os.utime(use_file(kept[name].path), (when, when))
    with caplog.at_level(logging.INFO, logger="dls"):
        third = CachedFolder("third", fill(1000), 2500e-9)
    assert sorted(path.name for path in folders(cache)) == ["first", "second", "third"], "all are in use"
    kept["second"].in_use.close()
    with caplog.at_level(logging.INFO, logger="dls"):
        CachedFolder("third", fill(1000), 2500e-9)
    assert sorted(path.name for path in folders(cache)) == ["first", "third"]
    assert f"{cache / 'second'} is deleted" in caplog.text and third.index == {"size": 1000}
    with pytest.raises(UserError, match="raise --cache_gigabytes"):
        keeping(make_rows((2500, 200)), make_extractor(), max_gigabytes=5e-6)
    assert len(folders(cache)) == 2


def test_what_a_store_has_mapped_stays(cache):
    """For as long as it is there."""
    store = keeping(make_rows(LENGTHS), make_extractor())
    (kept,) = folders(cache)
    CachedFolder("another", fill(1000), 1e-6)
    assert kept.is_dir() and len(store) == 5
    del store
    gc.collect()
    CachedFolder("another", fill(1000), 1e-6)
    assert not kept.exists()


def test_what_killed_runs_left_is_removed(cache):
    """At once for the same folder; for others when it is certain that nobody writes there any more."""
    CachedFolder("kept", fill(10), 1.0)
    same, old, young = (cache / name for name in (".kept.killed", ".other.killed", ".other.working"))
    for leftover in (same, old, young):
        (leftover / "data").mkdir(parents=True)
    os.utime(old, (1, 1))
    shutil.rmtree(cache / "kept")
    CachedFolder("kept", fill(10), 1.0)
    assert (cache / "kept").is_dir() and young.is_dir() and not same.exists() and not old.exists()


def use_a_small_cache(folder: Path, number: int, rounds: int) -> None:
    """In each round a folder that all runs want and one that two of them want, of which two fit into the cache."""
    datasets.config.HF_DATASETS_CACHE = folder
    for round in range(rounds):
        for name in (f"{round}", f"{round}-{number % 2}"):

            def write(folder, name=name):
                (folder / "data").write_bytes(name.encode() * 1000)
                return {"name": name}

            cached = CachedFolder(name, write, 1.5e-6 * len(name))
            assert cached.index == {"name": name}
            assert (cached.path / "data").read_bytes() == name.encode() * 1000
            cached.in_use.close()


def test_four_runs_share_a_cold_cache_that_is_too_small(tmp_path):
    """Nobody finds anything gone."""
    logs = [tmp_path / f"{number}.log" for number in range(4)]
    runs = [Forked(log, use_a_small_cache, tmp_path / "cache", number, 100) for number, log in enumerate(logs)]
    assert outputs(runs) == [""] * 4


def write_into_the_cache_forever(folder: Path) -> None:
    def write(folder):
        with (folder / "data").open("wb") as file:
            while True:
                file.write(bytes(1000))
                file.flush()
                time.sleep(0.001)

    datasets.config.HF_DATASETS_CACHE = folder
    CachedFolder("kept", write, 1.0)


def test_a_run_killed_while_it_writes_leaves_nothing_in_the_way(cache, tmp_path):
    with Forked(tmp_path / "log", write_into_the_cache_forever, tmp_path) as process:
        process.wait_for(lambda: list(cache.glob(".kept.*/kept/data")))
    assert CachedFolder("kept", fill(10), 1.0).index == {"size": 10}
    assert not list(cache.glob(".kept.*")) and (cache / "kept" / "data").stat().st_size == 10
    with use_file(cache / "kept").open("a") as file:  # nor does a lock of its own stay behind
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path / "data", 5),
        lambda path: (path / "data").unlink(),
        lambda path: (path / "index.json").unlink(),
        lambda path: (path / "index.json").write_text('{"size": 10}'),  # as another version wrote it
        lambda path: os.truncate(path / "index.json", 10),
    ],
)
def test_a_damaged_folder_is_made_anew(cache, damage):
    damage(CachedFolder("kept", fill(10), 1.0).path)
    assert CachedFolder("kept", fill(20), 1.0).index == {"size": 20}
    assert (cache / "kept" / "data").stat().st_size == 20 and len(folders(cache)) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(UserError, match=r"the cache .*dls_cache cannot be used .*HF_DATASETS_CACHE"):
        keeping(make_rows(LENGTHS), make_extractor())


# --- On the command line ---


def on_eight_sounds(tmp_path):
    """Options of a short run over eight files that it makes."""
    random = np.random.default_rng(0)
    (tmp_path / "sounds").mkdir()
    for clip in range(8):
        soundfile.write(tmp_path / "sounds" / f"{clip}.wav", 0.1 * random.standard_normal(RATE), 8000)
    return [*SMALL, "--corpus", f"audiofolder={tmp_path / 'sounds'}", "--num_train_epochs", "2"]


def test_command_line(cache, tmp_path):
    """The second run decodes nothing for training, and ends the same."""
    common, models = on_eight_sounds(tmp_path), []
    kept = ["--augmentation", "spectrogram", "--keep_spectrograms"]
    for name in "ab":
        log = succeed("train_npid.py", *common, *kept, "--output_dir", tmp_path / name)
        assert f"spectrograms of 8 clips are cached in {cache}" in log
        models.append((tmp_path / name / "model.safetensors").read_bytes())
    assert models[0] == models[1]
    assert "--augmentation spectrogram" in fail("train_npid.py", *common, "--keep_spectrograms")
    assert "--keep_waveforms or --keep_spectrograms" in fail("train_npid.py", *common, "--cache_gigabytes", "1")
    assert "--keep_waveforms has nothing to do" in fail("train_npid.py", *common, *kept, "--keep_waveforms")
    small = [*common, *kept, "--cache_gigabytes", "1e-6", "--seed", "1", "--clip_seconds", "0.4"]
    assert "raise --cache_gigabytes" in fail("train_npid.py", *small, "--output_dir", tmp_path / "c")


def test_kept_waveforms_on_the_command_line(cache, tmp_path):
    """The same weights as without."""
    common, models = on_eight_sounds(tmp_path), []
    for name, keep in {"decoded": [], "written": ["--keep_waveforms"], "read": ["--keep_waveforms"]}.items():
        log = succeed("train_npid.py", *common, *keep, "--output_dir", tmp_path / name)
        assert (f"waveforms of 8 clips are cached in {cache}" in log) == bool(keep)
        models.append((tmp_path / name / "model.safetensors").read_bytes())
    assert models[0] == models[1] == models[2]


# --- Long recordings ---


@pytest.fixture(scope="module")
def long_and_cut(tmp_path_factory) -> dict[str, Path]:
    """The same sound as four long files, and as files of half a second; each with its label and fold."""
    root, random = tmp_path_factory.mktemp("long"), np.random.default_rng(0)
    tables = {"long": ["file_name,label,fold"], "cut": ["file_name,label,fold"]}
    for name in tables:
        (root / name).mkdir()
    for number in range(4):
        pitch, facts = 300 * 2 ** (number % 2), f"class-{number % 2},{number // 2 + 1}"
        sound = 0.1 * np.sin(2 * np.pi * pitch * np.arange(6 * 8000) / 8000) + 0.05 * random.standard_normal(6 * 8000)
        soundfile.write(root / "long" / f"{number}.wav", sound, 8000)
        tables["long"].append(f"{number}.wav,{facts}")
        for part in range(12):
            soundfile.write(root / "cut" / f"{number}-{part:02d}.wav", sound[part * 4000 : (part + 1) * 4000], 8000)
            tables["cut"].append(f"{number}-{part:02d}.wav,{facts}")
    for name, lines in tables.items():
        (root / name / "metadata.csv").write_text("\n".join(lines) + "\n")
    return {name: root / name for name in tables}


@pytest.mark.parametrize("keep", [[], ["--keep_spectrograms"], ["--keep_waveforms"]], ids=str)
def test_windows_of_long_files_are_clips_like_any_other(cache, long_and_cut, keep, tmp_path):
    """In the bank, in training and in evaluation: the same as if the files had been cut."""
    options, histories = [*SMALL, "--num_train_epochs", "2", "--augmentation", "spectrogram", *keep], []
    for name, windows in {"long": ["--windows"], "cut": []}.items():
        corpus = ["--corpus", f"audiofolder={long_and_cut[name]}", *windows]
        log = succeed("train_npid.py", *options, *corpus, "--output_dir", tmp_path / name)
        assert ("audiofolder: 48 windows of 0.5 s, of 4 files" in log) == bool(windows)
        results = json.loads((tmp_path / name / "all_results.json").read_text())
        assert results["clips"] == {"audiofolder": 48}
        histories.append([{k: v for k, v in e.items() if k not in MEASURED} for e in results["history"]])
    assert histories[0] == histories[1] and "knn_accuracy" in histories[0][-1]
    assert len({stage.heard.digest_of_all() for stage in Record.read(tmp_path / "long").stages}) == 1
    fine_tuning = ["--model_name_or_path", tmp_path / "long", "--fold", "1", "--output_dir", tmp_path / "classes"]
    long = ["--corpus", f"audiofolder={long_and_cut['long']}", "--windows"]
    succeed("train_classification.py", *options, *long, *fine_tuning)
    results = json.loads((tmp_path / "classes" / "all_results.json").read_text())["folds"]["1"]
    assert (results["training_clips"], results["test_clips"]) == (24, 24)
    assert results["test_clips_heard_in_pretraining"] == 24


def test_overlapping_windows_and_silence(long_and_cut, tmp_path):
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    samples, rate = soundfile.read(long_and_cut["long"] / "0.wav")
    soundfile.write(sounds / "a.wav", np.concatenate([samples[:16000], np.zeros(16000), samples[:16000]]), rate)
    run = [*SMALL, "--corpus", f"audiofolder={sounds}", "--max_train_steps", "1", "--windows", "0.5"]
    log = succeed("train_npid.py", *run, "--overlap", "0.5", "--silence_db", "-60", "--output_dir", tmp_path / "run")
    assert "audiofolder: 16 windows of 0.5 s, of 1 files, 7 below -60 dB left out" in log
    assert "all 12 are below 40 dB" in fail(
        "train_npid.py", *run, "--silence_db", "40", "--output_dir", tmp_path / "no"
    )
    message = fail("train_npid.py", *run[:-2], "--overlap", "0.5", "--output_dir", tmp_path / "no")
    assert "--overlap and --silence_db say how --windows" in message


def test_a_long_file_is_not_decoded_whole(monkeypatch, tmp_path):
    """Neither for training nor for evaluation nor to be kept: no more than some windows at a time."""
    soundfile.write(tmp_path / "long.wav", 0.1 * np.random.default_rng(0).standard_normal(400 * RATE), RATE)
    corpus, extractor = load_corpus("audiofolder", tmp_path, cache_dir=tmp_path / "cache"), make_extractor()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    read, most = clips.read_waveform, []

    def measured(*arguments):
        waveform = read(*arguments)
        most.append(waveform.shape[1])
        return waveform

    monkeypatch.setattr(clips, "read_waveform", measured)
    for changes in ({}, {"keep_spectrograms": True}, {"keep_waveforms": True}):
        store = ClipStore([corpus], extractor, options(**changes))
        assert store.windows.tolist() == [800]
        store.for_training(np.array([0]), np.array([0.7]))
        store.for_evaluation(np.array([0, 0]), np.array([3, 799]))
    assert max(most) <= 16 * LENGTH
