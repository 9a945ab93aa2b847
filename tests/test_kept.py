"""Waveforms and spectrograms that are computed once and kept on disk."""

import logging
import os
import shutil
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import soundfile
import torch
from scripts import SMALL, fail, succeed
from test_augmentation import slow_picture
from test_input_pipeline import LENGTH, RATE, SPLITS, make_extractor, make_rows, mixed_views

from dls_training.arguments import UserError
from dls_training.augmentation import SpectrogramAugmentation, WaveformAugmentation
from dls_training.input_pipeline import (
    EvaluationClips,
    ViewMaker,
    draw_numbers,
    evaluation_loader,
    mean_over_windows,
    training_loader,
)
from dls_training.kept import keep_spectrograms, keep_waveforms
from dls_training.waveforms import DecodedWaveforms, load_waveform


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    return tmp_path / "dls_kept"


def rows_with_digests(lengths=(2500, 100, 2000, 9000, 40)):
    rows = make_rows(lengths)
    return rows.add_column("digest", [f"digest of {length}" for length in lengths])


def options(**changes):
    common = {"per_device_train_batch_size": 2, "seed": 3, "dataloader_num_workers": 0}
    common |= {"augmentation": "spectrogram", "augmentation_strength": 1.0}
    return SimpleNamespace(
        **{**common, "keep_spectrograms": True, "keep_waveforms": False, "cache_gigabytes": 1.0, **changes}
    )


def keep(rows, extractor, oversampling=2, max_gigabytes=1.0):
    return keep_spectrograms(rows, extractor, oversampling, max_gigabytes)


@pytest.mark.parametrize("audio_channels", [1, 2])
def test_kept_is_the_power_of_every_window(cache, audio_channels):
    rows, extractor = rows_with_digests(), make_extractor(audio_channels)
    kept = keep(rows, extractor)
    clips = EvaluationClips(rows, extractor)
    assert kept.windows.tolist() == [2, 1, 1, 5, 1]
    for clip in range(len(rows)):
        windows = clips[clip]["windows"]
        for number, window in enumerate(windows):
            expected = extractor.power(window, 2)
            found = kept.read(np.array([clip]), np.array([(number + 0.5) / len(windows)]))
            assert found.shape == (1, audio_channels, 3, 16, 21) and found.dtype == torch.bfloat16
            torch.testing.assert_close(found[0].float(), expected, rtol=2**-8, atol=0)


def test_read_takes_every_window_alike(cache):
    kept = keep(rows_with_digests((9000,)), make_extractor())
    draws = np.random.default_rng(0).random(5000)
    found = kept.read(np.zeros(5000, int), draws)[:, 0, 0, 0, 0].float().numpy()
    _, counts = np.unique(found, return_counts=True)
    assert len(counts) == 5 and counts.min() > 900


def test_training_views_come_from_kept_spectrograms(cache):
    """Cell by cell: each clip with its predecessor in the order of the whole epoch, whichever batch that falls to."""
    rows, extractor = rows_with_digests(), make_extractor()
    loader = training_loader(rows, extractor, options())
    loader.sampler.set_epoch(4)
    make_views, augment = ViewMaker(extractor, "spectrogram"), SpectrogramAugmentation()
    kept, order, seen = keep(rows, extractor), np.random.default_rng([3, 4]).permutation(5).tolist(), []

    def picture(index, partner):
        draws = draw_numbers(3, 4, index)
        power = kept.read(np.array([index]), draws[:1])[0].double().numpy()
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
    rows, extractor = rows_with_digests((2500, 100, 2000, 9000, 40, 3000, 2600, 1999, 2001)), make_extractor()
    whole = mixed_views(rows, extractor, 2, keep_spectrograms=True)
    for split in SPLITS:
        views = mixed_views(rows, extractor, 2, **split, keep_spectrograms=True)
        for index in set(views) & set(whole):
            torch.testing.assert_close(views[index], whole[index], rtol=0, atol=1e-6)
    for strength, loaded in ((1.0, 5), (0.0, 4)):
        args = options(per_device_train_batch_size=4, augmentation_strength=strength)
        assert all(len(batch["power"]) == loaded for batch in training_loader(rows, extractor, args))


def test_kept_once_for_the_same_clips_and_settings(cache, monkeypatch):
    rows, extractor = rows_with_digests(), make_extractor()
    keep(rows, extractor)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1

    def decode_again(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(DecodedWaveforms, "read", decode_again)
    keep(rows, extractor)
    others = [
        (rows.select([1, 0, 2, 3, 4]), extractor, 2),
        (rows, make_extractor(n_fft=512), 2),
        (rows, make_extractor(max_length=LENGTH + 1), 2),
        (rows, make_extractor(2), 2),
        (rows, extractor, 1),
    ]
    for other in others:
        with pytest.raises(AssertionError, match="decoded again"):
            keep(*other)


def test_kept_evaluation_pictures_are_exact(cache):
    """Each clip's score is the same as from its file, long clips with several windows included."""
    rows, extractor = rows_with_digests(), make_extractor(do_normalize=True)
    scores = []
    for kept in (False, True):
        loader = evaluation_loader(rows, extractor, options(keep_spectrograms=kept))
        batches = list(loader)
        assert [set(batch) for batch in batches] == [{"index", "labels", "counts", "power" if kept else "windows"}] * 3
        means = [mean_over_windows(batch, extractor, lambda x: x.flatten(1), 3) for batch in batches]
        scores.append(torch.cat(means))
        assert torch.cat([batch["index"] for batch in batches]).tolist() == [0, 1, 2, 3, 4]
        assert torch.cat([batch["labels"] for batch in batches]).tolist() == [0, 1, 2, 0, 1]
    assert torch.equal(*scores)


@pytest.mark.parametrize("audio_channels", [1, 2])
def test_kept_waveforms_are_the_decoded_ones(cache, audio_channels):
    rows, extractor = rows_with_digests(), make_extractor(audio_channels, sampling_rate=RATE - 1000)
    kept = keep_waveforms(rows, extractor, 1.0)
    order = [3, 0, 4, 4, 1]
    for clip, found in zip(order, kept.read(order), strict=True):
        expected = load_waveform(rows[clip]["audio"], extractor)
        assert expected.shape == (audio_channels, -(-len_of(rows, clip) * (RATE - 1000) // RATE))
        assert torch.equal(found, expected)


def len_of(rows, clip):
    return int(rows[clip]["digest"].rpartition(" ")[2])


def test_loaders_give_the_same_from_kept_waveforms(cache):
    rows, extractor = rows_with_digests(), make_extractor()
    for make_loader in (training_loader, evaluation_loader):
        decoded, kept = (
            list(make_loader(rows, extractor, options(keep_spectrograms=False, keep_waveforms=keep)))
            for keep in (False, True)
        )
        assert len(decoded) == len(kept) > 1
        for one, other in zip(decoded, kept, strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_space_is_bounded(cache, caplog):
    """Each holds 10 windows x 3 x 16 x 21 x 2 bytes = 20 kB: two of three fit, and the one used last stays."""
    extractor = make_extractor()
    corpora = [rows_with_digests((2500, 100, 2000, 9000, 40 + i)) for i in range(3)]
    keep(corpora[0], extractor)
    keep(corpora[1], extractor)
    first, second = sorted((p for p in cache.iterdir() if p.is_dir()), key=lambda path: path.stat().st_mtime)
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    keep(corpora[0], extractor)  # used again
    mapped = keep(corpora[1], extractor)
    os.utime(second, (2, 2))
    with caplog.at_level(logging.INFO):
        keep(corpora[2], extractor, max_gigabytes=45e-6)
    assert first.is_dir() and not second.exists() and f"{second} is deleted" in caplog.text
    assert np.isfinite(mapped.power).all()  # who has it open keeps it
    with pytest.raises(UserError, match="raise --cache_gigabytes"):
        keep(rows_with_digests((2500, 200)), extractor, max_gigabytes=5e-6)
    assert sum(path.is_dir() for path in cache.iterdir()) == 2


def test_what_killed_runs_left_is_removed(cache):
    """At once for the same clips; for others when it is certain that nobody writes there any more."""
    keep(rows_with_digests((2500, 100)), make_extractor())
    (kept,) = (path for path in cache.iterdir() if path.is_dir())
    same, old, young = (cache / name for name in (f".{kept.name}.killed", ".other.killed", ".other.working"))
    for leftover in (same, old, young):
        (leftover / "power").mkdir(parents=True)
    os.utime(old, (1, 1))
    shutil.rmtree(kept)
    keep(rows_with_digests((2500, 100)), make_extractor())
    assert kept.is_dir() and young.is_dir() and not same.exists() and not old.exists()


def on_eight_sounds(tmp_path):
    """Options of a short run over eight files that it makes."""
    random = np.random.default_rng(0)
    (tmp_path / "sounds").mkdir()
    for clip in range(8):
        soundfile.write(tmp_path / "sounds" / f"{clip}.wav", 0.1 * random.standard_normal(RATE), 8000)
    return [*SMALL, "--corpus", f"audiofolder={tmp_path / 'sounds'}", "--num_train_epochs", "2"]


def test_command_line(tmp_path):
    """The second run decodes nothing for training, and ends the same."""
    common = on_eight_sounds(tmp_path)
    kept = ["--augmentation", "spectrogram", "--keep_spectrograms"]
    environment = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    models = []
    for name in "ab":
        log = succeed("train_npid.py", *common, *kept, "--output_dir", tmp_path / name, env=environment)
        assert f"spectrograms of 8 clips are kept in {tmp_path / 'cache'}" in log
        models.append((tmp_path / name / "model.safetensors").read_bytes())
    assert models[0] == models[1]
    assert "--augmentation spectrogram" in fail("train_npid.py", *common, "--keep_spectrograms")
    assert "--keep_waveforms or --keep_spectrograms" in fail("train_npid.py", *common, "--cache_gigabytes", "1")
    assert "--keep_waveforms has nothing to do" in fail("train_npid.py", *common, *kept, "--keep_waveforms")
    small = [*common, *kept, "--cache_gigabytes", "1e-6", "--seed", "1", "--clip_seconds", "0.4"]
    message = fail("train_npid.py", *small, "--output_dir", tmp_path / "c", env=environment)
    assert "raise --cache_gigabytes" in message


def test_kept_waveforms_on_the_command_line(tmp_path):
    """The same weights as without."""
    common = on_eight_sounds(tmp_path)
    environment, models = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}, []
    for name, options in {"decoded": [], "written": ["--keep_waveforms"], "read": ["--keep_waveforms"]}.items():
        log = succeed("train_npid.py", *common, *options, "--output_dir", tmp_path / name, env=environment)
        assert (f"waveforms of 8 clips are kept in {tmp_path / 'cache'}" in log) == bool(options)
        models.append((tmp_path / name / "model.safetensors").read_bytes())
    assert models[0] == models[1] == models[2]
