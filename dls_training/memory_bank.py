"""The memory bank of instance discrimination: one unit vector per clip.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (2018).
"""

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

BANK_FILE = "memory_bank.safetensors"
TEMPERATURE = "temperature"  # in the file's metadata
KEY_BYTES = 16
# Rows that are read or sent at a time: a bank never needs much more memory than its rows.
BLOCK = 65536
RANDOM_BLOCK = 1024
ITEM_BYTES = {"F64": 8, "F32": 4, "U8": 1}


def find_keys(keys: torch.Tensor, among: torch.Tensor) -> np.ndarray:
    """The place of each key in `among`, (len(keys),): -1 where it is not there, or is no identity (all zero)."""
    # As byte strings, keys can be sorted and looked up.
    keys, among = (tensor.contiguous().numpy().view(f"S{KEY_BYTES}")[:, 0] for tensor in (keys, among))
    if not len(among):
        return np.full(len(keys), -1)
    order = np.argsort(among)
    place = order[np.searchsorted(among, keys, sorter=order).clip(max=len(among) - 1)]
    return np.where((among[place] == keys) & (keys != b""), place, -1)


def blocks(first: int, last: int, size: int = BLOCK) -> Iterable[tuple[int, int]]:
    """The parts of rows first .. last - 1 that lie in one block each."""
    while first < last:
        stop = min(last, (first // size + 1) * size)
        yield first, stop
        first = stop


def random_rows(out: torch.Tensor, first: int, seed: int) -> None:
    """Fills rows first … of a bank with unit vectors that depend on the seed and a row's number alone."""
    for start, stop in blocks(first, first + len(out), RANDOM_BLOCK):
        block = start // RANDOM_BLOCK
        state = int(np.random.SeedSequence([seed, block]).generate_state(1, np.uint64)[0])
        # The whole block, always: a shorter one would begin with other numbers.
        rows = torch.randn(RANDOM_BLOCK, out.shape[1], generator=torch.Generator().manual_seed(state & (2**63 - 1)))
        own = rows[start - block * RANDOM_BLOCK : stop - block * RANDOM_BLOCK]
        out[start - first : stop - first] = F.normalize(own, dim=-1)


class MemoryBank(nn.Module):
    """One unit vector per clip, moved towards the clip's newest embedding at every optimizer step.

    Attributes:
        num_clips: Rows, of all processes together.
        first: Number of the first row that this process holds.
        vectors: (rows held, embedding_dim), float32, unit length.
        Z: The constant that turns exp(similarity / temperature) into a probability; 0 until it is estimated. float64,
            since exp(1 / temperature) overflows float32 for temperatures below 0.0113.
        temperature: For which Z is estimated; None where that is unknown. See `set_temperature`.
        keys: (rows held, 16), uint8, see `ClipIdentities.digests`; all zero where clips have no identity.
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
        seed: int | None = 0,
    ):
        """
        Args:
            num_clips: Rows.
            embedding_dim: Columns.
            momentum: 0 <= momentum < 1.
            keys: Of all clips, see the class.
            seed: Of the random unit vectors that the bank starts from, the same however it is spread; None leaves the
                rows to be filled in.

        Raises:
            ValueError: if a size or the momentum is out of range, or the keys are not one per clip.
        """
        super().__init__()
        if num_clips < 1 or embedding_dim < 1 or not 0 <= momentum < 1:
            raise ValueError(
                f"expected num_clips >= 1, embedding_dim >= 1 and 0 <= momentum < 1, not {num_clips}, {embedding_dim} "
                f"and {momentum}"
            )
        if keys is not None and tuple(keys.shape) != (num_clips, KEY_BYTES):
            raise ValueError(f"expected keys of shape {(num_clips, KEY_BYTES)}, not {tuple(keys.shape)}")
        self.num_clips = num_clips
        self.momentum = momentum
        self.temperature: float | None = None
        self.first, last = self.share(num_clips)
        self.register_buffer("vectors", torch.empty(last - self.first, embedding_dim))
        self.register_buffer("Z", torch.zeros((), dtype=torch.float64))
        own_keys = torch.zeros(last - self.first, KEY_BYTES, dtype=torch.uint8)
        self.register_buffer("keys", own_keys if keys is None else keys[self.first : last].clone())
        if seed is not None:
            random_rows(self.vectors, self.first, seed)

    @classmethod
    def share(cls, num_clips: int) -> tuple[int, int]:
        """First row and end of the rows that this process holds: here, all."""
        return 0, num_clips

    def __len__(self) -> int:
        return self.num_clips

    def similarities(self, embeddings: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Dot products with the rows `indices`.

        Args:
            embeddings: (batch, embedding_dim), float32 at least.
            indices: (batch, columns), int64.

        Returns:
            (batch, columns), in the embeddings' dtype.
        """
        rows = self.vectors[indices].to(embeddings.dtype)
        return torch.bmm(rows, embeddings[:, :, None]).squeeze(-1)

    def cross_entropy(self, embeddings: torch.Tensor, indices: torch.Tensor, temperature: float) -> torch.Tensor:
        """-log softmax(similarity to every row / temperature) at each clip's own row: (batch,).

        Args:
            embeddings: (batch, embedding_dim), float32 at least.
            indices: (batch,), int64.
            temperature: tau.
        """
        logits = embeddings @ self.vectors.to(embeddings.dtype).T / temperature
        return F.cross_entropy(logits, indices, reduction="none")

    @torch.no_grad()
    def update(self, indices: torch.Tensor, embeddings: torch.Tensor) -> None:
        """v_i <- normalise(m v_i + (1 - m) v). Of a clip that occurs twice, the first embedding counts.

        Args:
            indices: (batch,), int64, of all processes.
            embeddings: (batch, embedding_dim), unit length.
        """
        # Ragged last batches are padded with clips that were in the batch already. Every copy of an index is given the
        # first one's row, so that the order in which a device writes them does not matter.
        ordered, order = indices.sort(stable=True)
        position = torch.arange(len(ordered), device=ordered.device)
        is_first = torch.ones_like(ordered, dtype=torch.bool)
        is_first[1:] = ordered[1:] != ordered[:-1]
        first = order[torch.where(is_first, position, 0).cummax(0).values]
        self._move(ordered - self.first, embeddings[first])

    def _move(self, rows: torch.Tensor, embeddings: torch.Tensor) -> None:
        moved = self.momentum * self.vectors[rows] + (1 - self.momentum) * embeddings.to(self.vectors.dtype)
        self.vectors.index_copy_(0, rows, F.normalize(moved, dim=-1))

    def set_temperature(self, temperature: float) -> None:
        """Says for which temperature Z is estimated from now on: one of another, or of an unknown one, starts anew."""
        if temperature != self.temperature:
            self.Z.zero_()
        self.temperature = temperature

    @torch.no_grad()
    def update_normaliser(self, mean_exp: torch.Tensor, momentum: float = 0.0) -> None:
        """Z <- momentum Z + (1 - momentum) mean(exp(similarity / temperature)) N; a first estimate counts whole.

        Args:
            mean_exp: Mean over a global batch, see `InstanceDiscrimination.mean_exp`; float64 scalar.
            momentum: Share of the old estimate that is kept.
        """
        estimate = mean_exp.to(self.Z) * len(self)
        self.Z.copy_(torch.where(self.Z == 0, estimate, momentum * self.Z + (1 - momentum) * estimate))

    def mean_similarity(self) -> torch.Tensor:
        """Mean cosine similarity between rows, a scalar: 1 where all rows are alike, near 0 where they are spread."""
        return (self._sum_of_rows() / len(self)).square().sum()

    def _sum_of_rows(self) -> torch.Tensor:
        return self.vectors.sum(dim=0, dtype=torch.float64)

    def take_over(self, path: str | Path) -> int:
        """Takes the rows of known clips, by their keys, from a saved bank.

        Its Z, too, which grows with the number of clips; unless it is of another temperature than this bank's.

        Args:
            path: What `save` wrote.

        Returns:
            Known clips.

        Raises:
            ValueError: naming the file, if it is not a memory bank, or one of another embedding_dim.
        """
        with opened(path) as file:
            vectors = file.get_slice("vectors")
            old_clips = vectors.get_shape()[0]
            place = find_keys(self.keys.cpu(), file.get_tensor("keys"))
            known = np.flatnonzero(place >= 0)
            known = known[np.argsort(place[known])]  # in the order of the file
            places = place[known]
            for start, stop in blocks(0, old_clips):
                inside = slice(*np.searchsorted(places, [start, stop]))
                if inside.start < inside.stop:
                    rows = vectors[start:stop][torch.from_numpy(places[inside] - start)]
                    self.vectors[torch.from_numpy(known[inside])] = rows.to(self.vectors)
            saved = saved_temperature(file)
            if self.temperature in (None, saved):
                self.temperature = saved
                self.Z.copy_(file.get_tensor("Z") * (len(self) / old_clips))
        return len(known)

    def save(self, path: str | Path | None) -> None:
        """Writes vectors, Z and keys as safetensors, a block at a time; Z's temperature is in the metadata.

        Args:
            path: None in every process but the main one, which hand over their share where they have one.
        """
        if path is None:
            return
        vectors, keys = ("F32", (len(self), self.vectors.shape[1])), ("U8", (len(self), KEY_BYTES))
        with Path(path).open("wb") as file:
            metadata = {TEMPERATURE: repr(self.temperature)} if self.temperature is not None else {}
            file.write(safetensors_header({"Z": ("F64", ()), "vectors": vectors, "keys": keys}, metadata))
            file.write(self.Z.cpu().numpy().tobytes())
            for name in ("vectors", "keys"):
                for block in self._blocks_of_all(name):
                    file.write(block.cpu().contiguous().numpy().data)

    def _blocks_of_all(self, name: str) -> Iterable[torch.Tensor]:
        return getattr(self, name).split(BLOCK)

    @staticmethod
    def saved_shape(path: str | Path) -> list[int]:
        """Rows and columns of a saved bank.

        Raises:
            ValueError: naming the file, if it is not a memory bank.
        """
        with opened(path) as file:
            return file.get_slice("vectors").get_shape()

    @classmethod
    def load(cls, path: str | Path, momentum: float = 0.5) -> "MemoryBank":
        """Reads what `save` wrote; of a bank that is spread over processes, this process's share.

        Raises:
            ValueError: naming the file, if it is not a memory bank.
        """
        with opened(path) as file:
            vectors, keys = file.get_slice("vectors"), file.get_slice("keys")
            bank = cls(*vectors.get_shape(), momentum=momentum, seed=None)
            own = slice(bank.first, bank.first + len(bank.vectors))
            bank.load_state_dict({"vectors": vectors[own], "keys": keys[own], "Z": file.get_tensor("Z")})
            bank.temperature = saved_temperature(file)
        return bank


@contextmanager
def opened(path: str | Path) -> Iterator:
    """A saved bank, opened with `safe_open`.

    Raises:
        ValueError: naming the file, for whatever is wrong with it.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            if set(file.keys()) != {"vectors", "Z", "keys"}:
                raise ValueError(f"it holds {', '.join(sorted(file.keys()))}")
            yield file
    except (TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} is not a memory bank (vectors, Z and keys as safetensors): {error}") from error


def saved_temperature(file) -> float | None:
    """For which temperature an opened bank's Z was estimated; None where the file does not say."""
    text = (file.metadata() or {}).get(TEMPERATURE)
    return None if text is None else float(text)


def safetensors_header(tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """The header of a safetensors file with this metadata, whose tensors follow in order: {name: (dtype, shape)}.

    The library writes a file from tensors that are whole in memory; a bank may be larger than that.
    """
    offset, entries = 0, {"__metadata__": metadata}
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text
