"""ESResNet for transformers: importing this package registers it with the Auto classes.

Example:
    >>> import modeling_dls
    >>> from transformers import AutoModelForAudioClassification
    >>> model = AutoModelForAudioClassification.from_pretrained("runs/esc10")  # doctest: +SKIP
"""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForAudioXVector,
)

from .configuration_esresnet import ESResNetConfig
from .feature_extraction_esresnet import ESResNetFeatureExtractor, three_band_spectrogram
from .modeling_esresnet import (
    ESResNetForAudioClassification,
    ESResNetForInstanceDiscrimination,
    ESResNetModel,
)

AutoConfig.register("esresnet", ESResNetConfig)
AutoFeatureExtractor.register(ESResNetConfig, ESResNetFeatureExtractor)
AutoModel.register(ESResNetConfig, ESResNetModel)
AutoModelForAudioClassification.register(ESResNetConfig, ESResNetForAudioClassification)
# "XVector" is transformers' name for a head that turns a recording into one embedding.
AutoModelForAudioXVector.register(ESResNetConfig, ESResNetForInstanceDiscrimination)

# A saved checkpoint carries its own code, so that trust_remote_code=True works where this package is not installed.
ESResNetConfig.register_for_auto_class()
ESResNetFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
ESResNetModel.register_for_auto_class("AutoModel")
ESResNetForAudioClassification.register_for_auto_class("AutoModelForAudioClassification")
ESResNetForInstanceDiscrimination.register_for_auto_class("AutoModelForAudioXVector")

__all__ = [
    "ESResNetConfig",
    "ESResNetFeatureExtractor",
    "ESResNetForAudioClassification",
    "ESResNetForInstanceDiscrimination",
    "ESResNetModel",
    "three_band_spectrogram",
]
