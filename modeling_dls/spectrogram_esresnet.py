"""ESResNet's three-band power spectrogram in decibels: waveform tensors in, pictures out."""

import math
from collections.abc import Callable
from functools import lru_cache, wraps

import torch
import torch.nn.functional as F

NUM_BANDS = 3
POWER_FLOOR = 1e-18  # replaces exact zeros, which have no logarithm: -180 dB
CPU_PART = 2  # clips at a time
MEL_CORNER = 700.0  # in Hz: the mel scale is log(1 + f / 700), equal steps in frequency below and in pitch above
FULL_SCALE = 32768.0  # ESResNet analyses 16-bit sample values, this interface takes samples in +-1


def cached_tensors(maxsize: int) -> Callable[[Callable], Callable]:
    """`lru_cache` for functions that make tensors: what they return can be used by any later call.

    Tensors made in inference mode are refused by autograd, so they are made outside it. Those made while torch traces
    (export, compile, FakeTensorMode) or transforms functions (vmap, grad) stand for others and outlive their context
    as something that gives wrong answers: there the function runs uncached.
    """

    def decorate(function: Callable) -> Callable:
        cached = lru_cache(maxsize)(torch.inference_mode(False)(function))

        @wraps(function)
        def call(*arguments):
            tracing = (
                torch.compiler.is_compiling()
                or torch._C._len_torch_dispatch_stack() > 0
                or torch._C._functorch.peek_interpreter_stack() is not None
            )
            return function(*arguments) if tracing else cached(*arguments)

        return call

    return decorate


@cached_tensors(maxsize=8)
def _analysis_window(win_length: int, n_fft: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Periodic four-term Blackman-Harris window, (win_length,), rounded to float32 as the original keeps it.

    It carries the full scale and the transform's 1 / sqrt(n_fft) too, which then cost nothing.
    """
    terms = [0.35875, 0.48829, 0.14128, 0.01168]
    window = torch.signal.windows.general_cosine(win_length, a=terms, sym=False, dtype=torch.float64)
    return (window.to(torch.float32).double() * (FULL_SCALE / n_fft**0.5)).to(device, dtype)


@cached_tensors(maxsize=8)
def _mel_filters(rows: int, n_fft: int, sampling_rate: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Triangles equally spaced on the mel scale from 0 Hz to half the rate: (bins, rows); each averages its bins.

    Where rows lie closer than bins, a triangle reaches at least to the next bin on either side: it interpolates.
    """
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64)
    top = math.log1p(sampling_rate / 2 / MEL_CORNER)
    edges = torch.linspace(0, top, rows + 2, dtype=torch.float64).expm1() * (MEL_CORNER * n_fft / sampling_rate)
    centre = edges[1:-1]
    lowest, highest = torch.minimum(edges[:-2], centre - 1), torch.maximum(edges[2:], centre + 1)
    rising, falling = (bins[:, None] - lowest) / (centre - lowest), (highest - bins[:, None]) / (highest - centre)
    filters = torch.minimum(rising, falling).clamp(min=0)
    return (filters / filters.sum(dim=0)).to(device, dtype)


def by_parts(transform: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Makes `transform`, (batch, samples) -> (batch, …), take (..., samples); on a CPU it gets few clips at a time.

    What is computed on the way then stays in the processor's caches.
    """

    @wraps(transform)
    def call(waveform: torch.Tensor, *settings, **more) -> torch.Tensor:
        flat = waveform[None].flatten(0, -2)
        if flat.device.type != "cpu" or len(flat) <= CPU_PART:
            result = transform(flat, *settings, **more)
        else:
            first = transform(flat[:CPU_PART], *settings, **more)
            result = torch.empty_strided((len(flat), *first.shape[1:]), first.stride(), dtype=first.dtype)
            result[:CPU_PART] = first
            for start in range(CPU_PART, len(flat), CPU_PART):
                part = slice(start, start + CPU_PART)
                result[part] = transform(flat[part], *settings, **more)
        return result.reshape(*waveform.shape[:-1], *result.shape[1:])

    return call


@by_parts
def three_band_power(
    waveform: torch.Tensor,
    n_fft: int = 2048,
    win_length: int = 1654,
    hop_length: int = 561,
    spec_height: int | None = None,
    spec_width: int | None = None,
    resize_mode: str = "bilinear",
    mel_rate: int | None = None,
) -> torch.Tensor:
    """Power spectrogram in three equal frequency bands, the lowest band first (ESResNet, section 3.1).

    Args:
        waveform: (..., samples) in +-1, float32 or float64; at least n_fft / 2 + 1 samples.
        n_fft, win_length, hop_length: Settings of the centred STFT, in samples.
        spec_height, spec_width: Size of each band's picture; None keeps the STFT's own.
        resize_mode: "bilinear" (the original's, corners aligned) or "area" (average over the cells that are merged).
        mel_rate: Spaces the 3 * spec_height rows equally on the mel scale of this sampling rate (Hz) before they are
            split into bands; None spaces them equally in frequency, as the original does.

    Returns:
        (..., 3, height, width) in squared 16-bit sample units, above zero, in the waveform's dtype.

    Raises:
        ValueError: if the waveform is shorter than half an FFT window.
    """
    samples = waveform.shape[-1]
    if samples <= n_fft // 2:
        raise ValueError(
            f"a waveform of {samples} samples is shorter than one analysis window: expected at least "
            f"{n_fft // 2 + 1} samples (set max_length to pad short clips)"
        )
    window = _analysis_window(win_length, n_fft, waveform.dtype, waveform.device)
    spectrum = torch.stft(waveform, n_fft, hop_length, win_length, window, return_complex=True)
    bins = spectrum.shape[-2]
    band_height = (spec_height if mel_rate else None) or bins // NUM_BANDS
    # In the order in which the transform leaves them in memory, frame by frame: (batch, frames, bins, 2).
    squares = torch.view_as_real(
        spectrum.transpose(1, 2)[..., : bins if mel_rate else NUM_BANDS * band_height]
    ).square()
    power = F.threshold(squares[..., 0] + squares[..., 1], 0, POWER_FLOOR, inplace=True)
    if mel_rate:
        power = power @ _mel_filters(NUM_BANDS * band_height, n_fft, mel_rate, power.dtype, power.device)
    power = power.unflatten(2, (NUM_BANDS, band_height)).transpose(1, 2)
    size = (spec_width or power.shape[-2], spec_height or power.shape[-1])
    if size != power.shape[-2:]:
        corners = {"align_corners": True} if resize_mode == "bilinear" else {}
        power = F.interpolate(power, size=size, mode=resize_mode, **corners)
    return power.transpose(2, 3)


def power_to_decibel(
    power: torch.Tensor, min_db: float | None = None, mean: float = 0.0, std: float = 1.0
) -> torch.Tensor:
    """10 log10(power), optionally floored at `min_db` and standardised to (dB - mean) / std.

    Args:
        power: Any shape, above zero.
        min_db: Lowest level kept, in dB; None keeps all.
        mean, std: In dB.
    """
    decibel = power.log10().mul_(10)
    if min_db is not None:
        decibel = decibel.clamp_(min=min_db)
    return decibel if (mean, std) == (0.0, 1.0) else decibel.sub_(mean).div_(std)


@by_parts
def three_band_spectrogram(
    waveform: torch.Tensor,
    n_fft: int = 2048,
    win_length: int = 1654,
    hop_length: int = 561,
    spec_height: int | None = None,
    spec_width: int | None = None,
    resize_mode: str = "bilinear",
    min_db: float | None = None,
    mean: float = 0.0,
    std: float = 1.0,
    mel_rate: int | None = None,
) -> torch.Tensor:
    """Three-band power spectrogram in decibels; with the defaults, ESResNet's own.

    Args:
        waveform: (..., samples) in +-1, float32 or float64.
        n_fft, win_length, hop_length, spec_height, spec_width, resize_mode, mel_rate: See `three_band_power`.
        min_db, mean, std: See `power_to_decibel`.

    Returns:
        (..., 3, height, width), in the waveform's dtype and on its device. 5 s at 44.1 kHz give (3, 341, 394).

    Raises:
        ValueError: if the waveform is shorter than half an FFT window.
    """
    power = three_band_power(waveform, n_fft, win_length, hop_length, spec_height, spec_width, resize_mode, mel_rate)
    return power_to_decibel(power, min_db, mean, std)
