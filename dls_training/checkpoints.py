"""Writing without ever leaving half a file, and reading back what a run needs to go on."""

import contextlib
import logging
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout

from datasets_scripts.errors import UserError
from datasets_scripts.files import (
    REPLACED,
    file_digest,
    folder_moved_into_place,
    json_digest,
    read_object,
    reason,
    write_json,
)

from .record import RECORD_FILE

logger = logging.getLogger("dls")

PREFIX = "checkpoint-"
LOCK = ".lock"
STATE_FILE = "trainer_state.json"
TENSOR_FILE = "training_state.pt"


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        epoch: Epochs completed.
        step: Optimizer steps completed.
        batches: Batches of the current epoch completed, per process.
        loss_sum: Of the current epoch's clips so far.
        clips: Of the current epoch so far.
        seconds: Of training so far, evaluation included.
        history: One dict per completed epoch.
    """

    epoch: int = 0
    step: int = 0
    batches: int = 0
    loss_sum: float = 0.0
    clips: int = 0
    seconds: float = 0.0
    history: list[dict] = field(default_factory=list)


@contextlib.contextmanager
def claim_output_dir(accelerator: Accelerator, output_dir: Path, resuming: bool) -> Iterator[None]:
    """Keeps the folder for this run alone, which otherwise does not begin: before hours of work it is sure that the
    folder can be written, and that no earlier run is overwritten. What a killed run left half written goes.

    Raises:
        UserError: naming --output_dir.
    """
    if not accelerator.is_main_process:
        yield
        return
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file: expected a folder, or a name that is free")
    lock = FileLock(output_dir / LOCK)  # is free as soon as its process has ended, however it did
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"--output_dir {output_dir} is in use by another run: let it end first, or choose another folder"
        ) from error
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written: {reason(error)}") from error
    try:
        prepare_output_dir(output_dir, resuming)
        yield
    finally:
        with contextlib.suppress(OSError):  # a system may not let go of an open file
            Path(lock.lock_file).unlink()
        lock.release()


def prepare_output_dir(output_dir: Path, resuming: bool) -> None:
    """See `claim_output_dir`; of a folder that no other run uses."""
    if not resuming and output_dir.is_dir():
        patterns = (f"{PREFIX}*", "all_results.json", "fold-*", "*.safetensors")
        earlier = [path for pattern in patterns for path in output_dir.glob(pattern)]
        if earlier:
            raise UserError(
                f"--output_dir {output_dir} holds an earlier run ({earlier[0].name}): choose another folder, or go on "
                "with --resume_from_checkpoint latest"
            )
    try:
        with tempfile.TemporaryFile(dir=output_dir) as probe:
            probe.write(b"written")
        for pattern in (f".{PREFIX}*", ".unfinished.*"):  # of a run that was killed while it wrote
            for leftover in [*output_dir.glob(pattern), *output_dir.glob(f"fold-*/{pattern}")]:
                replaced, final = leftover / REPLACED, leftover.parent / leftover.name[1:].rpartition(".")[0]
                if replaced.is_dir() and not final.exists():  # killed between two renames
                    replaced.rename(final)
                shutil.rmtree(leftover)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written: {reason(error)}") from error


def recorded_options(settings) -> dict:
    """The options of the run that goes on, as its record has them; none where nothing goes on.

    Whether they are this run's, and its record whole, is looked at later (`check_same_run`).
    """
    choice = settings.resume_from_checkpoint
    if choice is None:
        return {}
    folder = settings.output_dir if choice == "latest" else Path(choice)
    for path in sorted(folder.rglob(RECORD_FILE)):
        with contextlib.suppress(LookupError, TypeError, AttributeError):
            return dict(read_object(path)["stages"][-1]["options"])
    return {}


def checkpoint_number(path: Path) -> int:
    """The step in a checkpoint folder's name, -1 where there is none."""
    number = path.name.removeprefix(PREFIX)
    return int(number) if path.name.startswith(PREFIX) and number.isdecimal() else -1


def save_checkpoint(output_dir: Path, progress: Progress, save_model, tensors: dict, record, limit: int) -> None:
    """Writes `checkpoint-STEP`, moves it into place, and only then deletes the oldest beyond `limit`.

    Args:
        output_dir: Of the run.
        progress: Where the run is.
        save_model: Called with the folder: writes what `from_pretrained` needs, and the memory bank.
        tensors: States of optimizer, scheduler and, with fp16, gradient scaler.
        record: Of the run, a `Record`: saved beside the weights.
        limit: Checkpoints kept.
    """
    with folder_moved_into_place(output_dir / f"{PREFIX}{progress.step}") as folder:
        save_model(folder)
        record.save(folder)
        try:
            torch.save(tensors | {"random": torch.get_rng_state()}, folder / TENSOR_FILE)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(f"{TENSOR_FILE}: {error}") from error
        files = {path.name: file_digest(path) for path in folder.iterdir()}
        state = {"progress": asdict(progress), "files": files}
        write_json(folder / STATE_FILE, state | {"digest": json_digest(state)})
    numbered = [path for path in output_dir.glob(f"{PREFIX}*") if path.is_dir() and checkpoint_number(path) >= 0]
    # A run that went on from an earlier checkpoint than the last, or past a damaged one, leaves higher numbers behind:
    # they go first, so that what was just written stays.
    numbered.sort(key=lambda path: (checkpoint_number(path) <= progress.step, checkpoint_number(path)))
    for old in numbered[:-limit]:
        shutil.rmtree(old)


def read_state(folder: Path) -> dict | None:
    """A checkpoint's state, or None if a file is missing or is not, bit for bit, what was written."""
    state = read_object(folder / STATE_FILE)
    if state is None:
        return None
    if "run" in state:  # of an earlier version: whole or not, no run goes on from it
        return state
    digest = state.pop("digest", None)
    try:
        complete = digest == json_digest(state) and all(
            file_digest(folder / name) == written for name, written in state["files"].items()
        )
    except (OSError, LookupError, TypeError, AttributeError):  # JSON, but not of ours
        return None
    return state if complete else None


def find_checkpoint(choice: str | None, output_dir: Path) -> Path | None:
    """The checkpoint that --resume_from_checkpoint means; None starts from the beginning.

    Raises:
        UserError: if a named folder is no complete checkpoint.
    """
    if choice is None:
        return None
    if choice != "latest":
        if read_state(Path(choice)) is None:
            raise UserError(
                f"--resume_from_checkpoint {choice} is not a complete checkpoint: expected a {PREFIX}N folder"
            )
        return Path(choice)
    for folder in sorted(output_dir.glob(f"{PREFIX}*"), key=checkpoint_number, reverse=True):
        if read_state(folder) is not None:
            return folder
        logger.warning(f"{folder} is incomplete or damaged, and skipped")
    logger.info(f"{output_dir} holds no checkpoint yet: starting from the beginning")
    return None


def load_checkpoint(folder: Path) -> tuple[Progress, dict]:
    """Reads progress and tensors, and restores torch's random state.

    Args:
        folder: From `find_checkpoint`, of the run that goes on (`check_same_run`).

    Returns:
        The progress, and `tensors` as saved.

    Raises:
        UserError: naming the file that is damaged.
    """
    state = read_state(folder)
    try:
        tensors = torch.load(folder / TENSOR_FILE, map_location="cpu", weights_only=True)
        torch.set_rng_state(tensors.pop("random"))
        return Progress(**state["progress"]), tensors
    except (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        # Not torch's own words: they advise to load the file without its safety.
        raise UserError(f"{folder / TENSOR_FILE} is damaged, or is not what a training run wrote") from error
