"""Runs a file of `dls export` on recordings or a stream, and teaches it new classes, without torch.

    python run_onnx.py X.onnx recordings/ --overlap 0.5 --output detections.csv
    arecord -f S16_LE -r 44100 -t raw | python run_onnx.py X.onnx -
    python run_onnx.py X.onnx --learn labels.csv --output Y.onnx

Needs onnxruntime, numpy and soundfile, and no other file of the project.
"""

import argparse
import csv
import json
import math
import mmap
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from pathlib import Path
from typing import NamedTuple

import numpy as np

KEY, LAYOUT = "dls", 1  # of the facts in a file's metadata: raise it when they change
WEIGHT, SCALE, BIAS = "classifier.weight", "classifier.scale", "classifier.bias"
STANDARD_INPUT = "-"
MIN_NEW_SHARE = 0.1  # of a window that a last one must add to those before it
SEVERAL_LABELS_FROM = 0.5  # where neither the user nor the file says
COLUMNS = ("file", "start", "end", "label", "score")
DECIMALS = 6  # of seconds and scores
BLOCK = 1 << 15  # frames that are read at a time
LARGEST_SUM = 1 << 18  # numbers that are looked at together in resampling
LARGEST_SAMPLE = 2.0**31  # in any integer format; beyond, a file is damaged
RATES = (100, 1_000_000)
EXTENSIONS = frozenset((
    ".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".w64",
    ".bwf", ".rf64",
))  # fmt: skip
# Shares of the mean squared length of the features, and scales of logits, that learning chooses from.
PENALTIES, LOGIT_SCALES = np.logspace(-4, 2, 25), np.logspace(-1, 3, 81)
SMALLEST_SHARE = 0.05
PENALTY_FOR_SINGLE_CLIPS = 0.1
GROUP = 32  # weights of the last layer that share a scale, where it is stored in four bits


class Refused(Exception):
    """What ends the command in one line: names the file or option, and what to do."""


class Window(NamedTuple):
    """A part of a recording: where it starts and ends, in samples of the network's rate, and what is heard in it."""

    start: int
    end: int
    values: np.ndarray


# -- The file: protocol buffers, as far as they are needed to read and replace the last layer


def varint(data, place: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place


def encoded(value: int) -> bytes:
    """A number as `varint` reads it."""
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def fields(data) -> Iterator[tuple[int, object, object]]:
    """(number, value, all of its bytes) of each field of a message; a value is a whole number or bytes.

    Raises:
        ValueError: if the message is cut short or none.
    """
    place, end = 0, len(data)
    while place < end:
        begin = place
        try:
            tag, place = varint(data, place)
            kind, value = tag & 7, None
            if kind == 0:
                value, place = varint(data, place)
            elif kind in (1, 5):
                place += 8 if kind == 1 else 4
            elif kind == 2:
                size, place = varint(data, place)
                value, place = data[place : place + size], place + size
            else:
                place = end + 1
        except IndexError:
            place = end + 1
        if place > end:
            raise ValueError("is no ONNX file, or cut short")
        yield tag >> 3, value, data[begin:place]


def field(number: int, content: bytes) -> bytes:
    return encoded(number << 3 | 2) + encoded(len(content)) + content


MODEL_GRAPH, MODEL_METADATA = 7, 14
GRAPH_NODE, GRAPH_TENSOR, NODE_ATTRIBUTE, ATTRIBUTE_TENSOR = 1, 5, 5, 5
TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME, TENSOR_DATA, TENSOR_EXTERNAL, TENSOR_LOCATION = 1, 2, 8, 9, 13, 14
FLOAT, INT4 = 1, 22


def parts(data, *numbers: int) -> Iterator:
    """The messages that a path of fields leads to."""
    for number, value, _ in fields(data):
        if number == numbers[0]:
            if len(numbers) == 1:
                yield value
            else:
                yield from parts(value, *numbers[1:])


def tensor(name: str, values: np.ndarray) -> bytes:
    """A tensor as a message: float32, or whole numbers of four bits."""
    dims = b"".join(encoded(TENSOR_DIMS << 3) + encoded(size) for size in values.shape)
    whole = values.dtype == np.int8
    kind = encoded(TENSOR_TYPE << 3) + encoded(INT4 if whole else FLOAT)
    return (
        dims
        + kind
        + field(TENSOR_NAME, name.encode())
        + field(TENSOR_DATA, packed(values) if whole else values.tobytes())
    )


def with_classifier(data, tensors: dict[str, np.ndarray], facts: dict) -> Iterator[bytes]:
    """The file, piece by piece, with other tensors in place of those of these names, and other facts."""

    def graph(content) -> Iterator[bytes]:
        for number, value, whole in fields(content):
            name = bytes(next(parts(value, TENSOR_NAME), b"")).decode() if number == GRAPH_TENSOR else None
            yield field(GRAPH_TENSOR, tensor(name, tensors[name])) if name in tensors else bytes(whole)

    for number, value, whole in fields(data):
        if number == MODEL_GRAPH:
            yield field(MODEL_GRAPH, b"".join(graph(value)))
        elif number != MODEL_METADATA:
            yield bytes(whole)
    content = json.dumps(facts, ensure_ascii=False).encode()
    yield field(MODEL_METADATA, field(1, KEY.encode()) + field(2, content))


class Network:
    """A file of `dls export`, ready to run on one core.

    Attributes:
        facts: What stands in its metadata: `labels`, `sampling_rate` (Hz), `length` of a window (samples),
            `thresholds`, and more.
        tensors: Names of those that are stored whole.
    """

    def __init__(self, path: Path):
        """
        Raises:
            Refused: if there is no such file, it is none of ours, of another layout, damaged, or not whole in itself.
        """
        self.path = path
        try:
            with open(path, "rb") as file:
                self.tensors = self.checked(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
        except (OSError, ValueError) as error:
            raise Refused(
                f"{path}: {getattr(error, 'strerror', None) or error}; expected a file of dls export"
            ) from None
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # One window at a time needs no reserve of memory.
        options.enable_cpu_mem_arena = False
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            self.facts = json.loads(self.session.get_modelmeta().custom_metadata_map[KEY])
            found = self.facts["layout"]
            self.labels, self.rate, self.length = (self.facts[name] for name in ("labels", "sampling_rate", "length"))
            self.channels, self.multi_label = self.facts["audio_channels"], self.facts["multi_label"]
        except (KeyError, TypeError, ValueError):
            raise Refused(
                f"{path}: has no facts of dls export in its metadata; expected a file that it wrote"
            ) from None
        except Exception as error:  # onnxruntime's have no common class
            words = str(error).splitlines()[0]
            raise Refused(
                f"{path}: onnxruntime cannot run it ({words}); take it once more from where it came"
            ) from None
        if found != LAYOUT:
            raise Refused(
                f"{path}: has layout {found}, and this run_onnx.py reads layout {LAYOUT}: use the one beside it"
            )

    @staticmethod
    def checked(data) -> set[str]:
        names = set()
        for graph in parts(data, MODEL_GRAPH):
            stored = list(parts(graph, GRAPH_TENSOR))
            names = {bytes(next(parts(each, TENSOR_NAME), b"")).decode() for each in stored}
            stored += parts(graph, GRAPH_NODE, NODE_ATTRIBUTE, ATTRIBUTE_TENSOR)
            for each in stored:
                if any(
                    number == TENSOR_EXTERNAL or (number == TENSOR_LOCATION and value)
                    for number, value, _ in fields(each)
                ):
                    raise ValueError("points to data outside itself")
        if not names:
            raise ValueError("is no ONNX file, or cut short")
        return names

    def __call__(self, waveforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(batch, samples), or (batch, 2, samples) -> logits (batch, labels) and embedding (batch, size), float32."""
        return tuple(self.session.run(["logits", "embedding"], {"waveform": waveforms}))

    def shaped(self, waveform: np.ndarray) -> np.ndarray:
        """(channels, samples) -> a batch of one."""
        return waveform if self.channels == 1 else waveform[None]

    def scores(self, waveform: np.ndarray) -> np.ndarray:
        """(channels, samples) -> (labels,), from 0 to 1."""
        logits = self(self.shaped(waveform))[0][0].astype(np.float64)
        if self.multi_label:
            return 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
        powers = np.exp(logits - logits.max())
        return powers / powers.sum()


# -- Sound: files and streams -> windows


def fit_channels(block: np.ndarray, channels: int, name: str) -> np.ndarray:
    """(channels of the file, samples) -> (channels, samples)."""
    if len(block) == channels:
        return block
    if channels == 1:
        return block.mean(axis=0, keepdims=True)
    if len(block) == 1:
        return np.repeat(block, channels, axis=0)
    raise Refused(f"{name}: cannot make {channels} audio channels of {len(block)}")


def file_blocks(
    path: str, channels: int, start: float = 0.0, end: float = math.inf
) -> tuple[int, Iterator[np.ndarray]]:
    """A file's rate, and a stretch of it (in s), block by block: (channels, samples), float32.

    Raises:
        Refused: naming the file, if it cannot be decoded or holds what no sound has.
    """
    import soundfile

    def blocks() -> Iterator[np.ndarray]:
        with sound:
            position, last = round(start * sound.samplerate), min(sound.frames, end * sound.samplerate)
            try:
                sound.seek(min(position, sound.frames))
                while position < last and len(
                    block := sound.read(min(BLOCK, round(last) - position), "float32", True)
                ):
                    largest = max(block.max(), -block.min())  # NaN if there is one
                    if not largest <= LARGEST_SAMPLE:
                        raise Refused(f"{path}: holds samples that no sound has ({largest:.3g}); the file is damaged")
                    position += len(block)
                    yield fit_channels(block.T, channels, path)
            except (soundfile.LibsndfileError, RuntimeError) as error:
                raise Refused(f"{path}: truncated or damaged ({error})") from None
            if position == round(start * sound.samplerate):
                raise Refused(f"{path}: holds no samples from {start:g} s on")

    try:
        sound = soundfile.SoundFile(path)
    except (soundfile.LibsndfileError, OSError, RuntimeError) as error:
        raise Refused(f"{path}: truncated, damaged, or not a sound file ({error})") from None
    return sound.samplerate, blocks()


def standard_input(channels: int) -> Iterator[np.ndarray]:
    """Raw 16-bit little-endian mono samples as they come: (channels, samples)."""
    rest, size = b"", 0
    while data := sys.stdin.buffer.read1(2 * BLOCK):
        data, size = rest + data, size + len(data)
        rest = data[len(data) // 2 * 2 :]
        if len(data) > 1:
            samples = np.frombuffer(data, "<i2", len(data) // 2).astype(np.float32) / 32768
            yield np.repeat(samples[None], channels, axis=0)
    if size < 2:
        raise Refused("standard input ended before its first sample: expected raw 16-bit mono samples")
    if rest:
        say(f"standard input ended within a sample, after {size} bytes: the last byte is left out. Are these 16-bit "
            "mono samples of the rate that --sampling_rate says?")  # fmt: skip


def resampled(blocks: Iterable[np.ndarray], source: int, target: int) -> Iterator[np.ndarray]:
    """Consecutive parts of a sound at another rate: a sinc in a Hann window of six zeros to a side, as torchaudio's.

    Each new sample is a sum over its neighbours, whose weights depend only on where it lies between them.
    """
    divisor = math.gcd(source, target)
    source, target = source // divisor, target // divisor
    if source == target:
        yield from blocks
        return
    cutoff = min(source, target) * 0.99
    width = math.ceil(6 * source / cutoff)
    offsets = np.arange(-width, width + 2)
    most = max(1, LARGEST_SUM // len(offsets))
    waiting, first, done = None, -width, 0  # `first` is the number of the oldest sample that waits

    def some(count: int) -> np.ndarray:
        """So many new samples, from `done` on."""
        numbers = np.arange(done, done + count)
        whole, phase = numbers * source // target, numbers * source % target
        times = np.clip((offsets - (phase / target)[:, None]) * (cutoff / source), -6, 6)
        weights = (np.sinc(times) * np.cos(times * (np.pi / 12)) ** 2 * (cutoff / source)).astype(np.float32)
        places = whole[:, None] + offsets - first
        return np.einsum("cnt,nt->cn", waiting[:, places], weights)

    for block in blocks:
        waiting = np.pad(block, ((0, 0), (width, 0))) if waiting is None else np.concatenate([waiting, block], axis=1)
        while (ready := min(most, ((first + waiting.shape[1] - width - 1) * target - 1) // source - done)) > 0:
            yield some(ready)
            done += ready
            passed = done * source // target - width - first
            waiting, first = waiting[:, passed:], first + passed
    if waiting is not None:
        total = -(-(first + waiting.shape[1]) * target // source)
        waiting = np.pad(waiting, ((0, 0), (0, width + 2)))
        while ready := min(most, total - done):
            yield some(ready)
            done += ready


def fit_length(waveform: np.ndarray, length: int) -> np.ndarray:
    """A short sound, padded with its first and last sample; of a longer one the middle, or where it is not silent."""
    surplus = waveform.shape[1] - length
    if surplus <= 0:
        left = -surplus // 2
        fitted = np.empty((len(waveform), length), np.float32)
        fitted[:, left : length + surplus + left] = waveform
        fitted[:, :left], fitted[:, length + surplus + left :] = waveform[:, 0].mean(), waveform[:, -1].mean()
        return fitted
    threshold = waveform.std(ddof=1) / 2
    for start in (surplus // 2, 0):
        crop = waveform[:, start : start + length]
        if crop.std(ddof=1) >= threshold:
            return crop
    return waveform[:, surplus:]


def windows(blocks: Iterable[np.ndarray], length: int, step: int) -> Iterator[Window]:
    """The windows of a sound whose length nobody knows before its end; `values` are (channels, length).

    One begins every `step` samples. The last ends with the sound, unless it would bring next to nothing new. Where one
    holds the sound, it is padded.
    """
    waveform, first, kept = (
        None,
        0,
        0,
    )  # what waits, where the next window begins, and how much is there from before it
    for block in blocks:
        waveform = block if waveform is None else np.concatenate([waveform, block], axis=1)
        while waveform.shape[1] - kept - MIN_NEW_SHARE * length - length > 0:
            yield Window(first, first + length, waveform[:, kept : kept + length])
            first, kept = first + step, kept + step
            waveform, kept = waveform[:, max(0, kept - length) :], min(kept, length)
    if waveform is None:
        return
    end = first + waveform.shape[1] - kept
    if first == 0:
        yield Window(0, end, fit_length(waveform, length))
    else:
        start = min(first, end - length)
        place = kept + start - first
        yield Window(start, end, waveform[:, place : place + length])


# -- Windows -> a table

Cell = tuple[int, int, np.ndarray]  # start and end in samples, a score for each label


def cells(windows: Iterable[Window], step: int) -> Iterator[Cell]:
    """A recording on the grid of its windows' beginnings: means of the windows that cover a cell, as far as they do.

    Args:
        windows: In order.
        step: From the beginning of one to the next one's, in samples: the length of a cell. What is left at the end,
            where it is next to nothing, belongs to the last cell.
    """
    covering, number, end = deque(), 0, 0

    def cell(start: int, end: int) -> Cell:
        shares = [min(window.end, end) - max(window.start, start) for window in covering]
        inside = [(share, window.values) for share, window in zip(shares, covering, strict=True) if share > 0]
        shares, values = zip(*inside, strict=True)
        return start, end, np.average(values, axis=0, weights=shares).astype(np.float32)

    for window in windows:
        while window.start >= (number + 1) * step:
            yield cell(number * step, (number + 1) * step)
            number += 1
            while covering and covering[0].end <= number * step:
                covering.popleft()
        covering.append(window)
        end = window.end
    last = max(0, math.ceil(end / step - MIN_NEW_SHARE) - 1)
    while covering and number <= last:
        yield cell(number * step, end if number == last else (number + 1) * step)
        number += 1


def best_labels(cells: Iterable[Cell], top_k: int) -> Iterator[tuple[int, int, int, float]]:
    """(start, end, label, score) of the best labels of each cell, the best first."""
    for start, end, scores in cells:
        for label in np.argsort(-scores, kind="stable")[:top_k].tolist():
            yield start, end, label, float(scores[label])


def detections(
    cells: Iterable[Cell], holds: Callable[[np.ndarray], np.ndarray]
) -> Iterator[tuple[int, int, int, float]]:
    """(start, end, label, score) of each stretch of neighbouring cells in which a label holds, by their starts.

    The score is the best of its cells': rows with a score from T on are those that a threshold T would have found.

    Args:
        cells: Of one recording.
        holds: Scores of a cell -> labels that hold there.
    """
    under_way, ended = {}, []  # {label: (start, end, score)}; a heap of (start, label, end, score)

    def those_before(first: float) -> Iterator[tuple[int, int, int, float]]:
        while ended and ended[0][0] < first:
            start, label, end, score = heappop(ended)
            yield start, end, label, score

    for start, end, scores in cells:
        holding = {label: float(scores[label]) for label in holds(scores).tolist()}
        for label in under_way.keys() - holding.keys():
            began, *rest = under_way.pop(label)
            heappush(ended, (began, label, *rest))
        for label, score in holding.items():
            began, _, best = under_way.get(label, (start, end, score))
            under_way[label] = began, end, max(best, score)
        yield from those_before(min((began for began, *_ in under_way.values()), default=math.inf))
    for label, (began, *rest) in under_way.items():
        heappush(ended, (began, label, *rest))
    yield from those_before(math.inf)


def rule(network: Network, threshold: float | str) -> Callable[[np.ndarray], np.ndarray]:
    """Scores -> the labels that hold; "auto": the file's own thresholds, or without any the best label."""
    if threshold == "auto":
        threshold = network.facts.get("thresholds")
        if threshold is None and not network.multi_label:
            return lambda scores: scores.argmax()[None]
        threshold = SEVERAL_LABELS_FROM if threshold is None else np.array(threshold, np.float32)
    return lambda scores: np.flatnonzero(scores >= threshold)


def heard(network: Network, blocks: Iterable[np.ndarray], source_rate: int, step: int) -> Iterator[Window]:
    """The windows of a sound, with their scores."""
    for window in windows(resampled(blocks, source_rate, network.rate), network.length, step):
        yield window._replace(values=network.scores(np.ascontiguousarray(window.values)))


def rows(network: Network, name: str, blocks: Iterable[np.ndarray], source_rate: int, options) -> Iterator[tuple]:
    """Lines of the table, of one sound."""
    step = max(1, round(network.length * (1 - options.overlap)))
    holds = rule(network, "auto" if options.threshold is None else options.threshold)
    found = cells(heard(network, blocks, source_rate, step), step)

    def among_the_best(scores: np.ndarray) -> np.ndarray:
        return np.intersect1d(np.argsort(-scores, kind="stable")[: options.top_k], holds(scores))

    as_scores = options.top_k is not None and options.threshold is None
    for start, end, label, score in (
        best_labels(found, options.top_k) if as_scores else detections(found, among_the_best)
    ):
        times = (round(place / network.rate, DECIMALS) for place in (start, end))
        yield name, *times, network.labels[label], round(score, DECIMALS)


def find_files(inputs: list[str]) -> list[tuple[str, str]]:
    """(name in the table, path) of the sound files that inputs name, those in folders at any depth."""
    found = {}
    for path in inputs:
        if os.path.isdir(path):
            own = list(sound_files(path))
            if not own:
                raise Refused(f"{path} holds no sound files (wav, flac, ogg, mp3, aiff, …)")
        elif os.path.exists(path):
            own = [path]
        else:
            raise Refused(f"INPUT {path}: there is no such file or folder")
        found |= {os.path.abspath(each): each for each in own}
    root = os.path.commonpath(
        [os.path.abspath(each if os.path.isdir(each) else os.path.dirname(each)) for each in inputs]
    )
    return [(printable(os.path.relpath(path, root)), path) for path in found.values()]


def sound_files(folder: str) -> Iterator[str]:
    """Those below a folder, in a fixed order, hidden ones left out."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from sound_files(entry.path)
        elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
            yield entry.path


def printable(name: str) -> str:
    """A path need not be text: bytes that are none are written as \\\\udcff."""
    return name.encode("utf-8", "backslashreplace").decode()


def write_table(file, network: Network, options) -> None:
    """The table of all inputs, as it comes."""
    table = csv.writer(file, lineterminator="\n")
    table.writerow(COLUMNS)
    if options.input == [STANDARD_INPUT]:
        rate = options.sampling_rate or network.rate
        if rate < network.rate:
            say(f"standard input has {rate} Hz: nothing above {rate / 2:g} Hz, where the network listens, too")
        for row in rows(network, STANDARD_INPUT, standard_input(network.channels), rate, options):
            table.writerow(row)
            file.flush()
        return
    files, unreadable, lower = find_files(options.input), 0, 0
    for name, path in files:
        try:
            rate, blocks = file_blocks(path, network.channels)
            found = list(rows(network, name, blocks, rate, options))
        except Refused as error:
            unreadable += 1
            say(str(error))
            continue
        lower += rate < network.rate
        table.writerows(found)
        file.flush()
    if unreadable == len(files):
        raise Refused(f"none of the {unreadable} files can be read")
    if unreadable:
        say(f"{unreadable} of {len(files)} files cannot be read and are left out")
    if lower:
        say(f"{lower} of {len(files)} files have a lower rate than the network's {network.rate} Hz, and nothing above")


# -- Learning


def read_labels(path: str) -> tuple[list[tuple[str, float, float]], list[str]]:
    """Stretches (file, start and end in s) and their labels; a later line about the same stretch prevails."""
    found, left_out = {}, 0
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            missing = {"file_name", "label"} - set(table.fieldnames or ())
            if missing:
                raise Refused(
                    f"{path}: no column {', '.join(sorted(missing))}; expected file_name,start,end,label,present"
                )
            for row in table:
                where = f"{path}, line {table.line_num}"
                if row.get("present") not in (None, "", "0", "1"):
                    raise Refused(f"{where}: present must be 1 or 0, not {row['present']!r}")
                if row.get("present") == "0" or not row["label"]:
                    left_out += 1
                    continue
                found[stretch(row, os.path.dirname(path), where)] = row["label"]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Refused(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if left_out:
        say(f"{path}: {left_out} lines say what is not there, and are left out: a stretch gets one label here")
    if len(set(found.values())) < 2:
        raise Refused(f"{path}: has {len(set(found.values()))} classes; expected examples of two or more")
    return list(found), list(found.values())


def stretch(row: dict, folder: str, where: str) -> tuple[str, float, float]:
    """File, start and end in s."""
    try:
        start, end = float(row.get("start") or 0), float(row.get("end") or math.inf)
    except ValueError:
        start = end = math.nan
    if not 0 <= start < end:
        raise Refused(f"{where}: from {row.get('start')} to {row.get('end')} s is no stretch; end must be after start")
    if not row["file_name"]:
        raise Refused(f"{where}: no value for file_name")
    return os.path.join(folder, row["file_name"]), start, end


def embed(network: Network, path: str, start: float, end: float) -> np.ndarray:
    """(size,): the mean over the windows of a stretch."""
    rate, blocks = file_blocks(path, network.channels, start, end)
    found = windows(resampled(blocks, rate, network.rate), network.length, network.length)
    return np.mean([network(network.shaped(np.ascontiguousarray(each.values)))[1][0] for each in found], axis=0)


def ridge_classifier(features: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The classifier in closed form of dls_training/closed_form.py, which explains it, without torch.

    Args:
        features: (clips, size).
        labels: (clips,), from 0 to num_classes - 1, each at least once.
        num_classes: Classes.

    Returns:
        Weight (num_classes, size) and bias (num_classes,), float32.
    """
    X, Y = features.astype(np.float64), np.eye(num_classes)[labels]
    mean, std = X.mean(axis=0), X.std(axis=0)
    varies = np.sort(std[std > 1e-6 * std.max()])
    std = np.where(std > (SMALLEST_SHARE * varies[(len(varies) - 1) // 2] if len(varies) else 0), std, np.inf)
    X, prior = (X - mean) / std, Y.mean(axis=0)
    if len(X) < X.shape[1]:
        values, vectors = np.linalg.eigh(X @ X.T)
        P = vectors * np.sqrt(values.clip(0))
    else:
        values, vectors = np.linalg.eigh(X.T @ X)
        P = X @ vectors
    values, targets = values.clip(0), P.T @ (Y - prior)
    unit = max(1, values.sum() / len(X))

    def fitted(penalty: float) -> np.ndarray:
        return prior + P @ (targets / (values + penalty)[:, None])

    def left_out(penalty: float) -> np.ndarray:
        leverage = (np.square(P) @ (1 / (values + penalty)) + 1 / len(X))[:, None]
        return (fitted(penalty) - leverage * Y) / (1 - leverage)

    penalty = PENALTY_FOR_SINGLE_CLIPS * unit
    if np.bincount(labels).min() > 1:
        penalty = unit * min(PENALTIES, key=lambda share: np.square(left_out(unit * share) - Y).mean())
    predictions = left_out(penalty)

    def cross_entropy(scale: float) -> float:
        logits = scale * (predictions - predictions.max(axis=1, keepdims=True))
        return (np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(X)), labels]).mean()

    scale = min(LOGIT_SCALES, key=cross_entropy)
    weight = scale * ((Y - fitted(penalty)).T @ X / penalty) / std
    return weight.astype(np.float32), (scale * prior - weight @ mean).astype(np.float32)


def in_four_bits(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A layer's weight (labels, size) as whole numbers from -7 to 7, (labels, size), and what those of each `GROUP`
    neighbours are to be multiplied by, (labels, groups).
    """
    labels, size = weight.shape
    groups = -(-size // GROUP)
    padded = np.pad(weight, ((0, 0), (0, groups * GROUP - size))).reshape(labels, groups, GROUP)
    scale = np.maximum(abs(padded).max(axis=2) / 7, 1e-12).astype(np.float32)
    return np.rint(padded / scale[..., None]).astype(np.int8).reshape(labels, -1)[:, :size], scale


def packed(numbers: np.ndarray) -> bytes:
    """Numbers of four bits, two to a byte, the first in its lower half."""
    halves = np.pad(numbers.reshape(-1), (0, numbers.size % 2)).astype(np.uint8) & 15
    return (halves[::2] | halves[1::2] << 4).tobytes()


def learn(network: Network, labels_file: str, output: Path) -> None:
    """Writes the file with the last layer that labelled stretches ask for; the labels are theirs alone.

    Raises:
        Refused: naming what is wrong with the labels, or a sound that cannot be read.
    """
    stretches, names = read_labels(labels_file)
    labels = sorted(set(names))
    features = []
    for place in stretches:
        features.append(embed(network, *place))
        if sys.stderr.isatty():
            print(f"\r{len(features)} of {len(stretches)} heard", end="", file=sys.stderr)
    weight, bias = ridge_classifier(np.stack(features), np.array([labels.index(name) for name in names]), len(labels))
    tensors = {WEIGHT: weight, BIAS: bias}
    if SCALE in network.tensors:
        tensors[WEIGHT], tensors[SCALE] = in_four_bits(weight)
    learned = {"name": output.name, "task": "learned on the device", "clips": {Path(labels_file).name: len(names)}}
    facts = network.facts | {"labels": labels, "thresholds": None, "multi_label": False, "int8": None}
    facts["record"] = [*network.facts.get("record", []), learned]
    with open(network.path, "rb") as file:
        pieces = list(with_classifier(memoryview(file.read()), tensors, facts))
    with replaced(output, "wb") as file:
        file.writelines(pieces)
    say(f"{output}: {len(labels)} classes from {len(names)} stretches")


# -- The command


@contextmanager
def replaced(path: Path, mode: str, **settings) -> Iterator:
    """A file that takes the place of another when it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, mode, **settings) as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def say(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


def number(read: Callable, lowest: float, highest: float) -> Callable[[str], float]:
    """Reads a number within bounds."""

    def parse(text: str) -> float:
        value = read(text)
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(f"must be from {lowest:g} to {highest:g}, not {text}")
        return value

    parse.__name__ = read.__name__
    return parse


def threshold(text: str) -> float | str:
    return text if text == "auto" else number(float, 0, 1)(text)


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("network", metavar="X.onnx", help="a file of dls export")
    command.add_argument("input", nargs="*", metavar="INPUT", help="sound files, folders, or - for standard input")
    command.add_argument("--output", type=Path, help="a .csv file (default: printed); with --learn, an .onnx file")
    command.add_argument(
        "--overlap", type=number(float, 0, 0.999), default=0.0, help="of a window with the next, a share"
    )
    command.add_argument("--threshold", type=threshold, metavar="T|auto", help="see dls predict (default: auto)")
    command.add_argument("--top_k", type=number(int, 1, 10**6), help="scores of the best labels, whatever they are")
    command.add_argument("--sampling_rate", type=number(int, *RATES), metavar="HZ", help="of standard input")
    command.add_argument("--learn", metavar="labels.csv", help="file_name,start,end,label,present: what to learn from")
    return command


def run(options: argparse.Namespace) -> None:
    if bool(options.learn) == bool(options.input):
        raise Refused("expected INPUT, or --learn labels.csv with --output Y.onnx")
    if STANDARD_INPUT in options.input and len(options.input) > 1:
        raise Refused("argument INPUT: - (standard input) goes with no other")
    if options.sampling_rate and STANDARD_INPUT not in options.input:
        raise Refused("--sampling_rate is that of standard input (INPUT -): files tell their own")
    if options.learn and (options.output is None or options.output.suffix.lower() != ".onnx"):
        raise Refused("--learn writes another file: add --output Y.onnx")
    network = Network(options.network)
    if options.learn:
        learn(network, options.learn, options.output)
    elif options.output:
        # Who listens to a stream for days wants its rows at once.
        opened = open if options.input == [STANDARD_INPUT] else replaced
        with opened(options.output, "w", newline="", encoding="utf-8") as file:
            write_table(file, network, options)
    else:
        sys.stdout.reconfigure(newline="", encoding="utf-8")
        write_table(sys.stdout, network, options)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code, 2 for what the user can mend."""
    options = parser().parse_args(argv)
    try:
        run(options)
    except (Refused, OSError) as error:
        if isinstance(error, BrokenPipeError):  # whoever read the table has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
