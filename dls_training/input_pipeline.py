"""From rows of a corpus to batches of waveforms; then, on the device, to views and spectrograms.

file bytes -> decode, resample -> waveform augmentation, crop or pad -> power spectrogram -> (kept, where that is asked
for) -> spectrogram augmentation -> decibel, normalisation
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
import torchaudio
from accelerate import Accelerator
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Sampler

from datasets_scripts import AudioError, decode_audio, load_corpus
from modeling_dls.feature_extraction_esresnet import ESResNetFeatureExtractor, fit_length

from .arguments import UserError
from .augmentation import NUM_DRAWS, SpectrogramAugmentation, WaveformAugmentation
from .kept_spectrograms import KeptSpectrograms, keep_spectrograms

# A recording much longer than a view is cut to a random stretch of this many views before augmentation, so that an
# hour of audio is neither sent to the device nor padded to by its batch.
MAX_VIEWS_PER_CLIP = 4

# On a CPU, views are made of this many clips at a time: intermediate results then stay in its caches.
CPU_PART = 2

# A clip's last window is dropped where less than this share of it would be new (files a few samples over length).
MIN_NEW_SHARE = 0.1


@lru_cache(maxsize=16)
def _resampler(source_rate: int, target_rate: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(source_rate, target_rate)


def load_waveform(audio: dict, extractor: ESResNetFeatureExtractor) -> torch.Tensor:
    """Decodes one clip, resamples it and fits its channels.

    Args:
        audio: `{"bytes", "path"}`, a cell of a corpus's audio column.
        extractor: Gives the rate and the number of channels.

    Returns:
        (audio_channels, samples), float32.

    Raises:
        AudioError: naming the file, if it cannot be decoded, or has more channels than can be fitted.
    """
    samples, rate = decode_audio(audio)
    waveform = torch.from_numpy(samples)
    if rate != extractor.sampling_rate:
        waveform = _resampler(rate, extractor.sampling_rate)(waveform)
    try:
        return extractor.fit_channels(waveform)
    except ValueError as error:
        raise AudioError(f"{audio['path'] or 'embedded clip'}: {error}") from None


def draw_numbers(seed: int, epoch: int, index: int) -> np.ndarray:
    """A clip's random numbers in an epoch: the stretch of a long recording, then `NUM_DRAWS` for augmentation.

    Stateless: a resumed run, another batch size or another number of workers gives a clip the same view.
    """
    return np.random.default_rng([seed, epoch, index]).random(1 + NUM_DRAWS)


class TrainingClips(torch.utils.data.Dataset):
    """Whole clips with the random numbers of their view; addressed by (epoch, row)."""

    def __init__(self, rows: Dataset, extractor: ESResNetFeatureExtractor, seed: int):
        self.rows = rows
        self.extractor = extractor
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        row = self.rows[index]
        waveform = load_waveform(row["audio"], self.extractor)
        draws = draw_numbers(self.seed, epoch, index)
        longest = MAX_VIEWS_PER_CLIP * self.extractor.max_length
        start = int(draws[0] * (max(waveform.shape[1] - longest, 0) + 1))
        label = row.get("label")
        return {
            "index": index,
            "label": -1 if label is None else label,
            "waveform": waveform[:, start : start + longest],
            "draws": torch.from_numpy(draws[1:]),
        }


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
        self.labels = torch.tensor([-1 if label is None else label for label in rows["label"][:]])
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


def as_it_is(batch: dict) -> dict:
    """Collates what is a batch already."""
    return batch


def evaluation_windows(waveform: torch.Tensor, length: int) -> torch.Tensor:
    """Consecutive windows of a clip; a clip no longer than one is padded centrally: (windows, channels, length).

    The last window ends with the clip, unless it would bring next to nothing new.
    """
    samples = waveform.shape[1]
    if samples <= length * (1 + MIN_NEW_SHARE):
        return fit_length(waveform, length)[None]
    count = -int(-(samples - MIN_NEW_SHARE * length) // length)
    starts = [min(i * length, samples - length) for i in range(count)]
    return torch.stack([waveform[:, start : start + length] for start in starts])


class EvaluationClips(torch.utils.data.Dataset):
    """Clips cut into consecutive windows."""

    def __init__(self, rows: Dataset, extractor: ESResNetFeatureExtractor):
        self.rows = rows
        self.extractor = extractor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        label = row.get("label")
        windows = evaluation_windows(load_waveform(row["audio"], self.extractor), self.extractor.max_length)
        return {"index": index, "label": -1 if label is None else label, "windows": windows}


def collate_evaluation(items: list[dict]) -> dict[str, torch.Tensor]:
    """Windows of all clips in one tensor, with the number that each clip has."""
    return {
        "index": torch.tensor([item["index"] for item in items]),
        "labels": torch.tensor([item["label"] for item in items]),
        "windows": torch.cat([item["windows"] for item in items]),
        "counts": torch.tensor([len(item["windows"]) for item in items]),
    }


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
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_clips)
        return ((self.epoch, int(index)) for index in order[: self.used])


def load_corpora(args, accelerator: Accelerator) -> list[tuple[str, Dataset]]:
    """Each --corpus with its name; one process prepares them and the others read what it cached.

    Raises:
        CorpusError: whatever is wrong with a folder or a file in it.
    """
    options = {"allow_partial": args.allow_partial, "skip_unreadable": args.skip_unreadable}
    with accelerator.main_process_first():
        return [(name, load_corpus(name, source, **options)) for name, source in args.corpus]


def training_loader(rows: Dataset, extractor: ESResNetFeatureExtractor, args) -> DataLoader:
    """Shuffled batches for a `ViewMaker`.

    Raises:
        UserError: if there are fewer than two clips: batch norm cannot normalise a batch of one.
    """
    if len(rows) < 2:
        raise UserError(f"--corpus: {len(rows)} clip(s) to train on are too few, at least 2 are needed")
    batch_size = args.per_device_train_batch_size
    common = {
        "batch_size": batch_size,
        "sampler": ShuffledClips(len(rows), batch_size, args.seed),
        "pin_memory": torch.cuda.is_available(),
    }
    if args.keep_spectrograms:
        decoded = evaluation_loader(rows, extractor, args)
        kept = keep_spectrograms(rows, decoded, extractor, SpectrogramAugmentation.OVERSAMPLING, args.cache_gigabytes)
        # Reading a batch is one copy out of mapped memory: workers would only add another.
        return DataLoader(KeptClips(rows, kept, args.seed), collate_fn=as_it_is, **common)
    return DataLoader(
        TrainingClips(rows, extractor, args.seed),
        num_workers=args.dataloader_num_workers,
        collate_fn=collate_training,
        **common,
    )


def evaluation_loader(rows: Dataset, extractor: ESResNetFeatureExtractor, args) -> DataLoader:
    """Clips in order, each cut into windows."""
    return DataLoader(
        EvaluationClips(rows, extractor),
        batch_size=args.per_device_train_batch_size,
        num_workers=args.dataloader_num_workers,
        collate_fn=collate_evaluation,
        pin_memory=torch.cuda.is_available(),
    )


class ViewMaker:
    """A training batch, on its device -> augmented `input_values`.

    Attributes:
        extractor: Makes the spectrograms.
        waveform_augmentation: Crops and pads to one length; with `"spectrogram"` it does nothing else.
        spectrogram_augmentation: None with `"waveform"`.
    """

    def __init__(self, extractor: ESResNetFeatureExtractor, augmentation: str = "waveform"):
        """
        Args:
            extractor: With `max_length`.
            augmentation: `"waveform"`, `"spectrogram"` or `"both"`.
        """
        self.extractor = extractor
        only_crop = {"max_scale": 1.0, "p_inversion": 0.0} if augmentation == "spectrogram" else {}
        self.waveform_augmentation = WaveformAugmentation(extractor.max_length, **only_crop)
        self.spectrogram_augmentation = None if augmentation == "waveform" else SpectrogramAugmentation()

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """From `training_loader` -> (batch, audio_channels, 3, height, width)."""
        power = batch["power"].float() if "power" in batch else self.power(batch)
        augmentation, extractor = self.spectrogram_augmentation, self.extractor
        if augmentation is not None:
            size = (extractor.spec_height or power.shape[-2], extractor.spec_width or power.shape[-1])
            power = augmentation(power, batch["draws"][:, WaveformAugmentation.NUM_DRAWS :], size)
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
    scores = torch.cat([score(extractor.spectrogram(part)).float() for part in batch["windows"].split(batch_size)])
    counts = batch["counts"]
    clip = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=len(scores))
    return scores.new_zeros(len(counts), scores.shape[1]).index_add_(0, clip, scores) / counts[:, None]
