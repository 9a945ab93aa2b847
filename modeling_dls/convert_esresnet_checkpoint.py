"""Converts others' weights to this format: the original ESResNet's, or a ResNet's or DenseNet's from ImageNet.

    python -m modeling_dls.convert_esresnet_checkpoint SOURCE OUTPUT_DIR [--labels FILE] [--n_fft ...]
    python -m modeling_dls.convert_esresnet_checkpoint SOURCE OUTPUT_DIR [--preset NAME] [--no_attention] [--seed N]
        [--allow_partial] [--downsample_in_bottleneck]

SOURCE is a .pt, .pth, .bin or .safetensors file, or a folder with a model.safetensors. Which network it holds, how
deep and wide, and the original's attention and number of classes are read from names and shapes; the signal settings
are not in it and default to the original's.

From ImageNet weights, the classifier is dropped: what is left is a start for `--model_name_or_path` of either train
script, which adds its own head. The attention starts randomly, as ESResNet's does on ImageNet weights: gates around a
half (standard deviation 0.2 in training) dampen the features that they were trained for and roughen them. Where these
are to stay as they are, as for `--freeze_backbone`, there is `--no_attention`.
Of a ResNet whose last stages are missing, `--allow_partial` takes the others; the rest starts randomly and is named.
He et al.'s first ResNets (v1) have a stage's stride in its first 1x1 convolution, which a file in torchvision's names
does not tell: `--downsample_in_bottleneck`.
ImageNet's networks have learned from pictures with a mean of about 0 and a standard deviation of about 1, and their
first batch norm expects them: their spectrograms are standardised, while the original ESResNet takes plain decibels.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

import modeling_dls  # which imports the models late
from modeling_dls import ESResNetConfig, ESResNetFeatureExtractor

# Our parameter names -> the original's, applied in order. Beside the attention, these are torchvision's and timm's.
ORIGINAL_NAMES = (
    (r"^esresnet\.", ""),
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^attention\.", "att5."),
    (r"^stages\.(\d)\.attention\.", lambda m: f"att{int(m[1]) + 1}."),
    (r"^stages\.(\d)\.residual\.layers\.", lambda m: f"layer{int(m[1]) + 1}."),
    (r"\.layer\.(\d)\.convolution\.", lambda m: f".conv{int(m[1]) + 1}."),
    (r"\.layer\.(\d)\.normalization\.", lambda m: f".bn{int(m[1]) + 1}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
)
DENSENET_NAMES = (
    (r"^embedder\.embedder\.convolution\.", "features.conv0."),
    (r"^embedder\.embedder\.normalization\.", "features.norm0."),
    (r"^stages\.\d\.dense\.transition\.normalization\.", "features.norm5."),
    (r"^stages\.(\d)\.dense\.transition\.", lambda m: f"features.transition{int(m[1]) + 1}."),
    (r"^stages\.(\d)\.dense\.block\.", lambda m: f"features.denseblock{int(m[1]) + 1}."),
    (r"\.normalization\.", "."),
)
# Layers in each stage of the ResNets that there are weights for: what the first stages are followed by.
RESNET_DEPTHS = [2, 2, 2, 2], [3, 4, 6, 3], [3, 4, 23, 3], [3, 8, 36, 3]
# What the original alone has.
ORIGINAL_MARK = r"att\d\.|classifier\.|window$"


class ConversionError(ValueError):
    """The file is not a complete checkpoint of a network that can be converted."""


@dataclass(frozen=True)
class ImageNetLayout:
    """How a library names the weights of its ImageNet networks. Patterns match from the beginning of a name.

    Attributes:
        network: What messages call it.
        mark: Pattern of names that no other layout has.
        classifier: Pattern of names that are dropped.
        stem: The first convolution's weight.
        layer: Pattern of the weights that give away the structure: of a residual layer's convolutions, or of the one
            that makes a dense layer's new channels. Its groups are the numbers of stage and layer.
        names: Our parameter names -> this layout's, applied in order.
    """

    network: str
    mark: str
    classifier: str
    stem: str
    layer: str
    names: tuple


TORCHVISION_RESNET = ImageNetLayout(
    network="a ResNet in torchvision's and timm's names",
    mark=r"(conv1|bn1|layer\d+|fc)\.",
    classifier=r"fc\.",
    stem="conv1.weight",
    layer=r"layer(\d+)\.(\d+)\.conv\d\.weight$",
    names=ORIGINAL_NAMES,
)
TRANSFORMERS_RESNET = ImageNetLayout(
    network="a ResNet in transformers' names",
    mark=r"(embedder|encoder)\.",
    classifier=r"classifier\.",
    stem="embedder.embedder.convolution.weight",
    layer=r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.\d\.convolution\.weight$",
    names=((r"^stages\.(\d)\.residual\.", r"encoder.stages.\1."),),
)
DENSENET = ImageNetLayout(
    network="a DenseNet in torchvision's and timm's names",
    mark=r"features\.",
    classifier=r"classifier\.",
    stem="features.conv0.weight",
    layer=r"features\.denseblock(\d+)\.denselayer(\d+)\.conv2\.weight$",
    names=DENSENET_NAMES,
)
LAYOUTS = (TORCHVISION_RESNET, TRANSFORMERS_RESNET, DENSENET)


def renamed(name: str, names: tuple) -> str:
    """What another library calls one of our parameters."""
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


def convert_state_dict(
    state: dict,
    model,
    names: tuple = ORIGINAL_NAMES,
    optional: str = r"window$",
    network: str = "the original ESResNet-50",
    new: str = r"$^",
) -> dict:
    """Renames a file's parameters and checks that they are exactly what `model` needs.

    Args:
        state: Parameter name -> tensor, as the file has them.
        model: Of the same size.
        names: Our parameter names -> the file's, applied in order.
        optional: Pattern of the file's names that may be missing, or are left out.
        network: What the file should be, for the message.
        new: Pattern of our names that the file does not have.

    Returns:
        A state dict for `model`.

    Raises:
        ConversionError: naming missing and unexpected keys, or tensors of another shape, under the file's names.
    """
    own = {name: tensor.shape for name, tensor in model.state_dict().items() if not re.search(new, name)}
    theirs = {name: renamed(name, names) for name in own}
    expected = {theirs[name]: shape for name, shape in own.items()}
    differing = {"missing": expected.keys() - state.keys(), "unexpected": state.keys() - expected.keys()}
    problems = {kind: sorted(n for n in found if not re.match(optional, n)) for kind, found in differing.items()}
    problems["of another shape"] = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    if any(problems.values()):
        lines = [f"  {len(found)} {kind}: {', '.join(found)}" for kind, found in problems.items() if found]
        raise ConversionError(f"not a complete checkpoint of {network}\n" + "\n".join(lines))
    return {name: state[their] for name, their in theirs.items() if their in state}


def find_layout(state: dict, allow_partial: bool = False) -> ImageNetLayout | None:
    """In whose names an ImageNet network is; None if it is none, but, as far as names tell, the original ESResNet.

    Args:
        state: Parameter name -> tensor.
        allow_partial: Whether the classifier, too, may be missing, by which a ResNet is told from the original.

    Raises:
        ConversionError: if the names are of several kinds.
    """
    found = {layout: name for layout in LAYOUTS for name in state if re.match(layout.mark, name)}
    if len(found) > 1:
        kinds = "; ".join(f"{layout.network}: {name}" for layout, name in found.items())
        raise ConversionError(f"mixes the names of several networks ({kinds})")
    layout = next(iter(found), None)
    is_imagenets = (allow_partial or "fc.weight" in state) and not any(re.match(ORIGINAL_MARK, name) for name in state)
    return None if layout is TORCHVISION_RESNET and not is_imagenets else layout


def network_settings(layout: ImageNetLayout, state: dict) -> dict:
    """Arguments of [`ESResNetConfig`] that make the network of an ImageNet checkpoint.

    Raises:
        ConversionError: if the stem or every layer is missing.
    """
    numbered: dict[int, dict[int, list[int]]] = {}  # stage -> {layer: its convolutions' widths}
    for name, tensor in state.items():
        match = re.match(layout.layer, name)
        if match and tensor.ndim == 4:
            stage, layer = map(int, match.groups())
            numbered.setdefault(stage, {}).setdefault(layer, []).append(len(tensor))
    if layout.stem not in state or state[layout.stem].ndim != 4 or not numbered:
        raise ConversionError(
            f"not a complete checkpoint of {layout.network}: {layout.stem} or all layers are missing"
        )
    stages = [list(layers.values()) for _, layers in sorted(numbered.items())]
    settings = {"embedding_size": len(state[layout.stem]), "depths": [len(layers) for layers in stages]}
    # A bottleneck's last convolution is its widest.
    widths = [max(max(layer) for layer in layers) for layers in stages]
    if layout is DENSENET:
        return settings | {"growth_rate": widths[0]}
    layer_type = "bottleneck" if any(len(layer) == 3 for layers in stages for layer in layers) else "basic"
    return settings | {"hidden_sizes": widths, "layer_type": layer_type}


def with_missing_stages(settings: dict) -> dict:
    """A ResNet's settings, completed by those of the network whose first stages these are.

    Raises:
        ConversionError: if there is no such network, or more than one.
    """
    depths, widths = settings["depths"], settings["hidden_sizes"]
    found = [whole for whole in RESNET_DEPTHS if whole[: len(depths)] == depths]
    if len(found) != 1:
        raise ConversionError(
            f"stages of {depths} layers are the beginning of {len(found)} known ResNets: --allow_partial cannot tell "
            "what follows"
        )
    missing = len(found[0]) - len(depths)
    widths = [*widths, *(widths[-1] * 2 ** (stage + 1) for stage in range(missing))]
    return settings | {"depths": found[0], "hidden_sizes": widths}


def check_transformers_config(path: Path) -> bool:
    """What shapes do not tell: whether a ResNet has its first stride and its activation where an ESResNet has them.

    Returns:
        Whether later strides are in the 1x1 convolution.

    Raises:
        ConversionError: naming the settings, if it has not; or if this is no configuration.
    """
    wanted = {"downsample_in_first_stage": False, "hidden_act": "relu"}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        differing = [f"{name} is {config[name]}" for name in wanted if config.get(name, wanted[name]) != wanted[name]]
    except (AttributeError, ValueError) as error:
        raise ConversionError(f"{path.name} is no configuration: {error}") from error
    if differing:
        raise ConversionError(f"{path.name} describes another network than an ESResNet: {', '.join(differing)}")
    return bool(config.get("downsample_in_bottleneck", False))


def read_state_dict(source: Path) -> dict:
    """Parameter name -> tensor from a file of torch's or safetensors', or from the usual wrappers around one.

    Prefixes that wrappers add are taken off, and torchvision's old `norm.1` is called `norm1`, as it is today.

    Raises:
        ConversionError: if the file cannot be read, or holds something else.
    """
    try:
        # Checkpoints come from strangers: nothing but tensors and plain containers is unpickled.
        if source.suffix == ".safetensors":
            state: dict = load_file(source)
        else:
            state = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConversionError(f"cannot read {source}: {error}") from error
    except Exception as error:  # torch.load raises many kinds, and its texts advise to load unsafely
        raise ConversionError(
            f"{source} is damaged, was not written by torch.save (or, as .safetensors, by safetensors), or holds more "
            "than tensors and plain containers, which is not loaded because it could run code"
        ) from error
    if isinstance(state, dict):
        for wrapper in ("state_dict", "model"):
            state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ConversionError(f"{source} holds no state dict: expected parameter names and tensors")
    names = {name: name.removeprefix("module.").removeprefix("resnet.") for name in state}
    names = {name: re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", new) for name, new in names.items()}
    if twice := [name for name, new in names.items() if name != new and new in state]:
        raise ConversionError(f"{source} has weights twice, under two kinds of names: {', '.join(twice)}")
    return {names[name]: tensor for name, tensor in state.items()}


def read_labels(path: Path, num_labels: int) -> list[str]:
    """Class names in order: a JSON list, or one name per line.

    Raises:
        ConversionError: if the file cannot be read, or the count is not `num_labels`.
    """
    try:
        text = path.read_text(encoding="utf-8")
        labels = json.loads(text) if path.suffix == ".json" else [line for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConversionError(f"--labels {path}: {error}") from error
    if not isinstance(labels, list) or len(labels) != num_labels or len(set(map(str, labels))) != num_labels:
        raise ConversionError(
            f"--labels {path}: expected a list of {num_labels} different names, as the checkpoint has"
        )
    return [str(label) for label in labels]


def from_original(state: dict, labels: Path | None, signal_settings: dict) -> tuple:
    """The original ESResNet's classifier and its feature extractor. See `convert`."""
    extractor = ESResNetFeatureExtractor(**signal_settings)
    if "window" in state and state["window"].numel() != extractor.win_length:
        raise ConversionError(
            f"trained with a window of {state['window'].numel()} samples: set --win_length to it, and --n_fft and "
            "--hop_length to what it was trained with"
        )
    classifier = state.get("classifier.weight")
    num_labels = classifier.shape[0] if classifier is not None and classifier.ndim else 0
    config = ESResNetConfig(attention=any(name.startswith("att") for name in state), num_labels=max(num_labels, 1))
    model = modeling_dls.ESResNetForAudioClassification(config)
    model.load_state_dict(convert_state_dict(state, model))
    if labels is not None:
        config.id2label = dict(enumerate(read_labels(labels, num_labels)))
        config.label2id = {name: index for index, name in config.id2label.items()}
    return model, extractor


def from_imagenet(
    state: dict, layout: ImageNetLayout, preset: str | None, seed: int, allow_partial: bool, network: dict,
    signal_settings: dict,
) -> tuple:  # fmt: skip
    """A backbone with ImageNet's weights and, where that is asked for, new attention; its extractor. See `convert`."""
    extractor = ESResNetFeatureExtractor.from_preset(preset or "esresnet50", **signal_settings, do_normalize=True)
    settings = network_settings(layout, state)
    stages = len(settings["depths"])
    if allow_partial and layout is not DENSENET:
        settings = with_missing_stages(settings)
    config = ESResNetConfig(initial_weights="imagenet", **network, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = modeling_dls.ESResNetModel(config)
    # Old files do not count batches, which nothing here depends on.
    optional = rf"{layout.classifier}|.*num_batches_tracked$"
    absent = "|".join(rf"^stages\.{stage}\." for stage in range(stages, len(config.depths)))
    new = rf"attention\.|{absent}" if absent else r"attention\."
    backbone = convert_state_dict(state, model, layout.names, optional, layout.network, new)
    model.load_state_dict(backbone, strict=False)
    if absent:
        count = sum(tensor.numel() for name, tensor in model.state_dict().items() if re.search(absent, name))
        names = ", ".join(f"stages.{stage}" for stage in range(stages, len(config.depths)))
        print(f"not in the file, and random: {names} ({count:,} numbers)")
    return model, extractor


def convert(
    source: Path,
    output_dir: Path,
    labels: Path | None = None,
    preset: str | None = None,
    attention: bool = True,
    seed: int = 0,
    allow_partial: bool = False,
    downsample_in_bottleneck: bool = False,
    **signal_settings,
):
    """Reads a checkpoint and writes a folder for `from_pretrained`, moved into place when complete.

    Args:
        source: The original's file; or an ImageNet network's, or a folder with its model.safetensors.
        output_dir: Must not exist, or be empty.
        labels: Of the original; see `read_labels`.
        preset: With ImageNet weights: whose pictures the extractor makes; None means `"esresnet50"`, at full size.
        attention: With ImageNet weights: whether the network has attention.
        seed: Of that attention, and of stages that are missing.
        allow_partial: With a ResNet's weights: whether its last stages may be missing. They start randomly.
        downsample_in_bottleneck: With a ResNet's weights: see [`ESResNetConfig`]; a transformers folder tells itself.
        **signal_settings: Of [`ESResNetFeatureExtractor`], instead of its defaults or the preset's.

    Returns:
        The model: an [`ESResNetForAudioClassification`] from the original, an [`ESResNetModel`] from ImageNet weights.

    Raises:
        ConversionError: naming the file, and keys that are wrong; also if `output_dir` is not empty, the window does
            not fit, or an option does not go with this kind of checkpoint.
        ImportError: if a DenseNet is converted without timm.
    """
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ConversionError(f"{output_dir} exists: expected a new or empty output folder")
    file = source / "model.safetensors" if source.is_dir() else source
    state = read_state_dict(file)
    try:
        layout = find_layout(state, allow_partial)
        if layout is None and (preset or not attention or allow_partial or downsample_in_bottleneck):
            raise ConversionError("no ImageNet weights, which these options go with")
        if layout is not None and labels:
            raise ConversionError("ImageNet weights, whose classes are dropped: leave --labels out")
        if layout is None:
            model, extractor = from_original(state, labels, signal_settings)
        else:
            if (config_file := file.with_name("config.json")).is_file():
                downsample_in_bottleneck = check_transformers_config(config_file)
            network = {"attention": attention, "downsample_in_bottleneck": downsample_in_bottleneck}
            model, extractor = from_imagenet(state, layout, preset, seed, allow_partial, network, signal_settings)
    except ConversionError as error:
        raise ConversionError(f"{file}: {error}") from error

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as folder:
        finished = Path(folder) / "model"
        model.save_pretrained(finished)
        extractor.save_pretrained(finished)
        os.replace(finished, output_dir)
    return model


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_dls.convert_esresnet_checkpoint",
        description="Convert a checkpoint of the original ESResNet, or a ResNet's or DenseNet's ImageNet weights. The "
        "network is read from the file.",
        argument_default=argparse.SUPPRESS,  # what is not given is the extractor's or the preset's
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a checkpoint file, or a folder of transformers'")
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="a new folder for from_pretrained")
    original = parser.add_argument_group("for the original")
    original.add_argument("--labels", type=Path, help="class names in order: a .json list, or one name per line")
    imagenet = parser.add_argument_group("for ImageNet weights")
    imagenet.add_argument("--preset", help="whose spectrograms the network gets (default: esresnet50, at full size)")
    imagenet.add_argument("--no_attention", dest="attention", action="store_false", help="plain ResNet or DenseNet")
    imagenet.add_argument("--seed", type=int, help="of the attention, which starts randomly (default: 0)")
    imagenet.add_argument("--allow_partial", action="store_true", help="of a ResNet: its last stages may be missing")
    imagenet.add_argument(
        "--downsample_in_bottleneck", action="store_true",
        help="of a ResNet: strides are in the first 1x1 convolutions (v1), which files in torchvision's names do not "
        "tell",
    )  # fmt: skip
    signal = parser.add_argument_group("signal")
    signal.add_argument("--n_fft", type=int, help="FFT length in samples (default: 2048)")
    signal.add_argument("--win_length", type=int, help="window in samples (default: 1654)")
    signal.add_argument("--hop_length", type=int, help="in samples (default: 561)")
    signal.add_argument("--spec_height", type=int, help="height of a band's picture (default: the preset's or STFT's)")
    signal.add_argument("--spec_width", type=int, help="width of a band's picture (default: the preset's or STFT's)")
    args = parser.parse_args(argv)
    try:
        model = convert(**vars(args))
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output_dir}: converted, load it with {type(model).__name__}.from_pretrained or --model_name_or_path")
    return 0


if __name__ == "__main__":
    sys.exit(main())
