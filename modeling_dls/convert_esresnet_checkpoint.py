"""Converts a checkpoint of the original ESResNet to this format.

    python -m modeling_dls.convert_esresnet_checkpoint SOURCE OUTPUT_DIR [--labels FILE] [--n_fft ...]

Attention and the number of classes are read from the file; the signal settings are not in it and default to the
original's.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path

# Our parameter names -> the original's, applied in order.
ORIGINAL_NAMES = (
    (r"^esresnet\.embedder\.embedder\.convolution\.", "conv1."),
    (r"^esresnet\.embedder\.embedder\.normalization\.", "bn1."),
    (r"^esresnet\.attention\.", "att5."),
    (r"^esresnet\.stages\.(\d)\.attention\.", lambda m: f"att{int(m[1]) + 1}."),
    (r"^esresnet\.stages\.(\d)\.residual\.layers\.", lambda m: f"layer{int(m[1]) + 1}."),
    (r"\.layer\.(\d)\.convolution\.", lambda m: f".conv{int(m[1]) + 1}."),
    (r"\.layer\.(\d)\.normalization\.", lambda m: f".bn{int(m[1]) + 1}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
)


class ConversionError(ValueError):
    """The file is not a complete checkpoint of the original ESResNet."""


def original_name(name: str) -> str:
    """The original's name of one of our parameters."""
    for pattern, replacement in ORIGINAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def convert_state_dict(state: dict, model) -> dict:
    """Renames the original's parameters and checks that they are exactly what `model` needs.

    Args:
        state: Parameter name -> tensor, as the original saves them; its analysis window is left out.
        model: An [`ESResNetForAudioClassification`] of the same size.

    Returns:
        A state dict for `model`.

    Raises:
        ConversionError: naming missing and unexpected keys, or tensors of another shape, under the original's names.
    """
    expected = {original_name(name): (name, tensor.shape) for name, tensor in model.state_dict().items()}
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys() - {"window"}),
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
            for name, (_, shape) in expected.items()
            if name in state and state[name].shape != shape
        ],
    }
    if any(problems.values()):
        lines = [f"  {len(names)} {what}: {', '.join(names)}" for what, names in problems.items() if names]
        raise ConversionError("not a complete checkpoint of the original ESResNet-50\n" + "\n".join(lines))
    return {name: state[original] for original, (name, _) in expected.items()}


def read_state_dict(source: Path) -> dict:
    """Parameter name -> tensor from a .pt file, or from the usual wrappers around one.

    Raises:
        ConversionError: if the file cannot be read, or holds something else.
    """
    import torch

    try:
        # Checkpoints come from strangers: nothing but tensors and plain containers is unpickled.
        state = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConversionError(f"cannot read {source}: {error}") from error
    except Exception as error:  # torch.load raises many kinds, and its texts advise to load unsafely
        raise ConversionError(
            f"{source} is damaged, was not written by torch.save, or holds more than tensors and plain containers, "
            "which is not loaded because it could run code"
        ) from error
    if isinstance(state, dict):
        for wrapper in ("state_dict", "model"):
            state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ConversionError(f"{source} holds no state dict: expected parameter names and tensors")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


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


def convert(source: Path, output_dir: Path, labels: Path | None = None, **signal_settings) -> None:
    """Reads the original's checkpoint and writes a folder for `from_pretrained`, moved into place when complete.

    Args:
        source: The original's .pt file.
        output_dir: Must not exist, or be empty.
        labels: See `read_labels`.
        **signal_settings: Of [`ESResNetFeatureExtractor`].

    Raises:
        ConversionError: see `convert_state_dict`; also if `output_dir` is not empty or the window does not fit.
    """
    from modeling_dls import ESResNetConfig, ESResNetFeatureExtractor, ESResNetForAudioClassification

    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ConversionError(f"{output_dir} exists: expected a new or empty output folder")
    state = read_state_dict(source)
    extractor = ESResNetFeatureExtractor(**signal_settings)
    if "window" in state and state["window"].numel() != extractor.win_length:
        raise ConversionError(
            f"{source} was trained with a window of {state['window'].numel()} samples: set --win_length to it, and "
            "--n_fft and --hop_length to what it was trained with"
        )
    classifier = state.get("classifier.weight")
    num_labels = classifier.shape[0] if classifier is not None and classifier.ndim else 0
    config = ESResNetConfig(attention=any(name.startswith("att") for name in state), num_labels=max(num_labels, 1))
    model = ESResNetForAudioClassification(config)
    model.load_state_dict(convert_state_dict(state, model))
    if labels is not None:
        config.id2label = dict(enumerate(read_labels(labels, num_labels)))
        config.label2id = {name: index for index, name in config.id2label.items()}

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as folder:
        finished = Path(folder) / "model"
        model.save_pretrained(finished)
        extractor.save_pretrained(finished)
        os.replace(finished, output_dir)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_dls.convert_esresnet_checkpoint",
        description="Convert a checkpoint of the original ESResNet. Attention and classes are read from the file.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the original's .pt file")
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="a new folder for from_pretrained")
    parser.add_argument("--labels", type=Path, help="class names in order: a .json list, or one name per line")
    parser.add_argument("--n_fft", type=int, default=2048, help="FFT length in samples (default: %(default)s)")
    parser.add_argument("--win_length", type=int, default=1654, help="window in samples (default: %(default)s)")
    parser.add_argument("--hop_length", type=int, default=561, help="in samples (default: %(default)s)")
    parser.add_argument("--spec_height", type=int, help="height of a band's picture (default: the STFT's own)")
    parser.add_argument("--spec_width", type=int, help="width of a band's picture (default: the STFT's own)")
    args = parser.parse_args(argv)
    try:
        convert(**vars(args))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output_dir}: converted, load it with AutoModelForAudioClassification.from_pretrained")
    return 0


if __name__ == "__main__":
    sys.exit(main())
