"""Cells at work, one after the other: what is to run, and how a script is started, watched, stopped."""

import contextlib
import ctypes
import fcntl
import io
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from datasets_scripts.command_line import SignalWatch
from datasets_scripts.errors import Interrupted, UserError
from datasets_scripts.exporting import is_hub_id
from dls_training.settings import ClassificationSettings, PretrainingSettings

from .cells import CellStore, local_weights
from .plan import FINE_TUNING, PRETRAINING, Cell

HERE = Path(__file__).resolve().parents[1]
# A progress bar ends with its times, "[00:03<00:12, 45.0 clips/s]"; a line of the log may follow it.
PROGRESS_BAR = re.compile(r".*\[\d+:\d\d[\d:]*[<,].*?\]")
PR_SET_PDEATHSIG = 1  # of Linux's prctl
SECONDS_FOR_A_PREDECESSOR = 120
POLL_SECONDS = 0.2
# How a command begins -> what this environment's Python is called with instead.
PROGRAMS = {
    ("python",): [],
    ("accelerate", "launch"): ["-m", "accelerate.commands.launch"],
    ("torchrun",): ["-m", "torch.distributed.run"],
}
SETTINGS = {PRETRAINING: PretrainingSettings, FINE_TUNING: ClassificationSettings}


def cells_to_run(store: CellStore, only: str) -> list[Cell]:
    """Cells without a result, and those without weights that they start from, each after what it starts from.

    Raises:
        UserError: if no cell has a name like `only`.
    """
    chosen = [cell for cell in store.plan.cells if fnmatchcase(cell.name, only)]
    if not chosen:
        raise UserError(f"--only {only}: there is no such cell in {store.plan.file}; --dry_run lists them")
    wanted = set()
    for cell in chosen:
        # ImageNet weights are converted where a cell starts from them, and not for their own sake.
        if cell.kind != "imagenet" and not store.result(cell) and not store.blocked(cell):
            while cell:
                wanted.add(cell)
                cell = None if not cell.start or store.has_weights(cell.start) else cell.start
    return [cell for cell in store.plan.cells if cell in wanted]


def check_commands(store: CellStore, cells: list[Cell]) -> None:
    """Has the scripts' own parsers read every command before the first one is run.

    Raises:
        UserError: naming the file and the key.
    """
    plan = store.plan
    for name in dict.fromkeys(name for cell in cells for name in cell.corpora):
        source = plan.directories[name]
        on_the_hub = is_hub_id(source or "") and not source.startswith(".")
        if source and not on_the_hub and not Path(source).expanduser().exists():
            raise UserError(f"{plan.file}: corpora.{name}: there is no {source} here (see --corpus {name}=DIR)")
    for cell in (cell for cell in cells if cell.script in SETTINGS):
        answer = io.StringIO()
        try:
            with contextlib.redirect_stderr(answer), contextlib.redirect_stdout(answer):
                command = store.command(cell)
                SETTINGS[cell.script].parsed(command[command.index(cell.script) + 1 :])
        except SystemExit as error:
            message = answer.getvalue().strip().splitlines()[-1].rpartition("error: ")[2]
            raise UserError(f"{plan.file}: options of {cell.where}: {message}") from error


def run_cells(store: CellStore, only: str, max_minutes: float | None, delete_weights: bool) -> int:
    """Runs one cell after the other. Returns how many failed, or could not start because of that.

    Raises:
        Interrupted: after a signal, with everything saved.
        TimeoutError: when `max_minutes` are over, likewise.
    """
    failed, started = 0, time.monotonic()
    deadline = math.inf if max_minutes is None else started + 60 * max_minutes
    with claimed(store.work) as lock, SignalWatch() as watch:
        store.read()  # not before: another run may have been at work until now
        cells = cells_to_run(store, only)
        store.clear_leftovers()
        if delete_weights:
            store.delete_weights()
        for number, cell in enumerate(cells):
            if watch.received:
                raise Interrupted(watch.received)
            if time.monotonic() > deadline:
                raise TimeoutError
            spent, left = time.monotonic() - started, time_left(store, cells[number:])
            progress = f"{cell.name} ({store.state(cell)}): {duration(spent)} so far, {left}"
            print(f"[{number + 1}/{len(cells)}] {progress}", flush=True)
            if cell.start and not store.has_weights(cell.start):
                print(f"    not started: it needs {cell.start.name}", flush=True)
                failed += 1
            elif not run_cell(cell, store, lock, watch, deadline):
                failed += 1
            if delete_weights:
                store.delete_weights()
    return failed


def time_left(store: CellStore, cells: list[Cell]) -> str:
    """An estimate from what finished cells of the same setting, or at least of the same kind, took."""

    def groups(cell: Cell) -> tuple:
        return (cell.kind, cell.facts.get("setting"), cell.facts.get("pretraining")), cell.kind

    taken = {}
    for cell in store.plan.cells:
        if result := store.result(cell):
            for group in groups(cell):
                taken.setdefault(group, []).append(result["wall_seconds"])
    known = [next((taken[group] for group in groups(cell) if group in taken), None) for cell in cells]
    left = sum(sum(times) / len(times) for times in known if times)
    unknown = sum(times is None for times in known)
    return f"about {duration(left)} left" + (f" and {unknown} cell(s) of a kind not yet timed" if unknown else "")


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


def run_cell(cell: Cell, store: CellStore, lock: int, watch: SignalWatch, deadline: float) -> bool:
    """Runs a cell's script and saves its result.

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
    command, log = store.command(cell), store.log(cell)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(command)}\n")
    if cell.kind == "imagenet":
        command[3] = local_weights(command[3])
    elif (store.work / cell.name).exists():
        command += ["--resume_from_checkpoint", "latest"]
    code, interrupted = run_script(
        command, log, lock, lambda: watch.received or (time.monotonic() > deadline and signal.SIGTERM)
    )
    seconds = earlier + time.monotonic() - started
    if code == 0:
        store.finish(cell, seconds)
        print(f"    done in {duration(seconds)}", flush=True)
        return True
    store.note(cell, seconds=seconds)
    if interrupted:
        raise Interrupted(watch.received) if watch.received else TimeoutError
    print(f"    failed with exit code {code}, see {log}:", *plain_lines(log)[-5:], sep="\n      ", flush=True)
    if "--resume_from_checkpoint" in command:
        print(
            f"    (it went on from what was in {log.with_suffix('')}; without that, it would start anew)", flush=True
        )
    return False


def run_script(command: list[str], log: Path, lock: int, signal_to_send: Callable[[], int]) -> tuple[int, bool]:
    """Runs a script in a process group of its own, so that signals reach it from here only, and only once.

    Args:
        command: `python SCRIPT …` or `python -m MODULE …`, as typed in the repository's folder; or with a launcher.
        log: A file that its output is added to. (A pipe would break if reproduce.py were killed.) On a terminal, what
            is added is shown.
        lock: See `claimed`.
        signal_to_send: Asked again and again; a signal's number has the script save and end.

    Returns:
        Its exit code, and whether it was sent the signal.
    """
    command = [str(HERE / word) if word in SETTINGS else word for word in command]
    words, program = next(found for found in PROGRAMS.items() if found[0] == tuple(command[: len(found[0])]))
    command = [sys.executable, *program, *command[len(words) :]]
    # torchrun leaves it to accelerate to choose the device: without a GPU it needs to be told.
    environment = os.environ | ({"ACCELERATE_USE_CPU": "true"} if words == ("torchrun",) else {})
    libc = ctypes.CDLL(None)

    def end_with_parent():
        """By SIGTERM, on which scripts save. Elsewhere than on Linux they run on, and the lock tells."""
        if hasattr(libc, "prctl"):
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    interrupted = False
    with log.open("ab") as output, log.open("rb") as news:
        news.seek(0, io.SEEK_END)
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, pass_fds=[lock], preexec_fn=end_with_parent, env=environment,
        )  # fmt: skip
        try:
            while True:
                code, printed = process.poll(), news.read()
                if sys.stderr.isatty():
                    sys.stderr.buffer.write(printed)
                    sys.stderr.flush()
                if code is not None:
                    return code, interrupted
                if not interrupted and (number := signal_to_send()):
                    process.send_signal(number)
                    interrupted = True
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:  # a second one: now without saving
            process.kill()
            raise


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
