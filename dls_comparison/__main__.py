"""Compares ways to pre-train, arms x folds x seeds, as one YAML file declares them, and writes the report.

    python reproduce.py results/esc10.yaml             # in a checkout
    python -m dls_comparison comparisons/mine.yaml     # wherever the package is installed

A cell is one run of train_npid.py or train_classification.py. Its result is saved as soon as it is there, so that work
adds up over days; what was interrupted goes on. docs/reproduce.md describes the file and the report.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from datasets_scripts.command_line import run_command
from datasets_scripts.errors import Interrupted, UserError
from datasets_scripts.options import Options, flag, named_source, option, path, real, text, whole

from .plan import read_plan


@dataclass(kw_only=True)
class ComparisonSettings(Options):
    """Compares ways to pre-train, arms x folds x seeds, as one YAML file declares them, and writes the report."""

    SCRIPT: ClassVar[str] = "reproduce.py"

    file: Path = option(
        None, path, "what to compare; results go into the folder of the same name beside it", positional=True,
        required=True,
    )  # fmt: skip
    corpus: list[tuple[str, str | None]] = option(
        [], named_source, "where a corpus of the file is on this machine", many=True, metavar="NAME=DIR"
    )
    work_dir: Path | None = option(None, path, "weights, checkpoints and logs (default: runs/NAME of the file)")
    only: str = option("*", text, "cells with such names, and what they start from (default: all)", metavar="GLOB")
    max_minutes: float | None = option(
        None, real(0), "save and end after M minutes (default: go on to the end)", metavar="M"
    )
    num_processes: int = option(
        1, whole(1, 1024), "of each train script: started with accelerate launch on GPUs, with torchrun without any"
    )
    delete_weights: bool = option(False, flag, "delete a cell's weights once no unfinished cell needs them")
    dry_run: bool = option(False, flag, "print cells and commands")
    report: bool = option(False, flag, "write the report of what is there")

    def check(self) -> None:
        if self.file.suffix not in (".yaml", ".yml"):
            raise UserError(f"{self.file}: expected a .yaml file, beside which a folder of its name can be")
        self.work_dir = self.work_dir or Path("runs") / self.file.stem

    @classmethod
    def epilog(cls) -> str:
        return (
            "Exit code: 0 if everything ran, or the time is up; 1 if a cell failed; 2 for a mistake in the file or\n"
            "the options; 130 or 143 after Ctrl-C or SIGTERM."
        )


def main(settings: ComparisonSettings) -> int:
    """Runs what is missing, and writes the report.

    Returns:
        The exit code.

    Raises:
        UserError: for a mistake in the file or the settings.
    """
    plan = read_plan(settings.file, dict(settings.corpus))
    # Not before: mistakes in the file are answered without waiting for torch.
    from .cells import CellStore
    from .report import write_report
    from .running import cells_to_run, check_commands, run_cells, time_left

    store = CellStore(plan, settings.work_dir, settings.num_processes)
    store.find_imagenet()
    for what, reason in store.skipped().items():
        print(f"{what} is skipped: {reason}")
    if settings.report:
        write_report(store)
        return 0
    cells = cells_to_run(store, settings.only)
    check_commands(store, cells)
    if settings.dry_run:
        for cell in cells:
            print(f"{cell.name} ({store.state(cell)})\n  {shlex.join(store.command(cell))}")
        print(f"{len(cells)} cell(s) to run, {time_left(store, cells)}")
        return 0
    end, code = "", 0
    try:
        code = 1 if run_cells(store, settings.only, settings.max_minutes, settings.delete_weights) else 0
    except TimeoutError:
        end = f"{settings.max_minutes:g} minutes are over"
    except Interrupted as interruption:
        end, code = f"{interruption}: saved", interruption.exit_code
    write_report(store)
    if end:
        print(f"{end}; the same command goes on from here")
    return code


if __name__ == "__main__":
    sys.exit(run_command(main, ComparisonSettings.parsed()))
