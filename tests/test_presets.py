"""Every preset of the registry: known to the command lines, unlike all others, and fit to be saved, loaded and run."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoFeatureExtractor

from dls_training import settings
from dls_training.networks import structure
from modeling_dls import ESResNetConfig, ESResNetFeatureExtractor, ESResNetForAudioClassification
from modeling_dls.presets_esresnet import PRESETS

SMALL = {"sampling_rate": 8000, "n_fft": 256, "win_length": 200, "hop_length": 40}
LABELS = {0: "dog", 1: "rain"}
every_preset = pytest.mark.parametrize("name", PRESETS)


def test_the_command_lines_know_every_preset():
    assert tuple(PRESETS) == settings.PRESETS


def test_structures_of_presets_differ():
    structures = [structure(ESResNetConfig.from_preset(preset)) for preset in PRESETS]
    assert all(first not in structures[:i] for i, first in enumerate(structures))


@every_preset
def test_its_network_is_saved_and_loaded(name, tmp_path):
    config = ESResNetConfig.from_preset(name, attention=False, embedding_dim=17, id2label=LABELS)
    config.save_pretrained(tmp_path)
    own = {"layer_type": "bottleneck", "pooling": "mean", "growth_rate": None} | PRESETS[name]["network"]
    for loaded in (
        AutoConfig.from_pretrained(tmp_path),
        ESResNetConfig.from_dict(json.loads(config.to_json_string())),
    ):
        assert type(loaded) is ESResNetConfig
        assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
        assert (loaded.attention, loaded.embedding_dim, loaded.num_labels) == (False, 17, 2)
        for setting, value in own.items():
            assert getattr(loaded, setting) == (list(value) if isinstance(value, tuple) else value)
        assert config.pooling == "statistics" or loaded.hidden_size == config.hidden_sizes[-1]


@every_preset
def test_its_signal_is_saved_and_loaded(name, tmp_path):
    extractor, signal = ESResNetFeatureExtractor.from_preset(name, **SMALL), PRESETS[name]["signal"]
    ESResNetConfig.from_preset(name).save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert {setting: saved[setting] for setting in SMALL | signal} == SMALL | signal
    clip = 0.1 * np.random.RandomState(0).standard_normal(2000)
    for loaded in (
        AutoFeatureExtractor.from_pretrained(tmp_path),
        ESResNetFeatureExtractor.from_dict(extractor.to_dict()),
    ):
        assert type(loaded) is ESResNetFeatureExtractor and loaded.to_dict() == extractor.to_dict()
        assert {setting: getattr(loaded, setting) for setting in SMALL | signal} == SMALL | signal
        spectrograms = (each(clip, sampling_rate=8000)["input_values"] for each in (loaded, extractor))
        np.testing.assert_array_equal(*spectrograms)


@every_preset
def test_its_network_takes_its_pictures(name):
    torch.manual_seed(0)
    model = ESResNetForAudioClassification(ESResNetConfig.from_preset(name, id2label=LABELS)).eval()
    extractor = ESResNetFeatureExtractor.from_preset(name, **SMALL)
    clips = list(np.random.RandomState(0).uniform(-0.5, 0.5, (3, 2000)))
    inputs = extractor(clips, sampling_rate=8000, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape == (3, 2) and logits.isfinite().all()


@pytest.mark.parametrize("made", [ESResNetConfig, ESResNetFeatureExtractor])
def test_an_unknown_preset_is_refused(made):
    with pytest.raises(ValueError, match=r"unknown preset 'resnet': expected one of esresnet50, esresnet18, .*tiny"):
        made.from_preset("resnet")
