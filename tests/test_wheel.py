"""What is installed works without the checkout: an sdist of it, and a wheel of the sdist, in a folder of their own."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from scripts import ROOT, SMALL

PACKAGES = {"modeling_dls", "datasets_scripts", "dls_training", "dls_sounds", "dls_comparison", "hub_cards"}
SCRIPTS = {"train_npid.py", "train_classification.py"}
SOURCE_FOLDERS = (*PACKAGES, "benchmarks", "checkpoints", "docs", "results", "tests")
COMPARISON = """
title: Two arms
options: {options}
corpora: {{audiofolder: {sounds}}}
corpus: audiofolder
pretraining: {{dls: {{corpora: [audiofolder], options: --num_train_epochs 1}}}}
arms: {{scratch: {{pretraining: none}}, dls: {{pretraining: dls}}}}
fine_tuning: [{{name: all, arms: [scratch, dls], options: --num_train_epochs 1}}]
"""


def run(*command, folder: Path, **environment) -> str:
    """What a command prints that ends well; it finds nothing of the checkout."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ended = subprocess.run(
        [str(part) for part in command], cwd=folder, env=variables | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(
        ROOT, folder / "tree",
        ignore=shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "runs", "demo_output", "__pycache__"),
    )  # fmt: skip
    build = "import setuptools.build_meta, sys; print(setuptools.build_meta.build_sdist(sys.argv[1]))"
    name = run(sys.executable, "-c", build, folder, folder=folder / "tree").splitlines()[-1]
    return folder / name


@pytest.fixture(scope="module")
def wheel(sdist) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent / "unpacked", filter="data")
    (tree,) = (sdist.parent / "unpacked").iterdir()
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", sdist.parent]
    run(sys.executable, "-m", "pip", "wheel", *options, tree, folder=tree)
    (found,) = sdist.parent.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel) -> Path:
    folder = wheel.parent / "installed"
    options = ["--quiet", "--no-deps", "--no-index", "--target", folder]
    run(sys.executable, "-m", "pip", "install", *options, wheel, folder=wheel.parent)
    return folder


def test_sdist_has_what_its_tests_need(sdist):
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    needed = [path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*.*") if path.is_file()]
    needed = {str(path.relative_to(ROOT)) for path in needed if "__pycache__" not in path.parts}
    needed |= {*SCRIPTS, "reproduce.py", "demo.py", "Makefile", "README.md", "CITATION.cff", "pyproject.toml"}
    assert len(needed) > 200 and not needed - packed


def test_wheel_has_the_packages_and_nothing_beside_them(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    (about,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
    assert {name.partition("/")[0] for name in names} == PACKAGES | SCRIPTS | {about}
    assert {*(f"{package}/py.typed" for package in PACKAGES), "hub_cards/templates/app.py"} <= set(names)
    for line in ("License-Expression: Apache-2.0", "Classifier: Operating System :: POSIX :: Linux", "Author: "):
        assert f"\n{line}" in metadata


@pytest.mark.slow
def test_installed_beside_the_environment(installed, sound_folder, tmp_path):
    """The commands, both train scripts, a comparison with its report, and the cards' templates."""

    def python(*words) -> str:
        return run(sys.executable, *words, folder=tmp_path, PYTHONPATH=str(installed), HF_HUB_OFFLINE="1")

    assert str(installed) in python("-c", "import dls_training; print(dls_training.__file__)")
    dls = run(installed / "bin" / "dls", "--help", folder=tmp_path, PYTHONPATH=str(installed))
    assert "predict" in dls
    for script in sorted(SCRIPTS):
        assert "--recipe recommended" in python("-m", script.removesuffix(".py"), "--help")
    file = tmp_path / "arms.yaml"
    file.write_text(COMPARISON.format(options=" ".join([*SMALL, "--max_train_steps 1"]), sounds=sound_folder))
    python("-m", "dls_comparison", file, "--only", "pretrain*")
    (run_folder,) = (tmp_path / "runs" / "arms").glob("pretrain*/")
    assert "# ESResNet, pre-trained" in (run_folder / "README.md").read_text()
    (tmp_path / "arms" / "README.md").unlink()
    python("-m", "dls_comparison", file, "--report")
    assert "Not run yet" in (tmp_path / "arms" / "README.md").read_text()
    exported = ["export", "audiofolder", "--data_dir", sound_folder, "--output_dir", "exported"]
    python("-m", "datasets_scripts", *exported)
    assert "load_dataset" in (tmp_path / "exported" / "README.md").read_text()
