"""Tiny networks as if they had been trained, recordings for them, and the slow, obvious way from one to the other."""

from pathlib import Path

import numpy as np
import soundfile
import torch

from modeling_dls import ESResNetConfig, ESResNetFeatureExtractor

RATE, LENGTH = 8000, 4000  # samples a second, and of a window
# Lengths in samples of 8 kHz; the long ones have several windows.
LENGTHS = {"a.wav": 4000, "b/c.flac": 2500, "b/d.wav": 9000, "e.ogg": 4100, "f.wav": 30000}


def save(head, folder: Path, seed: int = 0, **config) -> Path:
    """A network of random weights, with an extractor of half a second."""
    torch.manual_seed(seed)
    model = head(ESResNetConfig.from_preset("tiny", embedding_dim=16, **config)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as if it had been trained
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
    model.save_pretrained(folder)
    settings = {"sampling_rate": RATE, "n_fft": 1024, "win_length": 400, "hop_length": 100}
    extractor = ESResNetFeatureExtractor.from_preset("tiny", max_length=LENGTH, audio_channels=1, **settings)
    extractor.save_pretrained(folder)
    return folder


def write_recordings(folder: Path) -> Path:
    """`LENGTHS`, half a second of stereo at 44.1 kHz (g.wav), two unreadable files, one that is no sound."""
    (folder / "b").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, samples in LENGTHS.items():
        soundfile.write(folder / name, 0.1 * random.standard_normal(samples), RATE)
    soundfile.write(folder / "g.wav", 0.1 * random.standard_normal((22050, 2)), 44100)
    (folder / "broken.wav").write_bytes(b"RIFF, but nothing more")
    (folder / "empty.flac").write_bytes(b"")
    (folder / "notes.txt").write_text("not a sound")
    return folder


def slow_windows(samples: np.ndarray, length: int = LENGTH, step: int = LENGTH) -> list[tuple[int, int]]:
    """Where windows start and end: the last ends with the sound, unless less than a tenth of it would be new."""
    if len(samples) <= 1.1 * length:
        return [(0, len(samples))]
    starts = [0]
    while starts[-1] + length < len(samples) - 0.1 * length:
        starts.append(min(starts[-1] + step, len(samples) - length))
    return [*((start, start + length) for start in starts[:-1]), (starts[-1], len(samples))]


def slow_outputs(model, folder: Path, path: Path, length: int = LENGTH, step: int = LENGTH) -> list[tuple]:
    """[(start, end, the model's outputs)] of each window, one after the other."""
    extractor = ESResNetFeatureExtractor.from_pretrained(folder, max_length=length)
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    assert rate == RATE
    mono, found = samples.mean(axis=1), []
    places = slow_windows(mono, length, step)
    for start, end in places:
        window = mono if len(places) == 1 else mono[start : start + length]
        with torch.no_grad():
            found.append((start, end, model(**extractor(window, sampling_rate=RATE, return_tensors="pt"))))
    return found
