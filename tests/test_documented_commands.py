"""Commands and snippets of README and docs: each is one that its parser takes, and what needs little is run.

README's are run in test_documents.py, those of docs/own_recordings.md in test_own_recordings.py.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from corpora_trees import make_esc50, wav
from scripts import ROOT, SETTINGS
from sound_networks import RATE, save, write_recordings

from datasets_scripts import load_corpus
from datasets_scripts.__main__ import main as corpora
from datasets_scripts.__main__ import make_parser as corpora_parser
from dls_comparison.__main__ import ComparisonSettings
from dls_sounds import run_onnx
from dls_sounds.__main__ import COMMANDS
from dls_sounds.__main__ import main as dls
from hub_cards.__main__ import make_parser as hub_cards_parser
from modeling_dls import ESResNetForAudioClassification

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
OTHERS = {"hf", "arecord", "cat", "sha256sum", "apt-get"}  # programs of others


def blocks(document: Path) -> list[tuple[str, str]]:
    """(language, content) of each."""
    return re.findall(r"```(\w*)\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(document: Path) -> Iterator[list[str]]:
    """The words of each command in a block."""
    for language, content in blocks(document):
        lines = content.replace("\\\n", " ").splitlines()
        prompted = [line[2:] for line in lines if line.startswith("$ ")]
        for line in lines if language == "bash" else prompted:
            for command in line.split(" | "):
                if words := shlex.split(command, comments=True):
                    yield words


def mentions(document: Path) -> Iterator[list[str]]:
    """The words of each command between backticks in a line, which may be no more than its name and an option."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    programs = r"(?:python -m|python|dls|accelerate launch|make|pip install) "
    for code in re.findall(rf"`({programs}[^`\n]*)`", text):
        yield shlex.split(code)


def parse(words: list[str]) -> None:
    """Ends the process, as argparse does, or fails, where a command's words are none that it takes."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, *rest = [word for word in words if word not in ("…", "...")]
    is_cut = len(rest) + 1 < len(words)
    if program in ("accelerate", "torchrun"):
        launcher_options = {"launch", "--num_processes", "--num_machines", "--machine_rank", "--nproc_per_node"}
        while rest and (rest[0] in launcher_options or rest[0].isdigit()):
            rest = rest[1:]
    if program == "make":
        assert re.search(rf"^{re.escape(rest[0])}:", MAKEFILE, re.MULTILINE) or f" {rest[0]} " in MAKEFILE
    elif program == "pip":
        for extra in re.findall(r"\[(.*?)\]", " ".join(rest)):
            assert f"\n{extra} = [" in PYPROJECT
    elif program == "dls":
        COMMANDS[rest[0]][0].parsed(rest[1:])
    elif rest[:1] == ["-m"]:
        parse_module(rest[1], rest[2:], is_cut)
    elif program not in OTHERS and rest:
        parse_script(rest[0], rest[1:])


def parse_module(module: str, options: list[str], is_cut: bool) -> None:
    parsers = {"datasets_scripts": corpora_parser, "hub_cards": hub_cards_parser}
    if module in parsers and not is_cut:
        parsers[module]().parse_args(options)
    elif module == "pytest":
        assert (ROOT / options[0]).is_file()
    else:
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file() or (ROOT / module).is_dir()


def parse_script(script: str, options: list[str]) -> None:
    if (name := script.removesuffix(".py")) in SETTINGS:
        SETTINGS[name].parsed(options)
    elif name == "reproduce":
        ComparisonSettings.parsed(options)
    elif name == "run_onnx":
        run_onnx.parser().parse_args(options)
    elif name.startswith("benchmarks/"):
        text = (ROOT / script).read_text(encoding="utf-8")
        for option in (word[2:] for word in options if word.startswith("--")):
            assert option == "output" or re.search(rf'"--{option}"|\b{option}=', text), (script, option)
    elif script not in ("-c", "classify.py", "space/app.py"):  # which docs/first_run.md and docs/space.md make
        raise AssertionError(f"which script is {script}?")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_those_that_there_are(document, tmp_path, monkeypatch, capsys):
    (tmp_path / "some_recordings").mkdir()  # which one of the parsers looks for
    monkeypatch.chdir(tmp_path)
    for words in commands(document):
        try:
            parse(words)
        except SystemExit as end:
            raise AssertionError(f"{' '.join(words)}: {capsys.readouterr().err}") from end


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_is_mentioned_are_commands_and_options_that_there_are(document):
    for words in mentions(document):
        if words[0] == "dls":
            known = COMMANDS[words[1]][0].parser()._option_string_actions if words[1] != "COMMAND" else {}
            assert not {word for word in words if word.startswith("--")} - known.keys(), words
        elif words[0] != "python" or not words[1].startswith("train_"):
            parse(words)


@pytest.mark.parametrize(
    "command", ["dls embed x --outptu y", "make nonesuch", "python train_npid.py --epochs 3", "pip install '.[x]'"]
)
def test_a_command_that_there_is_not_is_found(command):
    with pytest.raises((AssertionError, SystemExit)):
        parse(shlex.split(command))


def test_datasets(tmp_path, monkeypatch):
    """docs/datasets.md, but for the commands that train: with small sounds, in place of /data in a folder of ours."""
    document = ROOT / "docs" / "datasets.md"
    make_esc50(tmp_path / "data" / "ESC-50")
    (tmp_path / "recordings").mkdir()
    (tmp_path / "recordings" / "night.wav").write_bytes(wav(3700))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for language, content in blocks(document):
        content = content.replace("/data/", f"{tmp_path}/data/")
        if language == "python":
            if "cut_into_windows" in content:
                names["dataset"] = load_corpus("audiofolder", "recordings")
            exec(content, names)
        for command in content.splitlines() if language == "bash" else ():
            words = shlex.split(command)
            if words[:3] == ["python", "-m", "datasets_scripts"]:
                assert corpora(words[3:]) == 0
            else:
                assert words[-1] == "…"
    assert names["samples"].shape[0] == 1 and len(names["windows"]) > 7 and len(names["block"][0]) > 0
    assert len(names["held_out"]) == 400 and len(names["dataset"]) == 2000


@pytest.mark.slow
def test_device(tmp_path, monkeypatch):
    """docs/device.md, but for what pip, a microphone and training do."""
    save(ESResNetForAudioClassification, tmp_path / "runs" / "mine", num_labels=3)
    for name in ("recordings", "some_recordings"):
        write_recordings(tmp_path / name)
    random = np.random.default_rng(0)
    for name in ("night-1.wav", "night-2.wav", "clip.wav"):
        soundfile.write(tmp_path / name, 0.1 * random.standard_normal(30 * RATE), RATE)
    monkeypatch.chdir(tmp_path)
    for language, content in blocks(ROOT / "docs" / "device.md"):
        if language == "csv":
            Path("labels.csv").write_text(content)
        for line in content.splitlines() if language == "bash" else ():
            words = shlex.split(line.rpartition(" | ")[2], comments=True)
            if words[0] == "dls":
                assert dls(words[1:]) == 0
            elif words[0] == "python":
                sound = bytes(2 * RATE * 2) if words[-1] == "-" else b""
                run = subprocess.run([sys.executable, *words[1:]], input=sound, capture_output=True, timeout=300)
                assert run.returncode == 0, run.stderr.decode()
            else:
                assert words[0] in ("pip", "accelerate")
    for name in ("mine.onnx", "mine8.onnx", "taught.onnx", "detections.csv"):
        assert Path(name).stat().st_size > 100
