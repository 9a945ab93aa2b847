"""A procedural corpus of everyday-like sounds: nothing to download, and hard enough to be worth learning.

What tells the classes apart is what happens over time. Several share their spectrum on purpose (every tonal class
draws its pitch from one range, every noisy class its colour from one range), and each clip has its own pitch, tempo,
level, onset, background and "microphone" (a random spectral tilt with peaks): the mean spectrum says little.
"""

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow as pa
import soundfile
from datasets.utils import tqdm

from .builder import SCHEMA_VERSION, describe_with_report
from .corpus import common_features
from .errors import CorpusError

GENERATOR_VERSION = 1  # in every clip's seed and cache key: raise it when a sound changes
FOLDS = 5
_BATCH = 16
_PITCHES = (350.0, 1600.0)  # Hz, shared by every tonal class


class Scene:
    """One clip in the making: its random numbers, its time axis, and the few operations the sounds are made of."""

    def __init__(self, rng: np.random.Generator, seconds: float, rate: int):
        self.rng, self.seconds, self.rate = rng, seconds, rate
        self.size = round(seconds * rate)
        self.time = np.arange(self.size, dtype=np.float32) / rate

    def draw(self, low: float, high: float) -> float:
        """A number from a log-uniform distribution, as pitch, tempo and level are heard."""
        return float(np.exp(self.rng.uniform(np.log(low), np.log(high))))

    def noise(self) -> np.ndarray:
        return self.rng.standard_normal(self.size, dtype=np.float32)

    def slow(self, rate_hz: float) -> np.ndarray:
        """Smooth random curve in -1..1 that moves about `rate_hz` times a second."""
        knots = self.rng.uniform(-1, 1, int(self.seconds * rate_hz) + 3)
        return np.interp(self.time * rate_hz, np.arange(len(knots)), knots).astype(np.float32)

    def tone(self, pitch: np.ndarray | float, harmonics: int = 1, fall: float = 1.0) -> np.ndarray:
        """Harmonic tone whose pitch in Hz may change over time; harmonic h has amplitude h**-fall."""
        pitch = np.broadcast_to(np.asarray(pitch, np.float32), self.time.shape)
        phase = np.cumsum(pitch / self.rate, dtype=np.float64) + self.rng.random()
        phase = (2 * np.pi * (phase % 1.0)).astype(np.float32)
        highest = max(1, min(harmonics, int(0.45 * self.rate / max(float(pitch.max()), 1.0))))
        return sum(np.sin(h * phase) * np.float32(h**-fall) for h in range(1, highest + 1))

    def events(self, starts: np.ndarray, length: float, gains: np.ndarray, rise: float = 0.005) -> np.ndarray:
        """Envelope of sounds that begin at `starts`, rise for `rise` and die away with time constant `length` (s)."""
        beat = np.zeros(self.size, np.float32)
        starts = np.asarray(starts)
        inside = (starts >= 0) & (starts < self.seconds)
        np.add.at(beat, (starts[inside] * self.rate).astype(int).clip(0, self.size - 1), np.asarray(gains)[inside])
        t = self.time[: max(2, min(self.size, int((6 * length + rise) * self.rate)))]
        return convolve(beat, np.exp(-t / length) * np.minimum(1.0, (t + 1 / self.rate) / rise))

    def rhythm(self, tempo: float, jitter: float) -> np.ndarray:
        """Starting times (s) of a beat of `tempo` per second, its phase random, each moved by up to `jitter` beats."""
        count = int(self.seconds * tempo) + 2
        return (np.arange(count) - self.rng.random() + self.rng.uniform(-jitter, jitter, count)) / tempo


def convolve(signal: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Causal convolution, as long as the signal."""
    size = 1 << int(np.ceil(np.log2(len(signal) + len(kernel))))
    product = np.fft.rfft(signal, size) * np.fft.rfft(kernel, size)
    return np.fft.irfft(product, size)[: len(signal)].astype(np.float32)


def dog(scene: Scene) -> np.ndarray:
    """Barks in groups: bursts of 0.1 s, harmonic with a falling pitch and breath, irregularly spaced."""
    starts = np.cumsum(scene.rng.choice([0.22, 0.3, 0.9], 12) * scene.draw(0.8, 1.3)) - scene.draw(0.1, 0.5)
    barks = scene.events(starts, scene.draw(0.04, 0.08), scene.rng.uniform(0.5, 1, 12), rise=0.02)
    pitch = scene.draw(*_PITCHES) * (0.7 + 0.6 * barks / max(barks.max(), 1e-6))
    return barks * (scene.tone(pitch, 6) + 0.4 * scene.noise())


def rain(scene: Scene) -> np.ndarray:
    """Steady noise with hundreds of faint drops a second: no rhythm, no swell."""
    drops = scene.rng.uniform(0, scene.seconds, int(scene.seconds * scene.draw(200, 600)))
    return scene.noise() * (0.7 + scene.events(drops, 0.002, scene.rng.exponential(0.4, len(drops)), rise=0.001))


def wind(scene: Scene) -> np.ndarray:
    """Noise that swells and fades slowly and deeply, once in one to three seconds."""
    return scene.noise() * np.exp(2.0 * scene.slow(scene.draw(0.6, 1.4)))


def crackle(scene: Scene) -> np.ndarray:
    """Fire: sparse clicks at random moments with very different strengths, over faint noise."""
    starts = scene.rng.uniform(0, scene.seconds, int(scene.seconds * scene.draw(6, 16)) + 2)
    gains = scene.rng.lognormal(0, 0.8, len(starts))
    return scene.noise() * (0.04 + scene.events(starts, scene.draw(0.004, 0.015), gains, rise=0.001))


def clock(scene: Scene) -> np.ndarray:
    """Ticking: short clicks in strict time, every other one weaker."""
    starts = scene.rhythm(scene.draw(2.5, 6), jitter=0.0)
    gains = np.where(np.arange(len(starts)) % 2, scene.draw(0.4, 0.9), 1.0)
    return scene.noise() * (0.04 + scene.events(starts, scene.draw(0.004, 0.015), gains, rise=0.001))


def footsteps(scene: Scene) -> np.ndarray:
    """Walking: dull, longer thuds, nearly regular, under three a second, each a heel and a sole."""
    tempo = scene.draw(1.3, 2.6)
    heels = scene.rhythm(tempo, jitter=0.06)
    gains = scene.rng.uniform(0.6, 1.0, len(heels))
    starts = np.concatenate([heels, heels + scene.draw(0.09, 0.14)])
    return scene.noise() * (0.04 + scene.events(starts, scene.draw(0.025, 0.05), np.concatenate([gains, 0.6 * gains])))


def engine(scene: Scene) -> np.ndarray:
    """Idling: noise and hum chopped 12 to 28 times a second at a wavering speed."""
    speed = scene.draw(12, 28) * (1 + 0.08 * scene.slow(1.0))
    strokes = (0.5 + 0.5 * scene.tone(speed)) ** 3
    return strokes * (scene.noise() + 0.6 * scene.tone(4 * speed, 8))


def siren(scene: Scene) -> np.ndarray:
    """One unbroken tone whose pitch glides up and down by about an octave, every one to three seconds."""
    sweep = np.sin(2 * np.pi * (scene.time * scene.draw(0.35, 1.0) + scene.rng.random()))
    return scene.tone(scene.draw(*_PITCHES) * 2 ** (scene.draw(0.4, 0.7) * sweep), 4)


def alarm(scene: Scene) -> np.ndarray:
    """Beeps: one constant pitch, switched on and off in strict time."""
    phase = (scene.time * scene.draw(1.5, 5) + scene.rng.random()) % 1.0
    return scene.tone(scene.draw(*_PITCHES), 4) * (phase < scene.draw(0.35, 0.6))


def bell(scene: Scene) -> np.ndarray:
    """Struck metal: inharmonic partials that ring on for seconds after each of a few strokes."""
    starts = scene.rhythm(scene.draw(0.4, 1.1), jitter=0.2)
    ring = scene.events(starts, scene.draw(0.5, 1.2), scene.rng.uniform(0.6, 1, len(starts)), rise=0.002)
    pitch = scene.draw(*_PITCHES) / 1.5
    partials = [(1.0, 1.0), (2.0, 0.6), (2.4, 0.5), (3.0, 0.3), (4.5, 0.2)]
    return ring * sum(gain * scene.tone(pitch * ratio) for ratio, gain in partials)


def birds(scene: Scene) -> np.ndarray:
    """Chirps in phrases: very short tones, each gliding up or down, a dozen a second, with rests between phrases."""
    tempo = scene.draw(7, 13)
    starts = scene.rhythm(tempo, jitter=0.1)
    phrases = np.repeat(scene.rng.random(len(starts) // 5 + 1) < 0.6, 5)[: len(starts)]
    phrases[scene.rng.integers(len(phrases)) // 5 * 5 :][:5] = True
    glide = (scene.time * tempo - starts[0] * tempo) % 1.0
    pitch = scene.draw(*_PITCHES) * 2 ** (scene.rng.choice([-1.0, 1.0]) * scene.draw(0.4, 0.9) * (glide - 0.3))
    return scene.tone(pitch, 3) * scene.events(starts, 0.4 / tempo / 2, phrases * 1.0, rise=0.01)


def saw(scene: Scene) -> np.ndarray:
    """Sawing: one to two strokes a second of noise chopped by teeth, faster in the middle of each stroke."""
    stroke = np.sin(2 * np.pi * (scene.time * scene.draw(0.9, 1.8) / 2 + scene.rng.random()))
    teeth = 0.5 + 0.5 * scene.tone(scene.draw(60, 140) * (0.15 + np.abs(stroke)))
    return scene.noise() * teeth * stroke**2


SOUNDS: dict[str, Callable[[Scene], np.ndarray]] = {
    sound.__name__: sound
    for sound in (dog, rain, siren, clock, engine, birds, footsteps, alarm, wind, bell, crackle, saw)
}


def make_clip(name: str, take: int, seed: int, seconds: float, rate: int) -> np.ndarray:
    """One clip: the same for the same arguments, whatever else is asked for.

    Args:
        name: a key of `SOUNDS`.
        take: number of the clip within its class, from 0.
        seed: the corpus's seed.
        seconds: length in s.
        rate: sampling rate in Hz.

    Returns:
        float32 samples in ±1, of shape (seconds · rate,).
    """
    rng = np.random.default_rng([GENERATOR_VERSION, seed, list(SOUNDS).index(name), take])
    scene = Scene(rng, seconds, rate)
    sound = SOUNDS[name](scene)
    sound = sound / (np.sqrt(np.mean(sound**2)) + 1e-9)
    background = scene.noise() * 10 ** (-scene.rng.uniform(8, 22) / 20)
    mixed = _microphone(scene, sound + background)
    return mixed * np.float32(scene.draw(0.1, 0.9) / (np.abs(mixed).max() + 1e-9))


def _microphone(scene: Scene, signal: np.ndarray) -> np.ndarray:
    """Random tilt of up to 6 dB an octave and random peaks and dips: distance, room and device in one."""
    size = 1 << int(np.ceil(np.log2(len(signal))))
    octaves = np.log2(np.maximum(np.fft.rfftfreq(size, 1 / scene.rate), 20.0) / 1000.0)
    knots = scene.rng.uniform(-12, 12, 14)
    decibels = scene.rng.uniform(-6, 3) * octaves + np.interp(octaves, np.linspace(-5.7, 4.5, 14), knots)
    return np.fft.irfft(np.fft.rfft(signal, size) * 10 ** (decibels / 20), size)[: len(signal)].astype(np.float32)


@dataclass
class SyntheticConfig(datasets.BuilderConfig):
    """What to generate.

    Attributes:
        num_classes: how many of `SOUNDS`, in their order.
        clips_per_class: clips of each; take t is in fold t mod 5 + 1.
        clip_seconds: length of each clip in s.
        sampling_rate: in Hz.
        seed: another seed gives other clips.
    """

    num_classes: int = 10
    clips_per_class: int = 40
    clip_seconds: float = 5.0
    sampling_rate: int = 44100
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        limits = {
            "num_classes": (1, len(SOUNDS)),
            "clips_per_class": (1, 100_000),
            "clip_seconds": (0.05, 600),
            "sampling_rate": (4000, 192_000),
            "seed": (0, 2**63 - 1),
        }
        for option, (low, high) in limits.items():
            value = getattr(self, option)
            if not low <= value <= high or (option != "clip_seconds" and value != int(value)):
                raise CorpusError(f"synthetic: {option} must be from {low} to {high}, not {value}")


class SyntheticBuilder(datasets.ArrowBasedBuilder):
    """Generates the corpus into Arrow, 16-bit WAV bytes embedded."""

    BUILDER_CONFIG_CLASS = SyntheticConfig
    VERSION = datasets.Version(SCHEMA_VERSION)

    def __init__(self, cache_dir: str | None = None, **options):
        super().__init__(
            cache_dir=cache_dir, dataset_name="dls_synthetic", hash=f"generator-{GENERATOR_VERSION}", **options
        )

    def _info(self) -> datasets.DatasetInfo:
        names = list(SOUNDS)[: self.config.num_classes]
        report = {
            "corpus": "synthetic",
            "clips": len(names) * self.config.clips_per_class,
            **{key: [] for key in ("shortfalls", "missing", "unlisted", "skipped", "wrong_durations", "duplicates")},
            "crossings": {},
        }
        return datasets.DatasetInfo(
            description=describe_with_report("Procedural everyday-like sounds", report),
            features=common_features(names, {}),
        )

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN, gen_kwargs={})]

    def _generate_tables(self) -> Iterator[tuple[int, pa.Table]]:
        names, takes = self.info.features["label"].names, self.config.clips_per_class
        clips = [(take, name) for take in range(takes) for name in names]
        for start in tqdm(range(0, len(clips), _BATCH), desc="Making sounds", unit=" batches"):
            rows = [self._row(name, take) for take, name in clips[start : start + _BATCH]]
            yield start, pa.Table.from_pylist(rows, schema=self.info.features.arrow_schema)

    def _row(self, name: str, take: int) -> dict:
        config, clip_id = self.config, f"{name}-{take:04d}"
        samples = make_clip(name, take, config.seed, config.clip_seconds, config.sampling_rate)
        file = io.BytesIO()
        soundfile.write(file, samples, config.sampling_rate, format="WAV", subtype="PCM_16")
        return {
            "audio": {"bytes": file.getvalue(), "path": f"{clip_id}.wav"},
            "label": self.info.features["label"].str2int(name),
            "fold": take % FOLDS + 1,
            "clip_id": clip_id,
            "source_id": clip_id,
            "digest": hashlib.sha256(file.getbuffer()).hexdigest(),
            "sampling_rate": config.sampling_rate,
            "num_channels": 1,
            "num_frames": len(samples),
        }
