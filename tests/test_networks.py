"""Networks that cannot be had: of another preset than the checkpoint, or without timm."""

import sys
from argparse import Namespace

import pytest

from datasets_scripts.errors import UserError
from dls_training.networks import make_config, make_model
from modeling_dls import ESResNetConfig, ESResNetModel


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
