"""A procedural corpus of everyday-like sounds: nothing to download, and hard enough to be worth learning.

What tells the classes apart is what happens over time. Their spectra overlap on purpose (the tonal classes' pitches
do, the noisy classes share one colour), and each clip has its own pitch, tempo, level, onset, background and
"microphone" (a random spectral tilt with peaks): the mean spectrum tells half of them.
"""

from collections.abc import Callable

import numpy as np

GENERATOR_VERSION = 2  # in every clip's seed and in the cache key: raise it when a sound changes
CONTROL_RATE = 2205  # values a second


class Scene:
    """One clip in the making: its random numbers, its time axis, and the few operations the sounds are made of.

    Envelopes and pitches are curves of `CONTROL_RATE` values a second, which `up` brings to the sampling rate: that is
    where a clip's few milliseconds go.
    """

    def __init__(self, rng: np.random.Generator, seconds: float, rate: int):
        self.rng, self.seconds, self.rate = rng, seconds, rate
        self.size = round(seconds * rate)
        self.step = max(1, round(rate / CONTROL_RATE))
        self.time = np.arange(-(-self.size // self.step) + 1) * (self.step / rate)

    def draw(self, low: float, high: float) -> float:
        """A number from a log-uniform distribution, as pitch, tempo and level are heard."""
        return float(np.exp(self.rng.uniform(np.log(low), np.log(high))))

    def noise(self) -> np.ndarray:
        """White noise of variance 1, (size,). Uniform: as white as Gaussian, in a quarter of the time."""
        return (self.rng.random(self.size, np.float32) - np.float32(0.5)) * np.float32(12**0.5)

    def up(self, curve: np.ndarray) -> np.ndarray:
        """A control curve at the sampling rate, (size,), linearly interpolated."""
        curve = curve.astype(np.float32)
        ramp = np.arange(self.step, dtype=np.float32) / self.step
        return (curve[:-1, None] + np.diff(curve)[:, None] * ramp).reshape(-1)[: self.size]

    def slow(self, per_second: float) -> np.ndarray:
        """Smooth random control curve in -1..1 that turns about `per_second` times a second."""
        knots = self.rng.uniform(-1, 1, int(self.seconds * per_second) + 3)
        return np.interp(self.time * per_second, np.arange(len(knots)), knots)

    def tone(self, pitch: np.ndarray | float, harmonics: int = 1, fall: float = 1.0) -> np.ndarray:
        """Tone, (size,), whose pitch (Hz) may be a control curve; harmonic h has amplitude h**-fall."""
        pitch = np.broadcast_to(pitch, self.time.shape)
        turns = np.cumsum(pitch * (self.step / self.rate)) + self.rng.random()
        # Whole turns are dropped before float32 would lose the fraction.
        starts, ramp = turns[:-1] % 1.0, np.arange(self.step, dtype=np.float32) / self.step
        phase = starts[:, None].astype(np.float32) + np.diff(turns)[:, None].astype(np.float32) * ramp
        phase = phase.reshape(-1)[: self.size] * np.float32(2 * np.pi)
        highest = max(1, min(harmonics, int(0.45 * self.rate / float(pitch.max()))))
        return sum(np.sin(h * phase) * np.float32(h**-fall) for h in range(1, highest + 1))

    def events(self, starts: np.ndarray, length: float, gains: np.ndarray, rise: float = 0.005) -> np.ndarray:
        """Control curve of sounds that begin at `starts`, rise for `rise` and die away with time constant `length`."""
        beat, starts = np.zeros(len(self.time)), np.asarray(starts)
        inside = (starts >= 0) & (starts < self.seconds)
        np.add.at(beat, (starts[inside] * self.rate / self.step).astype(int), np.asarray(gains)[inside])
        decay = np.exp(-self.time / length) * np.minimum(1.0, (self.time + self.time[1]) / rise)
        size = 2 * len(beat)  # room for the tail, which a circular convolution would wrap around
        return np.fft.irfft(np.fft.rfft(beat, size) * np.fft.rfft(decay, size), size)[: len(beat)]

    def rhythm(self, tempo: float, jitter: float) -> np.ndarray:
        """Starting times (s) of a beat of `tempo` per second, its phase random, each moved by up to `jitter` beats."""
        count = int(self.seconds * tempo) + 2
        return (np.arange(count) - self.rng.random() + self.rng.uniform(-jitter, jitter, count)) / tempo


def dog(scene: Scene) -> np.ndarray:
    """Barks in groups: bursts of 0.1 s, harmonic with a falling pitch and breath, irregularly spaced."""
    gaps = scene.rng.choice([0.22, 0.3, 0.9], int(scene.seconds * 5) + 2) * scene.draw(0.8, 1.3)
    starts = np.cumsum(gaps) - scene.draw(0.1, 0.5)
    barks = scene.events(starts, scene.draw(0.04, 0.08), scene.rng.uniform(0.5, 1, len(starts)), rise=0.02)
    pitch = scene.draw(350, 850) * (0.7 + 0.6 * barks / max(barks.max(), 1e-6))
    return scene.up(barks) * (scene.tone(pitch, 4) + np.float32(0.4) * scene.noise())


def rain(scene: Scene) -> np.ndarray:
    """Steady noise with hundreds of faint drops a second: no rhythm, no swell."""
    drops = scene.rng.uniform(0, scene.seconds, int(scene.seconds * scene.draw(200, 600)) + 1)
    patter = scene.events(drops, 0.002, scene.rng.exponential(0.4, len(drops)), rise=0.001)
    return scene.noise() * scene.up(0.7 + patter)


def siren(scene: Scene) -> np.ndarray:
    """One unbroken tone whose pitch glides up and down by about an octave, once in one to three seconds."""
    sweep = np.sin(2 * np.pi * (scene.time * scene.draw(0.35, 1.0) + scene.rng.random()))
    return scene.tone(scene.draw(600, 1500) * 2 ** (scene.draw(0.4, 0.7) * sweep), 4)


def clock(scene: Scene) -> np.ndarray:
    """Ticking: short clicks in strict time, every other one weaker."""
    starts = scene.rhythm(scene.draw(2.5, 6), jitter=0.0)
    gains = np.where(np.arange(len(starts)) % 2, scene.draw(0.4, 0.9), 1.0)
    return scene.noise() * scene.up(0.04 + scene.events(starts, scene.draw(0.004, 0.015), gains, rise=0.001))


def engine(scene: Scene) -> np.ndarray:
    """Idling: noise and hum chopped 12 to 28 times a second at a wavering speed."""
    speed = scene.draw(12, 28) * (1 + 0.08 * scene.slow(1.0))
    strokes = (0.5 + 0.5 * np.sin(2 * np.pi * np.cumsum(speed) * scene.time[1])) ** 3
    return scene.up(strokes) * (scene.noise() + np.float32(0.6) * scene.tone(4 * speed, 6))


def birds(scene: Scene) -> np.ndarray:
    """Chirps in phrases of five, about ten a second, each gliding up (or each down), with rests between phrases."""
    tempo = scene.draw(7, 13)
    starts = scene.rhythm(tempo, jitter=0.0)
    sung = np.repeat(scene.rng.random(len(starts) // 5 + 1) < 0.6, 5)
    sung[5 * scene.rng.integers(len(sung) // 5) :][:5] = True
    glide = (scene.time - starts[0]) * tempo % 1.0
    pitch = scene.draw(1600, 4000) * 2 ** (scene.rng.choice([-1.0, 1.0]) * scene.draw(0.4, 0.9) * (glide - 0.3))
    return scene.tone(pitch, 3) * scene.up(scene.events(starts, 0.2 / tempo, sung[: len(starts)] * 1.0, rise=0.01))


def footsteps(scene: Scene) -> np.ndarray:
    """Walking: dull, longer thuds, nearly regular, under three a second, each a heel and a sole."""
    heels = scene.rhythm(scene.draw(1.3, 2.6), jitter=0.06)
    gains = scene.rng.uniform(0.6, 1.0, len(heels))
    starts = np.concatenate([heels, heels + scene.draw(0.09, 0.14)])
    thuds = scene.events(starts, scene.draw(0.025, 0.05), np.concatenate([gains, 0.6 * gains]))
    return scene.noise() * scene.up(0.04 + thuds)


def alarm(scene: Scene) -> np.ndarray:
    """Beeps: one constant pitch, switched on and off in strict time."""
    phase = (scene.time * scene.draw(1.5, 5) + scene.rng.random()) % 1.0
    return scene.tone(scene.draw(1300, 3000), 4) * scene.up(phase < scene.draw(0.35, 0.6))


def wind(scene: Scene) -> np.ndarray:
    """Noise that swells and fades slowly and deeply, once in one to three seconds."""
    return scene.noise() * scene.up(np.exp(2.0 * scene.slow(scene.draw(0.6, 1.4))))


def bell(scene: Scene) -> np.ndarray:
    """Struck metal: inharmonic partials that ring on for seconds after each of a few strokes."""
    starts = scene.rhythm(scene.draw(0.4, 1.1), jitter=0.2)
    ring = scene.events(starts, scene.draw(0.5, 1.2), scene.rng.uniform(0.6, 1, len(starts)), rise=0.002)
    pitch = scene.draw(700, 1800) / 1.5
    partials = [(1.0, 1.0), (2.0, 0.6), (2.4, 0.5), (3.0, 0.3)]
    return scene.up(ring) * sum(np.float32(gain) * scene.tone(pitch * ratio) for ratio, gain in partials)


def crackle(scene: Scene) -> np.ndarray:
    """Fire: sparse clicks at random moments with very different strengths, over faint noise."""
    starts = scene.rng.uniform(0, scene.seconds, int(scene.seconds * scene.draw(6, 16)) + 2)
    gains = scene.rng.lognormal(0, 0.8, len(starts))
    return scene.noise() * scene.up(0.04 + scene.events(starts, scene.draw(0.004, 0.015), gains, rise=0.001))


def saw(scene: Scene) -> np.ndarray:
    """Sawing: one to two strokes a second of noise chopped by teeth, faster in the middle of each stroke."""
    stroke = np.sin(np.pi * (scene.time * scene.draw(0.9, 1.8) + scene.rng.random()))
    teeth = 0.5 + 0.5 * np.sin(2 * np.pi * np.cumsum(scene.draw(60, 140) * (0.15 + np.abs(stroke))) * scene.time[1])
    return scene.noise() * scene.up(teeth * stroke**2)


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
    background = scene.noise() * np.float32(
        np.sqrt(np.mean(sound**2)) * 10 ** (-scene.rng.uniform(12, 30) / 20) + 1e-6
    )
    mixed = _microphone(scene, sound + background)
    return mixed * np.float32(scene.draw(0.1, 0.9) / np.abs(mixed).max())


def _microphone(scene: Scene, signal: np.ndarray) -> np.ndarray:
    """Random tilt of up to 3 dB an octave and random peaks and dips: distance, room and device in one."""
    octaves = np.linspace(-6, 5, 45)  # about 1 kHz
    tilt, peaks = scene.rng.uniform(-3, 1) * octaves, scene.rng.uniform(-5, 5, 14)
    decibels = tilt + np.interp(octaves, np.linspace(-5.7, 4.5, 14), peaks)
    bins = np.fft.rfftfreq(len(signal), 1 / scene.rate)
    gain = np.interp(bins, 1000 * 2.0**octaves, 10 ** (decibels / 20)).astype(np.float32)
    # NumPy's forward transform is faster in float64, its inverse in complex64.
    spectrum = np.fft.rfft(signal.astype(np.float64)).astype(np.complex64) * gain
    return np.fft.irfft(spectrum, len(signal)).astype(np.float32)
