"""The synthetic corpus's clips, from `sounds`, into Arrow."""

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import datasets
import pyarrow as pa
import soundfile
import xxhash

from .builder import SCHEMA_VERSION, blank_report, common_features, describe_with_report
from .corpora.synthetic import Synthetic
from .errors import CorpusError
from .sounds import GENERATOR_VERSION, SOUNDS, make_clip

FOLDS = 5
# The options, and from where to where they go.
LIMITS = {
    "num_classes": (1, len(SOUNDS)),
    "clips_per_class": (1, 100_000),
    "clip_seconds": (0.05, 600),
    "sampling_rate": (4000, 192_000),
    "seed": (0, 2**63 - 1),
}
_BATCH = 16


@dataclass
class SyntheticConfig(datasets.BuilderConfig):
    """What to generate.

    Attributes:
        num_classes: how many of `SOUNDS`, in their order.
        clips_per_class: clips of each; take t is in fold t mod 5 + 1.
        clip_seconds: length of each clip in s.
        sampling_rate: in Hz.
        seed: another seed gives other clips.
    """

    num_classes: int = 10
    clips_per_class: int = 40
    clip_seconds: float = 5.0
    sampling_rate: int = 44100
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        for option, (low, high) in LIMITS.items():
            value = getattr(self, option)
            whole = isinstance(value, int)
            if not (whole or (option == "clip_seconds" and isinstance(value, float))) or not low <= value <= high:
                raise CorpusError(f"synthetic: {option} must be from {low} to {high}, not {value}")


class SyntheticBuilder(datasets.ArrowBasedBuilder):
    """Generates the corpus into Arrow, 16-bit WAV bytes embedded."""

    BUILDER_CONFIG_CLASS = SyntheticConfig
    VERSION = datasets.Version(SCHEMA_VERSION)

    def __init__(self, cache_dir: str | None = None, **options):
        super().__init__(
            cache_dir=cache_dir, dataset_name="dls_synthetic", hash=f"generator-{GENERATOR_VERSION}", **options
        )

    def _info(self) -> datasets.DatasetInfo:
        names = list(SOUNDS)[: self.config.num_classes]
        report = blank_report(Synthetic.name, len(names) * self.config.clips_per_class)
        return datasets.DatasetInfo(
            description=describe_with_report(Synthetic.title, report),
            license=Synthetic.licence,
            features=common_features(names, {}),
        )

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN, gen_kwargs={})]

    def _generate_tables(self) -> Iterator[tuple[int, pa.Table]]:
        names, takes = self.info.features["label"].names, self.config.clips_per_class
        clips = [(take, name) for take in range(takes) for name in names]
        # NumPy and libsndfile work outside Python's lock, and every clip has random numbers of its own.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(clips), _BATCH):
                rows = list(pool.map(self._row, clips[start : start + _BATCH]))
                yield start, pa.Table.from_pylist(rows, schema=self.info.features.arrow_schema)

    def _row(self, clip: tuple[int, str]) -> dict:
        take, name = clip
        config, clip_id = self.config, f"{name}-{take:04d}"
        samples = make_clip(name, take, config.seed, config.clip_seconds, config.sampling_rate)
        file = io.BytesIO()
        soundfile.write(file, samples, config.sampling_rate, format="WAV", subtype="PCM_16")
        return {
            "audio": {"bytes": file.getvalue(), "path": f"{clip_id}.wav"},
            "label": self.info.features["label"].str2int(name),
            "fold": take % FOLDS + 1,
            "clip_id": clip_id,
            "source_id": clip_id,
            "digest": xxhash.xxh3_128_hexdigest(file.getvalue()),
            "sampling_rate": config.sampling_rate,
            "num_channels": 1,
            "num_frames": len(samples),
        }
