"""The three-band spectrogram against a slow version, the crop and padding rules, and the feature extractor."""

import json

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoFeatureExtractor
from transformers.audio_utils import mel_filter_bank
from transformers.utils import PaddingStrategy

from modeling_dls import ESResNetConfig, ESResNetFeatureExtractor, three_band_spectrogram
from modeling_dls.feature_extraction_esresnet import fit_length
from modeling_dls.spectrogram_esresnet import _mel_filters, power_to_decibel, three_band_power

RATE = 8000
SMALL = {"sampling_rate": RATE, "n_fft": 64, "win_length": 50, "hop_length": 20}
DEFAULTS = {"n_fft": 2048, "win_length": 1654, "hop_length": 561}


def noise(*shape, seed=0, scale=0.1):
    return scale * np.random.RandomState(seed).standard_normal(shape)


def small_extractor(**settings):
    return ESResNetFeatureExtractor(**{**SMALL, **settings})


# --- three_band_spectrogram ---


def slow_power(samples, n_fft, win_length, hop_length):
    """One waveform (samples,) -> (3, height, frames): frame by frame, one explicit Fourier sum per bin."""
    window = np.zeros(n_fft)
    start = (n_fft - win_length) // 2
    n = 2 * np.pi * np.arange(win_length) / win_length
    terms = 0.35875 - 0.48829 * np.cos(n) + 0.14128 * np.cos(2 * n) - 0.01168 * np.cos(3 * n)
    window[start : start + win_length] = np.float32(terms)  # the original keeps its window in float32
    padded = np.pad(np.asarray(samples, dtype=np.float64) * 32768, n_fft // 2, mode="reflect")
    height = (n_fft // 2 + 1) // 3
    frames = []
    for first in range(0, len(padded) - n_fft + 1, hop_length):
        frame = padded[first : first + n_fft] * window
        power = []
        for k in range(3 * height):
            phase = 2 * np.pi * k * np.arange(n_fft) / n_fft
            real, imaginary = (frame * np.cos(phase)).sum(), (frame * np.sin(phase)).sum()
            power.append((real**2 + imaginary**2) / n_fft or 1e-18)
        frames.append(np.reshape(power, (3, height)))
    return np.stack(frames, axis=-1)


def slow_bilinear(picture, height, width):
    """Bilinear resize with aligned corners: cell i of n samples position i * (old - 1) / (n - 1)."""

    def sample(values, size):  # along the first axis
        resized = []
        for i in range(size):
            at = i * (len(values) - 1) / (size - 1) if size > 1 else 0.0
            low = min(int(at), len(values) - 2)
            resized.append((1 - (at - low)) * values[low] + (at - low) * values[low + 1])
        return np.stack(resized)

    return sample(sample(picture, height).T, width).T


def slow_area(picture, height, width):
    """The mean of the cells that each output cell touches."""

    def edges(i, old, new):
        return slice(i * old // new, -(-(i + 1) * old // new))

    return np.array(
        [
            [
                picture[edges(i, picture.shape[0], height), edges(j, picture.shape[1], width)].mean()
                for j in range(width)
            ]
            for i in range(height)
        ]
    )


def slow_mel(power, rows, n_fft, rate):
    """(bins, frames) -> (rows, frames): weighted means, by triangles that are at least one bin wide on each side."""
    edges = [700 * (np.exp(i / (rows + 1) * np.log(1 + rate / 2 / 700)) - 1) * n_fft / rate for i in range(rows + 2)]
    mel = []
    for lowest, centre, highest in zip(edges, edges[1:], edges[2:], strict=False):
        lowest, highest = min(lowest, centre - 1), max(highest, centre + 1)
        weights = [
            max(0, (k - lowest) / (centre - lowest) if k <= centre else (highest - k) / (highest - centre))
            for k in range(len(power))
        ]
        mel.append(sum(w * row for w, row in zip(weights, power, strict=True)) / sum(weights))
    return np.array(mel)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 0.01)])
@pytest.mark.parametrize(
    "n_fft, win_length, hop_length, samples",
    [(64, 64, 16, 200), (60, 37, 23, 201), (61, 30, 7, 150), (100, 81, 100, 51), (47, 47, 11, 24)],
)
def test_spectrogram_equals_a_slow_fourier_sum(n_fft, win_length, hop_length, samples, dtype, tolerance):
    waveform = noise(samples)
    expected = 10 * np.log10(slow_power(waveform, n_fft, win_length, hop_length))
    actual = three_band_spectrogram(torch.tensor(waveform, dtype=dtype), n_fft, win_length, hop_length)
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("resize_mode, slow_resize", [("bilinear", slow_bilinear), ("area", slow_area)])
@pytest.mark.parametrize("height, width", [(5, 7), (None, 4), (6, None), (17, 31), (10, 9), (1, 1)])
def test_power_is_resized_band_by_band_before_the_logarithm(resize_mode, slow_resize, height, width):
    waveform = noise(200)
    power = slow_power(waveform, 64, 50, 20)  # (3, 11, 11)
    resized = np.stack([slow_resize(band, height or power.shape[1], width or power.shape[2]) for band in power])
    actual = three_band_spectrogram(
        torch.from_numpy(waveform), 64, 50, 20, spec_height=height, spec_width=width, resize_mode=resize_mode
    )
    assert actual.shape == resized.shape
    np.testing.assert_allclose(actual.numpy(), 10 * np.log10(resized), rtol=0, atol=1e-6)


@pytest.mark.parametrize("height, width", [(3, None), (20, 4)])  # rows wider and narrower than the bins
def test_rows_on_the_mel_scale(height, width):
    waveform = noise(200)
    # 66 bins: slow_power's three bands are all of them, as the mel scale's are.
    power = slow_power(waveform, 130, 120, 20).reshape(66, -1)
    mel = slow_mel(power, 3 * height, 130, RATE).reshape(3, height, -1)
    expected = 10 * np.log10(np.stack([slow_area(band, height, width or mel.shape[2]) for band in mel]))
    actual = three_band_spectrogram(
        torch.from_numpy(waveform), 130, 120, 20, height, width, resize_mode="area", mel_rate=RATE
    )
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-6)
    extractor = ESResNetFeatureExtractor(RATE, 130, 120, 20, height, width, "area", "mel")
    features = extractor(waveform, sampling_rate=RATE, return_tensors="pt")["input_values"][0, 0]
    np.testing.assert_allclose(features.numpy(), expected, rtol=0, atol=0.01)


def test_the_mel_scale_is_transformers():
    """Where triangles are wider than a bin, they are those of transformers, but for their height."""
    theirs = mel_filter_bank(1025, 30, 0, 22050, 44100, mel_scale="htk")
    np.testing.assert_allclose(
        _mel_filters(30, 2048, 44100, torch.float64, torch.device("cpu")), theirs / theirs.sum(0), atol=1e-3
    )


def test_default_settings_are_the_originals():
    waveform = torch.from_numpy(noise(6000))
    assert torch.equal(three_band_spectrogram(waveform), three_band_spectrogram(waveform, **DEFAULTS))
    assert three_band_spectrogram(torch.zeros(5 * 44100)).shape == (3, 341, 394)
    assert three_band_spectrogram(torch.zeros(4 * 44100)).shape == (3, 341, 315)


def test_lowest_band_comes_first():
    t = torch.arange(44100, dtype=torch.float64) / 44100
    for band, frequency in enumerate((3000, 10000, 19000)):
        power = three_band_power(torch.sin(2 * torch.pi * frequency * t))
        assert power.mean(dim=(1, 2)).argmax() == band


def test_digital_silence_is_exactly_minus_180_decibel():
    assert (three_band_spectrogram(torch.zeros(4000)) == -180).all()


@pytest.mark.parametrize("shape", [(), (2,), (4, 1), (2, 3, 2)])
def test_leading_dimensions_are_kept_and_independent(shape):
    waveforms = torch.from_numpy(noise(*shape, 300))
    actual = three_band_spectrogram(waveforms, 64, 50, 20, spec_height=5, spec_width=6)
    assert actual.shape == (*shape, 3, 5, 6)
    for index in np.ndindex(*shape):
        single = three_band_spectrogram(waveforms[index], 64, 50, 20, spec_height=5, spec_width=6)
        torch.testing.assert_close(actual[index], single)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"spec_height": 4, "spec_width": 5},
        {"spec_height": 4, "mel_rate": RATE},
        {"min_db": 0.0, "mean": 45.3, "std": 20},
    ],
)
def test_gradients_are_right(settings):
    waveform = torch.from_numpy(noise(40, scale=0.5)).requires_grad_()
    torch.autograd.gradcheck(
        lambda x: three_band_spectrogram(x, n_fft=16, win_length=12, hop_length=9, **settings), waveform, atol=1e-4
    )


class Spectrogram(torch.nn.Module):
    def __init__(self, extractor):
        super().__init__()
        self.extractor = extractor

    def forward(self, waveform):
        return self.extractor.spectrogram(waveform)


def in_context(context):
    def run(module, waveform):
        with context:
            return module(torch.rand(waveform.shape))

    return run


UNUSUAL_CALLS = {  # where new tensors are not ordinary ones
    "inference mode": in_context(torch.inference_mode()),
    "fake tensors": in_context(FakeTensorMode()),
    "export": lambda module, x: torch.export.export(module, (x,), strict=False).module()(x),
    "strict export": lambda module, x: torch.export.export(module, (x,), strict=True).module()(x),
    "compile": lambda module, x: torch.compile(module, backend="eager", fullgraph=True)(x),
    "vmap": lambda module, x: torch.func.vmap(module)(x),
    "grad": lambda module, x: torch.func.grad(lambda y: module(y).sum())(x),
    "jvp": lambda module, x: torch.func.jvp(module, (x,), (x,))[0],
}


@pytest.mark.parametrize("first", ["ordinary call", "unusual call"])
@pytest.mark.parametrize("way", UNUSUAL_CALLS)
def test_a_call_where_tensors_are_not_ordinary_leaves_nothing_behind(way, first):
    n_fft = 70 + list(UNUSUAL_CALLS).index(way) * 4 + (first == "unusual call") * 2  # seen by no other test
    extractor = small_extractor(n_fft=n_fft, spec_height=4, frequency_scale="mel", do_normalize=True)
    waveform = torch.from_numpy(noise(2, 300)).float().requires_grad_()
    if first == "ordinary call":
        extractor.spectrogram(waveform)
    result = UNUSUAL_CALLS[way](Spectrogram(extractor), waveform.detach())
    after = extractor.spectrogram(waveform)
    assert type(after) is torch.Tensor
    torch.testing.assert_close(after.double(), extractor.spectrogram(waveform.double()), rtol=0, atol=1e-3)
    if way in ("export", "strict export", "compile", "vmap", "jvp"):
        torch.testing.assert_close(result, after)
    after.sum().backward()
    assert torch.isfinite(waveform.grad).all()


@pytest.mark.parametrize("clips", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "size",
    [
        {},
        {"spec_height": 5, "spec_width": 7, "resize_mode": "area"},
        {"spec_height": 5, "spec_width": 7, "mel_rate": RATE},
    ],
)
def test_a_batch_is_taken_apart_and_put_together(clips, size):
    """On a CPU a few clips are transformed at a time: nobody may notice, not even by a bit or in a gradient."""
    waveform = torch.randn(clips, 2, 300, generator=torch.Generator().manual_seed(0)).requires_grad_()
    whole = three_band_spectrogram(waveform, 64, 50, 20, **size)
    alone = torch.stack([torch.stack([three_band_spectrogram(c, 64, 50, 20, **size) for c in x]) for x in waveform])
    assert torch.equal(whole, alone)
    weights = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((result * weights).sum(), waveform)[0] for result in (whole, alone)]
    torch.testing.assert_close(*gradients)


def test_inputs_are_left_alone():
    waveform = torch.rand(300)
    power = three_band_power(waveform, 64, 50, 20)
    before = waveform.clone(), power.clone()
    power_to_decibel(power, min_db=20.0, mean=1.0, std=2.0)
    assert torch.equal(waveform, before[0]) and torch.equal(power, before[1])


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (45.3, 20.0)])
@pytest.mark.parametrize("min_db", [None, -9.7])
def test_normalisation_formula(min_db, mean, std):
    decibels = np.array([-180.0, -50.0, -9.8, -9.6, 0.0, 96.0])
    expected = (decibels if min_db is None else np.maximum(decibels, min_db)) - mean
    actual = power_to_decibel(torch.from_numpy(10 ** (decibels / 10)), min_db, mean, std)
    np.testing.assert_allclose(actual.numpy(), expected / std, rtol=1e-12, atol=1e-12)


def test_power_and_decibel_are_the_spectrogram_in_two_parts():
    """Training augments in between; the floor and the normalisation hold for what comes out of that."""
    waveform = torch.rand(2, 300, dtype=torch.float64) - 0.5
    extractor = small_extractor(do_normalize=True, min_db=50.0, mean=50.0, std=2.0)
    power = extractor.power(waveform)
    assert torch.equal(power, three_band_power(waveform, 64, 50, 20))
    assert torch.equal(extractor.decibel(power), extractor.spectrogram(waveform))
    louder = np.maximum(three_band_spectrogram(waveform, 64, 50, 20).numpy() + 10, 50.0)
    np.testing.assert_allclose(extractor.decibel(power * 10).numpy(), (louder - 50.0) / 2, atol=1e-9)


@pytest.mark.parametrize("samples, fits", [(0, False), (1, False), (32, False), (33, True)])
def test_a_waveform_shorter_than_one_window_is_refused(samples, fits):
    if fits:
        assert three_band_spectrogram(torch.rand(samples), 64, 50, 20).shape[0] == 3
    else:
        with pytest.raises(ValueError, match=f"{samples} samples is shorter than one analysis window.*at least 33"):
            three_band_spectrogram(torch.rand(samples), 64, 50, 20)


# --- fit_length ---


def slow_fit_length(clip, length):
    """ESResNet's evaluation rule on (channels, samples), with plain lists of samples and no cleverness."""
    samples = clip.shape[1]
    if samples <= length:
        left = (length - samples) // 2
        first = [[clip[:, 0].mean()] * left] * len(clip)
        last = [[clip[:, -1].mean()] * (length - samples - left)] * len(clip)
        return np.concatenate([np.array(first), clip, np.array(last)], axis=1)
    centre, head, tail = (samples - length) // 2, 0, samples - length
    for start in (centre, head):
        if clip[:, start : start + length].std(ddof=1) >= clip.std(ddof=1) / 2:
            return clip[:, start : start + length]
    return clip[:, tail:]


def loud_in(part, samples=30):
    """Two channels, quiet but for the named third of the clip."""
    gain = np.full(samples, 1e-3)
    third = samples // 3
    gain[{"head": slice(0, third), "centre": slice(third, -third), "tail": slice(-third, None)}[part]] = 1.0
    return gain * noise(2, samples, seed=3)


@pytest.mark.parametrize("length", [1, 2, 9, 10, 11, 29, 30, 31, 32, 45, 60])
@pytest.mark.parametrize("part", ["head", "centre", "tail"])
def test_fit_length_equals_the_slow_rule(part, length):
    clip = loud_in(part)
    actual = fit_length(torch.from_numpy(clip), length)
    np.testing.assert_allclose(actual.numpy(), slow_fit_length(clip, length))


@pytest.mark.parametrize("part, start", [("centre", 10), ("head", 0), ("tail", 20)])
def test_a_quiet_crop_gives_way_to_the_head_then_to_the_tail(part, start):
    clip = torch.from_numpy(loud_in(part))
    assert torch.equal(fit_length(clip, 10), clip[:, start : start + 10])


def test_padding_repeats_the_mean_over_channels():
    clip = torch.tensor([[1.0, 5.0, 2.0], [3.0, 5.0, 6.0]])
    expected = [[2.0, 1.0, 5.0, 2.0, 4.0, 4.0], [2.0, 3.0, 5.0, 6.0, 4.0, 4.0]]
    assert fit_length(clip, 6).tolist() == expected


@pytest.mark.parametrize("length", [2, 4, 9])
def test_a_constant_clip_keeps_its_value(length):
    assert fit_length(torch.full((1, 5), 0.25), length).tolist() == [[0.25] * length]


# --- ESResNetFeatureExtractor ---


def test_one_waveform_gives_a_batch_of_one():
    clip = noise(300).astype(np.float32)
    features = small_extractor()(clip, sampling_rate=RATE, return_tensors="pt")
    assert list(features) == ["input_values"]
    assert features["input_values"].dtype == torch.float32
    expected = three_band_spectrogram(torch.from_numpy(clip), 64, 50, 20)[None, None]
    assert torch.equal(features["input_values"], expected)


STEREO = noise(2, 300, seed=1)
CLIPS = noise(3, 300, seed=2)
WAYS = {  # what the user passes -> the batch of (channels, samples) that it means
    "1-d": (CLIPS[0], CLIPS[0][None, None]),
    "stereo": (STEREO, STEREO[None]),
    "(1, samples)": (CLIPS[:1], CLIPS[:1][None]),
    "list of 1-d": (list(CLIPS), CLIPS[:, None]),
    "tuple of 1-d": (tuple(CLIPS), CLIPS[:, None]),
    "list of stereo": ([STEREO, STEREO + 0.1], np.stack([STEREO, STEREO + 0.1])),
    "list of 1-d and (1, samples)": ([CLIPS[0], CLIPS[1:2]], CLIPS[:2, None]),
    "3-d": (np.stack([STEREO, STEREO + 0.1]), np.stack([STEREO, STEREO + 0.1])),
    "3-d torch": (torch.from_numpy(CLIPS[:, None]), CLIPS[:, None]),
    "nested lists": (CLIPS.tolist(), CLIPS[:, None]),
    "list of floats": (CLIPS[0].tolist(), CLIPS[0][None, None]),
    "list of torch": (list(torch.from_numpy(CLIPS)), CLIPS[:, None]),
    "list of mixed types": ([CLIPS[0].tolist(), torch.from_numpy(CLIPS[1])], CLIPS[:2, None]),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_pass_waveforms(way):
    raw, clips = WAYS[way]
    expected = three_band_spectrogram(torch.from_numpy(np.float32(clips)), 64, 50, 20)
    actual = small_extractor()(raw, sampling_rate=RATE, return_tensors="pt")["input_values"]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


PCM8 = np.random.RandomState(4).randint(0, 256, 300)  # as unsigned 8-bit PCM: exact in every type below


SAMPLE_TYPES = {
    "uint8": lambda pcm: pcm.astype(np.uint8),
    "int16": lambda pcm: ((pcm - 128) * 2**8).astype(np.int16),
    "int32": lambda pcm: ((pcm - 128) * 2**24).astype(np.int32),
    "float16": lambda pcm: ((pcm - 128) / 128).astype(np.float16),
    "float64": lambda pcm: (pcm - 128) / 128,
    "list": lambda pcm: ((pcm - 128) / 128).tolist(),
    "torch int16": lambda pcm: torch.from_numpy((pcm - 128) * 2**8).to(torch.int16),
    "torch bfloat16": lambda pcm: torch.from_numpy((pcm - 128) / 128).to(torch.bfloat16),
    "torch with gradients": lambda pcm: torch.from_numpy((pcm - 128) / 128).requires_grad_(),
    "big endian": lambda pcm: ((pcm - 128) * 2**8).astype(">i2"),
    "reversed view": lambda pcm: ((pcm - 128) / 128)[::-1].copy()[::-1],
    "strided view": lambda pcm: np.repeat((pcm - 128) / 128, 2)[::2],
}


@pytest.mark.parametrize("convert", SAMPLE_TYPES.values(), ids=SAMPLE_TYPES)
def test_every_sample_type_means_the_same(convert):
    expected = small_extractor()(((PCM8 - 128) / 128).astype(np.float32), sampling_rate=RATE)["input_values"]
    actual = small_extractor()(convert(PCM8), sampling_rate=RATE)["input_values"]
    np.testing.assert_array_equal(actual, expected)


def test_input_is_left_alone():
    clip = noise(200).astype(np.float32)
    before = clip.copy()
    small_extractor(max_length=300, do_normalize=True)(clip, sampling_rate=RATE)
    np.testing.assert_array_equal(clip, before)


@pytest.mark.filterwarnings("error")
def test_a_read_only_array_passes_without_a_warning():
    clip = noise(200)
    clip.flags.writeable = False
    small_extractor()(clip, sampling_rate=RATE)


@pytest.mark.parametrize(
    "raw, message",
    [
        (np.zeros(300, dtype=np.int64), "full scale of torch.int64"),
        ([0, 1, 2] * 100, "full scale of torch.int64"),
        (np.zeros(300, dtype=bool), "full scale of torch.bool"),
        (np.zeros(300, dtype=np.complex64), "full scale of torch.complex64"),
        (np.where(np.arange(300) == 7, np.nan, 0.0), "NaN or infinite"),
        ([np.zeros(300), np.full(300, -np.inf)], "NaN or infinite"),
        (np.zeros((300, 2)), "more channels than samples.*transpose"),
        ([np.zeros((300, 2))], "more channels than samples"),
        (np.zeros(0), "waveform is empty"),
        ([], "waveform is empty"),
        ([[]], "waveform is empty"),
        (np.zeros((0, 1, 300)), "batch is empty"),
        (np.zeros((1, 0, 300)), "waveform is empty"),
        (np.zeros((2, 2, 2, 300)), r"\(samples,\) or \(channels, samples\)"),
        (np.float32(0.5), r"\(samples,\) or \(channels, samples\)"),
        (np.zeros(32), "shorter than one analysis window"),
    ],
)
def test_bad_waveforms_are_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        small_extractor()(raw, sampling_rate=RATE)


def test_another_sampling_rate_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"made for 44100 Hz.*16000 Hz.*resample\(waveform, 16000, 44100\)"):
        ESResNetFeatureExtractor()(np.zeros(44100), sampling_rate=16000)


def test_no_sampling_rate_means_the_right_one():
    clip = noise(300)
    np.testing.assert_array_equal(
        small_extractor()(clip)["input_values"], small_extractor()(clip, sampling_rate=RATE)["input_values"]
    )


@pytest.mark.parametrize("return_tensors, kind", [("pt", torch.Tensor), ("np", np.ndarray), (None, list)])
@pytest.mark.parametrize("count", [1, 3])
def test_return_types(return_tensors, kind, count):
    values = small_extractor()(list(CLIPS[:count]), sampling_rate=RATE, return_tensors=return_tensors)["input_values"]
    assert type(values) is kind
    assert np.shape(values) == (count, 1, 3, 11, 16)
    assert np.asarray(values[0]).dtype == np.float32
    for value, clip in zip(values, CLIPS, strict=False):
        single = small_extractor()(clip, sampling_rate=RATE, return_tensors="np")["input_values"][0]
        np.testing.assert_allclose(np.asarray(value), single, rtol=0, atol=1e-4)


def test_device_is_where_the_result_is():
    features = small_extractor()(CLIPS[0], sampling_rate=RATE, return_tensors="pt", device="cpu")
    assert features["input_values"].device == torch.device("cpu")
    with pytest.raises(RuntimeError, match="no-such-device"):
        small_extractor()(CLIPS[0], sampling_rate=RATE, device="no-such-device")


LENGTHS = [noise(200, seed=5), noise(301, seed=6), noise(257, seed=7)]


def batch_of(clips, length):
    fitted = [fit_length(torch.from_numpy(np.float32(clip))[None], length) for clip in clips]
    return three_band_spectrogram(torch.stack(fitted), 64, 50, 20)


@pytest.mark.parametrize(
    "settings, arguments, length",
    [
        ({}, {}, 301),
        ({}, {"max_length": 240}, 240),
        ({}, {"max_length": 400}, 400),
        ({}, {"max_length": 400, "truncation": False}, 400),
        ({"max_length": 240}, {}, 240),
        ({"max_length": 240}, {"max_length": 400}, 400),
        ({}, {"max_length": 150, "padding": False}, 150),
        ({}, {"max_length": 150, "padding": "do_not_pad"}, 150),
        ({}, {"padding": "longest"}, 301),
        ({"max_length": 400}, {"padding": True}, 400),
        ({"max_length": 400}, {"padding": "longest"}, 301),
        ({"max_length": 240}, {"padding": "longest"}, 240),
        ({"max_length": 240}, {"padding": "longest", "truncation": False}, 301),
        ({"max_length": 400}, {"padding": "max_length"}, 400),
        ({}, {"max_length": 400, "padding": PaddingStrategy.MAX_LENGTH}, 400),
    ],
)
def test_unequal_lengths_are_padded_and_cropped(settings, arguments, length):
    actual = small_extractor(**settings)(LENGTHS, sampling_rate=RATE, return_tensors="pt", **arguments)
    torch.testing.assert_close(actual["input_values"], batch_of(LENGTHS, length), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": False},
        {"padding": "do_not_pad"},
        {"padding": False, "max_length": 240},
        {"padding": PaddingStrategy.DO_NOT_PAD, "max_length": 240},
        {"truncation": False, "max_length": 240},
    ],
)
def test_clips_that_cannot_form_a_batch_are_refused(arguments):
    with pytest.raises(ValueError, match="cannot form one batch"):
        small_extractor()(LENGTHS, sampling_rate=RATE, **arguments)


@pytest.mark.parametrize(
    "padding, message",
    [
        ("bogus", r"padding must be True, False, 'longest', 'max_length' or 'do_not_pad', not 'bogus'"),
        (None, "padding must be .*, not None"),
        ("max_length", "padding='max_length' needs max_length"),
    ],
)
def test_an_impossible_padding_is_refused(padding, message):
    with pytest.raises(ValueError, match=message):
        small_extractor()(LENGTHS, sampling_rate=RATE, padding=padding)


def test_a_clip_that_is_not_padded_keeps_its_length():
    values = small_extractor(max_length=400)(LENGTHS[0], sampling_rate=RATE, padding="do_not_pad", return_tensors="pt")
    torch.testing.assert_close(values["input_values"], batch_of(LENGTHS[:1], 200), rtol=0, atol=1e-4)


def test_mono_and_stereo_form_a_batch_only_where_audio_channels_says_how():
    with pytest.raises(ValueError, match="audio_channels"):
        small_extractor()([CLIPS[0], STEREO], sampling_rate=RATE)
    for audio_channels in (1, 2):
        extractor = small_extractor(audio_channels=audio_channels)
        values = extractor([CLIPS[0], STEREO], sampling_rate=RATE, return_tensors="pt")["input_values"]
        assert values.shape[:2] == (2, audio_channels)


@pytest.mark.parametrize("max_length", [0, -5])
def test_a_max_length_that_is_not_positive_is_refused(max_length):
    with pytest.raises(ValueError, match=f"max_length must be positive.*{max_length}"):
        small_extractor()(CLIPS[0], sampling_rate=RATE, max_length=max_length)


@pytest.mark.parametrize(
    "audio_channels, clip, expected",
    [
        (None, CLIPS[:3], CLIPS[:3]),
        (1, CLIPS[:1], CLIPS[:1]),
        (1, CLIPS[:3], CLIPS.mean(axis=0, keepdims=True)),
        (2, CLIPS[:1], np.repeat(CLIPS[:1], 2, axis=0)),
        (2, STEREO, STEREO),
    ],
)
def test_audio_channels(audio_channels, clip, expected):
    extractor = small_extractor(audio_channels=audio_channels)
    np.testing.assert_allclose(extractor.fit_channels(torch.from_numpy(clip)).numpy(), expected)
    values = extractor(clip, sampling_rate=RATE, return_tensors="pt")["input_values"]
    reference = three_band_spectrogram(torch.from_numpy(np.float32(expected))[None], 64, 50, 20)
    torch.testing.assert_close(values, reference, rtol=0, atol=0.01)


@pytest.mark.parametrize("audio_channels, channels", [(2, 3), (3, 2)])
def test_audio_channels_that_cannot_be_made_are_refused(audio_channels, channels):
    with pytest.raises(ValueError, match=f"cannot make {audio_channels} audio channels of {channels}"):
        small_extractor(audio_channels=audio_channels)(CLIPS[:channels], sampling_rate=RATE)


def test_do_normalize_floors_and_standardises():
    clip = np.where(np.arange(300) < 150, noise(300), 0.0)
    plain = small_extractor()(clip, sampling_rate=RATE, return_tensors="np")["input_values"]
    assert plain.min() == -180
    normalised = small_extractor(do_normalize=True)(clip, sampling_rate=RATE, return_tensors="np")["input_values"]
    np.testing.assert_allclose(normalised, (np.maximum(plain, -9.7) - 45.3) / 20, rtol=0, atol=1e-4)
    custom = small_extractor(do_normalize=True, min_db=-50.0, mean=1.0, std=2.0)
    normalised = custom(clip, sampling_rate=RATE, return_tensors="np")["input_values"]
    np.testing.assert_allclose(normalised, (np.maximum(plain, -50) - 1) / 2, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"resize_mode": "nearest"}, "resize_mode"),
        ({"frequency_scale": "bark"}, "frequency_scale"),
        ({"frequency_scale": "mel"}, "spec_height"),
        ({"win_length": 0}, "win_length"),
        ({"win_length": 65}, "n_fft"),
        ({"hop_length": 0}, "hop_length"),
        ({"spec_height": 0}, "spec_height"),
        ({"spec_width": -1}, "spec_width"),
        ({"max_length": 0}, "max_length"),
        ({"audio_channels": 0}, "audio_channels"),
        ({"sampling_rate": 0}, "sampling_rate"),
        ({"std": 0.0}, "std"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        small_extractor(**settings)


# Every argument away from its default, so that a setting that is not saved cannot hide.
UNUSUAL = {
    "sampling_rate": 8000,
    "n_fft": 100,
    "win_length": 90,
    "hop_length": 33,
    "spec_height": 7,
    "spec_width": 9,
    "resize_mode": "area",
    "frequency_scale": "mel",
    "do_normalize": True,
    "min_db": -20.5,
    "mean": 3.25,
    "std": 4.5,
    "max_length": 777,
    "audio_channels": 2,
    "padding_value": -1.0,
}


@pytest.mark.parametrize("settings", [{}, UNUSUAL], ids=["default", "unusual"])
def test_json_round_trip(settings, tmp_path):
    extractor = ESResNetFeatureExtractor(**settings)
    extractor.save_pretrained(tmp_path)
    ESResNetConfig.from_preset("tiny").save_pretrained(tmp_path)
    for name, value in settings.items():
        assert json.loads((tmp_path / "preprocessor_config.json").read_text())[name] == value
    for loaded in (
        AutoFeatureExtractor.from_pretrained(tmp_path),
        ESResNetFeatureExtractor.from_pretrained(tmp_path),
        ESResNetFeatureExtractor.from_dict(extractor.to_dict()),
    ):
        assert type(loaded) is ESResNetFeatureExtractor
        assert loaded.to_dict() == extractor.to_dict()
        assert {name: getattr(loaded, name) for name in UNUSUAL} == {
            name: getattr(extractor, name) for name in UNUSUAL
        }
        clip = noise(2000)
        np.testing.assert_array_equal(
            loaded(clip, sampling_rate=loaded.sampling_rate)["input_values"],
            extractor(clip, sampling_rate=extractor.sampling_rate)["input_values"],
        )
