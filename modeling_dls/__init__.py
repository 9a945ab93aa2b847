"""ESResNet for transformers: importing this package registers it with the Auto classes.

Example:
    >>> import modeling_dls
    >>> from transformers import AutoModelForAudioClassification
    >>> model = AutoModelForAudioClassification.from_pretrained("runs/esc10")  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForAudioXVector,
)

from .configuration_esresnet import ESResNetConfig
from .feature_extraction_esresnet import ESResNetFeatureExtractor, three_band_spectrogram

if TYPE_CHECKING:
    from .modeling_esresnet import (
        ESResNetForAudioClassification,
        ESResNetForInstanceDiscrimination,
        ESResNetModel,
    )

MODELS = {
    "ESResNetModel": AutoModel,
    "ESResNetForAudioClassification": AutoModelForAudioClassification,
    # "XVector" is transformers' name for a head that turns a recording into one embedding.
    "ESResNetForInstanceDiscrimination": AutoModelForAudioXVector,
}


def __getattr__(name: str):
    """Imports the models when they are first used: transformers' modelling code alone takes two seconds."""
    if name not in MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".modeling_esresnet", __name__), name)


class _LateClass:
    """Stands for a model class where the Auto classes look it up; importing it waits until it is used."""

    config_class = ESResNetConfig

    def __init__(self, name: str):
        self.__name__ = name

    def __getattr__(self, attribute: str):
        return getattr(__getattr__(self.__name__), attribute)


AutoConfig.register("esresnet", ESResNetConfig)
AutoFeatureExtractor.register(ESResNetConfig, ESResNetFeatureExtractor)
for _name, _auto_class in MODELS.items():
    _auto_class.register(ESResNetConfig, _LateClass(_name))

# A saved checkpoint carries its own code, so that trust_remote_code=True works where this package is not installed.
ESResNetConfig.register_for_auto_class()
ESResNetFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")

__all__ = [
    "ESResNetConfig",
    "ESResNetFeatureExtractor",
    "ESResNetForAudioClassification",
    "ESResNetForInstanceDiscrimination",
    "ESResNetModel",
    "three_band_spectrogram",
]
