"""Presets of networks: the same everywhere, and told apart from one another."""

import sys
from argparse import Namespace

import pytest

from datasets_scripts.errors import UserError
from dls_training import settings
from dls_training.networks import make_config, make_model, structure
from modeling_dls import ESResNetConfig, ESResNetModel, configuration_esresnet, feature_extraction_esresnet


def test_every_part_knows_the_same_presets():
    assert settings.PRESETS == tuple(configuration_esresnet.PRESETS) == tuple(feature_extraction_esresnet.PRESETS)


def test_structures_of_presets_differ():
    structures = [structure(ESResNetConfig.from_preset(preset)) for preset in settings.PRESETS]
    assert all(first not in structures[:i] for i, first in enumerate(structures))


def test_a_checkpoint_of_another_preset_is_refused_by_what_differs(tmp_path):
    ESResNetConfig.from_preset("densenet_small").save_pretrained(tmp_path)
    args = Namespace(model_name_or_path=tmp_path, preset="densenet_small", pooling=None)
    assert make_config(args, num_labels=3).growth_rate == 16
    args.preset = "esresnet18"
    with pytest.raises(UserError, match=r"embedding_size, depths, layer_type, growth_rate differ"):
        make_config(args)


def test_a_densenet_without_timm_is_a_message(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models.densenet", None)
    with pytest.raises(UserError, match="pip install timm"):
        make_model(ESResNetModel, None, ESResNetConfig.from_preset("densenet_small"), seed=0)
