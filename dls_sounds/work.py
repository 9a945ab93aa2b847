"""Work that can be stopped and goes on: parts that are computed once, by whichever process takes them, then one table.

The parts lie beside the output, in a hidden folder that goes when the table is in its place.
"""

import csv
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain, groupby, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from datasets_scripts.errors import LostProcess, UserError
from datasets_scripts.files import files_moved_into_place, json_digest, read_object, reason, write_json
from dls_training.cores import cores_in_use
from dls_training.runtime import lost_process, start_logging

from .engine import Finding, Recording, batches, computed, decoded
from .network import TrainedNetwork
from .settings import RecordingOptions
from .tables import table_name

logger = logging.getLogger("dls")

PART_BYTES, PART_FILES = 64 << 20, 512  # of consecutive files that are one part
ROWS_AT_A_TIME = 1024
PLAN = "plan.json"
DAYS = timedelta(days=30)  # a process may wait for another's longest recording

Rows = Callable[[str, Iterator[Finding]], Iterator[dict]]  # of a recording's name and windows


def recordings(files: Iterable[tuple[str, Path]]) -> list[Recording]:
    """Files (name, path) in order, divided into parts that take some seconds to compute, or hold one long file."""
    found, part, files_in_part, size = [], 0, 0, 0
    for name, path in files:
        own = path.stat().st_size if path.exists() else 0
        if files_in_part and (size + own > PART_BYTES or files_in_part == PART_FILES):
            part, files_in_part, size = part + 1, 0, 0
        found.append(Recording(part, name, str(path)))
        files_in_part, size = files_in_part + 1, size + own
    return found


class Work:
    """What remains to be done for an output, and what was done.

    Attributes:
        recordings: All of them.
        num_parts: Of them.
        is_main: Whether this process writes the output.
    """

    def __init__(self, output: Path, recordings: list[Recording], plan: dict):
        """
        Args:
            output: The table.
            recordings: From `recordings`, at least one.
            plan: What decides the parts' content, beside the recordings; JSON.

        Raises:
            UserError: if nothing can be written beside the output.
        """
        self.output, self.recordings = output, recordings
        self.num_parts = recordings[-1].part + 1
        self.folder = parts_folder(output)
        self.lock = FileLock(self.folder / "lock")  # is free as soon as its process has ended, however it did
        self.is_main = int(os.environ.get("RANK", "0")) == 0
        if self.is_main:
            facts = [plan, [file_facts(each) for each in recordings]]
            self.prepare({"digest": json_digest(facts)})

    def prepare(self, plan: dict) -> None:
        """Keeps parts of the same work that was stopped; makes room for new ones."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
            outdated = (".unfinished.*", "*.claimed") if read_object(self.folder / PLAN) == plan else ("*.*",)
            for path in chain.from_iterable(map(self.folder.glob, outdated)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_json(self.folder / PLAN, plan)
        except Timeout as error:
            raise UserError(f"--output {self.output} is being written by another process: let it end first") from error
        except OSError as error:
            raise UserError(f"--output {self.output} cannot be written ({reason(error)})") from error
        if done := len(list(self.folder.glob("*.parquet"))):
            logger.info(f"going on: {done} of {self.num_parts} parts were done before")

    def part(self, number: int, suffix: str = ".parquet") -> Path:
        return self.folder / f"{number:06d}{suffix}"

    def claimed(self) -> Iterator[Recording]:
        """Those of parts that are not done and no other process has taken, which are taken as they are asked for."""
        for number, own in groupby(self.recordings, key=lambda recording: recording.part):
            if self.part(number).exists():
                continue
            try:
                self.part(number, ".claimed").touch(exist_ok=False)
            except FileExistsError:
                continue
            yield from own

    def write(self, number: int, rows: Iterable[dict], unreadable: dict[str, str], schema: pa.Schema) -> None:
        """A part's rows as they come, and {file: reason} that is known when they have ended."""
        with files_moved_into_place(self.folder) as unfinished:
            write_rows(unfinished / self.part(number).name, rows, schema)
            write_json(unfinished / self.part(number, ".json").name, unreadable)

    def unreadable(self) -> dict[str, str]:
        """{file: reason}, in order."""
        parts = (json.loads(self.part(number, ".json").read_text("utf-8")) for number in range(self.num_parts))
        return {file: why for part in parts for file, why in part.items()}

    def tables(self, unreadable: dict[str, str]) -> Iterator[pa.RecordBatch]:
        """All rows, in order, but for those of files that could not be read to their ends."""
        refused = pa.array(list(unreadable), pa.string())
        for number in range(self.num_parts):
            with pq.ParquetFile(self.part(number)) as file:
                for table in file.iter_batches(ROWS_AT_A_TIME):
                    yield table.filter(pc.invert(pc.is_in(table["file"], refused))) if unreadable else table


def file_facts(recording: Recording) -> list:
    """What tells that a file is as it was."""
    stat = os.stat(recording.path) if os.path.exists(recording.path) else None  # as standard input does not
    return [recording.name, table_name(recording.path), stat and [stat.st_size, stat.st_mtime_ns]]


def parts_folder(output: Path) -> Path:
    """Beside the output."""
    return output.with_name(f".{output.name}.parts")


def write_rows(path: Path, rows: Iterable[dict], schema: pa.Schema) -> None:
    """Parquet, some rows at a time."""
    rows = iter(rows)
    with pq.ParquetWriter(path, schema) as writer:
        while some := list(islice(rows, ROWS_AT_A_TIME)):
            writer.write_table(pa.Table.from_pylist(some, schema))


@contextmanager
def processes() -> Iterator[None]:
    """Of torchrun: lets them wait for one another.

    Raises:
        LostProcess: if another has died.
    """
    start_logging(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.distributed.init_process_group("gloo", timeout=DAYS)
    try:
        yield
    except RuntimeError as error:
        if not lost_process(error):
            raise
        raise LostProcess("another process of this run has died; the same command goes on from here") from error
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def wait_for_the_others() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def compute(
    work: Work, network: TrainedNetwork, settings: RecordingOptions, rows: Rows, schema: pa.Schema,
    pcm_rate: int | None = None,
) -> None:  # fmt: skip
    """Does what of the work is not done, together with the other processes."""
    wait_for_the_others()  # until the main process has made room
    threads, step = cores_in_use(), network.step(settings.overlap)
    with tqdm(total=len(work.recordings), unit=" files", disable=not work.is_main) as bar:
        windows = decoded(work.claimed(), network, step, pcm_rate, threads)
        findings = computed(batches(windows, settings.batch_size), network, threads)
        findings = with_progress(findings, bar, network.extractor.sampling_rate)
        for number, own in groupby(findings, key=lambda finding: finding.recording.part):
            unreadable = {}
            work.write(number, rows_of_part(own, rows, unreadable), unreadable, schema)
    wait_for_the_others()


def with_progress(findings: Iterable[Finding], bar: tqdm, rate: int) -> Iterator[Finding]:
    """Counts files, and the hours of sound that were heard: one file can be as long as many."""
    heard, position, shown = 0, 0, time.monotonic()
    for finding in findings:
        yield finding
        if finding.values is None:
            heard, position = heard + position, 0
            bar.update()
        else:
            position = finding.end
        if time.monotonic() > shown + 0.5:
            bar.set_postfix_str(f"{(heard + position) / rate / 3600:.2f} h of sound")
            shown = time.monotonic()


def rows_of_part(findings: Iterable[Finding], rows: Rows, unreadable: dict[str, str]) -> Iterator[dict]:
    """Rows of each recording in turn; those that cannot be read to their ends are noted in `unreadable`."""

    def windows(own: Iterable[Finding]) -> Iterator[Finding]:
        for finding in own:
            if finding.values is not None:
                yield finding
            elif finding.error:
                unreadable[finding.recording.name] = finding.error

    for recording, own in groupby(findings, key=lambda finding: finding.recording):
        yield from rows(recording.name, windows(own))


def finish(work: Work, write: Callable[[Path, Iterator[pa.RecordBatch]], int]) -> None:
    """Puts the table into its place, and the list of unreadable files beside it.

    Args:
        work: Of which every part is done.
        write: Writes the output of that name from all rows, and returns their number.

    Raises:
        UserError: if no file can be read, or the table cannot be written.
    """
    if not work.is_main:
        return
    output, unreadable = work.output, work.unreadable()
    listed, total = output.with_name(f"{output.stem}.unreadable.csv"), len(work.recordings)
    if len(unreadable) == total:
        shutil.rmtree(work.folder)
        raise UserError(f"none of the {total} files can be read; the first: {next(iter(unreadable.values()))}")
    with files_moved_into_place(output.parent, by_way_of=work.folder) as unfinished:
        count = write(unfinished / output.name, work.tables(unreadable))
        if unreadable:
            with (unfinished / listed.name).open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("file", "reason"), *unreadable.items()])
    shutil.rmtree(work.folder)
    work.lock.release()
    if unreadable:
        logger.warning(f"{len(unreadable)} of {total} files cannot be read: see {listed}")
    else:
        listed.unlink(missing_ok=True)  # of an earlier run
    logger.info(f"{output}: {count} rows")
