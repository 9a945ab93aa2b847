"""A script at work below `reproduce.py`: how it is started, watched, stopped and never started twice."""

import contextlib
import ctypes
import fcntl
import io
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from datasets_scripts.command_line import SignalWatch
from datasets_scripts.errors import Interrupted, UserError

from .cells import CellStore, local_weights
from .plan import Cell

HERE = Path(__file__).resolve().parents[1]
# A progress bar ends with its times, "[00:03<00:12, 45.0 clips/s]"; a line of the log may follow it.
PROGRESS_BAR = re.compile(r".*\[\d+:\d\d[\d:]*[<,].*?\]")
PR_SET_PDEATHSIG = 1  # of Linux's prctl
SECONDS_FOR_A_PREDECESSOR = 120
POLL_SECONDS = 0.2


@contextlib.contextmanager
def claimed(work: Path) -> Iterator[int]:
    """Lets one reproduce.py at a time into a work folder.

    Gives the lock's file descriptor, which scripts inherit: the lock holds until the last of them has ended, also
    where reproduce.py was killed and its script is still saving.

    Raises:
        UserError: if the folder is in use, or cannot be written.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("a")
    except OSError as error:
        raise UserError(f"--work_dir {work} cannot be written: {error.strerror}") from error
    with lock:
        for second in range(SECONDS_FOR_A_PREDECESSOR):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if second == 0:
                print(f"waiting for another run to leave {work}", flush=True)
            time.sleep(1)
        else:
            raise UserError(f"{work} is in use by another reproduce.py, or by a script that one has started")
        yield lock.fileno()


class ScriptRun:
    """A script in a process group of its own, so that signals reach it through `interrupt` only, and only once."""

    def __init__(self, command: list[str], log: Path, lock: int):
        """
        Args:
            command: `python SCRIPT …` or `python -m MODULE …`, as typed in the repository's folder.
            log: A file that its output is added to. (A pipe would break if reproduce.py were killed.)
            lock: See `claimed`.
        """
        script = str(HERE / command[1]) if command[1].endswith(".py") else command[1]
        libc = ctypes.CDLL(None)

        def end_with_parent():
            """By SIGTERM, on which scripts save. Elsewhere than on Linux they run on, and the lock tells."""
            if hasattr(libc, "prctl"):
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, script, *command[2:]], stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True, pass_fds=[lock], preexec_fn=end_with_parent,
            )  # fmt: skip
        self.output = log.open("rb")
        self.output.seek(0, io.SEEK_END)
        self.interrupted = False

    def interrupt(self, number: int) -> None:
        """Has it save and end, by a signal."""
        if not self.interrupted:
            self.process.send_signal(number)
        self.interrupted = True

    def exit_code(self) -> int | None:
        """None while it runs. On a terminal, what it printed meanwhile is shown."""
        code, news = self.process.poll(), self.output.read()
        if sys.stderr.isatty():
            sys.stderr.buffer.write(news)
            sys.stderr.flush()
        return code


def plain_lines(log: Path) -> list[str]:
    """What a script printed as it stands in the end, without progress bars."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = (PROGRESS_BAR.sub("", line.rpartition("\r")[2]).rstrip() for line in text.split("\n"))
    return [line for line in lines if line]


def duration(seconds: float) -> str:
    """Rounded as one would say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def run_cell(cell: Cell, store: CellStore, lock: int, watch: SignalWatch, deadline: float) -> bool:
    """Runs a cell's script and keeps its result.

    Args:
        cell: What it starts from is there.
        store: Of its plan.
        lock: From `claimed`.
        watch: Of signals, which the script gets too.
        deadline: By time.monotonic, when it is to save and end.

    Returns:
        Whether it ended well.

    Raises:
        Interrupted: after a signal; TimeoutError: at the deadline. The script has saved then.
    """
    earlier, started = store.begin(cell), time.monotonic()
    command, log = store.command(cell), store.work / f"{cell.name}.log"
    typed = shlex.join(command)
    if cell.kind == "imagenet":
        command[3] = local_weights(command[3])
    elif Path(store.folder(cell)).exists():
        command += ["--resume_from_checkpoint", "latest"]
    run = ScriptRun(command, log, lock)
    try:
        while (code := run.exit_code()) is None:
            if watch.received or time.monotonic() > deadline:
                run.interrupt(watch.received or signal.SIGTERM)
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:  # a second one: now without saving
        run.process.kill()
        raise
    seconds, lines = earlier + time.monotonic() - started, plain_lines(log)
    store.keep_log(cell, [f"$ {typed}", *lines])
    if code == 0:
        store.finish(cell, seconds)
        print(f"    done in {duration(seconds)}", flush=True)
        return True
    store.note(cell, seconds=seconds)
    if run.interrupted:
        raise Interrupted(watch.received) if watch.received else TimeoutError
    print(f"    failed with exit code {code}:", *lines[-5:], sep="\n      ", flush=True)
    if "--resume_from_checkpoint" in command:
        print(f"    (it went on from what was in {store.folder(cell)}; without that, it would start anew)", flush=True)
    return False
