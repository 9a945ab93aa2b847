"""Augmentation, clip by clip and sample by sample in slow words."""

import numpy as np
import pytest
import torch

from dls_training.augmentation import (
    NUM_DRAWS,
    SpectrogramAugmentation,
    WaveformAugmentation,
    hidden_stretches,
    masked_std,
)

LAST = 1 - 2**-53  # the largest draw
LENGTH = 200


def slow_view(clip, draws, length, max_scale=1.25, p_inversion=0.5):
    """ESResNet's steps one after the other on one clip, (channels, samples) float64 -> (channels, length)."""
    channels, samples = clip.shape
    clip = clip.copy()
    quiet_below = (clip.std(ddof=1) if clip.size > 1 else 0.0) / 2
    if draws[0] < p_inversion:
        clip = clip[:, ::-1]
    scale = max_scale ** (2 * draws[1] - 1)
    scaled_length = max(int(samples * scale), 1)
    scaled = np.empty((channels, scaled_length))
    for t in range(scaled_length):
        position = min(t / scale, samples - 1)
        left = int(position)
        right = min(left + 1, samples - 1)
        scaled[:, t] = clip[:, left] + (position - left) * (clip[:, right] - clip[:, left])
    room = scaled_length - length
    if room <= 0:
        before = int(draws[2] * (-room + 1))
        view = np.empty((channels, length))
        for t in range(length):
            if t < before:
                view[:, t] = scaled[:, 0].mean()
            elif t >= before + scaled_length:
                view[:, t] = scaled[:, -1].mean()
            else:
                view[:, t] = scaled[:, t - before]
        return view
    for start in (int(draws[2] * (room + 1)), 0):
        view = scaled[:, start : start + length]
        if view.std(ddof=1) >= quiet_below:
            return view
    return scaled[:, room:]


def make_batch(lengths, channels, seed=0, filling=1e6):
    """Clips of noise that drifts, filled up with something loud."""
    rng = np.random.default_rng(seed)
    clips = [rng.normal(size=(channels, n)) * 0.2 + np.linspace(-0.3, 0.4, n) for n in lengths]
    waveform = torch.full((len(clips), channels, max(lengths)), filling, dtype=torch.float64)
    for row, clip in zip(waveform, clips, strict=True):
        row[:, : clip.shape[1]] = torch.from_numpy(clip)
    return clips, waveform, torch.tensor(lengths)


LENGTHS = [1, 2, 3, 7, 150, 159, 160, 161, 199, 200, 201, 240, 250, 251, 400, 3000]
DRAWS = [
    *([inversion, scaling, place] for inversion in (0.0, LAST) for scaling in (0.0, LAST) for place in (0.0, LAST)),
    [0.2, 0.5, 0.5],
    *np.random.default_rng(0).random((15, NUM_DRAWS)).tolist(),
]


@pytest.mark.parametrize("draws", DRAWS, ids=lambda draws: "-".join(f"{draw:.2f}" for draw in draws))
@pytest.mark.parametrize("channels", [1, 2])
def test_views_of_clips_of_very_different_lengths(channels, draws):
    clips, waveform, lengths = make_batch(LENGTHS, channels)
    views = WaveformAugmentation(LENGTH)(waveform, lengths, torch.tensor([draws] * len(clips), dtype=torch.float64))
    assert views.shape == (len(clips), channels, LENGTH) and views.dtype == torch.float64
    for view, clip in zip(views.numpy(), clips, strict=True):
        # A view that held any of the filling would be off by a million.
        np.testing.assert_allclose(view, slow_view(clip, draws, LENGTH), atol=1e-9)


@pytest.mark.parametrize("channels", [1, 2])
def test_views_in_float32(channels):
    clips, waveform, lengths = make_batch(LENGTHS, channels, seed=1)
    draws = torch.rand(len(clips), NUM_DRAWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    views = WaveformAugmentation(LENGTH)(waveform.float(), lengths, draws)
    assert views.dtype == torch.float32
    for view, clip, draw in zip(views.numpy(), clips, draws.tolist(), strict=True):
        np.testing.assert_allclose(view, slow_view(clip, draw, LENGTH), atol=1e-5)


def test_times_are_exact_late_in_a_long_clip():
    """A float32 time would be off by whole samples after minutes of sound."""
    samples = 20_000_000
    waveform = torch.arange(samples, dtype=torch.float64)[None, None]
    draws = torch.tensor([[LAST, 0.9, LAST]], dtype=torch.float64)
    view = WaveformAugmentation(LENGTH)(waveform, torch.tensor([samples]), draws)
    scale = 1.25**0.8
    start = int(samples * scale) - LENGTH
    # The rule for quiet crops applies to a ramp: its head is as quiet, its tail is this crop again.
    expected = [min((start + t) / scale, samples - 1) for t in range(LENGTH)]
    np.testing.assert_allclose(view[0, 0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_view_depends_on_its_clip_and_draws_alone(channels):
    _, waveform, lengths = make_batch(LENGTHS, channels)
    draws = torch.rand(len(lengths), NUM_DRAWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    augmentation = WaveformAugmentation(LENGTH)
    together = augmentation(waveform, lengths, draws)
    torch.manual_seed(99)
    order = torch.randperm(len(lengths))
    torch.testing.assert_close(augmentation(waveform[order], lengths[order], draws[order]), together[order])
    for row in range(len(lengths)):
        alone = augmentation(waveform[row : row + 1, :, : lengths[row]], lengths[row : row + 1], draws[row : row + 1])
        torch.testing.assert_close(alone, together[row : row + 1], rtol=0, atol=1e-12)


def test_the_input_is_left_as_it_was():
    _, waveform, lengths = make_batch([50, 300], 2)
    draws = torch.full((2, NUM_DRAWS), 0.1, dtype=torch.float64)
    copies = waveform.clone(), lengths.clone(), draws.clone()
    WaveformAugmentation(LENGTH)(waveform, lengths, draws)
    assert all(torch.equal(*pair) for pair in zip((waveform, lengths, draws), copies, strict=True))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_to_do_changes_no_bit(channels, dtype):
    waveform = torch.randn(3, channels, LENGTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    # Not inverted, scale 1.25^0.
    draws = torch.tensor([[0.5, 0.5, place] for place in (0.0, 0.3, LAST)], dtype=torch.float64)
    view = WaveformAugmentation(LENGTH)(waveform, torch.full((3,), LENGTH), draws)
    assert torch.equal(view, waveform)
    inverted = WaveformAugmentation(LENGTH, p_inversion=1.0)(waveform, torch.full((3,), LENGTH), draws)
    assert torch.equal(inverted, waveform.flip(-1))


def test_settings_are_obeyed():
    clips, waveform, lengths = make_batch([90, 500], 1)
    for draws in ([0.1, 0.0, 0.4], [0.9, 0.95, 0.7]):
        views = WaveformAugmentation(100, max_scale=2.0, p_inversion=0.05)(
            waveform, lengths, torch.tensor([draws] * 2, dtype=torch.float64)
        )
        for view, clip in zip(views.numpy(), clips, strict=True):
            np.testing.assert_allclose(view, slow_view(clip, draws, 100, 2.0, 0.05), atol=1e-9)


def bursts(samples, *spans):
    """Faint noise with loud stretches."""
    clip = np.random.default_rng(0).normal(size=(1, samples)) * 1e-3
    for start, end in spans:
        clip[:, start:end] *= 500
    return clip


QUIET = {
    "a loud crop stays": (bursts(1000, (400, 600)), 0.5, (400, 600)),
    "a quiet crop gives way to a loud head": (bursts(1000, (0, 150)), 0.5, (0, 200)),
    "a quiet crop with a quiet head gives way to the tail": (bursts(1000, (850, 1000)), 0.5, (800, 1000)),
    "the tail is taken even where it is quiet": (bursts(1000, (250, 380)), 0.5, (800, 1000)),
    "the head before the tail": (bursts(1000, (0, 150), (850, 1000)), 0.5, (0, 200)),
}


@pytest.mark.parametrize("case", QUIET)
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("offset", [0.0, 0.7])
def test_quiet_crops(case, channels, offset):
    clip, place, (start, end) = QUIET[case]
    # A constant in a recording is no loudness.
    clip = np.repeat(clip, channels, axis=0) * 0.2 + offset
    draws = [0.9, 0.5, place]
    view = WaveformAugmentation(LENGTH)(
        torch.from_numpy(clip)[None].float(), torch.tensor([1000]), torch.tensor([draws], dtype=torch.float64)
    )
    np.testing.assert_array_equal(view[0].numpy(), clip[:, start:end].astype(np.float32))
    np.testing.assert_allclose(slow_view(clip, draws, LENGTH), clip[:, start:end])


@pytest.mark.parametrize(("ratio", "stays"), [(0.45, False), (0.55, True)])
def test_quiet_means_below_half_of_the_clips_standard_deviation(ratio, stays):
    clip = np.where(np.arange(1000) % 2, 1.0, -1.0)[None]
    # The crop's amplitude for which its deviation is `ratio` of the whole clip's.
    clip[:, 400:600] *= (0.8 * ratio**2 / (1 - 0.2 * ratio**2)) ** 0.5
    draws = torch.tensor([[0.9, 0.5, 0.5]], dtype=torch.float64)
    view = WaveformAugmentation(LENGTH)(torch.from_numpy(clip)[None], torch.tensor([1000]), draws)
    np.testing.assert_array_equal(view[0].numpy(), clip[:, 400:600] if stays else clip[:, :200])


def test_a_quiet_crop_among_loud_ones():
    """Only the clips that are quiet give way, and each to its own head or tail."""
    clips = [clip for clip, _, _ in QUIET.values()]
    draws = [[0.1, 0.9 - 0.1 * i, 0.45] for i in range(len(clips))]
    views = WaveformAugmentation(LENGTH)(
        torch.from_numpy(np.stack(clips)), torch.full((len(clips),), 1000), torch.tensor(draws, dtype=torch.float64)
    )
    for view, clip, draw in zip(views.numpy(), clips, draws, strict=True):
        np.testing.assert_allclose(view, slow_view(clip, draw, LENGTH), atol=1e-12)


@pytest.mark.parametrize("samples", [150, 1000])
def test_silence_gives_silence(samples):
    draws = torch.rand(4, NUM_DRAWS, dtype=torch.float64)
    view = WaveformAugmentation(LENGTH)(torch.zeros(4, 1, samples), torch.full((4,), samples), draws)
    assert not view.any()


def test_draws_reach_every_position_and_both_ends_of_the_scale():
    """20,000 views of a ramp tell how each was made."""
    samples, views = 203, 20_000
    waveform = torch.arange(1.0, samples + 1, dtype=torch.float64).expand(views, 1, samples)
    draws = torch.from_numpy(np.random.default_rng(0).random((views, NUM_DRAWS)))
    lengths = torch.full((views,), samples)
    view = WaveformAugmentation(LENGTH, max_scale=1.0)(waveform, lengths, draws)[:, 0]
    inverted = view[:, 0] > view[:, -1]
    assert 0.48 < inverted.double().mean() < 0.52
    starts = view[~inverted, 0].long() - 1
    shares = torch.bincount(starts, minlength=4).double() / len(starts)
    assert len(shares) == 4 and (shares - 0.25).abs().max() < 0.02
    scaled = WaveformAugmentation(LENGTH)(waveform, lengths, draws)[:, 0]
    steps = (scaled[:, 101] - scaled[:, 100]).abs()  # 1 / scale, unless that place is padding
    assert 0.8 <= steps[steps > 0].min() < 0.801 and 1.249 < steps.max() <= 1.2501
    # 1.25^U(-1, 1) has its median at 1.
    assert 0.48 < (steps > 1).double().mean() < 0.52


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_masked_std(channels, dtype):
    clips, waveform, lengths = make_batch([1, 2, 5, 100, 777], channels)
    found = masked_std(waveform.to(dtype), lengths)
    expected = [clip.std(ddof=1) if clip.size > 1 else 0.0 for clip in clips]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize(("loudness", "constant"), [(1e-2, 0.9), (1e-3, 0.2), (1e-4, 0.02)])
def test_masked_std_of_a_faint_sound_on_a_constant(loudness, constant):
    samples = 220_500
    clip = np.random.default_rng(0).normal(size=(1, 1, samples)) * loudness + constant
    found = masked_std(torch.from_numpy(clip).float(), torch.tensor([samples]))
    np.testing.assert_allclose(found.item(), clip.std(ddof=1), rtol=0.02)


# Spectrograms


def slow_picture(power, partner, draws, augmentation, size):
    """The steps on one clip, cell by cell: (channels, 3, height, width) float64."""
    height, width = size
    share_x = augmentation.min_time + (1 - augmentation.min_time) * draws[0]
    share_y = augmentation.min_frequency + (1 - augmentation.min_frequency) * draws[2]

    def stretched(picture, share_x, share_y, draws):
        """Bilinear, cells as areas: the middle of cell i lies at i + 0.5."""
        fine_height, fine_width = picture.shape[-2:]
        left, top = (1 - share_x) * draws[1] * fine_width, (1 - share_y) * draws[3] * fine_height
        out = np.empty((*picture.shape[:-2], height, width))
        for i in range(height):
            for j in range(width):
                column = width - 1 - j if draws[4] < 0.5 else j
                x = np.clip(left + (column + 0.5) * share_x * fine_width / width - 0.5, 0, fine_width - 1)
                y = np.clip(top + (i + 0.5) * share_y * fine_height / height - 0.5, 0, fine_height - 1)
                x0, y0 = int(x), int(y)
                x1, y1 = min(x0 + 1, fine_width - 1), min(y0 + 1, fine_height - 1)
                upper = (1 - x + x0) * picture[..., y0, x0] + (x - x0) * picture[..., y0, x1]
                lower = (1 - x + x0) * picture[..., y1, x0] + (x - x0) * picture[..., y1, x1]
                out[..., i, j] = (1 - y + y0) * upper + (y - y0) * lower
        return out

    view = stretched(power, share_x, share_y, draws)
    share = augmentation.max_mix * draws[5]
    view = (1 - share) * view + share * partner
    view = view * 10 ** (augmentation.gain_db * (2 * draws[6] - 1) / 10)

    def stretch(pair, max_share, size):
        length = int(pair[0] * (max_share * size + 1))
        first = int(pair[1] * (size - length + 1))
        return slice(first, first + length)

    average = np.exp(np.mean([np.log(max(cell, augmentation.floor)) for cell in view.flatten()]))
    pairs = np.asarray(draws[7:]).reshape(-1, 2)
    for pair in pairs[:2]:
        view[..., stretch(pair, augmentation.max_time_mask, width)] = average
    for band in range(3):
        for pair in pairs[2 + 2 * band : 4 + 2 * band]:
            view[:, band, stretch(pair, augmentation.max_frequency_mask, height)] = average
    return view, stretched(power, share_x, share_y, draws)


def power_batch(clips, channels=1, height=9, width=14):
    return torch.from_numpy(np.random.default_rng(1).uniform(0.1, 2, (clips, channels, 3, height, width)))


@pytest.mark.parametrize("size", [(9, 14), (5, 7)])
@pytest.mark.parametrize("channels", [1, 2])
def test_spectrogram_augmentation_against_cells(channels, size):
    """Five clips with those mixed in: of the batch, or behind it; and the same without any."""
    augmentation = SpectrogramAugmentation(floor=0.5)  # within the range of these powers
    power, partners = power_batch(7, channels), [5, 0, 6, 1, 0]
    draws = np.random.default_rng(2).random((7, augmentation.NUM_DRAWS))
    draws[0], draws[1] = 0, LAST
    views = augmentation(power, torch.from_numpy(draws), size, torch.tensor(partners))
    stretched = [slow_picture(p, 0, d, augmentation, size)[1] for p, d in zip(power.numpy(), draws, strict=True)]
    assert len(views) == 5
    for i, partner in enumerate(partners):
        expected = slow_picture(power[i].numpy(), stretched[partner], draws[i], augmentation, size)[0]
        np.testing.assert_allclose(views[i].numpy(), expected, rtol=1e-9, atol=1e-12)
    augmentation.max_mix = 0.0
    unmixed = augmentation(power, torch.from_numpy(draws), size)
    for i in range(7):
        expected = slow_picture(power[i].numpy(), 0, draws[i], augmentation, size)[0]
        np.testing.assert_allclose(unmixed[i].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_spectrogram_augmentation_stays_above_zero_and_keeps_dtype():
    augmentation = SpectrogramAugmentation()
    draws = torch.rand(50, augmentation.NUM_DRAWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    views = augmentation(torch.full((50, 1, 3, 16, 32), 1e-18), draws, (8, 16))
    assert views.dtype == torch.float32 and (views > 0).all() and torch.isfinite(views.log10()).all()


def test_spectrograms_of_half_precision_are_augmented_in_float32():
    augmentation = SpectrogramAugmentation()
    draws = torch.rand(4, augmentation.NUM_DRAWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    coarse, partner = power_batch(4).bfloat16(), torch.tensor([1, 2, 3])
    assert torch.equal(
        augmentation(coarse, draws, (5, 7), partner), augmentation(coarse.float(), draws, (5, 7), partner)
    )


def test_spectrogram_augmentation_can_do_nothing():
    augmentation = SpectrogramAugmentation(1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    power = power_batch(4)
    draws = torch.full((4, augmentation.NUM_DRAWS), 0.7, dtype=torch.float64)
    torch.testing.assert_close(augmentation(power, draws, (9, 14)), power)
    fine = power_batch(4, height=8)
    means = fine.unflatten(-1, (7, 2)).unflatten(-3, (4, 2)).mean(dim=(-1, -3))
    torch.testing.assert_close(augmentation(fine, draws, (4, 7)), means)
    draws[:, 4] = 0.3
    torch.testing.assert_close(augmentation(power, draws, (9, 14)), power.flip(-1))


def test_strength_scales_every_range():
    draws = torch.full((4, SpectrogramAugmentation.NUM_DRAWS), 0.7, dtype=torch.float64)
    power = power_batch(4)
    torch.testing.assert_close(SpectrogramAugmentation.of_strength(0)(power, draws, (9, 14)), power)
    assert vars(SpectrogramAugmentation.of_strength(1)) == pytest.approx(vars(SpectrogramAugmentation()))
    half = vars(SpectrogramAugmentation.of_strength(0.5, 0.2))
    assert half == pytest.approx(vars(SpectrogramAugmentation(0.7, 0.9, 0.15, 4.0, 1 / 12, 1 / 8, 0.2)))
    strongest = SpectrogramAugmentation.of_strength(SpectrogramAugmentation.MAX_STRENGTH)
    assert strongest.min_time == pytest.approx(0.1) and 0 < strongest.max_time_mask < 0.5


def test_masks_hide_the_promised_shares():
    """Over many draws, a time mask is up to a sixth of the width, and every width and place occurs."""
    draws = torch.rand(20_000, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden = hidden_stretches(draws, 1 / 6, 48)
    assert sorted(hidden.sum(dim=1).unique().tolist()) == list(range(9))
    assert hidden.any(dim=0).all()
    assert hidden.double().mean().item() == pytest.approx(4 / 48, rel=0.02)
