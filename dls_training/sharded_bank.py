"""A memory bank that is spread over the processes of a run."""

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist

from .memory_bank import BLOCK, MemoryBank


class ShardedMemoryBank(MemoryBank):
    """A memory bank of which each process holds an equal share of the rows; every method is called in all processes.

    Embeddings travel, rows do not: each process computes the similarities to its own rows for the clips of all, and
    the results are summed over the processes. Memory per process is num_clips * embedding_dim / processes.

    Raises:
        ValueError: if there are fewer clips than processes.
    """

    @classmethod
    def share(cls, num_clips: int) -> tuple[int, int]:
        rank, processes = dist.get_rank(), dist.get_world_size()
        if num_clips < processes:
            raise ValueError(f"{num_clips} clips cannot be spread over {processes} processes")
        return first_row(num_clips, rank, processes), first_row(num_clips, rank + 1, processes)

    def similarities(self, embeddings: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return _ShardedSimilarities.apply(embeddings, indices, self)

    def cross_entropy(self, embeddings: torch.Tensor, indices: torch.Tensor, temperature: float) -> torch.Tensor:
        return _ShardedCrossEntropy.apply(embeddings, indices, temperature, self)

    def _move(self, rows: torch.Tensor, embeddings: torch.Tensor) -> None:
        own = (rows >= 0) & (rows < len(self.vectors))
        super()._move(rows[own], embeddings[own])

    def _sum_of_rows(self) -> torch.Tensor:
        return summed(super()._sum_of_rows())

    def take_over(self, path: str | Path) -> int:
        return int(summed(torch.tensor(super().take_over(path), device=self.vectors.device)))

    def save(self, path: str | Path | None) -> None:
        if dist.get_rank() == 0:
            super().save(path)
            return
        for name in ("vectors", "keys"):
            for block in super()._blocks_of_all(name):
                dist.send(block.contiguous(), dst=0)

    def _blocks_of_all(self, name: str) -> Iterable[torch.Tensor]:
        yield from super()._blocks_of_all(name)
        own, processes = getattr(self, name), dist.get_world_size()
        for rank in range(1, processes):
            left = first_row(len(self), rank + 1, processes) - first_row(len(self), rank, processes)
            while left:
                block = own.new_empty(min(BLOCK, left), own.shape[1])
                dist.recv(block, src=rank)
                yield block
                left -= len(block)


def first_row(num_clips: int, rank: int, processes: int) -> int:
    """Where a process's share of the rows begins, and the one's before it ends."""
    return num_clips * rank // processes


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The processes' tensors of one shape, one after another: (processes * batch, …)."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def summed(tensor: torch.Tensor, operation=dist.ReduceOp.SUM) -> torch.Tensor:
    """The sum (or what `operation` says) over processes, in place."""
    dist.all_reduce(tensor, operation)
    return tensor


def own_part(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """This process's rows of what `gathered` put together."""
    return tensor[dist.get_rank() * batch : (dist.get_rank() + 1) * batch]


class _ShardedSimilarities(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embeddings, indices, bank):
        everyones, rows = gathered(embeddings), gathered(indices) - bank.first
        # Only the pairs whose row is here: about one process's share of them.
        clip, column = ((rows >= 0) & (rows < len(bank.vectors))).nonzero(as_tuple=True)
        row = rows[clip, column]
        dots = torch.zeros(rows.shape, dtype=embeddings.dtype, device=embeddings.device)
        dots[clip, column] = (everyones[clip] * bank.vectors[row].to(embeddings.dtype)).sum(dim=-1)
        ctx.save_for_backward(clip, column, row)
        ctx.bank, ctx.batch = bank, len(embeddings)
        return own_part(summed(dots), ctx.batch).clone()

    @staticmethod
    def backward(ctx, gradient):
        clip, column, row = ctx.saved_tensors
        pulls = gathered(gradient)[clip, column, None] * ctx.bank.vectors[row].to(gradient.dtype)
        everyones = pulls.new_zeros(ctx.batch * dist.get_world_size(), pulls.shape[1]).index_add_(0, clip, pulls)
        return own_part(summed(everyones), ctx.batch).clone(), None, None


class _ShardedCrossEntropy(torch.autograd.Function):
    """Log-sum-exp over rows in several processes: the maximum first, then the sum relative to it."""

    @staticmethod
    def forward(ctx, embeddings, indices, temperature, bank):
        everyones, rows = gathered(embeddings), gathered(indices) - bank.first
        logits = everyones @ bank.vectors.to(embeddings.dtype).T / temperature
        highest = summed(logits.amax(dim=1), dist.ReduceOp.MAX)
        (clip,) = ((rows >= 0) & (rows < len(bank.vectors))).nonzero(as_tuple=True)
        positive = torch.zeros_like(highest)
        positive[clip] = logits[clip, rows[clip]]
        total, positive = summed(torch.stack([(logits - highest[:, None]).exp().sum(dim=1), positive]))
        log_total = highest + total.log()
        ctx.save_for_backward(everyones, clip, rows, log_total)
        ctx.bank, ctx.batch, ctx.temperature = bank, len(embeddings), temperature
        return own_part(log_total - positive, ctx.batch).clone()

    @staticmethod
    def backward(ctx, gradient):
        everyones, clip, rows, log_total = ctx.saved_tensors
        vectors = ctx.bank.vectors.to(everyones.dtype)
        errors = (everyones @ vectors.T / ctx.temperature - log_total[:, None]).exp()
        errors[clip, rows[clip]] -= 1
        pulls = (gathered(gradient)[:, None] * errors) @ vectors / ctx.temperature
        return own_part(summed(pulls), ctx.batch).clone(), None, None, None
