"""The floors in pyproject.toml exclude releases with which something was seen to fail."""

import sys
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from scripts import ROOT, SMALL, start

NEWEST_THAT_FAILS = {
    "accelerate": "1.14.0",
    "datasets": "4.2.0",
    "filelock": "3.28.0",
    "onnxruntime": "1.19.0",
    "onnxscript": "0.6.0",
    "pytest": "9.1.1",
    "tensorboard": "2.16.1",
    "torch": "2.7.0",
    "transformers": "5.3.0",
}


@pytest.mark.parametrize("name", NEWEST_THAT_FAILS)
def test_floors(name):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no parser of TOML")
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    lines = chain(project["dependencies"], *project["optional-dependencies"].values())
    (allowed,) = (line.specifier for line in map(Requirement, lines) if line.name == name)
    assert NEWEST_THAT_FAILS[name] not in allowed
    assert version(name) in allowed


@pytest.mark.parametrize(("torch", "pair"), [("2.9.1", "'torchaudio==2.9.*'"), ("2.13.0+cpu", "'torch==2.11.*' 'to")])
def test_torchaudio_that_cannot_be_loaded(torch, pair, sound_folder, tmp_path):
    """One message names the pair to install; where nothing is resampled, nothing is missing."""
    (tmp_path / "torchaudio.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    code = f"import runpy, torch; torch.__version__ = {torch!r}; runpy.run_path('train_npid.py', run_name='__main__')"
    common = [*SMALL, "--corpus", f"audiofolder={sound_folder}", "--max_train_steps", "1"]
    said = []
    for rate, exit_code in (("7000", 2), ("8000", 0)):
        words = [sys.executable, "-c", code, *common, "--sampling_rate", rate, "--output_dir", tmp_path / rate]
        process = start(words, cwd=ROOT, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
        said.append(process.communicate(timeout=300)[0])
        assert process.returncode == exit_code, said[-1]
    assert f"beside torch {torch} (libcudart.so.13" in said[0] and f"pip install {pair}" in said[0]
    assert "Traceback" not in said[0]


@pytest.mark.parametrize("command", ["embedding", "predicting"])
def test_embedding_and_predicting_do_without_datasets(command):
    """It takes 45 MB, and a second to import."""
    code = f"import sys, dls_sounds.{command}; sys.exit('datasets' in sys.modules)"
    assert start([sys.executable, "-c", code], cwd=ROOT).wait(timeout=120) == 0
