"""Networks that a command asks for, what cannot be had or is damaged, and what the launcher asks for."""

import contextlib
import json
import logging
import sys
from argparse import Namespace

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from safetensors.torch import load_file
from scripts import fail
from sound_networks import save

from datasets_scripts.errors import UserError
from dls_sounds.network import Classifier
from dls_sounds.page.analysis import Network
from dls_training import networks
from dls_training.networks import check_source, make_config, make_extractor, make_model
from dls_training.runtime import choose_device_and_precision
from dls_training.settings import TRACKERS, ClassificationSettings, PretrainingSettings
from modeling_dls import (
    ESResNetConfig,
    ESResNetForAudioClassification,
    ESResNetForInstanceDiscrimination,
    ESResNetModel,
)

CLASSIFIER = ESResNetForAudioClassification.__name__


def test_a_checkpoint_of_another_preset_is_refused_by_what_differs(tmp_path):
    ESResNetConfig.from_preset("densenet_small").save_pretrained(tmp_path)
    nothing = dict.fromkeys(("pooling", "embedding_size", "hidden_sizes", "pooler_act"))
    args = Namespace(model_name_or_path=tmp_path, preset="densenet_small", **nothing)
    assert make_config(args, num_labels=3).growth_rate == 16
    args.preset = "esresnet18"
    with pytest.raises(UserError, match=r"embedding_size, depths, layer_type, growth_rate differ"):
        make_config(args)


@pytest.mark.parametrize("settings", [PretrainingSettings, ClassificationSettings])
def test_a_recipe_says_nothing_of_another_presets_spectrograms(settings):
    def rows(*words):
        return settings.parsed(["--recipe", "thorough", *words]).spec_height

    assert rows() == rows("--preset", "small_mel") == 64 and rows("--preset", "esresnet50") is None
    assert rows("--preset", "esresnet50", "--spec_height", "16") == rows("--spec_height", "16") == 16


def test_a_densenet_without_timm_is_a_message(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models.densenet", None)
    with pytest.raises(UserError, match="pip install timm"):
        make_model(ESResNetModel, None, ESResNetConfig.from_preset("densenet_small"), seed=0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", None), ("model.safetensors", b"\xff" * 8), ("config.json", b"[]"), ("config.json", b"{"),
        ("config.json", b'{"model_type": "esresnet", "hidden_sizes": "wide"}'), ("preprocessor_config.json", b"[1]"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_said_in_one_line(name, content, tmp_path):
    folder = save(ESResNetForAudioClassification, tmp_path / "model")
    file = folder / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content is None else content)
    settings = ClassificationSettings(model_name_or_path=str(folder))

    def start():
        make_extractor(settings)
        make_model(ESResNetForAudioClassification, folder, make_config(settings), seed=0)

    for read in (start, lambda: Classifier(str(folder), None, "no"), lambda: Network(folder, CLASSIFIER)):
        with pytest.raises(UserError, match=str(folder)) as error:
            read()
        assert "\n" not in str(error.value)


def test_weights_that_would_be_unpickled_are_not_read(tmp_path):
    folder = save(ESResNetForAudioClassification, tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for read in (lambda: Classifier(str(folder), None, "no"), lambda: Network(folder, CLASSIFIER)):
        with pytest.raises(UserError, match=r"model\.safetensors"):
            read()


@pytest.mark.parametrize("model_type", ["esresnet", "stranger"])
def test_code_of_a_models_folder_is_not_run(model_type, tmp_path):
    folder, trace = save(ESResNetForAudioClassification, tmp_path / "model"), tmp_path / "executed"
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    everything = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForAudioClassification"), "evil.Evil")
    for name in ("config.json", "preprocessor_config.json"):
        content = json.loads((folder / name).read_text())
        content |= {"auto_map": everything | {"AutoFeatureExtractor": "evil.Evil"}}
        (folder / name).write_text(json.dumps(content | ({"model_type": model_type} if name[:4] == "conf" else {})))
    settings = ClassificationSettings(model_name_or_path=str(folder))
    for read in (
        lambda: Classifier(str(folder), None, "no"),
        lambda: Network(folder, CLASSIFIER),
        lambda: make_extractor(settings),
        lambda: make_model(ESResNetForAudioClassification, folder, make_config(settings), seed=0),
    ):
        with contextlib.suppress(UserError):
            read()
    assert not trace.exists()
    exec((folder / "evil.py").read_text())  # it would have worked
    assert trace.exists()


def test_a_mistyped_folder_is_not_asked_for_again_and_again(monkeypatch):
    asked = []

    def nobody_answers(url, **_):
        asked.append(url)
        raise ConnectionError("no connection")

    monkeypatch.setattr(networks, "get_hf_file_metadata", nobody_answers)
    for name in ("runs/npdi", "npdi"):
        with pytest.raises(UserError, match=f"--model {name}: there is no such folder, nor such a model: .*no conn"):
            check_source("--model", name)
    with pytest.raises(UserError, match="--model a b: there is no such folder, nor such a model"):
        check_source("--model", "a b")
    assert len(asked) == 2


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


def test_what_a_checkpoint_lacks_is_said_in_one_line(tmp_path, caplog):
    """And not by transformers, in red."""
    ESResNetForInstanceDiscrimination(ESResNetConfig.from_preset("tiny")).save_pretrained(tmp_path)
    config = ESResNetConfig.from_pretrained(tmp_path, num_labels=3)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        model = make_model(ESResNetForAudioClassification, tmp_path, config, seed=0)
    assert caplog.messages == [f"{tmp_path}: classifier starts anew; its projection is not used"]
    model.save_pretrained(tmp_path / "whole")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        make_model(ESResNetForAudioClassification, tmp_path / "whole", config, seed=0)
    assert not caplog.messages


def test_trackers_are_accelerates(tmp_path, monkeypatch):
    assert set(TRACKERS) == set(LOGGER_TYPE_TO_CLASS)
    monkeypatch.setattr("dls_training.runtime.get_available_trackers", lambda: ["tensorboard"])
    message = fail("train_npid.py", "--report_to", "comet_ml", "--output_dir", tmp_path)
    assert message == "error: --report_to comet_ml: it is not installed (pip install comet-ml)"


@pytest.mark.parametrize("what", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_what_splits_a_network_is_refused(what, tmp_path, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{what}", "true")
    assert f"accelerate is configured for {what}" in fail("train_npid.py", "--output_dir", tmp_path)


def test_configured_precision_counts(tmp_path, monkeypatch):
    """Where nothing is configured the launcher says "no", which nobody has chosen."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("dls_training.runtime.best_precision", lambda device: "the best")
    monkeypatch.setattr("dls_training.runtime.default_config_file", tmp_path / "config.yaml")
    monkeypatch.setattr("dls_training.runtime.PRECISIONS", ("the best", "no", "bf16", "fp16"))

    def chosen(environment: str, asked: str = "auto") -> str:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", environment)
        return choose_device_and_precision(asked)[1]

    assert chosen("no") == "the best" and chosen("bf16") == "bf16" and chosen("bf16", "no") == "no"
    (tmp_path / "config.yaml").touch()
    assert chosen("no") == "no"
    for precision, message in (("fp16", "needs a GPU"), ("fp8", "fp8 .accelerate config. is not for these")):
        with pytest.raises(UserError, match=message):
            chosen(precision)
