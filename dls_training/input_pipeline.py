"""From rows of a corpus to batches of waveforms; then, on the device, to views and spectrograms.

file bytes -> decode, resample -> waveform augmentation, crop or pad -> power spectrogram -> (kept, where that is asked
for) -> spectrogram augmentation -> decibel, normalisation
"""

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Sampler

from datasets_scripts import load_corpus
from modeling_dls.feature_extraction_esresnet import CPU_PART, POWER_FLOOR, ESResNetFeatureExtractor

from .arguments import UserError
from .augmentation import NUM_DRAWS, SpectrogramAugmentation, WaveformAugmentation
from .kept import KeptSpectrograms, KeptWaveforms, keep_spectrograms, keep_waveforms
from .waveforms import DecodedWaveforms, evaluation_windows

# A recording much longer than a view is cut to a random stretch of this many views before augmentation, so that an
# hour of audio is neither sent to the device nor padded to by its batch.
MAX_VIEWS_PER_CLIP = 4


def draw_numbers(seed: int, epoch: int, index: int) -> np.ndarray:
    """A clip's random numbers in an epoch: the stretch of a long recording, then `NUM_DRAWS` for augmentation.

    Stateless: a resumed run, another batch size or another number of workers gives a clip the same view.
    """
    return np.random.default_rng([seed, epoch, index]).random(1 + NUM_DRAWS)


class TrainingClips(torch.utils.data.Dataset):
    """Whole clips with the random numbers of their view; addressed by (epoch, row)."""

    def __init__(
        self,
        rows: Dataset,
        extractor: ESResNetFeatureExtractor,
        seed: int,
        waveforms: DecodedWaveforms | KeptWaveforms | None = None,
    ):
        """
        Args:
            rows: The clips.
            extractor: With `max_length`.
            seed: Of the views.
            waveforms: Where they come from; None decodes the rows' files.
        """
        self.waveforms = waveforms or DecodedWaveforms(rows, extractor)
        self.labels = label_numbers(rows)
        self.longest = MAX_VIEWS_PER_CLIP * extractor.max_length
        self.seed = seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[dict]:
        items = []
        for (epoch, index), waveform in zip(keys, self.waveforms.read([index for _, index in keys]), strict=True):
            draws = draw_numbers(self.seed, epoch, index)
            start = int(draws[0] * (max(waveform.shape[1] - self.longest, 0) + 1))
            items.append(
                {
                    "index": index,
                    "label": self.labels[index],
                    "waveform": waveform[:, start : start + self.longest],
                    "draws": torch.from_numpy(draws[1:]),
                }
            )
        return items


def label_numbers(rows: Dataset) -> np.ndarray:
    """(clips,), -1 where a clip has no label."""
    labels = rows["label"][:] if "label" in rows.column_names else [None] * len(rows)
    return np.array([-1 if label is None else label for label in labels])


def collate_training(items: list[dict]) -> dict[str, torch.Tensor]:
    """Fills clips up to the longest: waveform (batch, channels, samples), lengths, draws, index, labels."""
    waveforms = [item["waveform"] for item in items]
    padded = pad_sequence([waveform.T for waveform in waveforms], batch_first=True).transpose(1, 2)
    return {
        "index": torch.tensor([item["index"] for item in items]),
        "labels": torch.tensor([item["label"] for item in items]),
        "waveform": padded.contiguous(),
        "lengths": torch.tensor([waveform.shape[1] for waveform in waveforms]),
        "draws": torch.stack([item["draws"] for item in items]),
    }


class KeptClips(torch.utils.data.Dataset):
    """Whole batches of kept spectrograms with the random numbers of their views; addressed by (epoch, row)."""

    def __init__(self, rows: Dataset, kept: KeptSpectrograms, seed: int):
        self.kept = kept
        self.labels = torch.from_numpy(label_numbers(rows))
        self.seed = seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        index = np.array([index for _, index in keys])
        draws = np.stack([draw_numbers(self.seed, epoch, index) for epoch, index in keys])
        return {
            "index": torch.from_numpy(index),
            "labels": self.labels[index],
            "power": self.kept.read(index, draws[:, 0]),
            "draws": torch.from_numpy(draws[:, 1:]),
        }


class ClipsToMix(torch.utils.data.Dataset):
    """Batches of clips with those that are mixed into them; addressed by (epoch, row).

    Each clip's partner is its predecessor in the epoch's order, and the first's the last, so that it depends on seed,
    epoch and clip alone; a batch, a stretch of that order, has all but one of them. What views are made from goes on
    behind the batch with those that it has not; `partner` (batch,) tells where each clip's is; `index` and `labels`
    are the batch's alone.
    """

    def __init__(self, clips: TrainingClips | KeptClips, collate: Callable[[list | dict], dict], seed: int):
        """
        Args:
            clips: With their views' random numbers.
            collate: What they give -> a batch.
            seed: Of the order, see `ShuffledClips`.
        """
        self.clips, self.collate, self.seed = clips, collate, seed

    def __len__(self) -> int:
        return len(self.clips)

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        partners = [(epoch, int(predecessors(len(self), self.seed, epoch)[index])) for epoch, index in keys]
        loaded = [*keys, *sorted(set(partners) - set(keys))]
        number = {key: i for i, key in enumerate(loaded)}
        batch = self.collate(self.clips.__getitems__(loaded))
        batch |= {name: batch[name][: len(keys)] for name in ("index", "labels")}
        return batch | {"partner": torch.tensor([number[key] for key in partners])}


def as_it_is(batch: dict) -> dict:
    """Collates what is a batch already."""
    return batch


class EvaluationClips(torch.utils.data.Dataset):
    """Clips cut into consecutive windows."""

    def __init__(
        self,
        rows: Dataset,
        extractor: ESResNetFeatureExtractor,
        waveforms: DecodedWaveforms | KeptWaveforms | None = None,
    ):
        """
        Args:
            rows: The clips.
            extractor: With `max_length`.
            waveforms: Where they come from; None decodes the rows' files.
        """
        self.waveforms = waveforms or DecodedWaveforms(rows, extractor)
        self.labels = label_numbers(rows)
        self.length = extractor.max_length

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        return [
            {"index": index, "label": self.labels[index], "windows": evaluation_windows(waveform, self.length)}
            for index, waveform in zip(indices, self.waveforms.read(indices), strict=True)
        ]


class KeptEvaluationClips(torch.utils.data.Dataset):
    """Whole batches of the kept spectrograms of every window."""

    def __init__(self, rows: Dataset, kept: KeptSpectrograms):
        self.kept = kept
        self.labels = torch.from_numpy(label_numbers(rows))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        index = np.array(indices)
        return {
            "index": torch.from_numpy(index),
            "labels": self.labels[index],
            "power": self.kept.read_all(index),
            "counts": torch.from_numpy(self.kept.windows[index]),
        }


def collate_evaluation(items: list[dict]) -> dict[str, torch.Tensor]:
    """Windows of all clips in one tensor, with the number that each clip has."""
    return {
        "index": torch.tensor([item["index"] for item in items]),
        "labels": torch.tensor([item["label"] for item in items]),
        "windows": torch.cat([item["windows"] for item in items]),
        "counts": torch.tensor([len(item["windows"]) for item in items]),
    }


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
    """A permutation of the clips that depends on the seed and the epoch alone; yields (epoch, row).

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

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = order_of_epoch(self.num_clips, self.seed, self.epoch)
        return ((self.epoch, int(index)) for index in order[: self.used])


def load_corpora(args) -> list[tuple[str, Dataset]]:
    """Each --corpus with its name.

    Every process calls this. Locks see to it that one of them downloads and prepares while the others wait for as long
    as that takes, and then read what it cached; a barrier would lose patience.

    Raises:
        CorpusError: whatever is wrong with a folder or a file in it.
    """
    options = {"allow_partial": args.allow_partial, "skip_unreadable": args.skip_unreadable}
    return [(name, load_corpus(name, source, **options)) for name, source in args.corpus]


def training_loader(rows: Dataset, extractor: ESResNetFeatureExtractor, args) -> DataLoader:
    """Shuffled batches for a `ViewMaker`.

    Raises:
        UserError: if there are fewer than two clips: batch norm cannot normalise a batch of one.
    """
    if len(rows) < 2:
        raise UserError(f"--corpus: {len(rows)} clip(s) to train on are too few, at least 2 are needed")
    if args.keep_spectrograms:
        kept = keep_spectrograms(rows, extractor, SpectrogramAugmentation.OVERSAMPLING, args.cache_gigabytes)
        clips, collate = KeptClips(rows, kept, args.seed), as_it_is
    else:
        clips = TrainingClips(rows, extractor, args.seed, waveforms_of(rows, extractor, args))
        collate = collate_training
    if args.augmentation != "waveform" and args.augmentation_strength > 0:
        clips, collate = ClipsToMix(clips, collate, args.seed), as_it_is
    return make_loader(clips, collate, args, ShuffledClips(len(rows), args.per_device_train_batch_size, args.seed))


def evaluation_loader(rows: Dataset, extractor: ESResNetFeatureExtractor, args) -> DataLoader:
    """Clips in order, each cut into windows."""
    if args.keep_spectrograms:
        # As exact as if they were computed anew.
        kept = keep_spectrograms(rows, extractor, 1, args.cache_gigabytes, torch.float32)
        return make_loader(KeptEvaluationClips(rows, kept), as_it_is, args)
    return make_loader(EvaluationClips(rows, extractor, waveforms_of(rows, extractor, args)), collate_evaluation, args)


def waveforms_of(rows: Dataset, extractor: ESResNetFeatureExtractor, args) -> DecodedWaveforms | KeptWaveforms:
    """Where the waveforms of these clips come from."""
    if args.keep_waveforms:
        return keep_waveforms(rows, extractor, args.cache_gigabytes)
    return DecodedWaveforms(rows, extractor)


def make_loader(clips, collate, args, sampler: Sampler | None = None) -> DataLoader:
    # What accelerate looks for to tell the clips of a ragged last batch from those that it is filled up with.
    clips.total_dataset_length = len(sampler or clips)
    return DataLoader(
        clips,
        args.per_device_train_batch_size,
        sampler=sampler,
        # Kept spectrograms are one copy out of mapped memory: decoding processes would only add another.
        num_workers=0 if args.keep_spectrograms else args.dataloader_num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
    )


class ViewMaker:
    """A training batch, on its device -> augmented `input_values`.

    Attributes:
        extractor: Makes the spectrograms.
        waveform_augmentation: Crops and pads to one length; with `"spectrogram"` it does nothing else.
        spectrogram_augmentation: None with `"waveform"`.
    """

    def __init__(self, extractor: ESResNetFeatureExtractor, augmentation: str = "waveform", strength: float = 1.0):
        """
        Args:
            extractor: With `max_length`.
            augmentation: `"waveform"`, `"spectrogram"` or `"both"`.
            strength: Of either: its ranges are multiplied by it, the exponent of time scaling included.
        """
        self.extractor = extractor
        scale = WaveformAugmentation.MAX_SCALE**strength
        settings = {"max_scale": 1.0, "p_inversion": 0.0} if augmentation == "spectrogram" else {"max_scale": scale}
        self.waveform_augmentation = WaveformAugmentation(extractor.max_length, **settings)
        floor = 10 ** (extractor.min_db / 10) if extractor.do_normalize else POWER_FLOOR
        self.spectrogram_augmentation = (
            None if augmentation == "waveform" else SpectrogramAugmentation.of_strength(strength, floor)
        )

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """From `training_loader` -> (batch, audio_channels, 3, height, width)."""
        power = batch["power"].float() if "power" in batch else self.power(batch)
        augmentation, extractor = self.spectrogram_augmentation, self.extractor
        if augmentation is not None:
            size = (extractor.spec_height or power.shape[-2], extractor.spec_width or power.shape[-1])
            partner = batch["partner"] if augmentation.max_mix > 0 else None
            power = augmentation(power, batch["draws"][:, WaveformAugmentation.NUM_DRAWS :], size, partner)
        return extractor.decibel(power)

    def power(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Power spectrograms of augmented waveforms, finer where they are augmented further."""
        part = CPU_PART if batch["waveform"].device.type == "cpu" else len(batch["waveform"])
        parts = zip(*(batch[name].split(part) for name in ("waveform", "lengths", "draws")), strict=True)
        oversampling = self.spectrogram_augmentation.OVERSAMPLING if self.spectrogram_augmentation else 1
        return torch.cat([self.extractor.power(self.waveform_augmentation(*clips), oversampling) for clips in parts])


@torch.no_grad()
def mean_over_windows(batch: dict, extractor: ESResNetFeatureExtractor, score, batch_size: int) -> torch.Tensor:
    """Runs `score` (input_values -> (windows, values)) on an evaluation batch and averages each clip's windows.

    Args:
        batch: From `evaluation_loader`, on its device.
        extractor: Makes the spectrograms.
        score: The network's answer to a batch of windows.
        batch_size: Windows at a time: a batch of long recordings has many.

    Returns:
        (batch, values), float32.
    """
    if "power" in batch:
        pictures = (extractor.decibel(part) for part in batch["power"].split(batch_size))
    else:
        pictures = (extractor.spectrogram(part) for part in batch["windows"].split(batch_size))
    scores = torch.cat([score(picture).float() for picture in pictures])
    counts = batch["counts"]
    clip = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=len(scores))
    return scores.new_zeros(len(counts), scores.shape[1]).index_add_(0, clip, scores) / counts[:, None]
