"""Running the project's scripts as a user does: in a process of their own, or, where that is not what is tested, in
this one.
"""

import contextlib
import io
import logging
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from dls_training.settings import ClassificationSettings, PretrainingSettings

ROOT = Path(__file__).parents[1]
# Enough for a tiny network and the half-second clips of `sound_folder`.
SMALL = [
    "--preset", "tiny", "--clip_seconds", "0.5", "--per_device_train_batch_size", "8", "--dataloader_num_workers", "1",
    "--report_to", "none",
]  # fmt: skip

SETTINGS = {"train_npid": PretrainingSettings, "train_classification": ClassificationSettings}
MEASURED = ("clips_per_second", "seconds")  # in a run's history, by a clock


def start(command: list, **options) -> subprocess.Popen:
    """Starts `python SCRIPT …` (or `accelerate launch SCRIPT …`, `python -m MODULE …`) from another folder."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **options.pop("env", {})}
    return subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        **options,
    )  # fmt: skip


def run_script(script: str, *options, launcher: list | None = None, **popen_options) -> tuple[int, str]:
    """Exit code, and what was printed to either stream.

    A train script runs in this process, unless it is launched, helps, or needs an environment or folder of its own:
    imports take longer than what most tests train.
    """
    name = script.removesuffix(".py")
    if name in SETTINGS and not launcher and not popen_options and "--help" not in options:
        return call(import_module(name), *options)
    process = start([*(launcher or [sys.executable]), ROOT / script, *options], **popen_options)
    output = process.communicate(timeout=600)[0]
    return process.returncode, output


def call(module, *options) -> tuple[int, str]:
    """What a train script that was imported ends with, and what it says."""
    from accelerate.state import AcceleratorState

    from datasets_scripts.command_line import run_command

    said, root = io.StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(said), root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    AcceleratorState._reset_state(True)  # another run may have had another precision
    try:
        with contextlib.redirect_stderr(said):
            settings = SETTINGS[module.__name__].parsed([str(option) for option in options])
            return run_command(module.main, settings), said.getvalue()
    except SystemExit as end:
        return end.code, said.getvalue()
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        AcceleratorState._reset_state(True)


def succeed(script: str, *options, **popen_options) -> str:
    code, output = run_script(script, *options, **popen_options)
    assert code == 0, output
    return output


def fail(script: str, *options, **popen_options) -> str:
    """A run that ends in one clear message: exit code 2, no traceback. Returns the message."""
    code, output = run_script(script, *options, **popen_options)
    assert code == 2, output
    assert "Traceback" not in output, output
    return output.splitlines()[-1]
