"""Who a clip is: its file's content and the stretch of it that is used; for some corpora also a published identity."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from hashlib import blake2b
from itertools import repeat, starmap
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
import xxhash

from .corpora import CORPORA
from .corpus import Corpus

if TYPE_CHECKING:  # of 45 MB, which those who embed and predict do without
    import datasets

DIGEST_BYTES = 16
WHOLE = (0.0, float("inf"))
# Columns of a clip's stretch, in s; a dataset without them has whole files. (UrbanSound8K's own `start` and `end` are
# places in recordings that it does not contain.)
STRETCH_COLUMNS = ("clip_start", "clip_end")


@dataclass(frozen=True, eq=False)
class ClipIdentities:
    """Identities of some clips, in order.

    Nothing in them depends on what a decoder makes of a file.

    Attributes:
        content: (clips, 16) uint8, digest of the file.
        stretch: (clips, 2) float64, start and end in s; (0, inf) is the whole file.
        published: (clips, 16) uint8, the same for every edition of a published clip, however it is encoded; zero where
            there is none.
    """

    content: np.ndarray
    stretch: np.ndarray
    published: np.ndarray

    def __post_init__(self):
        shapes = [(column.dtype, column.shape) for column in (self.content, self.stretch, self.published)]
        digests = (np.dtype(np.uint8), (len(self.content), DIGEST_BYTES))
        if shapes != [digests, (np.dtype(np.float64), (len(self.content), 2)), digests]:
            raise ValueError(f"these are no identities of clips: {shapes}")

    @classmethod
    def of(cls, dataset: "datasets.Dataset") -> "ClipIdentities":
        """Those of a dataset from `load_corpus` or `combine_corpora`, or selected from one."""
        plain, columns = dataset.with_format(None), set(dataset.column_names)
        content = np.frombuffer(bytes.fromhex("".join(plain["digest"][:])), np.uint8).reshape(-1, DIGEST_BYTES)
        return cls(content, stretches(dataset), _digests(_published(plain, columns)))

    def __len__(self) -> int:
        return len(self.content)

    def __getitem__(self, rows) -> "ClipIdentities":
        """Those of some rows: numbers, a mask or a slice."""
        return ClipIdentities(*(getattr(self, column.name)[rows] for column in fields(self)))

    @property
    def is_published(self) -> np.ndarray:
        """(clips,), bool."""
        return self.published.any(axis=1)

    @property
    def is_whole(self) -> np.ndarray:
        """(clips,), bool: whether the clip is all of its file."""
        return (self.stretch == WHOLE).all(axis=1)

    def names(self) -> list[tuple[bytes, ...]]:
        """For each clip the names that it goes by: clips with a name in common are one and the same."""
        stretch = np.ascontiguousarray(self.stretch).view(np.uint8)
        parts = map(bytes, np.concatenate([self.content, stretch], axis=1))
        own = zip(parts, map(bytes, self.published), self.is_published, strict=True)
        return [(part, published) if known else (part,) for part, published, known in own]

    def digests(self) -> np.ndarray:
        """One name for each clip, (clips, 16) uint8; editions of a published clip share it."""
        keys = np.where(self.is_published[:, None], self.published, self.content)
        for row in np.flatnonzero(~self.is_published & ~self.is_whole):
            name = self.content[row].tobytes() + self.stretch[row].tobytes()
            keys[row] = np.frombuffer(blake2b(name, digest_size=DIGEST_BYTES).digest(), np.uint8)
        return keys

    def shared_with(self, others: "ClipIdentities") -> np.ndarray:
        """Whether each clip's sound, or a part of it, is among `others`: (clips,), bool."""
        published = set(map(bytes, others.published[others.is_published]))
        whole = set(map(bytes, others.content[others.is_whole]))
        stretches = _united(others[~others.is_whole])

        def is_among(content: bytes, start: float, end: float) -> bool:
            if content in whole:
                return True
            starts, ends = stretches.get(content, ((), ()))
            place = bisect_right(ends, start)  # the first stretch that ends later
            return place < len(starts) and starts[place] < end

        by_name = [name in published for name in map(bytes, self.published)]
        by_content = starmap(is_among, zip(map(bytes, self.content), *self.stretch.T.tolist(), strict=True))
        return np.logical_or(by_name, list(by_content)).astype(bool)

    def digest_of_all(self) -> str:
        """Of all identities in their order, hexadecimal."""
        digest = xxhash.xxh3_128()
        for column in fields(self):
            digest.update(np.ascontiguousarray(getattr(self, column.name)).tobytes())
        return digest.hexdigest()


def stretches(dataset: "datasets.Dataset") -> np.ndarray:
    """(clips, 2) float64: start and end of each clip's stretch in s; (0, inf) is the whole file."""
    arrow = dataset.with_format("arrow")
    columns = [
        pc.fill_null(arrow[column][:], whole) if column in dataset.column_names else np.full(len(dataset), whole)
        for column, whole in zip(STRETCH_COLUMNS, WHOLE, strict=True)
    ]
    return np.stack(columns, axis=1)


def _united(clips: ClipIdentities) -> dict[bytes, tuple[list[float], list[float]]]:
    """Of each content the starts and ends of the stretches that the clips cover together, in order."""
    covered: dict[bytes, tuple[list[float], list[float]]] = {}
    for content, (start, end) in sorted(zip(map(bytes, clips.content), clips.stretch.tolist(), strict=True)):
        starts, ends = covered.setdefault(content, ([], []))
        if ends and start <= ends[-1]:
            ends[-1] = max(ends[-1], end)
        else:
            starts.append(start)
            ends.append(end)
    return covered


def _published(plain: "datasets.Dataset", columns: set[str]) -> Iterator[str | None]:
    """Each clip's published identity: as its corpus knows it, or as any does by its file, wherever that lies."""
    # Flattened, so that the bytes of embedded clips are not read.
    paths = plain.select_columns("audio").flatten().select_columns("audio.path")["audio.path"][:]
    own = next((name for name, corpus in CORPORA.items() if corpus.columns and columns >= corpus.columns.keys()), None)
    owners = plain["corpus"][:] if "corpus" in columns else repeat(own, len(paths))
    ways = {corpus.published_identity for corpus in CORPORA.values()} - {Corpus.published_identity}
    ids = plain["clip_id"][:] if "clip_id" in columns else repeat(None, len(paths))
    for owner, clip_id, path in zip(owners, ids, paths, strict=True):
        known = CORPORA[owner].published_identity(path or "", clip_id) if owner in CORPORA else None
        yield known or next(filter(None, (identity(path or "") for identity in ways)), None)


def _digests(names: Iterable[str | None]) -> np.ndarray:
    """(names, 16) uint8: of each name; zero for None."""
    nothing = bytes(DIGEST_BYTES)
    found = [xxhash.xxh3_128_digest(name.encode()) if name else nothing for name in names]
    return np.frombuffer(b"".join(found), np.uint8).reshape(-1, DIGEST_BYTES)
