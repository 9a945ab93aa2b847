"""Compares ways to pre-train, arms x folds x seeds, as one YAML file declares them, and writes the report.

    python reproduce.py results/esc10.yaml

A cell is one run of train_npid.py or train_classification.py. Its result is kept as soon as it is there, so that work
adds up over days; what was interrupted goes on. docs/reproduce.md describes the file and the report.
"""
# ruff: noqa: E402

import argparse
import sys
from pathlib import Path

from datasets_scripts.command_line import SignalWatch, run_command
from datasets_scripts.errors import UserError
from datasets_scripts.options import named_source, real
from dls_comparison.plan import FINE_TUNING, PRETRAINING, Cell, Plan, Planner


def parse_args(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Exit code: 0 if everything ran, or the time is up; 1 if a cell failed; 2 for a mistake in the file or "
        "the options; 130 or 143 after Ctrl-C or SIGTERM.",
    )
    add = parser.add_argument
    add("file", type=Path, help="what to compare; results go into the folder of the same name beside it")
    add("--corpus", action="append", type=named_source, default=[], metavar="NAME=DIR",
        help="where a corpus of the file is on this machine")  # fmt: skip
    add("--work_dir", type=Path, help="weights and checkpoints (default: runs/NAME of the file)")
    add("--only", metavar="GLOB", default="*", help="cells with such names, and what they start from (default: all)")
    add("--max_minutes", type=real(0), default=float("inf"), metavar="M",
        help="save and end after M minutes (default: go on to the end)")  # fmt: skip
    add("--delete_weights", action="store_true", help="delete a cell's weights once no unfinished cell needs them")
    add("--dry_run", action="store_true", help="print cells and commands")
    add("--report", action="store_true", help="write the report of what is there")
    args = parser.parse_args(argv)
    if args.file.suffix not in (".yaml", ".yml"):
        parser.exit(2, f"error: {args.file}: expected a .yaml file, beside which a folder of its name can be\n")
    try:
        args.plan = Planner(args.file, dict(args.corpus)).plan
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    args.work_dir = args.work_dir or Path("runs") / args.file.stem
    return args


# Arguments and plan are read before anything heavy is imported: mistakes are answered at once.
ARGS = parse_args() if __name__ == "__main__" else None

import contextlib
import csv
import io
import shlex
import time
from fnmatch import fnmatchcase

from datasets_scripts.errors import Interrupted
from datasets_scripts.exporting import is_hub_id
from datasets_scripts.files import files_moved_into_place
from dls_comparison import outcomes
from dls_comparison.cells import CellStore
from dls_comparison.running import claimed, duration, run_cell
from dls_comparison.tables import tables
from dls_training.report import draw_comparison
from dls_training.settings import ClassificationSettings, PretrainingSettings
from hub_cards import write_comparison


def cells_to_run(plan: Plan, store: CellStore, only: str) -> list[Cell]:
    """Cells without a result, and those without weights that they start from, each after what it starts from.

    Raises:
        UserError: if no cell has such a name.
    """
    chosen = [cell for cell in plan.cells if fnmatchcase(cell.name, only)]
    if not chosen:
        raise UserError(f"--only {only}: there is no such cell in {plan.file}; --dry_run lists them")
    wanted = set()

    def add(cell: Cell) -> None:
        wanted.add(cell.name)
        if cell.start and not store.has_weights(cell.start):
            add(cell.start)

    for cell in chosen:
        # ImageNet weights are converted where a cell starts from them, and not for their own sake.
        if cell.kind != "imagenet" and not store.result(cell) and not store.blocked(cell):
            add(cell)
    return [cell for cell in plan.cells if cell.name in wanted]


def check_commands(plan: Plan, store: CellStore, cells: list[Cell]) -> None:
    """Has the scripts' own parsers read every command before the first one is run.

    Raises:
        UserError: naming the file and the key.
    """
    for name in dict.fromkeys(name for cell in cells for name in cell.corpora):
        source = plan.directories[name]
        on_the_hub = is_hub_id(source or "") and not source.startswith(".")
        if source and not on_the_hub and not Path(source).expanduser().exists():
            raise UserError(f"{plan.file}: corpora.{name}: there is no {source} here (see --corpus {name}=DIR)")
    if not cells:
        return
    parsers = {PRETRAINING: PretrainingSettings.parsed, FINE_TUNING: ClassificationSettings.parsed}
    for cell in (cell for cell in cells if cell.script in parsers):
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                parsers[cell.script](store.command(cell)[2:])
        except SystemExit as error:
            message = said.getvalue().strip().splitlines()[-1].rpartition("error: ")[2]
            raise UserError(f"{plan.file}: options of {cell.where}: {message}") from error


def run_cells(args, store: CellStore, started: float) -> int:
    """Runs one cell after the other. Returns how many failed, or could not start because of that.

    Raises:
        Interrupted: after a signal, with everything saved.
        TimeoutError: when --max_minutes are over, likewise.
    """
    failed, deadline = 0, started + 60 * args.max_minutes
    with claimed(args.work_dir) as lock, SignalWatch() as watch:
        cells = cells_to_run(args.plan, store, args.only)  # not before: another run may have been at work until now
        store.clear_leftovers()
        if args.delete_weights:
            store.delete_weights()
        for number, cell in enumerate(cells):
            if watch.received:
                raise Interrupted(watch.received)
            if time.monotonic() > deadline:
                raise TimeoutError
            spent, left = time.monotonic() - started, time_left(store, cells[number:])
            print(
                f"[{number + 1}/{len(cells)}] {cell.name} ({store.state(cell)}): {duration(spent)} so far, {left}",
                flush=True,
            )
            if cell.start and not store.has_weights(cell.start):
                print(f"    not started: it needs {cell.start.name}", flush=True)
                failed += 1
            elif not run_cell(cell, store, lock, watch, deadline):
                failed += 1
            if args.delete_weights:
                store.delete_weights()
    return failed


def time_left(store: CellStore, cells: list[Cell]) -> str:
    """An estimate from what finished cells of the same setting, or at least of the same kind, took."""
    taken = {}
    for cell in store.plan.cells:
        if result := store.result(cell):
            for group in groups(cell):
                taken.setdefault(group, []).append(result["wall_seconds"])
    known = [next((taken[group] for group in groups(cell) if group in taken), None) for cell in cells]
    left = sum(sum(times) / len(times) for times in known if times)
    unknown = sum(times is None for times in known)
    return f"about {duration(left)} left" + (f" and {unknown} cell(s) of a kind not yet timed" if unknown else "")


def groups(cell: Cell) -> tuple:
    return (cell.kind, cell.facts.get("setting"), cell.facts.get("pretraining")), cell.kind


def skipped(plan: Plan, store: CellStore) -> dict[str, str]:
    """{arm or pre-training: why it cannot be run}"""
    reasons = {}
    for cell in plan.cells:
        if cell.kind != "imagenet" and not store.result(cell) and (reason := store.blocked(cell)):
            is_arm = "arm" in cell.facts
            what = plan.arms[cell.facts["arm"]]["label"] if is_arm else f"pre-training {cell.facts['pretraining']}"
            reasons[what] = reason
    return reasons


def write_report(plan: Plan, store: CellStore) -> None:
    """README.md, accuracy.png, per_epoch.csv and commands.txt: from the cells' results, and nothing else."""
    cells = [cell for cell in plan.cells if cell.kind != "imagenet"]
    results = [result for cell in plan.cells if (result := store.result(cell))]
    by_setting = outcomes.gather(plan, results)
    panels = outcomes.curves(by_setting)
    with files_moved_into_place(store.results) as folder:
        write_comparison(
            folder / "README.md",
            plan=plan,
            cells=len(cells),
            done=sum(bool(store.result(cell)) for cell in cells),
            took=duration(sum(result["wall_seconds"] for result in results)),
            missing=[cell.name for cell in cells if not store.result(cell) and not store.blocked(cell)],
            skipped=skipped(plan, store),
            has_curves=bool(panels),
            **tables(plan, by_setting, results),
        )
        with (folder / "per_epoch.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, outcomes.EPOCH_COLUMNS)
            writer.writeheader()
            writer.writerows(outcomes.epoch_lines(results))
        commands = [f"{shlex.join(store.command(cell))}\n" for cell in plan.cells if not cell.ready]
        (folder / "commands.txt").write_text("".join(commands), encoding="utf-8")
        if panels:
            draw_comparison(folder / "accuracy.png", panels)
    if not panels:
        (store.results / "accuracy.png").unlink(missing_ok=True)  # of what the file said before
    print(f"{store.results / 'README.md'} reports on {len(results)} of {len(cells)} cells")


def main() -> None:
    args, started = ARGS, time.monotonic()
    plan, store = args.plan, CellStore(args.plan, args.file.with_suffix(""), args.work_dir)
    store.find_imagenet()
    for what, reason in skipped(plan, store).items():
        print(f"{what} is skipped: {reason}")
    if args.report:
        write_report(plan, store)
        return
    cells = cells_to_run(plan, store, args.only)
    check_commands(plan, store, cells)
    if args.dry_run:
        for cell in cells:
            print(f"{cell.name} ({store.state(cell)})\n  {shlex.join(store.command(cell))}")
        print(f"{len(cells)} cell(s) to run, {time_left(store, cells)}")
        return
    end, code = "", 0
    try:
        code = 1 if run_cells(args, store, started) else 0
    except TimeoutError:
        end = f"{args.max_minutes:g} minutes are over"
    except Interrupted as interruption:
        end, code = f"{interruption}: saved", interruption.exit_code
    write_report(plan, store)
    if end:
        print(f"{end}; the same command goes on from here")
    sys.exit(code)


if __name__ == "__main__":
    sys.exit(run_command(main))
