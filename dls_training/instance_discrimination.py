"""Non-parametric instance discrimination: its two objectives over a memory bank, and the k-NN that watches them.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (2018); Hornauer et al.,
"Unsupervised Discriminative Learning of Sounds for Audio Event Classification" (2021).
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F

from .memory_bank import MemoryBank

# Of the votes in weighted k-NN. The original takes the temperature of the loss; then runs with different temperatures
# would be measured differently.
KNN_SIGMA = 0.1


def nce_logits(bank: MemoryBank, embeddings: torch.Tensor, indices: torch.Tensor, temperature: float) -> torch.Tensor:
    """similarity / temperature to the bank's rows `indices` (batch, columns), float32 at least: (batch, columns)."""
    return bank.similarities(embeddings, indices) / temperature


def nce_loss(logits: torch.Tensor, Z: torch.Tensor, num_clips: int) -> torch.Tensor:
    """Noise-contrastive estimation of the instance softmax (Wu et al., eq. 7), per clip.

    With P = exp(logit) / Z and Pn = 1 / num_clips:
    -[log P / (P + K Pn) + sum over K negatives of log K Pn / (P_k + K Pn)].

    Args:
        logits: (batch, 1 + K), similarity / temperature of the positive, then of the negatives.
        Z: Scalar.
        num_clips: Rows of the bank.

    Returns:
        (batch,)
    """
    num_negatives = logits.shape[1] - 1
    # P / (P + K Pn) is the logistic function of log P - log K Pn: nothing is exponentiated, nothing overflows.
    log_ratio = logits - (Z.log() + math.log(num_negatives / num_clips)).to(logits.dtype)
    return -(F.logsigmoid(log_ratio[:, 0]) + F.logsigmoid(-log_ratio[:, 1:]).sum(dim=-1))


def softmax_loss(
    bank: MemoryBank, embeddings: torch.Tensor, indices: torch.Tensor, temperature: float
) -> torch.Tensor:
    """-log P(i | v) with the exact softmax over the whole bank (Hornauer et al., eq. 1), per clip.

    Args:
        bank: Of N clips.
        embeddings: (batch, embedding_dim), unit length.
        indices: (batch,), the clips' own rows.
        temperature: tau.

    Returns:
        (batch,)
    """
    return bank.cross_entropy(embeddings, indices, temperature)


class InstanceDiscrimination:
    """The pretext loss over a memory bank: `"nce"` or `"softmax"`.

    Attributes:
        bank: The memory bank.
        z_momentum: See the constructor.
    """

    def __init__(
        self,
        bank: MemoryBank,
        objective: str = "nce",
        num_negatives: int = 64,
        temperature: float = 0.4,
        exclude_positive: bool = False,
        z_momentum: float | None = None,
        seed: int = 0,
    ):
        """
        Args:
            bank: Of N clips. Its Z starts anew where it was estimated for another temperature.
            objective: `"nce"` or `"softmax"`.
            num_negatives: K.
            temperature: tau.
            exclude_positive: Whether a clip is never its own negative; the original allows it.
            z_momentum: None keeps the first batch's Z (the original); a number keeps a running, unbiased estimate of
                sum_j exp(v_j . v / tau) instead, which forgets an unlucky first batch.
            seed: Of the negatives.

        Raises:
            ValueError: if the objective is unknown, or positives are to be excluded from a bank of one clip.
        """
        if objective not in ("nce", "softmax"):
            raise ValueError(f"objective must be 'nce' or 'softmax', not {objective!r}")
        if exclude_positive and len(bank) < 2:
            raise ValueError("a bank of one clip has no negatives besides the clip itself")
        bank.set_temperature(temperature)
        self.bank = bank
        self.objective = objective
        self.num_negatives = num_negatives
        self.temperature = temperature
        self.exclude_positive = exclude_positive
        self.z_momentum = z_momentum
        self.seed = seed

    def candidates(
        self, indices: list[torch.Tensor], places: list[torch.Tensor], slots: int, step: int
    ) -> list[torch.Tensor | None]:
        """Noise for one global batch: each clip's own index, then K uniformly drawn ones, with replacement.

        They depend on the seed, the step and a clip's place in the global batch alone, so that any number of
        processes, of accumulated batches and of restarts draws the same.

        Args:
            indices: Of the batches that fall to this process, each (batch,).
            places: Of the same clips in the global batch.
            slots: Places in the global batch.
            step: Optimizer steps before this one.

        Returns:
            For each batch (batch, 1 + K), int64; None for the exact softmax, which needs no noise.
        """
        if self.objective == "softmax":
            return [None] * len(indices)
        state = int(np.random.SeedSequence([self.seed, step]).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(state & (2**63 - 1))
        choices = len(self.bank) - self.exclude_positive
        noise = torch.randint(choices, (slots, self.num_negatives), generator=generator).to(indices[0].device)
        candidates = []
        for index, place in zip(indices, places, strict=True):
            negatives = noise[place]
            if self.exclude_positive:
                negatives = negatives + (negatives >= index[:, None])
            candidates.append(torch.cat([index[:, None], negatives], dim=1))
        return candidates

    def needs_normaliser(self) -> bool:
        """Whether the first global batch must estimate Z before any loss is taken."""
        return self.objective == "nce" and self.bank.Z.item() == 0

    @torch.no_grad()
    def mean_exp(self, embeddings: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Each clip's estimate of the mean of exp(similarity / temperature) over the bank's rows: (batch,), float64.

        For a fixed Z lemniscate's: the mean over the candidates, in which the positive weighs 1 / (K + 1) instead of
        1 / N. That is too much once clips resemble their own rows, so a running estimate is the unbiased one: the
        positive counts as the one row that it is, and the negatives stand for all others.

        Args:
            embeddings: (batch, embedding_dim), unit length.
            candidates: (batch, 1 + K), see `candidates`.
        """
        values = nce_logits(self.bank, embeddings, candidates, self.temperature).double().exp()
        if self.z_momentum is None:
            return values.mean(dim=1)
        # A negative that happens to be the positive is counted already; the others are any row with equal chances.
        others = values[:, 1:] * (candidates[:, 1:] != candidates[:, :1])
        choices = len(self.bank) - self.exclude_positive
        return (values[:, 0] + choices * others.mean(dim=1)) / len(self.bank)

    def loss(self, embeddings: torch.Tensor, indices: torch.Tensor, candidates: torch.Tensor | None) -> torch.Tensor:
        """Loss of each clip, (batch,).

        Args:
            embeddings: (batch, embedding_dim), unit length, float32 at least.
            indices: (batch,), the clips' own rows.
            candidates: (batch, 1 + K) for NCE, see `candidates`.
        """
        if self.objective == "softmax":
            return softmax_loss(self.bank, embeddings, indices, self.temperature)
        logits = nce_logits(self.bank, embeddings, candidates, self.temperature)
        return nce_loss(logits, self.bank.Z, len(self.bank))


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
