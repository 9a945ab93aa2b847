"""Named networks, each with the spectrograms that it gets. Imports nothing: command lines read it for its names."""

_RESNET18 = {"hidden_sizes": (64, 128, 256, 512), "depths": (2, 2, 2, 2), "layer_type": "basic"}
_SMALL = {"embedding_size": 32, "hidden_sizes": (32, 64, 128, 256), "depths": (1, 1, 1, 1), "layer_type": "basic"}
_TINY = {"embedding_size": 16, "hidden_sizes": (16, 32, 64, 128), "depths": (1, 1, 1, 1), "layer_type": "basic"}
# Small networks get small, standardised pictures; averaging keeps the energy that bilinear sampling would skip.
_SMALL_PICTURES = {"spec_height": 64, "spec_width": 128, "resize_mode": "area", "do_normalize": True}

_EARLY = _SMALL | {"embedding_size": 64, "hidden_sizes": (64, 96, 128, 192), "pooling": "statistics"}
_MEL_PICTURES = _SMALL_PICTURES | {"spec_height": 32, "spec_width": 256, "frequency_scale": "mel"}

# Name -> arguments of `ESResNetConfig` (network) and of `ESResNetFeatureExtractor` (signal) that are not the defaults.
PRESETS: dict[str, dict[str, dict]] = {
    # The network of the paper.
    "esresnet50": {"network": {}, "signal": {}},
    # Small enough to pre-train on a CPU within minutes.
    "esresnet18": {"network": _RESNET18, "signal": _SMALL_PICTURES},
    # Smaller still: for edge devices and for the demo.
    "small": {"network": _SMALL, "signal": _SMALL_PICTURES},
    # Of the recommended recipe: it pools what all its stages do, and is wide where they begin (see results/choice).
    # Pitch matters most where sounds differ most, below a few kilohertz; and when, more than at which pitch exactly.
    "small_mel": {"network": _EARLY, "signal": _MEL_PICTURES},
    # A quarter of it, for small devices.
    "tiny_mel": {
        "network": _EARLY | {"embedding_size": 24, "hidden_sizes": (24, 40, 56, 56)},
        "signal": _MEL_PICTURES,
    },
    # For tests.
    "tiny": {"network": _TINY, "signal": _SMALL_PICTURES | {"spec_height": 32, "spec_width": 64}},
    # The other network that the DLS paper compares; both need timm.
    "densenet121": {"network": {"depths": (6, 12, 24, 16), "growth_rate": 32}, "signal": {}},
    # Half its width: the sizes of esresnet18's stages, and about the cost of its training step on a CPU.
    "densenet_small": {
        "network": {"embedding_size": 32, "depths": (6, 12, 24, 16), "growth_rate": 16},
        "signal": _SMALL_PICTURES,
    },
}


def preset(name: str) -> dict[str, dict]:
    """The network's and the signal's settings of a preset.

    Raises:
        ValueError: if there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
