"""Deterministic weights and waveforms behind golden.json.

The original ESResNet was run once on these weights and waveforms, in float64 and with its default settings, and
golden.json holds what it answered: spectrogram points as (audio channel, band, row, frame, dB), and logits. Nothing
here depends on a random stream that may change: NumPy's legacy RandomState is frozen.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
CASES = json.loads((HERE / "golden.json").read_text())
RATE = 44100


def original_state_dict(attention: bool = True, num_classes: int = 10) -> dict[str, torch.Tensor]:
    """State dict of the original ESResNet-50 under its own parameter names, the analysis window included."""
    state = {}
    for name, shape in json.loads((HERE / "original_state_dict.json").read_text()).items():
        shape = [num_classes if size == "num_classes" else size for size in shape]
        if name.startswith("att") and not attention:
            continue
        if name == "window":
            state[name] = torch.from_numpy(blackman_harris(*shape))
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        else:
            state[name] = _fill(name, shape)
    return state


def _fill(name: str, shape: list[int]) -> torch.Tensor:
    r = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    is_norm = ".bn" in name or name.startswith("bn") or "downsample.1" in name
    if name.endswith("running_var"):
        r = 1 + 0.1 * np.abs(r)
    elif name.endswith("running_mean"):
        r = 0.1 * r
    elif is_norm and name.endswith("weight"):
        r = (0.2 if ".bn3." in name else 1.0) * (1 + 0.1 * r)
    elif is_norm:
        r = 0.1 * r
    elif len(shape) > 1:
        r = r * math.sqrt(1.0 / np.prod(shape[1:]))
    else:
        r = 0.01 * r
    return torch.from_numpy(np.asarray(r, dtype=np.float32))


def blackman_harris(length: int) -> np.ndarray:
    """Periodic 4-term Blackman-Harris window, float32, shape (length,)."""
    n = np.arange(length) * 2 * np.pi / length
    window = 0.35875 - 0.48829 * np.cos(n) + 0.14128 * np.cos(2 * n) - 0.01168 * np.cos(3 * n)
    return window.astype(np.float32)


def waveform(case: str) -> np.ndarray:
    """A 44.1 kHz test signal in [-1, 1), float32, shape (channels, samples)."""
    channels = {
        "chirp_mono_5s": lambda: [_chirp(5 * RATE)],
        "noise_mono_5s": lambda: [0.2 * _noise(5 * RATE, 8)],
        "burst_mono_5s": lambda: [_burst(5 * RATE)],
        "half_silent_mono_5s": lambda: [
            np.where(np.arange(5 * RATE) < 5 * RATE // 2, 0.2 * _noise(5 * RATE, 10), 0.0)
        ],
        "stereo_4s": lambda: [_chirp(4 * RATE), 0.2 * _noise(4 * RATE, 11)],
    }[case]()
    return np.stack([(np.clip(c, -1, 1) * 32767).round() / 32768 for c in channels]).astype(np.float32)


def _noise(n: int, seed: int) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(n)


def _chirp(n: int) -> np.ndarray:
    t = np.arange(n) / RATE
    return 0.6 * np.sin(2 * np.pi * (100 * t + 1500 * t * t)) + 0.01 * _noise(n, 7)


def _burst(n: int) -> np.ndarray:
    t = np.arange(n) / RATE
    return 0.8 * np.sin(2 * np.pi * 440 * t) * (t % 1.0 < 0.25) + 0.002 * _noise(n, 9)
