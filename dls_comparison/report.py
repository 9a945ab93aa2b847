"""The report of a comparison: README.md and accuracy.png, from the plan and the raw numbers, and nothing else."""

from pathlib import Path

from datasets_scripts.files import files_moved_into_place
from datasets_scripts.markdown import rendered
from dls_training.report import draw_comparison
from hub_cards.card import TEMPLATES

from . import tables
from .cells import CellStore
from .outcomes import FEWEST_FOR_INTERVAL, FIRST_EPOCHS, curves, gather
from .running import duration


def write_report(store: CellStore) -> None:
    """Writes both files beside the CSV, the picture where there are curves to compare."""
    plan, folder = store.plan, store.csv.parent
    cells = [cell for cell in plan.cells if cell.kind != "imagenet"]
    results = [result for cell in plan.cells if (result := store.result(cell))]
    by_setting, by_name = gather(plan, results), {result["cell"]: result for result in results}
    panels = curves(by_setting)
    done = sum(bool(store.result(cell)) for cell in cells)
    text = rendered(
        (TEMPLATES / "comparison.md").read_text(encoding="utf-8"),
        strict=True,
        plan=plan,
        file=Path(folder.resolve().parent.name) / plan.file.name,  # wherever on this machine that is
        cells=len(cells),
        done=done,
        took=duration(sum(result["wall_seconds"] for result in results)),
        missing=[cell.name for cell in cells if not store.result(cell) and not store.blocked(cell, anywhere=True)],
        skipped=store.skipped(anywhere=True),
        has_curves=bool(panels),
        settings=[tables.of_setting(plan, name, arms, by_name) for name, arms in by_setting.items() if arms],
        pretraining=tables.pretraining_rows(results),
        search=tables.search_rows(plan.corpus, results),
        search_fold=next((result["fold"] for result in results if result["kind"] == "search"), None),
        voting=tables.voting(results),
        machines=tables.machines(results),
        circumstances=tables.differences_in_circumstances(results),
        first_epochs=FIRST_EPOCHS,
        fewest=FEWEST_FOR_INTERVAL,
    )
    with files_moved_into_place(folder) as unfinished:
        (unfinished / "README.md").write_text(text, encoding="utf-8")
        if panels:
            draw_comparison(unfinished / "accuracy.png", panels)
    if not panels:
        (folder / "accuracy.png").unlink(missing_ok=True)  # of what the file said before
    print(f"{folder / 'README.md'} reports on {done} of {len(cells)} cells")
