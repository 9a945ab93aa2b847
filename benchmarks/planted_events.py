"""Events that `dls predict` finds in an hour of generated background, in which clips of ESC-10 lie at known times.

    python benchmarks/planted_events.py --esc10 /data/ESC-10

The steps of docs/own_recordings.md: pre-training on recordings, fine-tuning on all that is labelled, detections.
The network hears folds 2 to 5 and background; the sixty events are clips of fold 1. A detection is right if an event
of its class, for which no other detection stands, is heard for half of the shorter of the two. Nothing is chosen: it
is the recommended recipe, as many epochs as are asked for, and the default threshold.
"""

import csv
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import REPOSITORY, ratio_line, run

RATE, SECONDS, EVENTS = 44100, 3600, 60
CLIP = 5  # s
BACKGROUND, QUIETER_DB = "background", 20  # than the events


def noise(random, seconds: float):
    """Background like a distant road's or the wind's: noise whose power falls by 3 dB an octave, coming and going."""
    import numpy as np

    samples = round(seconds * RATE)
    spectrum = np.fft.rfft(random.standard_normal(samples).astype("float32"))
    spectrum /= np.sqrt(np.arange(1, len(spectrum) + 1))
    sound = np.fft.irfft(spectrum, samples)
    swell = 1 + 0.5 * np.sin(2 * np.pi * np.arange(samples) / RATE / random.uniform(7, 13))
    return (sound * swell / np.sqrt(np.mean(sound**2))).astype("float32")


def make_recordings(clips, folder: Path, random) -> None:
    """The labelled clips of all folds but the first, and as much background as there are clips of a class."""
    import soundfile

    rows = ["file_name,label"]
    names = clips.features["label"].names
    for row in clips.filter(lambda fold: fold != 1, input_columns="fold"):
        source = Path(row["audio"]["path"])
        shutil.copy(source, folder / source.name)
        rows.append(f"{source.name},{names[row['label']]}")
    for number in range((len(rows) - 1) // len(names)):
        soundfile.write(folder / f"background-{number}.wav", 0.03 * noise(random, CLIP), RATE)
        rows.append(f"background-{number}.wav,{BACKGROUND}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")


def plant(clips, path: Path, random) -> list[tuple[str, float, float]]:
    """Writes an hour of background with clips of the first fold in it: (label, start, end) of each."""
    import numpy as np
    import soundfile

    from datasets_scripts import decode_audio

    hour, events = noise(random, SECONDS), []
    held_out = clips.filter(lambda fold: fold == 1, input_columns="fold")
    chosen = random.permutation(len(held_out))[:EVENTS].tolist()
    for number, clip in enumerate(chosen):
        samples, rate = decode_audio(held_out[clip]["audio"])
        assert rate == RATE
        heard = np.flatnonzero(np.abs(samples[0]) > 1e-4)  # without the silence that clips are filled up with
        sound = samples[0, heard[0] : heard[-1] + 1]
        sound = sound * (10 ** (QUIETER_DB / 20) / np.sqrt(np.mean(sound**2)))
        start = round((number + random.uniform(0.1, 0.8)) * SECONDS / EVENTS * RATE)
        hour[start : start + len(sound)] += sound
        label = held_out.features["label"].names[held_out[clip]["label"]]
        events.append((label, start / RATE, (start + len(sound)) / RATE))
    soundfile.write(path, hour * (0.9 / np.abs(hour).max()), RATE)
    return events


def matched(events: list[tuple[str, float, float]], detections: list[tuple[str, float, float]]) -> int:
    """How many detections are right, the earliest first."""
    left, right = list(events), 0
    for label, start, end in sorted(detections, key=lambda detection: detection[1]):
        for event in left:
            shared = min(end, event[2]) - max(start, event[1])
            if event[0] == label and shared >= 0.5 * min(end - start, event[2] - event[1]):
                left.remove(event)
                right += 1
                break
    return right


def command(*words) -> None:
    subprocess.run([sys.executable, *map(str, words)], check=True, cwd=REPOSITORY, stderr=subprocess.DEVNULL)


def find(clips, folder: Path, seed: int, epochs: int) -> dict[str, float]:
    """One hour: precision, recall, and how long the commands took."""
    import numpy as np

    random = np.random.default_rng(seed)
    recordings, hour, found = folder / "recordings", folder / "hour.wav", folder / "detections.csv"
    recordings.mkdir(parents=True)
    make_recordings(clips, recordings, random)
    events = plant(clips, hour, random)
    common = [
        "--recipe",
        "recommended",
        "--corpus",
        f"audiofolder={recordings}",
        "--seed",
        seed,
        "--report_to",
        "none",
    ]
    started = time.perf_counter()
    command(
        "train_npid.py",
        *common,
        "--num_train_epochs",
        epochs,
        "--knn_interval",
        epochs,
        "--output_dir",
        folder / "npid",
    )
    start_from = ["--model_name_or_path", folder / "npid", "--fold", "none", "--output_dir", folder / "mine"]
    command("train_classification.py", *common, *start_from)
    command("-m", "dls_sounds", "predict", hour, "--model", folder / "mine", "--overlap", 0.5, "--output", found)
    minutes = (time.perf_counter() - started) / 60
    with found.open(newline="") as file:
        rows = [(row["label"], float(row["start"]), float(row["end"])) for row in csv.DictReader(file)]
    detections = [row for row in rows if row[0] != BACKGROUND]
    right = matched(events, detections)
    print(f"seed {seed}: {right} of {len(detections)} detections right, {EVENTS} events", file=sys.stderr)
    return {"precision": right / max(1, len(detections)), "recall": right / EVENTS, "minutes": minutes}


def measure(args) -> list[dict]:
    from datasets_scripts import load_corpus

    clips, hours = load_corpus("esc10", args.esc10), []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            hours.append(find(clips, Path(folder) / str(seed), seed, args.epochs))
    precision, recall, minutes = ([hour[name] for hour in hours] for name in ("precision", "recall", "minutes"))
    return [
        ratio_line("precision of detections", precision),
        ratio_line("recall of events", recall),
        ratio_line("minutes from recordings to detections", minutes, "<= 15"),
    ]


if __name__ == "__main__":
    run(measure, esc10=("ESC-10", "the 400 real clips"), epochs=(60, "of the pre-training"), seeds=3)
