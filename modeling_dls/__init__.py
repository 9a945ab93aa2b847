"""ESResNet for transformers: importing this package registers it with the Auto classes.

Example:
    >>> import modeling_dls
    >>> from transformers import AutoModelForAudioClassification
    >>> model = AutoModelForAudioClassification.from_pretrained("runs/esc10")  # doctest: +SKIP
"""

from . import torchaudio_guard  # noqa: F401  # isort: skip  # before transformers imports it

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .configuration_esresnet import AUTO_MAP, ESResNetConfig
from .feature_extraction_esresnet import ESResNetFeatureExtractor
from .spectrogram_esresnet import three_band_spectrogram

if TYPE_CHECKING:
    from .modeling_esresnet import *  # noqa: F403

# The models and their Auto classes, as the last lines of their module name them. It is read, not imported, because
# transformers' modelling code alone takes two seconds; and it is there to be read: checkpoints get copies of it.
MODELS = dict(
    re.findall(
        r'^(\w+)\.register_for_auto_class\("(\w+)"\)$',
        Path(__file__).with_name("modeling_esresnet.py").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
)


def __getattr__(name: str):
    """Imports the models when they are first used."""
    if name not in MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".modeling_esresnet", __name__), name)


# transformers knows its own models by name, and imports them when they are looked up: ours enter its tables likewise.
sys.modules[f"transformers.models.{ESResNetConfig.model_type}"] = sys.modules[__name__]
for _name, _auto_class in MODELS.items():
    _mapping = getattr(transformers, _auto_class)._model_mapping
    _mapping._model_mapping[ESResNetConfig.model_type] = _name
    _mapping._reverse_config_mapping[ESResNetConfig.__name__] = ESResNetConfig.model_type
    AUTO_MAP[_auto_class] = f"modeling_esresnet.{_name}"
# Not before: transformers 5.4 documents the models of this table while it makes the Auto classes.
CONFIG_MAPPING_NAMES[ESResNetConfig.model_type] = ESResNetConfig.__name__
transformers.AutoFeatureExtractor.register(ESResNetConfig, ESResNetFeatureExtractor)

# A saved checkpoint carries its own code, so that trust_remote_code=True works where this package is not installed.
ESResNetConfig.register_for_auto_class()
ESResNetFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")

__all__ = ["ESResNetConfig", "ESResNetFeatureExtractor", "three_band_spectrogram", *MODELS]
