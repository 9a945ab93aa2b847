"""Running the project's scripts: in this process; in a forked one, to be killed; or from the start, as a user does.

A process that starts imports for seconds what tiny networks train with in less: where starting is not what is tested,
a test should do without it.
"""

import contextlib
import io
import logging
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from dls_training.settings import ClassificationSettings, PretrainingSettings

ROOT = Path(__file__).parents[1]
# Enough for a tiny network and the half-second clips of `sound_folder`.
SMALL = [
    "--preset", "tiny", "--clip_seconds", "0.5", "--per_device_train_batch_size", "8", "--report_to", "none",
]  # fmt: skip

SETTINGS = {"train_npid": PretrainingSettings, "train_classification": ClassificationSettings}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([*SETTINGS, "dls_sounds.embedding", "dls_sounds.predicting"])
MEASURED = ("clips_per_second", "seconds")  # in a run's history, by a clock


def start(command: list, **options) -> subprocess.Popen:
    """Starts `python SCRIPT …` (or `accelerate launch SCRIPT …`, `python -m MODULE …`) from another folder."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **options.pop("env", {})}
    options = {"stdout": subprocess.PIPE, **options}
    return subprocess.Popen(
        [str(part) for part in command], stderr=subprocess.STDOUT, text=True, env=environment, **options
    )


class Forked:
    """A process that is forked from one that has imported everything, to be killed, stopped, or run beside others.

    As a context manager it ends with the block.

    Attributes:
        process: As `multiprocessing` has it.
    """

    def __init__(self, log: Path, function: Callable[..., int | None], *arguments, **environment):
        """Calls a function of a module there.

        Args:
            log: Where everything goes that the process prints.
            function: Returns the exit code.
            *arguments: Of the function.
            **environment: Variables of the process, beside those of this one.
        """
        self.log = log
        self.process = FORKS.Process(target=_forked, args=(log, {**os.environ, **environment}, function, *arguments))
        self.process.start()

    @property
    def is_running(self) -> bool:
        return self.process.is_alive()

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait_for(self, happened: Callable[[], object]) -> None:
        """Until something happens that this process should bring about."""
        while not happened():
            assert self.is_running, self.output()
            time.sleep(0.002)

    def end(self) -> tuple[int, str]:
        """Exit code and output, once it has ended by itself."""
        self.process.join(timeout=300)
        assert not self.is_running, self.output()
        return self.process.exitcode, self.output()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()


def _forked(log: Path, environment: dict[str, str], function: Callable[..., int | None], *arguments) -> None:
    multiprocessing.set_start_method(None, force=True)  # a run's own processes start as they do for a user
    with log.open("ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    sys.exit(function(*arguments))


def group(folder: Path, processes: int, function, *arguments) -> list[Forked]:
    """Processes that find one another as torchrun's do, without torchrun, which ends the others where one dies."""
    folder.mkdir()
    common = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [
        Forked(folder / f"{rank}.log", function, *arguments, **common, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(processes)
    ]


def outputs(processes: list[Forked]) -> list[str]:
    """What each has printed, once all have ended well."""
    ended = []
    with contextlib.ExitStack() as running:
        for process in processes:
            running.enter_context(process)
        ended += [process.end() for process in processes]
    assert not any(code for code, _ in ended), ended
    return [output for _, output in ended]


def train(script: str, options: list) -> int:
    """What the file of a train script, or `dls`, does when it is run: its exit code."""
    from datasets_scripts.command_line import run_command
    from dls_sounds.__main__ import main as dls

    if script == "dls":
        return dls([os.fspath(option) if isinstance(option, Path) else str(option) for option in options])
    name = script.removesuffix(".py")
    return run_command(import_module(name).main, SETTINGS[name].parsed([str(option) for option in options]))


def free_port() -> int:
    """Below those that the system gives to connections: nobody takes it in the seconds until it is used."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as attempt, contextlib.suppress(OSError):
            attempt.bind(("127.0.0.1", port))
            return port


def torchrun(processes: int) -> list:
    """The start of a command that has torchrun start `processes` of them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes]
    return [*launcher, "--master_port", free_port()]


def run_script(script: str, *options, launcher: list | None = None, **popen_options) -> tuple[int, str]:
    """Exit code, and what was printed to either stream.

    It runs in this process, unless it is launched, or needs an environment or folder of its own.
    """
    name = script.removesuffix(".py")
    if name in (*SETTINGS, "dls") and not launcher and not popen_options:
        return call(name, *options)
    process = start([*(launcher or [sys.executable]), ROOT / script, *options], **popen_options)
    output = process.communicate(timeout=600)[0]
    return process.returncode, output


def call(name: str, *options) -> tuple[int, str]:
    """What a script that was imported ends with, and what it says."""
    from accelerate.state import AcceleratorState

    said, root = io.StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(said), root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    AcceleratorState._reset_state(True)  # another run may have had another precision
    try:
        with contextlib.redirect_stderr(said):
            return train(name, options), said.getvalue()
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
