"""What a trained folder says of a sound. Knows nothing of the page that shows it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from datasets import Dataset

import modeling_dls
from datasets_scripts import load_corpus, loading_options
from datasets_scripts.audio import opened_sound
from datasets_scripts.errors import AudioError, CorpusError, UserError
from datasets_scripts.files import read_object
from dls_training.input_pipeline import label_numbers
from dls_training.memory_bank import BANK_FILE
from dls_training.nearest_neighbours import KNN_SIGMA
from dls_training.networks import loading
from dls_training.tasks import Pretraining, task_of
from dls_training.waveforms import sound_blocks
from modeling_dls.feature_extraction_esresnet import evaluation_windows, window_starts

from .memory import Memory, Neighbour

MAX_SECONDS = 600.0  # of a sound; memory and time to answer are bounded by it
MAX_SAMPLES = int(MAX_SECONDS) * 48_000 * 2  # of all channels together that are decoded of it
WINDOWS_AT_A_TIME = 16
NEIGHBOURS = 5
EXAMPLES = 6
QUIETEST = -120.0  # dB below full scale: what silence counts as


@dataclass(frozen=True)
class Window:
    """A stretch of a sound that the network takes at a time.

    Attributes:
        start, end: In s.
        decibel: Level (root mean square) below full scale.
        scores: Class -> probability or share of votes; empty where there is nothing to name classes by.
    """

    start: float
    end: float
    decibel: float
    scores: dict[str, float]


@dataclass(frozen=True)
class Analysis:
    """What is known of a sound.

    Attributes:
        seconds: Analysed.
        cut: Whether the sound is longer than that.
        scores: Of the whole sound, see `Window`.
        windows: Consecutive, at least one.
        loudest: Number of a window.
        spectrogram: What the network sees of that one: (audio_channels, 3, height, width).
        embedding: (embedding_dim,), unit length; None without a memory bank.
        neighbours: The nearest first.
    """

    seconds: float
    cut: bool
    scores: dict[str, float]
    windows: list[Window]
    loudest: int
    spectrogram: torch.Tensor
    embedding: torch.Tensor | None
    neighbours: list[Neighbour]


class Network:
    """A saved network and its extractor, in single precision.

    Attributes:
        extractor: With `max_length`.
    """

    def __init__(self, folder: Path, architecture: str):
        """
        Raises:
            UserError: naming the folder, if there is no such network in it, or it needs timm.
        """
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with loading(str(folder)):
            self.extractor = modeling_dls.ESResNetFeatureExtractor.from_pretrained(folder)
            model = getattr(modeling_dls, architecture).from_pretrained(folder, use_safetensors=True)
            self.model = model.eval().to(self.device)

    def waveform(self, path: str) -> torch.Tensor:
        """(audio_channels, samples): what `analysed_seconds` says of a file, decoded block by block.

        Raises:
            AudioError: if the file cannot be read as a sound.
        """
        audio = {"bytes": None, "path": path}
        return torch.cat(list(sound_blocks(audio, self.extractor, (0.0, analysed_seconds(path)))), dim=1)

    def per_window(self, waveform: torch.Tensor) -> torch.Tensor:
        """(windows, classes) probabilities of a classifier; (windows, embedding_dim) of instance discrimination."""
        windows = evaluation_windows(waveform, self.extractor.max_length).split(WINDOWS_AT_A_TIME)
        return torch.cat([self._answer(part.to(self.device)).float().cpu() for part in windows])

    @torch.no_grad()
    def _answer(self, waveforms: torch.Tensor) -> torch.Tensor:
        outputs = self.model(self.extractor.spectrogram(waveforms))
        return self.model.probabilities(outputs.logits) if "logits" in outputs else outputs.embeddings


class TrainedFolder:
    """The output folder of a train script, ready to be asked about sounds.

    Attributes:
        results: Its all_results.json.
        task: Whose results these are.
        network: Whose spectrograms are shown: the classifier, or that of a pre-training.
        memory: The memory bank, or None.
        votes: How neighbours vote, k and sigma.
        class_names: What scores are of; empty where there is nothing to name classes by.
        missing: Sentences: what cannot be shown, why, and how to get it.
        examples: (label, cell of the audio column) of clips to try.
        examples_from: Where they come from, in words.
    """

    def __init__(self, folder: Path, given: list[tuple[str, str | None]] | None):
        """
        Args:
            folder: Written by `train_npid.py` or `train_classification.py`.
            given: Names and folders of corpora; they replace recorded ones of the same name. None, for a classifier:
                clips and pre-training are not looked for, and not missed.

        Raises:
            UserError: if the folder is no such output.
            CorpusError: if one of the given corpora cannot be used.
        """
        self.results = read_results(folder)
        self.task = task_of(self.results)
        self.missing: list[str] = []
        self.network = Network(folder, self.task.architecture)
        self.memory, self.embedder = None, None
        home = None if given is None else self._pretraining_folder(folder)
        runs = [read_results(run) for run in dict.fromkeys([folder, home]) if run]
        corpora = [] if given is None else self._corpora(runs, given)
        if home:
            self.memory = self._open_memory(home, corpora)
            self.embedder = self.network if home == folder else Network(home, Pretraining.architecture)
        self.votes = self.results.get("knn", {"k": 5, "sigma": KNN_SIGMA})
        self.class_names = self.task.class_names(self)
        if not self.class_names:
            self.missing.append("Labels: none of the clips at hand that the memory bank holds has one.")
        self.examples, self.examples_from = self._examples(corpora)

    def _pretraining_folder(self, folder: Path) -> Path | None:
        """The folder of the pre-training, if it is there and holds a memory bank."""
        parts, home = "Nearest clips and map:", self.task.pretraining_folder(folder, self.results)
        if home is None:
            self.missing.append(
                f"{parts} this network was trained from scratch and has no memory bank. Fine-tune from a pre-training "
                "(train_npid.py) to see them."
            )
        elif home != folder and not ((home / BANK_FILE).is_file() and (home / "all_results.json").is_file()):
            self.missing.append(
                f"{parts} they need the pre-training that this network came from, and {home} "
                + (f"has no {BANK_FILE}." if home.is_dir() else "is not there. Start this from the folder it is in.")
            )
            return None
        return home

    def _corpora(self, runs: list[dict], given: list[tuple[str, str | None]]) -> list[tuple[str, Dataset]]:
        """Those at hand of the corpora that the runs used; the given ones first."""
        found = [(name, load_corpus(name, place, allow_partial=True, skip_unreadable=True)) for name, place in given]
        replaced, seen = {name for name, _ in given}, set()
        for options in (run["options"] for run in runs):
            for name, place in map(tuple, options["corpus"]):
                if name in replaced or (name, place) in seen:
                    continue
                seen.add((name, place))
                advice = f"Start with --corpus {name}=DIR."
                if place is None and name != "synthetic":  # nothing is downloaded for a page
                    self.missing.append(f"The clips of {name}: the run downloaded them. {advice}")
                    continue
                try:
                    found.append((name, load_corpus(name, place, **loading_options(name, options))))
                except CorpusError as error:
                    self.missing.append(f"The clips of {name}: {error}. {advice}")
        return found

    def _open_memory(self, home: Path, corpora: list[tuple[str, Dataset]]) -> Memory:
        try:
            memory = Memory(home / BANK_FILE, corpora)
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from error
        if not len(memory.known):
            self.missing.append("Nearest clips: none of the memory bank's clips is at hand.")
        return memory

    def _examples(self, corpora: list[tuple[str, Dataset]]) -> tuple[list[tuple[str, dict]], str]:
        """Clips of different classes, from a held-out fold where there is one."""
        if not corpora:
            return [], ""
        name, clips = next((pair for pair in corpora if pair[0] == self.results.get("corpus")), corpora[0])
        held_out = self.results.get("folds") or self.results.get("excluded_folds", {}).get(name) or []
        # Folds that were made for the run are not in the corpus.
        fold = None if self.results.get("made_folds") else next((int(fold) for fold in held_out), None)
        labels, folds = label_numbers(clips), np.array(clips["fold"][:])
        rows = np.flatnonzero(folds == fold) if fold is not None else np.arange(len(clips))
        _, first = np.unique(labels[rows], return_index=True)
        chosen = first[np.linspace(0, len(first) - 1, min(EXAMPLES, len(first))).round().astype(int)]
        names = clips.features["label"].names
        examples = []
        for row in rows[chosen].tolist():
            label = names[labels[row]] if labels[row] >= 0 else clips[row]["clip_id"]
            examples.append((label, clips[row]["audio"]))
        return examples, f"{name}, fold {fold}, which was held out" if fold is not None else name

    def analyse(self, path: str) -> Analysis:
        """Everything that the page shows of a sound.

        Args:
            path: A file that soundfile reads.

        Raises:
            AudioError: if the file cannot be read as a sound.
        """
        waveform, extractor = self.network.waveform(path), self.network.extractor
        rate, samples, length = extractor.sampling_rate, waveform.shape[1], extractor.max_length
        embeddings, embedding = None, None
        if self.embedder is not None:
            own = waveform if self.embedder is self.network else self.embedder.waveform(path)
            embeddings = self.embedder.per_window(own)
            embedding = F.normalize(embeddings.mean(dim=0), dim=0)
        starts, windows = window_starts(samples, length), evaluation_windows(waveform, length)
        each, whole = torch.empty(len(windows), 0), torch.empty(0)
        if self.class_names:
            each, whole = self.task.scores(self, waveform, embeddings, embedding)
        levels = windows.square().mean(dim=(1, 2)).clamp(min=10 ** (QUIETEST / 10)).log10().mul(10).tolist()
        loudest = int(np.argmax(levels))
        return Analysis(
            seconds=samples / rate,
            cut=soundfile.info(path).duration > analysed_seconds(path),
            scores=self._named(whole),
            windows=[
                Window(start / rate, min(start + length, samples) / rate, level, self._named(scores))
                for start, level, scores in zip(starts, levels, each, strict=True)
            ],
            loudest=loudest,
            spectrogram=extractor.spectrogram(windows[loudest]),
            embedding=embedding,
            neighbours=self.memory.nearest(embedding, NEIGHBOURS) if self.memory else [],
        )

    def _named(self, scores: torch.Tensor) -> dict[str, float]:
        return dict(zip(self.class_names, scores.tolist(), strict=True))

    def spectrogram(self, path: str, window: int) -> torch.Tensor:
        """What the network sees of a window: (audio_channels, 3, height, width).

        Raises:
            AudioError: if the file cannot be read as a sound.
        """
        windows = evaluation_windows(self.network.waveform(path), self.network.extractor.max_length)
        return self.network.extractor.spectrogram(windows[window])


def analysed_seconds(path: str) -> float:
    """How much of a file is analysed at most: less where it has many channels, or a high rate.

    Raises:
        AudioError: if the file cannot be read as a sound.
    """
    with opened_sound({"bytes": None, "path": path}) as sound:
        return min(MAX_SECONDS, MAX_SAMPLES / (sound.sampling_rate * sound.num_channels))


def read_results(folder: Path) -> dict:
    """A run's all_results.json.

    Raises:
        UserError: naming the folder, if there is none in it.
    """
    results = read_object(folder / "all_results.json")
    if task_of(results) is None:
        raise UserError(
            f"{folder} is not the output of a finished run: expected a folder with the all_results.json of "
            "train_npid.py or train_classification.py"
        )
    return results


def in_words(error: AudioError, path: str) -> str:
    """What is wrong with a file, by its own name: the folder of an uploaded one says nothing to its owner."""
    return str(error).replace(path, Path(path).name)
