"""From sound files to batches, views and scores."""

import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import xxhash
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.data import DataLoader

from datasets_scripts.command_line import run_command
from datasets_scripts.errors import AudioError, UserError
from dls_training import input_pipeline
from dls_training.augmentation import NUM_DRAWS, WaveformAugmentation
from dls_training.clips import MAX_VIEWS_PER_CLIP, ClipStore
from dls_training.input_pipeline import ClipBatches, Key, ShuffledClips, ViewMaker, load_corpora, mean_over_windows
from dls_training.runtime import decoding_processes
from dls_training.waveforms import read_waveform
from modeling_dls import ESResNetFeatureExtractor
from modeling_dls.feature_extraction_esresnet import evaluation_windows, fit_length

RATE = 4000
LENGTH = 2000


def make_extractor(audio_channels=1, **options):
    sizes = {"n_fft": 256, "win_length": 200, "hop_length": 100, "spec_height": 8, "spec_width": 16}
    settings = {"sampling_rate": RATE, "max_length": LENGTH, "audio_channels": audio_channels, **sizes, **options}
    return ESResNetFeatureExtractor(**settings)


def encoded(samples, rate=RATE):
    """(channels, samples) -> a cell of an audio column."""
    file = io.BytesIO()
    soundfile.write(file, np.asarray(samples).T, rate, format="WAV", subtype="FLOAT")
    return {"bytes": file.getvalue(), "path": "clip.wav"}


def noise(samples, channels=1, seed=0):
    return (np.random.default_rng(seed).normal(size=(channels, samples)) * 0.1).astype(np.float32)


def rows_of(cells, rate=RATE, **columns):
    """What `load_corpus` says of some clips, as far as it matters here."""
    frames = [soundfile.info(io.BytesIO(cell["bytes"])).frames for cell in cells]
    digests = [xxhash.xxh3_128_hexdigest(cell["bytes"]) for cell in cells]
    facts = {"digest": digests, "num_frames": frames, "sampling_rate": [rate] * len(cells)}
    return Dataset.from_dict({"audio": cells, **facts, **columns})


def make_rows(lengths=(2500, 100, 2000, 9000, 1999, 2001, 40, 3000, 2600), labels=True):
    columns = {"label": [i % 3 for i in range(len(lengths))]} if labels else {}
    return rows_of([encoded(noise(n, seed=i)) for i, n in enumerate(lengths)], **columns)


def options(**changes):
    settings = {"per_device_train_batch_size": 4, "seed": 3, "dataloader_num_workers": 0}
    settings |= {"keep_spectrograms": False, "keep_waveforms": False, "cache_gigabytes": 1.0}
    settings |= {"augmentation": "waveform", "augmentation_strength": 1.0, "windows": None}
    return SimpleNamespace(**settings | changes)


def training_loader(rows, extractor, args):
    return input_pipeline.training_loader(ClipStore([rows], extractor, args), rows, args)


def evaluation_loader(rows, extractor, args):
    return input_pipeline.evaluation_loader(ClipStore([rows], extractor, args), rows, args)


# One clip


def test_a_clip_at_the_right_rate_is_not_touched():
    samples = noise(777)
    waveform = read_waveform(encoded(samples), make_extractor())
    assert waveform.dtype == torch.float32
    np.testing.assert_array_equal(waveform.numpy(), samples)


@pytest.mark.parametrize(("source", "target"), [(22050, 44100), (48000, 44100), (8000, 44100), (96000, 44100)])
def test_resampling_keeps_length_and_pitch(source, target):
    seconds, frequency = 0.5, 1234.0
    sine = 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * source)) / source)
    waveform = read_waveform(encoded(sine[None], source), ESResNetFeatureExtractor(target, audio_channels=1))
    assert waveform.shape == (1, int(seconds * target))
    # Phase and loudness as well; the filter has no past at the edges.
    expected = 0.5 * np.sin(2 * np.pi * frequency * np.arange(waveform.shape[1]) / target)
    inside = slice(200, -200)
    np.testing.assert_allclose(waveform[0, inside].numpy(), expected[inside], atol=0.01)


def test_resampling_down_does_not_alias():
    sine = 0.5 * np.sin(2 * np.pi * 3000 * np.arange(8000) / 8000)
    waveform = read_waveform(encoded(sine[None], 8000), make_extractor())  # 3000 Hz are beyond 4000 / 2
    assert waveform.shape == (1, 4000) and waveform[:, 200:-200].abs().max() < 0.02


def test_channels():
    stereo = noise(500, channels=2)
    mono = read_waveform(encoded(stereo), make_extractor(1))
    np.testing.assert_allclose(mono.numpy(), stereo.mean(axis=0, keepdims=True), atol=1e-7)
    np.testing.assert_array_equal(read_waveform(encoded(stereo), make_extractor(2)).numpy(), stereo)
    doubled = read_waveform(encoded(stereo[:1]), make_extractor(2))
    np.testing.assert_array_equal(doubled.numpy(), stereo[[0, 0]])
    six = read_waveform(encoded(noise(500, channels=6)), make_extractor(1))
    assert six.shape == (1, 500)


def test_many_clips_at_once_are_each_as_alone():
    """Rates, lengths and channels mixed; parts as well as whole clips."""
    extractor, parts = make_extractor(audio_channels=1), []
    for i, rate in enumerate([RATE, 8000, 3000, 8000, RATE, 3000, 8000]):
        parts.append(rows_of([encoded(noise(200 + 37 * i, 1 + i % 2, seed=i), rate)], rate))
    store = ClipStore(parts, extractor, options())
    whole = [read_waveform(part[0]["audio"], extractor) for part in parts]
    assert store.lengths.tolist() == [waveform.shape[1] for waveform in whole]
    for row, waveform in enumerate(store.read([(row, 0, 10_000) for row in range(7)])):
        assert torch.equal(waveform, whole[row])
    for row, waveform in enumerate(store.read([(row, 20, 31) for row in range(7)])):
        torch.testing.assert_close(waveform, whole[row][:, 20:31], rtol=0, atol=1e-6)


UNUSABLE = {
    "no sound": b"not a sound",
    "empty": b"",
    "six channels": encoded(noise(500, channels=6))["bytes"],
    "not a number": encoded([[0.1, math.nan]])["bytes"],
}


@pytest.mark.parametrize(("what", "num_workers"), [*((what, 0) for what in UNUSABLE), ("six channels", 1)])
@pytest.mark.parametrize("make_loader", [training_loader, evaluation_loader])
def test_a_file_that_cannot_be_used_is_named(tmp_path, make_loader, what, num_workers):
    path = tmp_path / "broken.wav"
    path.write_bytes(UNUSABLE[what])
    rows = rows_of([encoded(noise(500)), encoded(noise(500, seed=1))])
    cells = [rows[0]["audio"], {"bytes": None, "path": str(path)}]  # as if it had been replaced since it was checked
    rows = rows.remove_columns("audio").add_column("audio", cells)
    loader = make_loader(rows, make_extractor(audio_channels=2), options(dataloader_num_workers=num_workers))
    with pytest.raises(AudioError, match=r"broken\.wav"):
        list(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_of_decoding_processes_are_not_pinned(monkeypatch, num_workers):
    """With both, torch 2.11 waits for minutes at the end of a process on a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loader = training_loader(make_rows((500, 600)), make_extractor(), options(dataloader_num_workers=num_workers))
    assert (loader.num_workers, loader.pin_memory) == (num_workers, not num_workers)


@pytest.mark.parametrize(
    ("device", "kept", "decodes"),
    [
        ("cuda", None, True),
        ("cuda", "keep_waveforms", False),
        ("cuda", "keep_spectrograms", False),
        ("cpu", None, False),
    ],
)
def test_processes_decode_on_a_gpu_what_is_not_kept(device, kept, decodes):
    settings = options(**({kept: True} if kept else {}))
    assert (decoding_processes(torch.device(device), settings) > 0) == decodes


def test_a_resampler_made_while_torch_traces_is_not_kept():
    cell, extractor = encoded(noise(500), rate=4567), make_extractor()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(read_waveform(cell, extractor), FakeTensor)
    assert type(read_waveform(cell, extractor)) is torch.Tensor


def test_a_user_reads_one_line_about_a_file_that_a_worker_could_not_use(tmp_path, capsys):
    rows = make_rows((500, 600)).remove_columns("audio")
    rows = rows.add_column("audio", [{"bytes": None, "path": str(tmp_path / "missing.wav")}] * 2)
    loader = training_loader(rows, make_extractor(), options(dataloader_num_workers=1))
    assert run_command(lambda: list(loader)) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith(f"error: {tmp_path / 'missing.wav'}: the file does not")


# Training


def by_index(loader, epoch):
    """Row -> what a view is made from, and the view."""
    loader.sampler.set_epoch(epoch)
    clips = {}
    for batch in loader:
        views = WaveformAugmentation(LENGTH)(batch["signal"], batch["lengths"], batch["draws"])
        for row, index in enumerate(batch["index"].tolist()):
            assert index not in clips
            samples = batch["signal"][row, :, : batch["lengths"][row]]
            clips[index] = (batch["labels"][row], batch["draws"][row], samples, views[row])
    return clips


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("audio_channels", [1, 2])
def test_a_view_depends_on_seed_epoch_and_clip_alone(audio_channels):
    rows, extractor = make_rows(), make_extractor(audio_channels)
    reference = by_index(training_loader(rows, extractor, options()), epoch=5)
    assert len(reference) == 8  # nine clips in batches of four leave one out
    for changes in (
        {},
        {"per_device_train_batch_size": 3},
        {"per_device_train_batch_size": 9},
        {"dataloader_num_workers": 2},
        {"dataloader_num_workers": 2, "per_device_train_batch_size": 5},
    ):
        torch.manual_seed(len(changes))  # the global states have no say
        np.random.seed(len(changes))
        clips = by_index(training_loader(rows, extractor, options(**changes)), epoch=5)
        common = set(clips) & set(reference)
        assert len(common) >= 8
        assert all(same(clips[index], reference[index]) for index in common)
    another_epoch = by_index(training_loader(rows, extractor, options()), epoch=6)
    another_seed = by_index(training_loader(rows, extractor, options(seed=4)), epoch=5)
    for clips in (another_epoch, another_seed):
        assert not any(torch.equal(clips[i][1], reference[i][1]) for i in set(clips) & set(reference))


def batch_of(rows, extractor, *keys, seed=1, **changes):
    return ClipBatches(ClipStore([rows], extractor, options(**changes)), rows, seed).__getitems__(list(keys))


def test_training_clip():
    rows, extractor = make_rows(), make_extractor()
    batch = batch_of(rows, extractor, Key(2, 4))
    assert batch["index"].tolist() == [2] and batch["labels"].tolist() == [2] and batch["lengths"].tolist() == [2000]
    np.testing.assert_array_equal(batch["signal"][0].numpy(), noise(2000, seed=2))
    assert batch["draws"].shape == (1, NUM_DRAWS) and batch["draws"].dtype == torch.float64
    assert ((batch["draws"] >= 0) & (batch["draws"] < 1)).all()
    # Every clip, epoch and seed has numbers of its own.
    keys = [Key(clip, epoch) for epoch in (1, 2) for clip in (1, 2)]
    draws = torch.cat([batch_of(rows, extractor, *keys, seed=seed)["draws"] for seed in (1, 2)])
    assert len({tuple(draw) for draw in draws.tolist()}) == 8


def test_clips_are_filled_up_to_the_longest():
    rows, extractor = make_rows(), make_extractor(2)
    batch = batch_of(rows, extractor, Key(1, 0), Key(4, 0), Key(6, 0))
    assert batch["lengths"].tolist() == [100, 1999, 40] and batch["lengths"].dtype == torch.int64
    assert batch["signal"].shape == (3, 2, 1999) and batch["signal"].is_contiguous()
    for clip, length, signal in zip((1, 4, 6), (100, 1999, 40), batch["signal"], strict=True):
        np.testing.assert_array_equal(signal[:, :length].numpy(), noise(length, seed=clip)[[0, 0]])


def test_a_long_recording_is_cut_to_a_random_stretch():
    longest = MAX_VIEWS_PER_CLIP * LENGTH
    ramp = np.arange(1.0, 3 * longest + 1)[None]
    rows, starts = rows_of([encoded(ramp)]), []
    for waveform in batch_of(rows, make_extractor(), *(Key(0, epoch) for epoch in range(60)))["signal"][:, 0]:
        starts.append(int(waveform[0]) - 1)
        np.testing.assert_array_equal(waveform.numpy(), ramp[0, starts[-1] : starts[-1] + longest])
    assert min(starts) < longest / 4 and max(starts) > 1.75 * longest and len(set(starts)) > 50


@pytest.mark.parametrize("surplus", [-1, 0, 1])
def test_a_recording_just_as_long_as_is_kept(surplus):
    longest = MAX_VIEWS_PER_CLIP * LENGTH
    samples, starts = noise(longest + surplus), set()
    keys = [Key(0, epoch) for epoch in range(20)]
    for waveform in batch_of(rows_of([encoded(samples)]), make_extractor(), *keys)["signal"].numpy():
        assert waveform.shape == (1, min(longest, longest + surplus))
        (start,) = [s for s in (0, 1) if np.array_equal(waveform, samples[:, s : s + longest])]
        starts.add(start)
    assert starts == ({0, 1} if surplus == 1 else {0})


@pytest.mark.parametrize("rows", [make_rows(labels=False), make_rows().add_column("other", range(9))])
def test_clips_without_a_label_get_minus_one(rows):
    if "label" in rows.column_names:
        rows = rows.map(lambda row, i: {"label": None if i else 2}, with_indices=True)
    for loader in (
        training_loader(rows, make_extractor(), options()),
        evaluation_loader(rows, make_extractor(), options()),
    ):
        labels = {i: label for b in loader for i, label in zip(b["index"].tolist(), b["labels"].tolist(), strict=True)}
        expected = {i: 2 if i == 0 and "label" in rows.column_names else -1 for i in labels}
        assert len(labels) >= 8 and labels == expected


@pytest.mark.parametrize("audio_channels", [1, 2])
def test_views_are_augmentation_and_spectrogram_of_each_clip(audio_channels):
    extractor, augmentation = make_extractor(audio_channels), WaveformAugmentation(LENGTH)
    for indices in ([0, 1, 2, 3, 4], [5], [3, 6]):
        batch = batch_of(make_rows(), extractor, *(Key(index, 0) for index in indices))
        views = ViewMaker(extractor)(batch)
        assert views.shape == (len(indices), audio_channels, 3, 8, 16) and views.dtype == torch.float32
        for view, samples, length, draws in zip(
            views, *(batch[n] for n in ("signal", "lengths", "draws")), strict=True
        ):
            alone = augmentation(samples[None, :, :length], length[None], draws[None])
            torch.testing.assert_close(view, extractor.spectrogram(alone)[0], rtol=1e-4, atol=1e-3)


def mixed_views(rows, extractor, epoch, processes=1, **changes) -> dict[int, torch.Tensor]:
    """Row -> its view in an epoch, of all processes' batches together."""
    args, views = options(**{"augmentation": "spectrogram", **changes}), {}
    loader = training_loader(rows, extractor, args)
    make_views = ViewMaker(extractor, args.augmentation, from_spectrograms=args.keep_spectrograms)
    loader.sampler.set_epoch(epoch)
    for process in range(processes):
        batches = BatchSamplerShard(loader.batch_sampler, processes, process)  # as Accelerate spreads them
        for batch in DataLoader(loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn):
            made = make_views(batch)
            assert len(made) == len(batch["index"]) == len(batch["labels"]) and next(iter(batch)) == "index"
            for index, view in zip(batch["index"].tolist(), made, strict=True):
                # What fills up a ragged batch are copies.
                torch.testing.assert_close(view, views.setdefault(index, view), rtol=0, atol=1e-6)
    return views


SPLITS = [
    {"per_device_train_batch_size": 2},
    {"per_device_train_batch_size": 3},
    {"per_device_train_batch_size": 9},
    {"per_device_train_batch_size": 2, "processes": 2},
    {"per_device_train_batch_size": 4, "processes": 3},
]


@pytest.mark.parametrize("audio_channels", [1, 2])
@pytest.mark.parametrize("augmentation", ["spectrogram", "both"])
def test_a_mixed_view_depends_on_seed_epoch_and_clip_alone(augmentation, audio_channels):
    """Neither on the size of the batch nor on the number of processes."""
    rows, extractor = make_rows(), make_extractor(audio_channels, do_normalize=True)
    whole = mixed_views(rows, extractor, 5, augmentation=augmentation)
    assert len(whole) == 8  # nine clips in batches of four leave one out
    for split in SPLITS:
        views = mixed_views(rows, extractor, 5, **split, augmentation=augmentation)
        for index in set(views) & set(whole):
            torch.testing.assert_close(views[index], whole[index], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "mixes"),
    [
        ({"augmentation": "waveform"}, False),
        ({"augmentation": "spectrogram", "augmentation_strength": 0.0}, False),
        ({"augmentation": "spectrogram", "augmentation_strength": 0.1}, True),
        ({"augmentation": "both", "dataloader_num_workers": 2}, True),
    ],
)
def test_one_clip_more_is_loaded_for_a_batch_that_is_mixed(changes, mixes):
    loader = training_loader(make_rows(), make_extractor(), options(**changes))
    for batch in loader:
        assert len(batch["signal"]) == len(batch["draws"]) == len(batch["lengths"]) == 4 + mixes
        assert len(batch["index"]) == len(batch["labels"]) == 4
    # A batch of every clip has all partners.
    for batch in training_loader(make_rows(), make_extractor(), options(per_device_train_batch_size=9, **changes)):
        assert len(batch["signal"]) == len(batch["index"]) == 9


@pytest.mark.parametrize("num_clips", [0, 1])
def test_too_few_clips_to_train_on(num_clips):
    with pytest.raises(UserError, match=f"{num_clips} clip"):
        training_loader(make_rows().select(range(num_clips)), make_extractor(), options())


# Order


@pytest.mark.parametrize(("num_clips", "batch_size"), [(2, 64), (64, 64), (66, 64), (400, 64), (7, 4)])
def test_order_is_a_permutation_of_seed_and_epoch(num_clips, batch_size):
    orders = {}
    for seed in (0, 1):
        for epoch in (0, 1, 2):
            sampler = ShuffledClips(num_clips, batch_size, seed)
            sampler.set_epoch(epoch)
            order = list(sampler)
            assert len(order) == len(sampler) == num_clips
            assert {key.epoch for key in order} == {epoch}
            assert sorted(key.clip for key in order) == list(range(num_clips))
            assert list(sampler) == order  # asked again, the same
            orders[seed, epoch] = tuple(key.clip for key in order)
    if num_clips > 5:
        assert len(set(orders.values())) == 6 and tuple(range(num_clips)) not in orders.values()


@pytest.mark.parametrize(("num_clips", "batch_size"), [(9, 4), (3, 2), (65, 64)])
def test_a_last_batch_of_one_waits_and_it_is_not_always_the_same_clip(num_clips, batch_size):
    sampler = ShuffledClips(num_clips, batch_size, seed=0)
    left_out = []
    for epoch in range(40):
        sampler.set_epoch(epoch)
        used = [key.clip for key in sampler]
        assert len(used) == len(set(used)) == len(sampler) == num_clips - 1
        (missing,) = set(range(num_clips)) - set(used)
        left_out.append(missing)
    assert len(set(left_out)) >= min(num_clips, 20)


# Evaluation


@pytest.mark.parametrize(
    "samples", [1, 30, 999, 1000, 1001, 1099, 1100, 1101, 1500, 2000, 2099, 2101, 2500, 6000, 6001]
)
@pytest.mark.parametrize("channels", [1, 2])
def test_windows_cover_a_clip(samples, channels):
    length = 1000
    waveform = torch.from_numpy(noise(samples, channels))
    windows = evaluation_windows(waveform, length)
    assert windows.shape[1:] == (channels, length)
    if samples <= 1100:
        assert torch.equal(windows, fit_length(waveform, length)[None])
        return
    # One window for each thousand samples, and another where more than a hundred remain.
    full, rest = divmod(samples, length)
    assert len(windows) == full + (rest > 100)
    covered = np.zeros(samples, bool)
    for number, window in enumerate(windows):
        start = number * length if (number + 1) * length <= samples else samples - length
        assert torch.equal(window, waveform[:, start : start + length])
        covered[start : start + length] = True
    assert covered[: full * length].all()
    assert covered.all() == (rest == 0 or rest > 100)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.5, 1), (4.9, 1), (5, 1), (5.2, 1), (7.5, 2), (10, 2), (12.5, 3), (30, 6), (30.3, 6), (31, 7)],
)
def test_number_of_windows_at_full_rate(seconds, expected):
    assert len(evaluation_windows(torch.zeros(1, round(seconds * 44100)), 5 * 44100)) == expected


def test_evaluation_clips_come_in_order_with_all_their_windows():
    rows, extractor = make_rows(), make_extractor()
    expected = [evaluation_windows(read_waveform(row["audio"], extractor), LENGTH) for row in rows]
    clip_of_window = [clip for clip, windows in enumerate(expected) for _ in windows]
    for changes in ({}, {"dataloader_num_workers": 2}, {"per_device_train_batch_size": 2}):
        batches = list(evaluation_loader(rows, extractor, options(**changes)))
        assert torch.cat([batch["index"] for batch in batches]).tolist() == clip_of_window
        assert torch.cat([batch["labels"] for batch in batches]).tolist() == [i % 3 for i in clip_of_window]
        assert torch.equal(torch.cat([batch["signal"] for batch in batches]), torch.cat(expected))
        assert max(len(batch["signal"]) for batch in batches) == options(**changes).per_device_train_batch_size


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_mean_over_windows(batch_size):
    rows, extractor, accelerator = make_rows((5500, 1000, 8000, 3000)), make_extractor(), Accelerator(cpu=True)
    make_views, weight = ViewMaker(extractor), torch.nn.Parameter(torch.ones(()))

    def score(batch):
        flat = make_views.unchanged(batch).flatten(1)
        return torch.stack([flat.mean(1), flat.amax(1), flat[:, 0]], dim=1).to(torch.float64) * weight

    loader = evaluation_loader(rows, extractor, options(per_device_train_batch_size=batch_size))
    means = mean_over_windows(accelerator, accelerator.prepare(loader), score)
    assert means.dtype == torch.float32 and not means.requires_grad
    for mean, row in zip(means, rows, strict=True):
        windows = evaluation_windows(read_waveform(row["audio"], extractor), LENGTH)
        scores = [score({"signal": window[None]})[0] for window in windows]
        torch.testing.assert_close(mean.double(), sum(scores).detach() / len(windows), rtol=1e-5, atol=1e-5)


# Corpora


def test_load_corpora_hands_the_options_on(monkeypatch):
    calls = []
    monkeypatch.setattr("dls_training.input_pipeline.load_corpus", lambda *a, **o: calls.append((a, o)) or len(calls))
    args = SimpleNamespace(corpus=[("esc10", "/a"), ("synthetic", None)], allow_partial=True, skip_unreadable=False)
    args.windows = None
    assert load_corpora(args) == [("esc10", 1), ("synthetic", 2)]
    expected = {"allow_partial": True, "skip_unreadable": False}
    assert calls == [(("esc10", "/a"), expected), (("synthetic", None), expected)]


@pytest.mark.parametrize("num_clips", [9, 8, 6])
def test_gathered_for_metrics_is_every_clip_of_an_epoch(num_clips):
    """Also where a clip waits for the next epoch: accelerate would cut the last batch as if it had that one, too."""
    accelerator = Accelerator(cpu=True)
    loader = training_loader(make_rows((8000,) * num_clips), make_extractor(), options())
    gathered = [accelerator.gather_for_metrics(batch["index"]) for batch in accelerator.prepare(loader)]
    assert len(torch.cat(gathered)) == num_clips - (num_clips % 4 == 1)
