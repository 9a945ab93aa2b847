"""A pre-training's memory bank, joined with the clips that it remembers."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from datasets_scripts import ClipIdentities
from dls_training.input_pipeline import label_numbers
from dls_training.memory_bank import MemoryBank, find_keys
from dls_training.nearest_neighbours import knn_votes

POINTS_ON_MAP = 5000  # of a larger bank, a random choice is drawn


@dataclass(frozen=True)
class Neighbour:
    """A clip that the network remembers as similar.

    Attributes:
        row: Of the memory bank.
        name: corpus/clip_id.
        label: Its class, where it has one.
        distance: 1 - cosine of the two embeddings, 0..2.
    """

    row: int
    name: str
    label: str | None
    distance: float


class Memory:
    """The memory bank and, for those of its rows whose clip is at hand, that clip.

    Attributes:
        vectors: (rows, embedding_dim), unit length.
        classes: Names, of all corpora together.
        labels: (rows,), numbers of classes; -1 where a clip is not at hand, or has no label.
        known: Rows whose clip is at hand.
    """

    def __init__(self, path: Path, corpora: list[tuple[str, Dataset]]):
        """
        Args:
            path: What `MemoryBank.save` wrote.
            corpora: From `load_corpus`, each with its name.

        Raises:
            ValueError: naming the file, if it is not a memory bank.
        """
        bank = MemoryBank.load(path)
        self.vectors, self.corpora = bank.vectors, corpora
        self.corpus = np.full(len(bank), -1)  # of each row's clip, and its place there
        self.place = np.full(len(bank), -1)
        self.labels = np.full(len(bank), -1)
        self.classes: list[str] = []
        for number, (_, clips) in enumerate(corpora):
            rows = find_keys(torch.from_numpy(ClipIdentities.of(clips).digests()), bank.keys)
            places = np.flatnonzero(rows >= 0)
            rows = rows[places]
            self.corpus[rows], self.place[rows] = number, places
            self.labels[rows] = self._numbers_of_classes(clips)[label_numbers(clips)[places]]
        self.known = np.flatnonzero(self.corpus >= 0)
        self.labelled = np.flatnonzero(self.labels >= 0)
        chosen = np.random.default_rng(0).permutation(len(bank))[:POINTS_ON_MAP]
        self.on_map = np.sort(chosen)

    def _numbers_of_classes(self, clips: Dataset) -> np.ndarray:
        """The number of each of a corpus's labels among `classes`; the last entry, which label -1 takes, is -1."""
        names = clips.features["label"].names if "label" in clips.column_names else []
        self.classes += [name for name in names if name not in self.classes]
        return np.array([*map(self.classes.index, names), -1])

    def votes(self, embeddings: torch.Tensor, k: int, sigma: float) -> torch.Tensor:
        """Weighted k-NN over the labelled clips: (queries, classes), each row adding up to 1."""
        labels = torch.from_numpy(self.labels[self.labelled])
        return knn_votes(embeddings, self.vectors[self.labelled], labels, len(self.classes), k, sigma)

    def nearest(self, embedding: torch.Tensor, count: int) -> list[Neighbour]:
        """The nearest clips at hand, the nearest first.

        Args:
            embedding: (embedding_dim,), unit length.
            count: How many.
        """
        similarities = self.vectors[self.known] @ embedding
        values, places = similarities.topk(min(count, len(self.known)))
        return [
            self._neighbour(int(self.known[place]), 1 - value)
            for value, place in zip(values.tolist(), places.tolist(), strict=True)
        ]

    def _neighbour(self, row: int, distance: float) -> Neighbour:
        name, clips = self.corpora[self.corpus[row]]
        label = self.classes[self.labels[row]] if self.labels[row] >= 0 else None
        return Neighbour(row, f"{name}/{clips[int(self.place[row])]['clip_id']}", label, max(0.0, distance))

    def audio(self, row: int) -> dict:
        """The cell of the audio column of a row's clip, for `decode_audio`."""
        return self.corpora[self.corpus[row]][1][int(self.place[row])]["audio"]
