"""ESResNet for transformers: importing this package registers it with the Auto classes.

Example:
    >>> import modeling_dls
    >>> from transformers import AutoModelForAudioClassification
    >>> model = AutoModelForAudioClassification.from_pretrained("runs/esc10")  # doctest: +SKIP
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForAudioXVector,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

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


# transformers knows its own models by name, and imports them when they are looked up: ours enter its tables likewise.
sys.modules[f"transformers.models.{ESResNetConfig.model_type}"] = sys.modules[__name__]
CONFIG_MAPPING_NAMES[ESResNetConfig.model_type] = ESResNetConfig.__name__
for _name, _auto_class in MODELS.items():
    _auto_class._model_mapping._model_mapping[ESResNetConfig.model_type] = _name
    _auto_class._model_mapping._reverse_config_mapping[ESResNetConfig.__name__] = ESResNetConfig.model_type
AutoFeatureExtractor.register(ESResNetConfig, ESResNetFeatureExtractor)

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
