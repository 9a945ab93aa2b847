"""Non-parametric instance discrimination: memory bank, its two objectives, and the k-NN that watches them.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (2018); Hornauer et al.,
"Unsupervised Discriminative Learning of Sounds for Audio Event Classification" (2021).
"""

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

BANK_FILE = "memory_bank.safetensors"
KEY_BYTES = 16


def clip_keys(corpora: Iterable[str], clip_ids: Iterable[str]) -> torch.Tensor:
    """Identity of each clip that survives reordering: digests of `corpus/clip_id`, uint8, (clips, 16)."""
    digests = [
        hashlib.blake2b(f"{corpus}/{clip_id}".encode(), digest_size=KEY_BYTES).digest()
        for corpus, clip_id in zip(corpora, clip_ids, strict=True)
    ]
    return torch.from_numpy(np.frombuffer(bytearray(b"".join(digests)), np.uint8)).view(-1, KEY_BYTES)


class MemoryBank(nn.Module):
    """One unit vector per clip, moved towards the clip's newest embedding at every optimizer step.

    Attributes:
        vectors: (num_clips, embedding_dim), float32, unit length.
        Z: The constant that turns exp(similarity / temperature) into a probability; 0 until it is estimated. float64,
            since exp(1 / temperature) overflows float32 for temperatures below 0.0113.
        keys: (num_clips, 16), uint8, see `clip_keys`; all zero where clips have no identity.
        momentum: Share of the old vector that an update keeps.

    Example:
        >>> bank = MemoryBank(num_clips=400, embedding_dim=128)
        >>> bank.update(torch.tensor([7]), torch.nn.functional.normalize(torch.randn(1, 128), dim=-1))
    """

    def __init__(
        self,
        num_clips: int,
        embedding_dim: int = 128,
        momentum: float = 0.5,
        keys: torch.Tensor | None = None,
        seed: int = 0,
    ):
        """
        Args:
            num_clips: Rows.
            embedding_dim: Columns.
            momentum: 0 <= momentum < 1.
            keys: See the class.
            seed: Of the random unit vectors that the bank starts from, the same in every process.

        Raises:
            ValueError: if a size or the momentum is out of range, or the keys are not one per clip.
        """
        super().__init__()
        if num_clips < 1 or embedding_dim < 1 or not 0 <= momentum < 1:
            raise ValueError(
                f"expected num_clips >= 1, embedding_dim >= 1 and 0 <= momentum < 1, not {num_clips}, {embedding_dim} "
                f"and {momentum}"
            )
        if keys is None:
            keys = torch.zeros(num_clips, KEY_BYTES, dtype=torch.uint8)
        if tuple(keys.shape) != (num_clips, KEY_BYTES):
            raise ValueError(f"expected keys of shape {(num_clips, KEY_BYTES)}, not {tuple(keys.shape)}")
        start = torch.randn(num_clips, embedding_dim, generator=torch.Generator().manual_seed(seed))
        self.momentum = momentum
        self.register_buffer("vectors", F.normalize(start, dim=-1))
        self.register_buffer("Z", torch.zeros((), dtype=torch.float64))
        self.register_buffer("keys", keys.clone())

    def __len__(self) -> int:
        return len(self.vectors)

    @torch.no_grad()
    def update(self, indices: torch.Tensor, embeddings: torch.Tensor) -> None:
        """v_i <- normalise(m v_i + (1 - m) v). Of a clip that occurs twice, the first embedding counts.

        Args:
            indices: (batch,), int64.
            embeddings: (batch, embedding_dim), unit length.
        """
        # Ragged last batches are padded with clips that were in the batch already. Every copy of an index is given the
        # first one's row, so that the order in which a device writes them does not matter.
        ordered, order = indices.sort(stable=True)
        position = torch.arange(len(ordered), device=ordered.device)
        is_first = torch.ones_like(ordered, dtype=torch.bool)
        is_first[1:] = ordered[1:] != ordered[:-1]
        first = order[torch.where(is_first, position, 0).cummax(0).values]
        rows = self.momentum * self.vectors[ordered] + (1 - self.momentum) * embeddings[first].to(self.vectors.dtype)
        self.vectors.index_copy_(0, ordered, F.normalize(rows, dim=-1))

    @torch.no_grad()
    def update_normaliser(self, mean_exp: torch.Tensor, momentum: float = 0.0) -> None:
        """Z <- momentum Z + (1 - momentum) mean(exp(similarity / temperature)) N; a first estimate counts whole.

        Args:
            mean_exp: Mean over a global batch and its negatives, float64 scalar.
            momentum: Share of the old estimate that is kept.
        """
        estimate = mean_exp.to(self.Z) * len(self)
        self.Z.copy_(torch.where(self.Z == 0, estimate, momentum * self.Z + (1 - momentum) * estimate))

    def save(self, path: str | Path) -> None:
        """Writes vectors, Z and keys as safetensors."""
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, str(path))

    @classmethod
    def load(cls, path: str | Path, momentum: float = 0.5) -> "MemoryBank":
        """Reads what `save` wrote.

        Raises:
            ValueError: naming the file, if it is not a memory bank.
        """
        try:
            state = load_file(str(path))
            bank = cls(*state["vectors"].shape, momentum=momentum, keys=state["keys"])
            bank.load_state_dict(state)
        except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{path} is not a memory bank (vectors, Z and keys as safetensors): {error}") from error
        return bank


def nce_logits(bank: MemoryBank, embeddings: torch.Tensor, indices: torch.Tensor, temperature: float) -> torch.Tensor:
    """similarity / temperature to the bank's rows `indices` (batch, columns), float32 at least: (batch, columns)."""
    rows = bank.vectors[indices].to(embeddings.dtype)
    return torch.bmm(rows, embeddings[:, :, None]).squeeze(-1) / temperature


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
    logits = embeddings @ bank.vectors.to(embeddings.dtype).T / temperature
    return F.cross_entropy(logits, indices, reduction="none")


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
            bank: Of N clips.
            objective: `"nce"` or `"softmax"`.
            num_negatives: K.
            temperature: tau.
            exclude_positive: Whether a clip is never its own negative; the original allows it.
            z_momentum: None keeps the first batch's Z (the original); a number keeps a running estimate instead, which
                forgets an unlucky first batch.
            seed: Of the negatives.

        Raises:
            ValueError: if the objective is unknown, or positives are to be excluded from a bank of one clip.
        """
        if objective not in ("nce", "softmax"):
            raise ValueError(f"objective must be 'nce' or 'softmax', not {objective!r}")
        if exclude_positive and len(bank) < 2:
            raise ValueError("a bank of one clip has no negatives besides the clip itself")
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

    def mean_exp(self, embeddings: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """mean(exp(similarity / temperature)) over a batch and its candidates, float64 scalar."""
        with torch.no_grad():
            return nce_logits(self.bank, embeddings, candidates, self.temperature).double().exp().mean()

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
    sigma: float = 0.4,
    chunk_size: int = 4096,
) -> torch.Tensor:
    """Predicts each query's class by its k nearest references, votes weighted by exp(similarity / sigma).

    Args:
        queries: (queries, dim), unit length.
        references: (references, dim), unit length.
        labels: (references,), int64 in 0 .. num_classes - 1.
        num_classes: Classes.
        k: Neighbours; all references vote where there are fewer.
        sigma: The paper takes the temperature of the loss.
        chunk_size: Queries compared at once, which bounds memory and changes no result.

    Returns:
        (queries,), int64.
    """
    predictions = []
    for chunk in queries.split(chunk_size):
        similarity, nearest = (chunk @ references.T).topk(min(k, len(references)), dim=1)
        # Relative to the nearest, so that a small sigma cannot overflow.
        weights = ((similarity - similarity[:, :1]) / sigma).exp()
        votes = weights.new_zeros(len(chunk), num_classes).scatter_add_(1, labels[nearest], weights)
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions) if predictions else labels.new_zeros(0)


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
