"""A saved checkpoint works through trust_remote_code with torch, numpy and transformers alone, our package absent."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scripts import ROOT

from modeling_dls import (
    ESResNetConfig,
    ESResNetFeatureExtractor,
    ESResNetForAudioClassification,
    ESResNetForInstanceDiscrimination,
    ESResNetModel,
)

LABELS = ["dog", "rain", "sea waves", "crying baby"]
HERE = {"modeling_dls", "datasets_scripts", "dls_training", "hub_cards", "train_npid", "train_classification"}
# What our own requirements and an audio user's environment have beyond torch, numpy and transformers.
OPTIONAL = {"accelerate", "datasets", "evaluate", "librosa", "matplotlib", "pandas", "scipy", "sklearn", "soundfile"}
OPTIONAL |= {"tensorboard", "timm", "torchaudio", "torchcodec", "torchvision"}

# Runs in a process of its own. Nothing but the standard library and sys.argv comes from this file.
BEFORE = """
import importlib.machinery, importlib.util, json, sys

job = json.loads(sys.argv[1])


class Without(importlib.machinery.PathFinder):
    # As if these were not installed; being the only finder of files, it also switches editable installs off.
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        hidden = fullname.partition(".")[0] in job["hidden"]
        return None if hidden else super().find_spec(fullname, path, target)


builtin = [importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter]
sys.meta_path[:] = [*builtin, Without]
assert not any(importlib.util.find_spec(name) for name in job["hidden"])
try:
    import modeling_dls
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("this package is importable, the test would prove nothing")
"""

STRANGER = """
import numpy as np
import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification
from transformers import AutoModelForAudioXVector, pipeline

clips = np.load(job["clips"])
remote = {"trust_remote_code": True}


def look(folder):
    config = AutoConfig.from_pretrained(folder, **remote)
    extractor = AutoFeatureExtractor.from_pretrained(folder, **remote)
    inputs = extractor(list(clips), sampling_rate=extractor.sampling_rate, return_tensors="pt")
    found = {"labels": [config.id2label[i] for i in range(config.num_labels)], "extractor": extractor.to_dict()}
    auto_classes = {
        "logits": AutoModelForAudioClassification, "embeddings": AutoModelForAudioXVector, "pooler_output": AutoModel
    }
    for output, auto_class in auto_classes.items():
        model = auto_class.from_pretrained(folder, **remote)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        with torch.no_grad():
            found[output] = model(**inputs)[output].tolist()
    return found


answer = {"first": look(job["classifier"]), "embedder": look(job["embedder"])}
classify = pipeline("audio-classification", model=job["classifier"], top_k=None, **remote)
audio = [{"array": clip, "sampling_rate": classify.feature_extractor.sampling_rate} for clip in clips]
answer["one by one"] = [classify(clip) for clip in clips]
answer["batched"] = classify(audio, batch_size=2)
classify.save_pretrained(job["resaved"])
answer["again"] = look(job["resaved"])
answer["once more"] = pipeline("audio-classification", model=job["resaved"], top_k=None, **remote)(list(clips))
answer["imported"] = sorted({name.partition(".")[0] for name in sys.modules} & set(job["hidden"]))
print(json.dumps(answer))
"""

DENSE = """
import torch
from transformers import AutoConfig, AutoModel

answer = {"growth_rate": AutoConfig.from_pretrained(job["dense"], trust_remote_code=True).growth_rate}
try:
    AutoModel.from_pretrained(job["dense"], trust_remote_code=True)
except ImportError as error:
    answer["without timm"] = str(error)
job["hidden"] = sorted(set(job["hidden"]) - {"timm", "torchvision"})  # as if it had been installed meanwhile
model = AutoModel.from_pretrained(job["dense"], trust_remote_code=True)
with torch.no_grad():
    answer["with timm"] = model(torch.ones(1, 1, 3, 32, 64)).pooler_output.tolist()
print(json.dumps(answer))
"""


def run_stranger(script: str, job: dict, folder) -> dict:
    """What `script` prints in a process that finds neither this package nor what `OPTIONAL` names."""
    job |= {"hidden": sorted(HERE | OPTIONAL)}
    (folder / "elsewhere").mkdir()
    finished = subprocess.run(
        [sys.executable, "-I", "-c", BEFORE + script, json.dumps(job)],
        cwd=folder / "elsewhere",
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "home"),
            "HF_MODULES_CACHE": str(folder / "code"),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Clips, a classifier, an embedder and their extractor, and what a stranger's process made of the saved files."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    config = ESResNetConfig.from_preset("tiny", embedding_dim=24, **names)
    models = {
        "classifier": ESResNetForAudioClassification(config).eval(),
        "embedder": ESResNetForInstanceDiscrimination(config).eval(),
    }
    extractor = ESResNetFeatureExtractor.from_preset(
        "tiny", sampling_rate=8000, n_fft=512, win_length=400, hop_length=100
    )
    for name, model in models.items():
        model.save_pretrained(folder / name)
        extractor.save_pretrained(folder / name)
    clips = np.random.RandomState(0).uniform(-0.5, 0.5, (3, 8000)).astype(np.float32)
    np.save(folder / "clips.npy", clips)
    job = {name: str(folder / name) for name in ("classifier", "embedder", "resaved")}
    answer = run_stranger(STRANGER, job | {"clips": str(folder / "clips.npy")}, folder)
    return clips, models, extractor, answer, folder


def test_every_auto_class_gives_the_same_as_the_package(published):
    clips, models, extractor, answer, _ = published
    inputs = extractor(list(clips), sampling_rate=8000, return_tensors="pt")
    for seen, name, output in [("first", "classifier", "logits"), ("embedder", "embedder", "embeddings")]:
        with torch.no_grad():
            expected = models[name](**inputs)[output]
            pooled = models[name].esresnet(**inputs).pooler_output
        np.testing.assert_allclose(answer[seen][output], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(answer[seen]["pooler_output"], pooled, rtol=1e-5, atol=1e-5)
        assert np.shape(answer[seen]["embeddings"]) == (3, 24)
        assert answer[seen]["labels"] == LABELS
        saved = {key: value for key, value in answer[seen]["extractor"].items() if key in extractor.to_dict()}
        assert saved == extractor.to_dict()


def test_pipeline_scores_one_by_one_and_in_batches(published):
    clips, models, extractor, answer, _ = published
    with torch.no_grad():
        logits = models["classifier"](**extractor(list(clips), sampling_rate=8000, return_tensors="pt")).logits
    for way in ("one by one", "batched", "once more"):
        scores = [{entry["label"]: entry["score"] for entry in entries} for entries in answer[way]]
        actual = [[clip[label] for label in LABELS] for clip in scores]
        np.testing.assert_allclose(actual, logits.softmax(dim=-1), rtol=1e-5, atol=1e-6)


def test_a_checkpoint_saved_again_there_works_as_before(published):
    *_, answer, folder = published
    for output in ("logits", "pooler_output"):
        np.testing.assert_allclose(answer["again"][output], answer["first"][output], rtol=1e-6, atol=1e-6)
    assert answer["again"]["labels"] == LABELS
    code = {path.name for path in (ROOT / "modeling_dls").glob("*_esresnet.py")}
    for name in ("classifier", "resaved"):
        assert code <= {path.name for path in (folder / name).iterdir()}
        assert set(json.loads((folder / name / "config.json").read_text())["auto_map"]) == {
            "AutoConfig",
            "AutoModel",
            "AutoModelForAudioClassification",
            "AutoModelForAudioXVector",
        }


def test_torch_numpy_and_transformers_are_enough(published):
    *_, answer, _ = published
    assert answer["imported"] == []


def test_a_densenet_there_needs_timm_and_says_so(tmp_path):
    torch.manual_seed(0)
    config = ESResNetConfig(embedding_size=16, depths=(1, 1, 1, 1), growth_rate=8)
    model = ESResNetModel(config).eval()
    model.save_pretrained(tmp_path / "dense")
    answer = run_stranger(DENSE, {"dense": str(tmp_path / "dense")}, tmp_path)
    assert answer["growth_rate"] == 8 and "pip install timm" in answer["without timm"]
    with torch.no_grad():
        expected = model(torch.ones(1, 1, 3, 32, 64)).pooler_output
    np.testing.assert_allclose(answer["with timm"], expected, rtol=1e-5, atol=1e-6)
