"""What goes wrong in pre-training without stopping it, said in words."""

import logging

import torch

from .memory_bank import MemoryBank

logger = logging.getLogger("dls")

# Rows whose mean cosine similarity exceeds this hardly tell clips apart any more.
COLLAPSED = 0.95


class Visits:
    """Which clips have been trained on in the current epoch, in all processes together."""

    def __init__(self, num_clips: int, device: torch.device, within_epoch: bool):
        """
        Args:
            num_clips: Rows of the bank.
            device: Of the indices.
            within_epoch: Whether the run goes on within an epoch, whose beginning was seen by an earlier process.
        """
        self.seen = torch.zeros(num_clips, dtype=torch.bool, device=device)
        self.whole_epoch = not within_epoch

    def add(self, indices: torch.Tensor) -> None:
        """Notes the clips of one step, of all processes."""
        self.seen[indices] = True

    def end_epoch(self, epoch: int, expected: int) -> None:
        """Warns if fewer clips than expected were seen, and begins anew.

        Args:
            epoch: Its number.
            expected: Clips of an epoch.
        """
        seen = int(self.seen.sum())
        if self.whole_epoch and seen < expected:
            rows = ", ".join(map(str, (~self.seen).nonzero()[:5, 0].tolist()))
            logger.warning(
                f"epoch {epoch}: {expected - seen} of {expected} clips were never trained on, and their rows of the "
                f"memory bank are stale (first: {rows}): the data were not shared out as they should be"
            )
        self.seen.zero_()
        self.whole_epoch = True


def bank_similarity(bank: MemoryBank, epoch: int) -> float:
    """Mean cosine similarity between the bank's rows, with a warning if the embedding has collapsed."""
    similarity = bank.mean_similarity().item()
    if similarity > COLLAPSED:
        logger.warning(
            f"epoch {epoch}: the embedding has collapsed: the memory bank's rows have a mean cosine similarity of "
            f"{similarity:.3f}, so that clips are hardly told apart. Lower --learning_rate, or take another --nce_t"
        )
    return similarity


def has_finite_weights(model: torch.nn.Module) -> bool:
    """Whether every parameter and buffer is a number."""
    finite = [tensor.isfinite().all() for tensor in model.state_dict().values() if tensor.is_floating_point()]
    return bool(torch.stack(finite).all())
