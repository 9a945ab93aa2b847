"""Batches of clips for training and evaluation; then, on the device, views and spectrograms.

clips -> waveform augmentation, crop or pad -> power spectrogram -> spectrogram augmentation -> decibel, normalisation
"""

import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler

from datasets_scripts import cut_into_windows, load_corpus, loading_options
from datasets_scripts.errors import UserError
from modeling_dls import ESResNetFeatureExtractor
from modeling_dls.spectrogram_esresnet import CPU_PART, POWER_FLOOR

from .augmentation import NUM_DRAWS, SpectrogramAugmentation, WaveformAugmentation
from .clips import ClipStore
from .settings import TrainingSettings

logger = logging.getLogger("dls")


def draw_numbers(seed: int, epoch: int, index: int) -> np.ndarray:
    """A clip's random numbers in an epoch: the stretch of a long recording, then `NUM_DRAWS` for augmentation.

    Stateless: a resumed run, another batch size or another number of workers gives a clip the same view.
    """
    return np.random.default_rng([seed, epoch, index]).random(1 + NUM_DRAWS)


ANSWERS = "answers"  # the column of `LabelledCorpus.clips` that says of each class whether a clip is of it


def label_numbers(rows: Dataset) -> np.ndarray:
    """(clips,), -1 where a clip has no label; with `ANSWERS` (clips, classes), -1 where an answer is not known."""
    if ANSWERS in rows.column_names:
        return np.array(rows[ANSWERS][:])
    labels = rows["label"][:] if "label" in rows.column_names else [None] * len(rows)
    return np.array([-1 if label is None else label for label in labels])


class Key(NamedTuple):
    """What a batch is asked for: a clip's view in an epoch, or, without one, a window as it is."""

    clip: int
    epoch: int | None = None
    window: int = 0


class ClipBatches(torch.utils.data.Dataset):
    """Whole batches of some of a store's clips, addressed by lists of `Key`.

    What is mixed into a clip is its predecessor in the epoch's order, and into the first the last, so that it depends
    on seed, epoch and clip alone; a batch, a stretch of that order, has all but one of them. `signal`, `lengths` and
    `draws` go on behind the batch with those that it has not; `partner` (batch,) tells where each clip's is.

    A batch holds `index` (batch,), rows of this dataset, `labels` (see `label_numbers`), `signal` and
    `lengths` (see `ClipStore`), and, for training, `draws` (…, NUM_DRAWS) and `partner`.

    Attributes:
        make_views: Keys -> `input_values`, which a batch for training then holds in place of signals; None where a
            `ViewMaker` makes them of the batch, on its device.
    """

    def __init__(self, store: ClipStore, clips: Dataset, seed: int = 0, mixes: bool = False):
        """
        Args:
            store: Holds the clips.
            clips: Which, and in which order.
            seed: Of the views.
            mixes: Whether views mix clips.
        """
        self.store, self.rows, self.seed, self.mixes = store, store.rows_of(clips), seed, mixes
        self.labels = torch.from_numpy(label_numbers(clips))
        self.make_views: Callable[[list[Key]], torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, keys: list[Key]) -> dict[str, torch.Tensor]:
        index = np.array([key.clip for key in keys])
        batch = {"index": torch.from_numpy(index), "labels": self.labels[index]}
        if keys[0].epoch is None:
            return batch | self.store.for_evaluation(self.rows[index], np.array([key.window for key in keys]))
        return batch | ({"input_values": self.make_views(keys)} if self.make_views else self.for_training(keys))

    def for_training(self, keys: list[Key]) -> dict[str, torch.Tensor]:
        """What a `ViewMaker` makes views of."""
        batch = {}
        if self.mixes:
            partners = [key._replace(clip=self.partner(key)) for key in keys]
            keys = [*keys, *sorted(set(partners) - set(keys))]
            place = {key: number for number, key in enumerate(keys)}
            batch["partner"] = torch.tensor([place[key] for key in partners])
        draws = np.stack([draw_numbers(self.seed, key.epoch, key.clip) for key in keys])
        batch |= self.store.for_training(self.rows[[key.clip for key in keys]], draws[:, 0])
        return batch | {"draws": torch.from_numpy(draws[:, 1:])}

    def partner(self, key: Key) -> int:
        return int(predecessors(len(self), self.seed, key.epoch)[key.clip])

    def windows(self) -> list[Key]:
        """Every window of every clip, in order."""
        return [Key(clip, None, w) for clip, row in enumerate(self.rows) for w in range(self.store.windows[row])]


def as_it_is(batch: dict) -> dict:
    """Collates what is a batch already."""
    return batch


def order_of_epoch(num_clips: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the clips."""
    return np.random.default_rng([seed, epoch]).permutation(num_clips)


@lru_cache(maxsize=1)
def predecessors(num_clips: int, seed: int, epoch: int) -> np.ndarray:
    """The clip before each in the epoch's order, the last before the first: (clips,)."""
    order = order_of_epoch(num_clips, seed, epoch)
    before = np.empty_like(order)
    before[order] = np.roll(order, 1)
    return before


class ShuffledClips(Sampler):
    """A permutation of the clips that depends on the seed and the epoch alone.

    Batch norm cannot normalise a batch of one: where the last batch would be that, a clip (another one each epoch)
    waits for the next epoch.
    """

    def __init__(self, num_clips: int, batch_size: int, seed: int):
        self.num_clips = num_clips
        self.used = num_clips - 1 if num_clips % batch_size == 1 else num_clips
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.used

    def __iter__(self) -> Iterator[Key]:
        order = order_of_epoch(self.num_clips, self.seed, self.epoch)
        return (Key(int(clip), self.epoch) for clip in order[: self.used])


def load_corpora(settings: TrainingSettings) -> list[tuple[str, Dataset]]:
    """Each --corpus with its name; with --windows, a row per window.

    Every process calls this. Locks see to it that one of them downloads and prepares while the others wait for as long
    as that takes, and then read what it cached; a barrier would lose patience.

    Raises:
        CorpusError: whatever is wrong with a folder or a file in it.
    """
    given = vars(settings)
    corpora = [(name, load_corpus(name, source, **loading_options(name, given))) for name, source in settings.corpus]
    return [(name, windows_of(name, clips, settings)) for name, clips in corpora] if settings.windows else corpora


def windows_of(name: str, clips: Dataset, settings: TrainingSettings) -> Dataset:
    """A corpus cut up as --windows, --overlap and --silence_db say."""
    windows, silent = cut_into_windows(clips, settings.windows, settings.overlap, settings.silence_db)
    left_out = f", {silent} below {settings.silence_db:g} dB left out" if settings.silence_db is not None else ""
    logger.info(f"{name}: {len(windows)} windows of {settings.windows:g} s, of {len(clips)} files{left_out}")
    return windows


def training_loader(store: ClipStore, clips: Dataset, settings: TrainingSettings) -> DataLoader:
    """Shuffled batches for a `ViewMaker`.

    Raises:
        UserError: if there are fewer than two clips: batch norm cannot normalise a batch of one.
    """
    if len(clips) < 2:
        raise UserError(f"--corpus: {len(clips)} clip(s) to train on are too few, at least 2 are needed")
    mixes = settings.augmentation != "waveform" and settings.augmentation_strength > 0
    batches = ClipBatches(store, clips, settings.seed, mixes)
    return make_loader(
        batches, ShuffledClips(len(clips), settings.per_device_train_batch_size, settings.seed), settings
    )


def evaluation_loader(store: ClipStore, clips: Dataset, settings: TrainingSettings) -> DataLoader:
    """Every window of every clip, in order, for `mean_over_windows`."""
    batches = ClipBatches(store, clips)
    return make_loader(batches, batches.windows(), settings)


def make_loader(batches: ClipBatches, sampler: Sampler | list[Key], settings: TrainingSettings) -> DataLoader:
    batches.total_dataset_length = len(
        sampler
    )  # accelerate's name for what it fills up ragged batches to, and cuts off
    # Reading cached spectrograms is one copy out of mapped memory: decoding processes would only add another.
    workers = 0 if batches.store.caches_spectrograms else settings.dataloader_num_workers
    return DataLoader(
        batches,
        settings.per_device_train_batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,  # what they are asked for is in the keys; starting them costs a second
        collate_fn=as_it_is,
        # Where both are wanted, torch 2.11 waits at its exit for one such process after the other, five seconds each.
        pin_memory=torch.cuda.is_available() and not workers,
    )


class ViewMaker:
    """A batch, on its device -> `input_values`, augmented for training.

    Attributes:
        extractor: Makes the spectrograms.
        waveform_augmentation: Crops and pads to one length; with `"spectrogram"` it does nothing else.
        spectrogram_augmentation: None with `"waveform"`.
    """

    def __init__(
        self,
        extractor: ESResNetFeatureExtractor,
        augmentation: str = "waveform",
        strength: float = 1.0,
        from_spectrograms: bool = False,
    ):
        """
        Args:
            extractor: With `max_length`.
            augmentation: `"waveform"`, `"spectrogram"` or `"both"`.
            strength: Of either: its ranges are multiplied by it, the exponent of time scaling included.
            from_spectrograms: Whether batches hold power spectrograms, see `ClipStore.caches_spectrograms`.
        """
        self.extractor, self.from_spectrograms = extractor, from_spectrograms
        scale = WaveformAugmentation.MAX_SCALE**strength
        ranges = {"max_scale": 1.0, "p_inversion": 0.0} if augmentation == "spectrogram" else {"max_scale": scale}
        self.waveform_augmentation = WaveformAugmentation(extractor.max_length, **ranges)
        floor = 10 ** (extractor.min_db / 10) if extractor.do_normalize else POWER_FLOOR
        self.spectrogram_augmentation = (
            None if augmentation == "waveform" else SpectrogramAugmentation.of_strength(strength, floor)
        )

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """From `training_loader` -> (batch, audio_channels, 3, height, width)."""
        if "input_values" in batch:
            return batch["input_values"]
        power = batch["signal"] if self.from_spectrograms else self.power(batch)
        augmentation, extractor = self.spectrogram_augmentation, self.extractor
        if augmentation is not None:
            size = (extractor.spec_height or power.shape[-2], extractor.spec_width or power.shape[-1])
            partner = batch["partner"] if augmentation.max_mix > 0 else None
            power = augmentation(power, batch["draws"][:, WaveformAugmentation.NUM_DRAWS :], size, partner)
        return extractor.decibel(power)

    def unchanged(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """From `evaluation_loader` -> (batch, audio_channels, 3, height, width)."""
        return (self.extractor.decibel if self.from_spectrograms else self.extractor.spectrogram)(batch["signal"])

    def power(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Power spectrograms of augmented waveforms, finer where they are augmented further."""
        part = CPU_PART if batch["signal"].device.type == "cpu" else len(batch["signal"])
        parts = zip(*(batch[name].split(part) for name in ("signal", "lengths", "draws")), strict=True)
        oversampling = self.spectrogram_augmentation.OVERSAMPLING if self.spectrogram_augmentation else 1
        return torch.cat([self.extractor.power(self.waveform_augmentation(*clips), oversampling) for clips in parts])


@torch.no_grad()
def mean_over_windows(accelerator: Accelerator, loader: DataLoader, score: Callable) -> torch.Tensor:
    """Scores every window, in all processes together, and averages each clip's.

    Args:
        accelerator: Which prepared the loader.
        loader: From `evaluation_loader`.
        score: A batch -> (batch, values).

    Returns:
        (clips, values), in the order of the clips, float32, on the CPU.
    """
    clips = len(loader.dataset)
    total, count = None, torch.zeros(clips)
    for batch in loader:
        index, scores = accelerator.gather_for_metrics((batch["index"], score(batch).float()))
        index, scores = index.cpu(), scores.cpu()
        total = torch.zeros(clips, scores.shape[1]) if total is None else total
        total.index_add_(0, index, scores)
        count.index_add_(0, index, torch.ones(len(index)))
    return total / count[:, None]
