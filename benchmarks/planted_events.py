"""Events that `dls predict` finds in an hour of generated background, in which clips of ESC-10 lie at known times.

    python benchmarks/planted_events.py --esc10 /data/ESC-10

The steps of docs/own_recordings.md: pre-training on recordings, fine-tuning on all that is labelled, detections. The
recordings are background, too, with the clips of folds 2 to 5 in it and a labels.csv that says where; the sixty events
are clips of fold 1. A detection is right if an event of its class, for which no other detection stands, is heard for
half of the shorter of the two. Nothing is chosen: it is the recommended recipe, as many epochs as are asked for, and
the default threshold.
"""

import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import REPOSITORY, ratio_line, run

RATE, EVENTS, CLIP = 44100, 60, 5  # s
SPACE, SPACE_IN_THE_HOUR = 15, 60  # s, for each clip
CLIPS_A_FILE = 20
BACKGROUND, LOUDER_DB = "background", 20  # than the background are the events


def noise(random, seconds: float):
    """Background like a distant road's or the wind's: noise whose power falls by 3 dB an octave, coming and going."""
    import numpy as np

    samples = round(seconds * RATE)
    spectrum = np.fft.rfft(random.standard_normal(samples).astype("float32"))
    spectrum /= np.sqrt(np.arange(1, len(spectrum) + 1))
    sound = np.fft.irfft(spectrum, samples)
    swell = 1 + 0.5 * np.sin(2 * np.pi * np.arange(samples) / RATE / random.uniform(7, 13))
    return (sound * swell / np.sqrt(np.mean(sound**2))).astype("float32")


def plant(clips, path: Path, space: int, random) -> list[tuple[str, float, float]]:
    """Writes a recording of background with a clip in each `space` (s), at random: (label, start, end) of each."""
    import numpy as np
    import soundfile

    from datasets_scripts import decode_audio

    names, recording, events = clips.features["label"].names, noise(random, space * len(clips)), []
    for number, row in enumerate(clips):
        samples, rate = decode_audio(row["audio"])
        assert rate == RATE
        heard = np.flatnonzero(np.abs(samples[0]) > 1e-4)  # without the silence that clips are filled up with
        sound = samples[0, heard[0] : heard[-1] + 1]
        sound = sound * (10 ** (LOUDER_DB / 20) / np.sqrt(np.mean(sound**2)))
        start = round((number * space + CLIP + random.uniform(0, space - 2 * CLIP)) * RATE)
        recording[start : start + len(sound)] += sound
        events.append((names[row["label"]], start / RATE, (start + len(sound)) / RATE))
    soundfile.write(path, recording * (0.9 / np.abs(recording).max()), RATE)
    return events


def make_recordings(clips, folder: Path, random) -> None:
    """Labelled recordings of twenty clips each, with as many stretches of background as there are clips of a class."""
    rows = ["file_name,start,end,label"]
    for number, first in enumerate(range(0, len(clips), CLIPS_A_FILE)):
        own = clips.select(range(first, min(len(clips), first + CLIPS_A_FILE)))
        for event, (label, start, end) in enumerate(plant(own, folder / f"{number}.wav", SPACE, random)):
            rows.append(f"{number}.wav,{start:.3f},{end:.3f},{label}")
            if event % len(clips.features["label"].names) == 0:
                rows.append(f"{number}.wav,{event * SPACE},{event * SPACE + CLIP},{BACKGROUND}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")


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
    clips = clips.select(random.permutation(len(clips)))
    make_recordings(clips.filter(lambda fold: fold != 1, input_columns="fold"), recordings, random)
    held_out = clips.filter(lambda fold: fold == 1, input_columns="fold")
    events = plant(held_out.select(range(EVENTS)), hour, SPACE_IN_THE_HOUR, random)
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
    length = ["--windows", "--num_train_epochs", epochs, "--knn_interval", epochs]
    command("train_npid.py", *common, *length, "--output_dir", folder / "npid")
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
    run(measure, esc10=("ESC-10", "the 400 real clips"), epochs=(60, "of the pre-training"), seeds=2)
