"""A trained network that is made ready for repeated inference: waveforms in, vectors or scores out."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from datasets_scripts.errors import UserError
from datasets_scripts.files import json_digest
from dls_training.networks import check_source, loading, set_length
from dls_training.runtime import choose_device_and_precision
from dls_training.settings import AS_LONG_AS_CLIPS
from modeling_dls import (
    ESResNetConfig,
    ESResNetFeatureExtractor,
    ESResNetForAudioClassification,
    ESResNetForInstanceDiscrimination,
    ESResNetModel,
)

CLIP_SECONDS = 5.0  # where neither the checkpoint nor the user says
NOT_IN_WEIGHTS = ("hidden_act", "pooler_act", "downsample_in_bottleneck")  # neither in their names nor in their sizes
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainedNetwork:
    """A checkpoint with its batch norm folded and its convolutions in the precision of their sums.

    Attributes:
        source: Folder (absolute) or Hub id.
        digest: Of weights and settings, hexadecimal; the length of windows and the precision are no part of it.
        config: Of the network.
        extractor: Its `max_length` is that of a window.
        device: Where it runs.
    """

    def __init__(
        self,
        source: str,
        model_class: Callable[[ESResNetConfig], type[PreTrainedModel]],
        windows: float | str | None,
        mixed_precision: str,
    ):
        """
        Args:
            source: Folder or Hub id.
            model_class: Of a checkpoint's configuration; a ValueError says why there is none.
            windows: Length of a window in s; None or `AS_LONG_AS_CLIPS` takes the checkpoint's.
            mixed_precision: See `choose_device_and_precision`.

        Raises:
            UserError: if there is no such checkpoint, it is none of ours, needs timm, or windows are too short for it.
        """
        check_source("--model", source)
        self.source = str(Path(source).resolve()) if Path(source).exists() else source
        with loading(f"--model {source}"):
            self.config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            if not isinstance(self.config, ESResNetConfig):
                raise ValueError(f"it is a {self.config.model_type}, not an ESResNet")
            self.extractor = ESResNetFeatureExtractor.from_pretrained(source)
            model = model_class(self.config).from_pretrained(source, use_safetensors=True).eval()
        self.digest = digest_of(model, self.extractor)
        if windows not in (None, AS_LONG_AS_CLIPS):
            set_length(self.extractor, windows, "--windows")
        elif self.extractor.max_length is None:
            set_length(self.extractor, CLIP_SECONDS)
        self.extractor.audio_channels = self.extractor.audio_channels or 1
        self.device, precision = choose_device_and_precision(mixed_precision)
        if self.device.type == "cuda":  # with its number: threads do not share which device is the current one
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        self.dtype = DTYPES[precision]
        self.model = model.fold_batch_norm().to(self.device, self.dtype, memory_format=torch.channels_last)
        self.keep_statistics_exact()

    def keep_statistics_exact(self) -> None:
        """Pooled statistics come in float32: what follows them costs nothing, and need not be rounded to bf16."""
        base = self.model.base_model
        if base.pooling is not None:
            heads = [] if base is self.model else [module for module in self.model.children() if module is not base]
            for module in (base.pooling, *heads):
                module.float()

    @property
    def length(self) -> int:
        """Of a window, in samples."""
        return self.extractor.max_length

    @property
    def seconds(self) -> float:
        """Of a window."""
        return self.length / self.extractor.sampling_rate

    def step(self, overlap: float) -> int:
        """From the beginning of a window to the next one's, in samples."""
        return max(1, round(self.length * (1 - overlap)))

    @torch.inference_mode()
    def outputs(self, waveforms: torch.Tensor):
        """The model's, of (windows, audio_channels, samples)."""
        return self.model(self.extractor.spectrogram(waveforms.to(self.device)).to(self.dtype))

    def __str__(self) -> str:
        precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        return f"windows of {self.seconds:g} s, on {self.device}, precision {precision}"


def digest_of(model: PreTrainedModel, extractor: ESResNetFeatureExtractor) -> str:
    """Of all that decides what a network answers."""
    weights = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    signal = {name: value for name, value in extractor.to_dict().items() if name != "max_length"}
    usual, own = ESResNetConfig(), model.config
    unusual = {name: getattr(own, name) for name in NOT_IN_WEIGHTS if getattr(own, name) != getattr(usual, name)}
    return json_digest([weights.hexdigest(), signal, *([unusual] if unusual else [])])


class Embedder(TrainedNetwork):
    """Waveforms -> vectors.

    Attributes:
        layer: "projection" or "pooled".
        dim: Length of a vector.
    """

    def __init__(self, source: str, layer: str | None, windows: float | str | None, mixed_precision: str):
        """
        Args:
            layer: "projection", "pooled", or None for whichever the checkpoint has.
            source, windows, mixed_precision: See `TrainedNetwork`.

        Raises:
            UserError: see `TrainedNetwork`; or it has no projection where one is asked for.
        """

        def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
            has_projection = ESResNetForInstanceDiscrimination.__name__ in (config.architectures or [])
            if layer == "projection" and not has_projection:
                raise ValueError("it was not saved by train_npid.py and has no projection: use --layer pooled")
            self.layer = layer or ("projection" if has_projection else "pooled")
            return ESResNetForInstanceDiscrimination if self.layer == "projection" else ESResNetModel

        super().__init__(source, model_class, windows, mixed_precision)
        self.dim = self.config.embedding_dim if self.layer == "projection" else self.config.hidden_size

    def __call__(self, waveforms: torch.Tensor) -> torch.Tensor:
        """(windows, audio_channels, samples) -> (windows, dim), float32, on the CPU."""
        outputs = self.outputs(waveforms)
        return (outputs.embeddings if self.layer == "projection" else outputs.pooler_output).float().cpu()

    def mean(self, vectors: torch.Tensor) -> torch.Tensor:
        """(windows, dim) -> (dim,): the vector of what the windows are parts of."""
        mean = vectors.mean(dim=0)
        return torch.nn.functional.normalize(mean, dim=0) if self.layer == "projection" else mean


class Classifier(TrainedNetwork):
    """Waveforms -> scores.

    Attributes:
        labels: Names, in the order of scores.
        multi_label: Whether a sound can have several labels, whose scores do not depend on one another.
        threshold: From which score on a label holds, where the checkpoint's configuration says, or {label: that}; else
            None.
    """

    def __init__(self, source: str, windows: float | str | None, mixed_precision: str):
        """
        Args:
            source, windows, mixed_precision: See `TrainedNetwork`.

        Raises:
            UserError: see `TrainedNetwork`; or it is no classifier, or its thresholds are not those of its labels.
        """

        def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
            if ESResNetForAudioClassification.__name__ not in (config.architectures or []):
                raise ValueError("it was not saved by train_classification.py and knows no labels: fine-tune it first")
            return ESResNetForAudioClassification

        super().__init__(source, model_class, windows, mixed_precision)
        self.labels = [self.config.id2label[number] for number in range(self.config.num_labels)]
        self.multi_label = self.config.problem_type == "multi_label_classification"
        self.threshold = self.threshold_of_the_checkpoint()

    def __call__(self, waveforms: torch.Tensor) -> torch.Tensor:
        """(windows, audio_channels, samples) -> (windows, labels), scores from 0 to 1, float32, on the CPU."""
        logits = self.outputs(waveforms).logits.float()
        return self.model.probabilities(logits).cpu()

    def threshold_of_the_checkpoint(self) -> float | dict[str, float] | None:
        """`threshold`, of all labels, or `thresholds`, {label: its own}, of the configuration.

        Raises:
            UserError: if labels lack, or what there is are no scores.
        """
        own = getattr(self.config, "thresholds", None)
        if own is None:
            return getattr(self.config, "threshold", None)
        numbers = isinstance(own, dict) and all(type(own.get(label)) in (int, float) for label in self.labels)
        if not numbers or len(own) != len(self.labels) or not all(0 <= score <= 1 for score in own.values()):
            raise UserError(
                f"--model {self.source}: thresholds in its config.json must be a score from 0 to 1 for each of its "
                f"{len(self.labels)} labels, such as {{{self.labels[0]!r}: 0.5, …}}; without them 0.5 is taken"
            )
        return {label: own[label] for label in self.labels}
