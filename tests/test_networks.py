"""Networks that cannot be had: of another preset than the checkpoint, or without timm."""

import sys
from argparse import Namespace

import pytest
import torch

from datasets_scripts.errors import UserError
from dls_training.networks import make_config, make_extractor, make_model
from dls_training.settings import PretrainingSettings
from modeling_dls import ESResNetConfig, ESResNetModel


def test_a_checkpoint_of_another_preset_is_refused_by_what_differs(tmp_path):
    ESResNetConfig.from_preset("densenet_small").save_pretrained(tmp_path)
    nothing = dict.fromkeys(("pooling", "embedding_size", "hidden_sizes"))
    args = Namespace(model_name_or_path=tmp_path, preset="densenet_small", **nothing)
    assert make_config(args, num_labels=3).growth_rate == 16
    args.preset = "esresnet18"
    with pytest.raises(UserError, match=r"embedding_size, depths, layer_type, growth_rate differ"):
        make_config(args)


def test_a_densenet_without_timm_is_a_message(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models.densenet", None)
    with pytest.raises(UserError, match="pip install timm"):
        make_model(ESResNetModel, None, ESResNetConfig.from_preset("densenet_small"), seed=0)


@pytest.mark.parametrize(
    ("rate", "transform"),
    [(44100, (2048, 1654, 561)), (16000, (768, 600, 204)), (48000, (2240, 1800, 611)), (8000, (384, 300, 102))],
)
def test_spectrograms_keep_their_times_at_other_rates(rate, transform):
    extractor = make_extractor(PretrainingSettings(recipe="recommended", sampling_rate=rate, clip_seconds=1.0))
    assert (extractor.n_fft, extractor.win_length, extractor.hop_length) == transform
    assert (extractor.sampling_rate, extractor.max_length) == (rate, rate)
    assert extractor.spectrogram(torch.zeros(1, 1, rate)).shape == (1, 1, 3, 32, 256)


def test_a_checkpoint_keeps_its_rate(tmp_path):
    make_extractor(PretrainingSettings(recipe="recommended", sampling_rate=16000)).save_pretrained(tmp_path)
    own = {"recipe": "recommended", "model_name_or_path": str(tmp_path)}
    assert make_extractor(PretrainingSettings(**own)).sampling_rate == 16000
    with pytest.raises(UserError, match=r"--sampling_rate 44100: .* has 16000"):
        make_extractor(PretrainingSettings(**own, sampling_rate=44100))
