"""A cache on disk that many runs share: written once, mapped by all, and bounded."""

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import datasets
from filelock import FileLock

from datasets_scripts.errors import UserError
from datasets_scripts.files import folder_moved_into_place, read_object, write_json

try:
    import fcntl
except ImportError:  # Windows, which refuses by itself to delete what is mapped
    fcntl = None

logger = logging.getLogger("dls")

INDEX_FILE = "index.json"
LEFTOVER_SECONDS = 24 * 3600  # since a run that was killed wrote last


class CachedFolder:
    """A folder in the cache of `datasets` (`HF_DATASETS_CACHE`), under a name that says what is in it.

    Runs that want the same write it once. One lock of the whole cache is held while folders appear, are claimed or
    deleted, and each folder has a lock of its own while it is written. Who uses a folder holds a shared lock on it, so
    that nobody deletes it: also for as long as a run that was killed takes to disappear, and not longer.

    Attributes:
        path: The folder.
        index: What `write` returned when it was written.
    """

    def __init__(self, name: str, write: Callable[[Path], dict], max_gigabytes: float):
        """
        Args:
            name: Of the folder.
            write: Fills a folder, and returns what is needed to read it, as JSON takes it.
            max_gigabytes: Of all folders: those that were not used for longest are deleted to make room.

        Raises:
            UserError: if the cache cannot be written.
        """
        self.root = Path(datasets.config.HF_DATASETS_CACHE) / "dls_cache"
        self.path = self.root / name
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not self._claim():
                self._write(write)
            with self._lock():
                self._make_room(max_gigabytes)
        except OSError as error:
            raise UserError(
                f"the cache {self.root} cannot be used ({error.strerror or error}): the environment variable "
                "HF_DATASETS_CACHE can name another place"
            ) from error
        self.index = read_object(self.path / INDEX_FILE)["index"]

    def _lock(self, name: str = "") -> FileLock:
        return FileLock(self.root / f"{name}.lock")

    def _claim(self) -> bool:
        """Says that this run uses the folder, whether it is there already or not. Returns whether it is."""
        with self._lock():
            self.in_use = use(self.path, exclusive=False)
            os.utime(use_file(self.path))
            return self._is_whole()

    def _is_whole(self) -> bool:
        """Whether the folder is there with all that was written."""
        content = read_object(self.path / INDEX_FILE) or {}
        written = content.get("files") if "index" in content else None
        sizes = {path.name: path.stat().st_size for path in self.path.glob("*") if path.name != INDEX_FILE}
        return sizes == written

    def _write(self, write: Callable[[Path], dict]) -> None:
        with self._lock(self.path.name):
            if self._is_whole():  # by another run, meanwhile
                return
            for leftover in self.root.glob(f".{self.path.name}.*"):  # of a run that was killed
                shutil.rmtree(leftover)
            with folder_moved_into_place(self.path) as unfinished:
                index = write(unfinished)
                files = {path.name: path.stat().st_size for path in unfinished.iterdir()}
                for name in files:  # on the disk before the folder has its name: power may fail
                    with (unfinished / name).open("rb") as file:
                        os.fsync(file.fileno())
                write_json(unfinished / INDEX_FILE, {"index": index, "files": files})

    def _make_room(self, max_gigabytes: float) -> None:
        """Deletes what was not used for longest; never what is in use."""
        for leftover in self.root.glob(".*.*"):  # of runs that were killed, and never started again
            with contextlib.suppress(FileNotFoundError):  # or of one that has just finished
                if leftover.is_dir() and time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                    shutil.rmtree(leftover)
        left = max_gigabytes
        folders = [path for path in self.root.iterdir() if path.is_dir() and not path.name.startswith(".")]
        for folder in sorted(folders, key=lambda path: (path != self.path, -last_used(path))):
            left -= gigabytes(folder)
            if left < 0 and (claimed := use(folder, exclusive=True)):
                with claimed:
                    logger.info(f"{folder} is deleted: --cache_gigabytes is {max_gigabytes:g}")
                    shutil.rmtree(folder)
                    use_file(folder).unlink()


def use_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.use")


def use(folder: Path, exclusive: bool) -> TextIO | None:
    """The file by which runs say that they use a folder, locked; None where others' locks forbid that."""
    file = use_file(folder).open("a")
    if fcntl is None:
        return file
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def last_used(folder: Path) -> float:
    file = use_file(folder)
    return (file if file.exists() else folder).stat().st_mtime


def gigabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e9
