"""Settings: the same from a command line and from Python, and one line for whatever is wrong with them."""

import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import pytest
from scripts import ROOT

import train_classification
import train_npid
from datasets_scripts.errors import UserError
from datasets_scripts.options import Options, flag, named_source, one_of, option, path, real, text, whole
from dls_sounds.settings import EmbedSettings, PredictSettings, SearchSettings
from dls_training.settings import ClassificationSettings, PretrainingSettings

SOUNDS = {
    EmbedSettings: ["in", "--output", "x.parquet", "--windows"],
    PredictSettings: ["-", "--output", "x.csv", "--model", "m"],
    SearchSettings: ["a.wav", "--index", "x.parquet"],
}  # and what must be given to them


@dataclass(kw_only=True)
class Small(Options):
    """What a command with every kind of option takes."""

    SCRIPT: ClassVar[str] = "small.py"
    RECIPES: ClassVar[dict] = {"plain": {"on": False}, "rich": {"on": True, "share": 0.75}}

    recipe: str = option("plain", one_of(*RECIPES), "a set of defaults")
    folder: Path = option(None, path, "where", positional=True, required=True)
    count: int = option(7, whole(1, 100), "how many")
    share: float = option(0.25, real(0, below=1), "of a whole, in %")
    on: bool = option(False, flag, "or off")
    loud: bool = option(False, flag, "or not")
    word: str | None = option(None, text, "anything (default: nothing)")
    length: float | None = option(None, real(0.0), "in s", bare=2.0)
    source: list = option([("a", None)], named_source, "several", many=True)


GIVEN = {"folder": "x", "count": 3, "share": 0.5, "on": True, "loud": True, "word": "two words", "length": 2.0}
WORDS = ["x", "--count", "3", "--share=0.5", "--on", "--loud", "--word", "two words", "--length"]
WORDS += ["--source", "a=b", "--source", "c"]


def test_a_command_line_and_python_say_the_same():
    said, called = Small.parsed(WORDS), Small(**GIVEN, source=[("a", "b"), "c"])
    assert said.command == shlex.join(["small.py", *WORDS])
    assert said.plain() == called.plain() and said.source == [("a", "b"), ("c", None)] and said.folder == Path("x")
    again = Small.parsed(shlex.split(called.command)[1:])
    assert again.plain() == called.plain() and "two words" in called.command


def test_recipes_are_defaults_that_what_is_given_outdoes():
    assert (Small(folder="x").on, Small(folder="x").share, Small(folder="x").count) == (False, 0.25, 7)
    rich = Small(folder="x", recipe="rich")
    assert (rich.on, rich.share, rich.count) == (True, 0.75, 7)
    assert Small(folder="x", recipe="rich", share=0.25).share == 0.25
    assert not Small.parsed(["x", "--recipe=rich", "--no-on"]).on
    assert Small(folder="x").source == [("a", None)] and Small(folder="x").source is not Small(folder="y").source


WRONG = [
    (["--count", "0"], "argument --count: must be between 1 and 100, not 0"),
    (["--count", "12345678901234567890"], "must be between 1 and 100, not 12345678901234567890"),
    (["--count", "1.5"], "must be a whole number, not '1.5'"),
    (["--count", ""], "must be a whole number, not ''"),
    (["--share", "inf"], "argument --share: must be a finite number, not 'inf'"),
    (["--share", "nan"], "must be a finite number, not 'nan'"),
    (["--share", "1e999"], "must be a finite number, not '1e999'"),
    (["--share", "1"], "must be at least 0 and below 1, not 1"),
    (["--share", "-0.5"], "must be at least 0, not -0.5"),
    (["--word", ""], "argument --word: must not be empty"),
    (["--word", " "], "must not be empty"),
    (["--source="], "argument --source: must not be empty"),
    (["--source", "a="], "argument --source: must not be empty"),
    (["--source", "=b"], "argument --source: must not be empty"),
    (["--source", "a=~nobody-here/x"], "argument --source: ~nobody-here/x: Could not determine home directory."),
    (["--recipe", "poor"], "argument --recipe: invalid choice: 'poor' (choose from plain, rich)"),
    (["--nonsense"], "unrecognized arguments: --nonsense"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_what_is_wrong_is_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        Small.parsed(["x", *words])
    *usage, line = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("small.py: error: ") and line.endswith(message)
    assert not any("Traceback" in before for before in usage)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 1.5}, "argument --count: must be a whole number, not 1.5"),
        ({"count": True}, "argument --count: must be a whole number, not True"),
        ({"share": float("inf")}, "argument --share: must be a finite number, not inf"),
        ({"loud": "yes"}, "argument --loud: must be True or False, not 'yes'"),
        ({"folder": None}, "argument FOLDER: must be given"),
    ],
)
def test_python_is_told_the_same(given, message):
    with pytest.raises(UserError) as error:
        Small(**{"folder": "x"} | given)
    assert str(error.value) == message


def test_a_tilde_is_the_users_folder_behind_an_equals_sign_too(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert Small.parsed(["~/x"]).folder == Path("/home/somebody/x")
    assert Small.parsed(["x", "--source=a=~/b"]).source == [("a", "/home/somebody/b")]
    given = ["--corpus=esc10=~/ESC-10", "--model_name_or_path=~/npid", "--output_dir=~/runs"]
    settings = ClassificationSettings.parsed(given)
    assert settings.corpus == [("esc10", "/home/somebody/ESC-10")] and settings.output_dir == Path(
        "/home/somebody/runs"
    )
    assert settings.model_name_or_path == "/home/somebody/npid"


@pytest.mark.parametrize("settings", [PretrainingSettings, ClassificationSettings, *SOUNDS])
def test_every_number_is_bounded(settings, capsys):
    """Whatever is given to an option is taken, or is one line that names it: never a traceback."""
    for own in settings.__dataclass_fields__.values():
        if own.metadata.get("read") in (None, flag) or own.metadata["positional"]:
            continue
        for value in ("inf", "nan", "-inf", "9" * 20, "-" + "9" * 20, "", "0x10", "1e-400", "~nobody-here"):
            try:
                settings.parsed([*SOUNDS.get(settings, []), f"--{own.name}={value}"])
            except SystemExit as end:
                assert end.code == 2
                assert f"{own.name}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("settings", [PretrainingSettings, ClassificationSettings, *SOUNDS])
def test_help_says_every_default_once(settings, capsys):
    with pytest.raises(SystemExit):
        settings.parsed(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for own in settings.__dataclass_fields__.values():
        if "read" in own.metadata and not own.metadata["positional"]:
            assert f"--{own.name}" in shown
    assert "None)" not in shown and "default: default" not in shown


@pytest.mark.parametrize("script", ["train_npid.py", "train_classification.py", "dls", "dls embed", "reproduce.py"])
def test_help_does_not_wait_for_heavy_imports(script):
    """Below 0.2 s on a quiet machine (docs/speed.md); by what is not imported, which a busy one does not change."""
    words = [*script.split(), "--help"]
    code = f"import runpy, sys; sys.argv = {words}; sys.path.insert(0, {str(ROOT)!r})\n"
    run = "run_module('dls_sounds'" if words[0] == "dls" else f"run_path({str(ROOT / script)!r}"
    code += f"try: runpy.{run}, run_name='__main__')\n"
    code += "except SystemExit: pass\nprint(sorted({'torch', 'numpy', 'transformers', 'datasets'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.splitlines()[-1] == "[]"


def test_a_script_can_be_called(sound_folder, tmp_path):
    """Both, in this process, from Python alone."""
    common = {"preset": "tiny", "clip_seconds": 0.5, "report_to": "none", "max_train_steps": 1}
    common |= {"corpus": [("audiofolder", str(sound_folder))], "per_device_train_batch_size": 8}
    train_npid.main(PretrainingSettings(**common, output_dir=tmp_path / "npid"))
    start = {"model_name_or_path": str(tmp_path / "npid"), "preset": None, "fold": 1}
    train_classification.main(ClassificationSettings(**common | start, output_dir=tmp_path / "classifier"))
    assert (tmp_path / "classifier" / "model.safetensors").is_file()


COMMANDS = [
    ("hub_cards", ["publish", "", "--hub_model_id", "a"], "argument RUN_FOLDER: must not be empty"),
    ("hub_cards", ["publish", "a", "--hub_model_id", ""], "argument --hub_model_id: must not be empty"),
    ("hub_cards", ["space", "a", "--corpus=esc10="], "argument --corpus: must not be empty"),
    ("datasets_scripts", ["export", "esc10", "--output_dir="], "argument --output_dir: must not be empty"),
    ("datasets_scripts", ["describe", "esc10", "--data_dir="], "argument --data_dir: must not be empty"),
]


@pytest.mark.parametrize(("module", "words", "message"), COMMANDS)
def test_the_other_commands_refuse_likewise(module, words, message, capsys):
    with pytest.raises(SystemExit) as end:
        import_module(f"{module}.__main__").main(words)
    assert end.value.code == 2 and capsys.readouterr().err.splitlines()[-1].endswith(f"error: {message}")
