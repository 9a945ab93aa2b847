"""Events that `dls predict` finds in an hour of generated background, in which clips of ESC-10 lie at known times.

    python benchmarks/planted_events.py --esc10 /data/ESC-10

The steps of docs/own_recordings.md: pre-training on recordings, fine-tuning on all that is labelled, detections. The
recordings are background, too, with the clips of folds 2 to 5 in it and a labels.csv that says where; the sixty events
are clips of fold 1. A detection is right if an event of its class, for which no other detection stands, is heard for
half of the shorter of the two; it is a false alarm of the background if no event at all is heard in it. Nothing is
chosen: it is the recommended recipe, as many epochs as are asked for, and the model's own thresholds. The same network
is fine-tuned once more without the examples of background; to compare them at the same recall, the thresholds of both
are moved to where it is reached.
"""

import csv
import itertools
import json
import math
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
HOUR = EVENTS * SPACE_IN_THE_HOUR / 3600
OPERATING_POINTS, RECALLS = 250, (0.7, 0.8, 0.9)


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


def false_alarms(events: list[tuple[str, float, float]], detections: list[tuple[str, float, float]]) -> int:
    """How many detections touch no event, of whichever class."""
    return sum(all(end <= first or start >= last for _, first, last in events) for _, start, end in detections)


def with_thresholds_moved(events, scores: Path, model: Path) -> list[tuple[float, float]]:
    """(recall, false alarms an hour of background) at every threshold; own thresholds move together, in logits.

    Args:
        events: (label, start, end) of each.
        scores: Of every label of every stretch, by `dls predict --top_k`.
        model: Which says its thresholds, if it has some.
    """
    import numpy as np

    from dls_sounds.predicting import detections

    config = json.loads((model / "config.json").read_text())
    names = list(config["label2id"])
    middle = np.array([config.get("thresholds", {}).get(name, 0.5) for name in names])
    cells = []
    with scores.open(newline="") as file:
        for (start, end), rows in itertools.groupby(
            csv.DictReader(file), lambda row: (float(row["start"]), float(row["end"]))
        ):
            own = {row["label"]: float(row["score"]) for row in rows}
            score = np.clip([own[name] for name in names], 1e-9, 1 - 1e-9)
            cells.append((start, end, np.log(score / (1 - score)) - np.log(middle / (1 - middle))))
    background = HOUR - sum(end - start for _, start, end in events) / 3600
    found = []
    for threshold in np.quantile(
        np.concatenate([margins for *_, margins in cells]), np.linspace(0, 1, OPERATING_POINTS)
    ):
        heard = detections(cells, lambda margins, threshold=threshold: np.flatnonzero(margins >= threshold))
        heard = [(names[label], start, end) for start, end, label, _ in heard]
        found.append((matched(events, heard) / len(events), false_alarms(events, heard) / background))
    return found


def command(*words) -> None:
    subprocess.run([sys.executable, *map(str, words)], check=True, cwd=REPOSITORY, stderr=subprocess.DEVNULL)


def classify(recordings: Path, hour: Path, npid: Path, output: Path, seed: int) -> float:
    """Fine-tunes on what is labelled, and lists detections and scores; minutes until the former are there."""
    started = time.perf_counter()
    command(
        "train_classification.py", *recipe(recordings, seed), "--model_name_or_path", npid, "--fold", "none",
        "--output_dir", output,
    )  # fmt: skip
    predict = ["-m", "dls_sounds", "predict", hour, "--model", output, "--overlap", 0.5, "--output"]
    command(*predict, output / "detections.csv", "--threshold", "auto")
    minutes = (time.perf_counter() - started) / 60
    command(*predict, output / "scores.csv", "--top_k", 100)
    return minutes


def recipe(recordings: Path, seed: int) -> list:
    return ["--recipe", "recommended", "--corpus", f"audiofolder={recordings}", "--seed", seed, "--report_to", "none"]


def find(clips, folder: Path, seed: int, epochs: int) -> dict[str, float]:
    """One hour: what is found in it and what is not there, and how long the commands took."""
    import numpy as np

    random = np.random.default_rng(seed)
    recordings, hour = folder / "recordings", folder / "hour.wav"
    recordings.mkdir(parents=True)
    clips = clips.select(random.permutation(len(clips)))
    make_recordings(clips.filter(lambda fold: fold != 1, input_columns="fold"), recordings, random)
    held_out = clips.filter(lambda fold: fold == 1, input_columns="fold")
    events = plant(held_out.select(range(EVENTS)), hour, SPACE_IN_THE_HOUR, random)
    started = time.perf_counter()
    length = ["--windows", "--num_train_epochs", epochs, "--knn_interval", epochs]
    command("train_npid.py", *recipe(recordings, seed), *length, "--output_dir", folder / "npid")
    minutes = (time.perf_counter() - started) / 60
    minutes += classify(recordings, hour, folder / "npid", folder / "with", seed)
    table = recordings / "labels.csv"
    table.write_text("".join(line for line in table.open() if f",{BACKGROUND}" not in line))
    classify(recordings, hour, folder / "npid", folder / "without", seed)
    return judged(events, folder) | {"minutes from recordings to detections": minutes}


def judged(events: list[tuple[str, float, float]], folder: Path) -> dict[str, float]:
    """What is right and wrong in the tables of `classify`, with and without examples of background."""
    with (folder / "with" / "detections.csv").open(newline="") as file:
        detections = [(row["label"], float(row["start"]), float(row["end"])) for row in csv.DictReader(file)]
    right, alarms = matched(events, detections), {}
    for arm in ("with", "without"):
        moved = with_thresholds_moved(events, folder / arm / "scores.csv", folder / arm)
        for recall in RECALLS:
            what = f"false alarms an hour of background at a recall of {recall}, {arm} examples of background"
            alarms[what] = min((each for reached, each in moved if reached >= recall), default=math.inf)
    print(f"{folder.name}: {right} of {len(detections)} detections right, {len(events)} events", file=sys.stderr)
    return {
        "precision of detections": right / max(1, len(detections)),
        "recall of events": right / len(events),
    } | alarms


def measure(args) -> list[dict]:
    from datasets_scripts import load_corpus

    clips, hours = load_corpus("esc10", args.esc10), []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, 1 + args.seeds):  # 0 was looked at while this was made
            hours.append(find(clips, Path(folder) / str(seed), seed, args.epochs))
    reaches = {"minutes from recordings to detections": "<= 15"}
    return [ratio_line(what, [hour[what] for hour in hours], reaches.get(what, "")) for what in hours[0]]


if __name__ == "__main__":
    run(measure, esc10=("ESC-10", "the 400 real clips"), epochs=(60, "of the pre-training"), seeds=2)
