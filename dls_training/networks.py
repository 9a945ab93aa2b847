"""The network and the feature extractor that a train script's options ask for."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import set_seed
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from torch import nn
from transformers import CONFIG_NAME, PreTrainedModel
from transformers.utils import logging as transformers_logging

from datasets_scripts.errors import UserError
from datasets_scripts.hub import is_lost_connection, reason
from modeling_dls import ESResNetConfig, ESResNetFeatureExtractor

from .settings import AS_LONG_AS_CLIPS, TrainingSettings

logger = logging.getLogger("dls")

USUAL = {"clip_seconds": 5.0, "audio_channels": 1}
FFT_MULTIPLE = 64
HUB_SECONDS = 10  # for an answer whether there is such a model
STRUCTURE = (
    "embedding_size", "hidden_sizes", "depths", "layer_type", "attention", "pooling", "growth_rate",
    "downsample_in_bottleneck",
)  # fmt: skip


def structure(config: ESResNetConfig) -> dict:
    """What makes two networks' weights interchangeable."""
    return {name: getattr(config, name) for name in STRUCTURE}


def given(settings: TrainingSettings, *names: str) -> dict:
    """Those of the options that were given."""
    return {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}


def check_agreement(settings: TrainingSettings, options: dict, found) -> None:
    """Options that change a preset may be said of a checkpoint, too, but change nothing there.

    Raises:
        UserError: naming one that the checkpoint does not agree with.
    """
    for name, value in options.items():
        if getattr(found, name) != value:
            raise UserError(
                f"--{name} {value}: --model_name_or_path {settings.model_name_or_path} has {getattr(found, name)}, "
                "which it was trained with; leave the option out"
            )


def check_source(option: str, source: str) -> None:
    """Says of a folder that is not there what `from_pretrained` would take for a Hub id, and ask for again and again.

    Raises:
        UserError: naming the option.
    """
    path = Path(source)
    if path.exists():
        return
    if path.is_absolute() or len(path.parts) > 2:
        raise UserError(f"{option} {path}: there is no such folder, and a Hub id has one slash at most")
    try:
        validate_repo_id(source)
        get_hf_file_metadata(hf_hub_url(source, CONFIG_NAME), timeout=HUB_SECONDS)
    except (HTTPError, OSError, ValueError) as error:
        # Without a connection, what was downloaded before serves.
        if is_lost_connection(error) and isinstance(try_to_load_from_cache(source, CONFIG_NAME), str):
            return
        raise UserError(f"{option} {source}: there is no such folder, nor such a model: {reason(error)}") from error


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Around what reads a checkpoint, which may be anybody's, and damaged in any way.

    Args:
        what: Is loaded, for messages.

    Raises:
        UserError: in one line, for whatever goes wrong.
    """
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())
        if not isinstance(error, (ImportError, OSError, ValueError, RuntimeError, SafetensorError)):
            said = f"one of its files is damaged ({type(error).__name__}: {said})"
        raise UserError(f"{what}: {said}") from error


def make_extractor(settings: TrainingSettings) -> ESResNetFeatureExtractor:
    """The checkpoint's extractor, or the preset's, set to the length and channels of this run.

    Where --clip_seconds, --audio_channels or the length of --windows is not given, it is filled in with what holds.

    Raises:
        UserError: if the checkpoint has none, or others than options say, the settings do not go together, or a view
            is shorter than one analysis window.
    """
    changes = given(settings, "sampling_rate", "frequency_scale", "spec_height", "spec_width")
    if settings.model_name_or_path:
        check_source("--model_name_or_path", settings.model_name_or_path)
        with loading(f"--model_name_or_path {settings.model_name_or_path}"):
            extractor = ESResNetFeatureExtractor.from_pretrained(settings.model_name_or_path)
        check_agreement(settings, changes, extractor)
    else:
        try:
            transform = transform_at(settings.preset, settings.sampling_rate) if settings.sampling_rate else {}
            extractor = ESResNetFeatureExtractor.from_preset(settings.preset, **transform, **changes)
        except ValueError as error:
            raise UserError(f"--preset {settings.preset} with {', '.join(changes)} changed: {error}") from error
    own = {"clip_seconds": extractor.max_length and extractor.max_length / extractor.sampling_rate}
    own |= {"audio_channels": extractor.audio_channels}
    for name, usual in USUAL.items():
        if getattr(settings, name) is None:
            setattr(settings, name, own[name] or usual)
        elif own[name] not in (None, getattr(settings, name)):
            logger.warning(
                f"--{name} {getattr(settings, name)}: {settings.model_name_or_path} was trained with {own[name]:g}, "
                "and may do worse with another"
            )
    extractor.audio_channels = settings.audio_channels
    set_length(extractor, settings.clip_seconds)
    if settings.windows == AS_LONG_AS_CLIPS:
        settings.windows = settings.clip_seconds
    return extractor


def transform_at(preset: str, sampling_rate: int) -> dict[str, int]:
    """The STFT's settings of a preset at another rate: as long in seconds, n_fft a length that FFTs are fast at."""
    usual = ESResNetFeatureExtractor.from_preset(preset)
    share = sampling_rate / usual.sampling_rate
    win_length, hop_length = (max(1, round(share * size)) for size in (usual.win_length, usual.hop_length))
    n_fft = FFT_MULTIPLE * max(round(share * usual.n_fft / FFT_MULTIPLE), -(-win_length // FFT_MULTIPLE))
    return {"n_fft": n_fft, "win_length": win_length, "hop_length": hop_length}


def set_length(extractor: ESResNetFeatureExtractor, clip_seconds: float, option: str = "--clip_seconds") -> None:
    """Sets the length of a view.

    Raises:
        UserError: naming the option, if it is shorter than one analysis window.
    """
    extractor.max_length = round(clip_seconds * extractor.sampling_rate)
    if extractor.max_length <= extractor.n_fft // 2:
        shortest = (extractor.n_fft // 2 + 1) / extractor.sampling_rate
        raise UserError(f"{option} {clip_seconds} is below one analysis window ({shortest:.3f} s)")


def make_config(settings: TrainingSettings, **overrides) -> ESResNetConfig:
    """The checkpoint's configuration, or the preset's, with `overrides`.

    Raises:
        UserError: if there is no such checkpoint, or it was made from another preset than --preset, or changed.
    """
    changes, source = given(settings, "pooling", "embedding_size", "hidden_sizes"), settings.model_name_or_path
    overrides |= given(settings, "pooler_act")  # has no weights
    if not source:
        try:
            return ESResNetConfig.from_preset(settings.preset, **changes, **overrides)
        except ValueError as error:
            raise UserError(f"--preset {settings.preset} with {', '.join(changes)} changed: {error}") from error
    with loading(f"--model_name_or_path {source}"):
        config = ESResNetConfig.from_pretrained(source, **overrides)
    if config.model_type != "esresnet":
        raise UserError(f"--model_name_or_path {source} is a {config.model_type}, not an ESResNet")
    check_agreement(settings, changes, config)
    if settings.preset:
        preset, own = structure(ESResNetConfig.from_preset(settings.preset, **changes)), structure(config)
        differing = [name for name in STRUCTURE if preset[name] != own[name]]
        if differing:
            raise UserError(
                f"--model_name_or_path {source} is from another preset than --preset {settings.preset} "
                f"({', '.join(differing)} differ): leave --preset out"
            )
    return config


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its warnings: a new head is nothing to be warned of in red."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def report_loading(source: str | Path, found: dict) -> None:
    """Says in a line which parts of a network are not the checkpoint's.

    Args:
        source: The checkpoint.
        found: As `from_pretrained` gives it: names of weights, those of another size with both sizes.
    """
    mismatched = [name for name, *_ in found["mismatched_keys"]]
    new, unused = (
        ", ".join(sorted({name.partition(".")[0] for name in names}))
        for names in ([*found["missing_keys"], *mismatched], found["unexpected_keys"])
    )
    words = [f"{new} starts anew"] * bool(new) + [f"its {unused} is not used"] * bool(unused)
    if words:
        logger.info(f"{source}: {'; '.join(words)}")


def make_model(
    model_class: type[PreTrainedModel], source: str | Path | None, config: ESResNetConfig, seed: int,
    reinit_stages: int = 0,
) -> PreTrainedModel:  # fmt: skip
    """A network in training mode, with the weights of `source`, or random ones; a head of another size starts anew.

    Random weights depend on the seed alone, whatever ran before in this process.

    Args:
        model_class: One of ESResNet's with a head.
        source: A checkpoint; None for random weights.
        config: The network's.
        seed: Of random weights.
        reinit_stages: How many of the last stages, and what comes after them, start randomly all the same.

    Raises:
        UserError: naming the source, if there are no such weights; or timm, if the network needs it.
    """
    set_seed(seed)
    if source is None:
        try:
            return model_class(config).train()
        except ImportError as error:
            raise UserError(str(error)) from error
    with loading(f"no weights can be loaded from {source}"), quiet_transformers():
        model, found = model_class.from_pretrained(
            source, config=config, ignore_mismatched_sizes=True, use_safetensors=True, output_loading_info=True
        )
    report_loading(source, found)
    if reinit_stages:
        random = model_class(config).esresnet
        trained = list(model.esresnet.stages)[:-reinit_stages]
        model.esresnet.stages = nn.ModuleList([*trained, *random.stages[len(trained) :]])
        if random.attention is not None:
            model.esresnet.attention = random.attention
    return model.train()
