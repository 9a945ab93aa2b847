"""Weighted k-NN: the share of clips whose nearest neighbours have their label watches an embedding as it is trained.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (2018).
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from .clips import ClipStore
from .input_pipeline import ViewMaker, evaluation_loader, mean_over_windows
from .settings import PretrainingSettings

# Of the votes in weighted k-NN. The original takes the temperature of the loss; then runs with different temperatures
# would be measured differently.
KNN_SIGMA = 0.1


def weighted_knn(
    queries: torch.Tensor,
    references: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    k: int = 5,
    sigma: float = KNN_SIGMA,
    chunk_size: int = 4096,
) -> torch.Tensor:
    """Predicts each query's class by its k nearest references, votes weighted by exp(similarity / sigma).

    Args:
        queries: (queries, dim), unit length.
        references: (references, dim), unit length.
        labels: (references,), int64 in 0 .. num_classes - 1.
        num_classes: Classes.
        k: Neighbours; all references vote where there are fewer.
        sigma: The smaller, the more the nearest outweigh the others.
        chunk_size: Queries compared at once, which bounds memory and changes no result.

    Returns:
        (queries,), int64.
    """
    predictions = [
        knn_votes(chunk, references, labels, num_classes, k, sigma).argmax(dim=1)
        for chunk in queries.split(chunk_size)
    ]
    return torch.cat(predictions) if predictions else labels.new_zeros(0)


def knn_votes(
    queries: torch.Tensor, references: torch.Tensor, labels: torch.Tensor, num_classes: int, k: int, sigma: float
) -> torch.Tensor:
    """What each class gets of the votes behind `weighted_knn`, whose arguments these are: (queries, num_classes).

    A row's votes add up to 1.
    """
    similarity, nearest = (queries @ references.T).topk(min(k, len(references)), dim=1)
    # softmax subtracts the largest: a small sigma cannot overflow.
    weights = (similarity / sigma).softmax(dim=1)
    return weights.new_zeros(len(queries), num_classes).scatter_add_(1, labels[nearest], weights)


def knn_accuracy_by_fold(
    embeddings: torch.Tensor, labels: torch.Tensor, folds: torch.Tensor, held_out: Iterable[int], k: int, sigma: float
) -> dict[int, float]:
    """Weighted k-NN accuracy of each held-out fold against all other folds: {fold: 0..1}.

    Args:
        embeddings: (clips, dim), unit length.
        labels: (clips,), int64.
        folds: (clips,), int64.
        held_out: Folds to query, one after the other.
        k, sigma: See `weighted_knn`.
    """
    num_classes = int(labels.max()) + 1
    accuracies = {}
    for fold in held_out:
        query = folds == fold
        predicted = weighted_knn(embeddings[query], embeddings[~query], labels[~query], num_classes, k, sigma)
        accuracies[fold] = (predicted == labels[query]).double().mean().item()
    return accuracies


@dataclass
class LabelledCorpus:
    """A corpus on which neighbours are asked for labels.

    Attributes:
        name: As results call it.
        classes: Their names.
        labels, folds: (clips,), int64.
        held_out: Folds that are queried.
        loader: Of all of its clips, in order.
        embeddings: (clips, embedding_dim), the newest.
    """

    name: str
    classes: list[str]
    labels: torch.Tensor
    folds: torch.Tensor
    held_out: list[int]
    loader: DataLoader
    embeddings: torch.Tensor | None = None


class NearestNeighbourTests:
    """Weighted k-NN accuracy of the embedding on every corpus that has labels.

    Excluded folds are held out; where none is, each official fold in turn; without folds, every fifth clip.
    """

    def __init__(self, settings: PretrainingSettings, corpora: list[tuple[str, Dataset]], store: ClipStore,
                 make_views: ViewMaker, accelerator: Accelerator):  # fmt: skip
        self.accelerator, self.make_views = accelerator, make_views
        self.k, self.sigma = settings.knn_k, KNN_SIGMA
        self.corpora: list[LabelledCorpus] = []
        times = Counter()
        for name, corpus in corpora:
            labels, folds = corpus["label"][:], torch.tensor(corpus["fold"][:])
            if None in labels or len(set(labels)) < 2:
                continue
            if len(folds.unique()) < 2:
                folds = torch.arange(len(labels)) % 5 + 1
            existing = folds.unique().tolist()
            held_out = sorted(settings.excluded_folds(name).intersection(existing)) or existing
            loader = accelerator.prepare(evaluation_loader(store, corpus, settings))
            times[name] += 1
            shown_as = name if times[name] == 1 else f"{name}-{times[name]}"  # a second folder of one's own
            classes = corpus.features["label"].names
            self.corpora.append(LabelledCorpus(shown_as, classes, torch.tensor(labels), folds, held_out, loader))

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """{corpus: accuracy 0..1, mean of the held-out folds}"""
        model.eval()
        accuracies = {}
        for corpus in self.corpora:
            corpus.embeddings = self.embed(model, corpus.loader)
            by_fold = knn_accuracy_by_fold(
                corpus.embeddings, corpus.labels, corpus.folds, corpus.held_out, self.k, self.sigma
            )
            accuracies[corpus.name] = sum(by_fold.values()) / len(by_fold)
        model.train()
        return accuracies

    def embed(self, model: PreTrainedModel, loader: DataLoader) -> torch.Tensor:
        """Every clip of a corpus, in order: (clips, embedding_dim), the mean over a clip's windows at unit length."""

        def score(batch):
            return model(self.make_views.unchanged(batch)).embeddings

        return F.normalize(mean_over_windows(self.accelerator, loader, score), dim=-1)

    @property
    def are_measured(self) -> bool:
        """Whether this process has asked, wherever there is something to ask."""
        return all(corpus.embeddings is not None for corpus in self.corpora)

    def draw_first(self, path: Path) -> None:
        """A map of the first labelled corpus' embeddings, as they were last; none without labels."""
        from .report import draw_embedding  # matplotlib takes its time, and is needed once, at the end

        if self.corpora:
            first = self.corpora[0]
            title = f"{first.name}, two principal components of the embedding"
            draw_embedding(path, first.embeddings, first.labels.numpy(), first.classes, title)
