"""What is there of a plan's cells: results that count, weights to start from, and what an interrupted run left."""

import json
import shlex
import shutil
import time
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

from datasets_scripts.files import files_moved_into_place, write_json
from dls_training.checkpoints import PREFIX

from .plan import CONVERSION, FINE_TUNING, PRETRAINING, Cell, Plan

# What the report needs of a script's all_results.json. The rest is as long as the corpus, or stands elsewhere.
KEPT = {
    PRETRAINING: ("clips", "excluded_folds", "objective", "knn", "history", "seconds", "options", "environment"),
    FINE_TUNING: ("corpus", "folds", "options", "environment"),
    CONVERSION: (),
}


class CellStore:
    """A plan's results, logs and weights.

    Attributes:
        plan: The plan.
        results: Folder of the report, with `cells` and `logs` below it.
        work: Folder of weights and checkpoints. For each cell: its output folder, what it printed so far (`CELL.log`)
            and, in `CELL.json`, the key that it was started with and, until it is finished, the seconds that it took.
    """

    def __init__(self, plan: Plan, results: Path, work: Path):
        self.plan, self.results, self.work = plan, results, work

    def result_file(self, cell: Cell) -> Path:
        return self.results / "cells" / f"{cell.name}.json"

    def result(self, cell: Cell) -> dict | None:
        """What a finished cell measured; None where it has not run, or was something else when it ran."""
        found = read_json(self.result_file(cell))
        return found if found.get("key") == cell.key else None

    def state(self, cell: Cell) -> str:
        """Why a cell is to be run."""
        if self.unfinished(cell):
            return "goes on"
        if self.result(cell):
            return "again: its weights are gone"
        return "again: the plan has changed" if self.result_file(cell).exists() else "new"

    def folder(self, cell: Cell) -> str:
        """Where its weights are, or will be; or a Hub id."""
        return cell.ready or str(self.work / cell.name)

    def attempt(self, cell: Cell) -> dict:
        """What is noted of the cell's last run, if it was the same cell then."""
        noted = read_json(self.work / f"{cell.name}.json")
        return noted if noted.get("key") == cell.key else {}

    def unfinished(self, cell: Cell) -> bool:
        """Whether an interrupted run can go on. (A conversion takes seconds and has no checkpoints.)"""
        return "seconds" in self.attempt(cell) and cell.script != CONVERSION

    def has_weights(self, cell: Cell) -> bool:
        """Whether another cell can start from it now."""
        finished = self.attempt(cell) and not self.unfinished(cell)
        return cell.ready is not None or bool(finished and (self.work / cell.name / "model.safetensors").is_file())

    def command(self, cell: Cell) -> list[str]:
        """What a user would type, in the repository's folder."""
        if cell.script == CONVERSION:
            return ["python", *CONVERSION.split(), cell.options[0], self.folder(cell), *cell.options[1:]]
        words = []
        for name in cell.corpora:
            source = self.plan.directories[name]
            words += ["--corpus", f"{name}={source}" if source else name]
        if cell.start:
            words += ["--model_name_or_path", self.folder(cell.start)]
        elif cell.script == FINE_TUNING:
            words += ["--init", "scratch"]
        return ["python", cell.script, *words, *cell.options, "--output_dir", self.folder(cell)]

    def begin(self, cell: Cell) -> float:
        """Makes room for a run, or keeps what an interrupted one left.

        Returns:
            Seconds of the earlier attempts that this one goes on from.
        """
        attempt, log = self.attempt(cell), self.work / f"{cell.name}.log"
        if not self.unfinished(cell):
            shutil.rmtree(self.work / cell.name, ignore_errors=True)
            log.unlink(missing_ok=True)
            attempt = {"seconds": 0.0}
        elif "started" in attempt and log.exists():  # killed together with us: it lived when it last wrote
            attempt["seconds"] += max(0.0, log.stat().st_mtime - attempt["started"])
        self.note(cell, seconds=attempt["seconds"], started=time.time())
        return attempt["seconds"]

    def note(self, cell: Cell, **attempt) -> None:
        with files_moved_into_place(self.work) as folder:
            write_json(folder / f"{cell.name}.json", {"key": cell.key, **attempt})

    def keep_log(self, cell: Cell, lines: list[str]) -> None:
        with files_moved_into_place(self.results / "logs") as folder:
            (folder / f"{cell.name}.log").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def finish(self, cell: Cell, seconds: float) -> None:
        """Writes a cell's result, and deletes its checkpoints, which nothing needs any more.

        Args:
            cell: Its script has ended well.
            seconds: That it took, starting and all attempts included.
        """
        folder = self.work / cell.name
        said = read_json(folder / "all_results.json")
        result = {
            "cell": cell.name,
            "key": cell.key,
            "kind": cell.kind,
            **cell.facts,
            "command": shlex.join(self.command(cell)),
            "starts_from": cell.start and cell.start.name,
            "wall_seconds": round(seconds, 2),
            "network": network(folder),
            **{name: said[name] for name in KEPT[cell.script] if name in said},
        }
        for run in result.get("folds", {}).values():
            run.pop("confusion_matrix", None)  # as long as all else together, and not compared
        with files_moved_into_place(self.result_file(cell).parent) as unfinished:
            write_json(unfinished / self.result_file(cell).name, result)
        for checkpoint in [*folder.glob(f"{PREFIX}*"), *folder.glob(f"fold-*/{PREFIX}*")]:
            shutil.rmtree(checkpoint)
        self.note(cell)

    def delete_weights(self) -> None:
        """Deletes the folders of finished cells that no unfinished one starts from."""
        needed = {cell.start.name for cell in self.plan.cells if cell.start and not self.result(cell)}
        for cell in self.plan.cells:
            if cell.name not in needed and self.result(cell):
                shutil.rmtree(self.work / cell.name, ignore_errors=True)

    def clear_leftovers(self) -> None:
        """Deletes what a run that was killed had not yet moved into place."""
        for leftover in [*self.results.glob("**/.unfinished.*"), *self.work.glob(".unfinished.*")]:
            shutil.rmtree(leftover)

    def find_imagenet(self) -> None:
        """Notes in the cell of the ImageNet weights whether they are there, and whether they can be used as they are.

        Nobody is asked for them where no unfinished cell needs them.
        """
        for cell in self.plan.cells:
            waiting = any(other.start is cell and not self.result(other) for other in self.plan.cells)
            if cell.script == CONVERSION and cell.options[0] and waiting:
                cell.ready, cell.problem = find_weights(cell.options[0])

    def blocked(self, cell: Cell) -> str | None:
        """Why the weights that a cell starts from, directly or not, cannot be had; None where they can."""
        if cell.problem or not cell.start or self.has_weights(cell.start):
            return cell.problem
        return self.blocked(cell.start)


def read_json(path: Path) -> dict:
    """A file's content; nothing where there is none, or none that was written here."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def network(folder: Path) -> dict:
    """What must be the same for two runs to be comparable: the network's structure and the signal settings."""
    from dls_training.networks import STRUCTURE  # loads the models, which nothing else here needs

    config, signal_settings = read_json(folder / "config.json"), read_json(folder / "preprocessor_config.json")
    told = {name: config.get(name) for name in STRUCTURE} | signal_settings
    return {name: value for name, value in told.items() if name not in ("auto_map", "feature_extractor_type")}


def find_weights(given: str) -> tuple[str | None, str | None]:
    """Looks for weights that were trained elsewhere.

    Args:
        given: A file, a folder or a Hub id.

    Returns:
        `given` if it is an ESResNet already, and None; or None, and why it cannot be had (None: it can be converted).
    """
    path = Path(given)
    try:
        config = path / "config.json" if path.exists() else Path(hf_hub_download(given, "config.json"))
    except Exception as error:  # the Hub's client has many ways to fail, which all mean that there are no weights
        return None, f"{given} is neither here nor to be had from the Hub ({type(error).__name__})"
    return (given if read_json(config).get("model_type") == "esresnet" else None), None


def local_weights(given: str) -> str:
    """What `find_weights` found, as a file or folder."""
    return given if Path(given).exists() else snapshot_download(given, allow_patterns=["*.json", "*.safetensors"])
