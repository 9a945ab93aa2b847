"""Non-parametric instance discrimination: its two objectives over a memory bank, and an optimizer step on them.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (2018); Hornauer et al.,
"Unsupervised Discriminative Learning of Sounds for Audio Event Classification" (2021).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from modeling_dls.modeling_esresnet import frozen_batch_norm_statistics

from .health import Visits
from .input_pipeline import ViewMaker
from .loop import GlobalBatch, TrainingLoop
from .memory_bank import MemoryBank


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


class InstanceDiscrimination(nn.Module):
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
        super().__init__()
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

    def forward(
        self, embeddings: torch.Tensor, indices: torch.Tensor, candidates: torch.Tensor | None
    ) -> torch.Tensor:
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


class PretextStep:
    """One optimizer step of instance discrimination, over however many processes and batches it is split."""

    def __init__(self, accelerator, loop: TrainingLoop, objective: InstanceDiscrimination, make_views: ViewMaker):
        self.accelerator, self.loop, self.objective, self.make_views = accelerator, loop, objective, make_views
        self.needs_normaliser = objective.needs_normaliser()
        loop.share_views(make_views)
        self.visits = Visits(len(objective.bank), accelerator.device, within_epoch=loop.progress.batches > 0)

    def __call__(self, batch: GlobalBatch) -> torch.Tensor:
        """Updates the network, and then, once, the bank. Returns the loss summed over the clips."""
        views = [self.make_views(part) for part in batch.batches]
        indices = [part["index"] for part in batch.batches]
        candidates = self.objective.candidates(indices, batch.places, batch.slots, batch.step)
        if self.needs_normaliser:
            self.estimate_normaliser(batch, views, candidates)
            self.needs_normaliser = False
        embeddings = []

        def clip_losses(number):
            embeddings.append(self.loop.model(views[number]).embeddings)
            return self.objective(embeddings[number], indices[number], candidates[number])

        loss_sum = self.loop.optimize(batch, clip_losses)
        embeddings = [embedding.detach() for embedding in embeddings]
        if self.objective.z_momentum is not None:
            self.update_normaliser(batch, embeddings, candidates)
        # After the step and outside of backward, so that it happens once however many batches were accumulated.
        self.update_bank(batch, torch.cat(indices), torch.cat(embeddings))
        return loss_sum

    def update_bank(self, batch: GlobalBatch, indices: torch.Tensor, embeddings: torch.Tensor) -> None:
        places = torch.cat(batch.places)
        places, indices, embeddings = self.accelerator.gather((places, indices, embeddings))
        # Clips that fill up a ragged batch become copies of its first clip, of which only the first counts.
        indices = torch.where(places < batch.clips, indices, indices[0])
        self.objective.bank.update(indices, embeddings)
        self.visits.add(indices)

    @torch.no_grad()
    def estimate_normaliser(self, batch: GlobalBatch, views, candidates) -> None:
        """Z from the first global batch, before any loss is taken: how the batch is split must not matter."""
        with frozen_batch_norm_statistics(self.loop.model):
            self.update_normaliser(batch, [self.loop.model(view).embeddings for view in views], candidates)

    def update_normaliser(self, batch: GlobalBatch, embeddings, candidates) -> None:
        means = self.objective.mean_exp(torch.cat(embeddings), torch.cat(candidates))
        own_sum = (means * (torch.cat(batch.places) < batch.clips)).sum()
        mean = self.accelerator.reduce(own_sum) / batch.clips
        self.objective.bank.update_normaliser(mean, self.objective.z_momentum or 0.0)
