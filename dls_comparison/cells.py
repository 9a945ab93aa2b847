"""What is there of a plan's cells: results that count, weights to start from, and what an interrupted run left."""

import shlex
import shutil
import time
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download

from datasets_scripts.files import files_moved_into_place, read_object, write_json
from dls_training.checkpoints import PREFIX
from dls_training.networks import STRUCTURE
from dls_training.record import NOT_COMPARED

from .plan import CONVERSION, FINE_TUNING, Cell, Plan
from .results import add_result, read_results

# A script's options that may differ between the arms, seeds and machines of one setting.
DIFFERENT_OPTIONS = NOT_COMPARED | {"corpus", "model_name_or_path", "preset", "init", "fold", "seed"}


class CellStore:
    """A plan's results, logs and weights.

    Attributes:
        plan: The plan.
        csv: Of results, see results.py.
        work: Folder of weights and checkpoints. For each cell: its output folder, what it printed so far (`CELL.log`)
            and, in `CELL.json`, the key that it was started with and, until it is finished, the seconds that it took.
        num_processes: Of each of the train scripts.
        results: The CSV's content when it was last read.
    """

    def __init__(self, plan: Plan, work: Path, num_processes: int = 1):
        self.plan, self.work, self.num_processes = plan, work, num_processes
        self.csv = plan.file.with_suffix("") / "cells.csv"
        self.absent: dict[str, str | None] = {}  # cell of weights from elsewhere -> why they are not on this machine
        self.read()

    def read(self) -> None:
        self.results = read_results(self.csv)

    def result(self, cell: Cell) -> dict | None:
        """What a finished cell measured; None where it has not run, or was something else when it ran."""
        found = self.results.get(cell.name)
        return found if found and found["key"] == cell.key else None

    def state(self, cell: Cell) -> str:
        """Why a cell is to be run."""
        if self.unfinished(cell):
            return "goes on"
        if self.result(cell):
            return "again: its weights are gone"
        return "again: the plan has changed" if cell.name in self.results else "new"

    def attempt(self, cell: Cell) -> dict:
        """What is noted of the cell's last run, if it was the same cell then."""
        noted = read_object(self.work / f"{cell.name}.json") or {}
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
        return command(cell, self.plan.directories, self.work, self.num_processes)

    def log(self, cell: Cell) -> Path:
        return self.work / f"{cell.name}.log"

    def note(self, cell: Cell, **attempt) -> None:
        with files_moved_into_place(self.work) as folder:
            write_json(folder / f"{cell.name}.json", {"key": cell.key, **attempt})

    def begin(self, cell: Cell) -> float:
        """Makes room for a run, or leaves what an interrupted one saved.

        Returns:
            Seconds of the earlier attempts that this one goes on from.
        """
        attempt, log = self.attempt(cell), self.log(cell)
        if not self.unfinished(cell):
            shutil.rmtree(self.work / cell.name, ignore_errors=True)
            log.unlink(missing_ok=True)
            attempt = {"seconds": 0.0}
        elif "started" in attempt and log.exists():  # killed together with us: it lived when it last wrote
            attempt["seconds"] += max(0.0, log.stat().st_mtime - attempt["started"])
        self.note(cell, seconds=attempt["seconds"], started=time.time())
        return attempt["seconds"]

    def finish(self, cell: Cell, seconds: float) -> None:
        """Saves a cell's result, and deletes its checkpoints, which nothing needs any more.

        Args:
            cell: Its script has ended well.
            seconds: That it took, starting and all attempts included.
        """
        folder = self.work / cell.name
        # Where corpora and weights are on this machine is nobody else's business.
        anywhere = {name: source and "DIR" for name, source in self.plan.directories.items()}
        result = {
            "cell": cell.name,
            "kind": cell.kind,
            **cell.facts,
            "starts_from": cell.start and cell.start.name,
            "wall_seconds": round(seconds, 2),
            **measured(read_object(folder / "all_results.json") or {}),
            "network": network(folder),
            "command": shlex.join(command(cell, anywhere, Path("runs") / self.plan.file.stem, self.num_processes)),
            "key": cell.key,
        }
        add_result(self.csv, result, [other.name for other in self.plan.cells])
        self.read()
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
        for leftover in [*self.csv.parent.glob(".unfinished.*"), *self.work.glob(".unfinished.*")]:
            shutil.rmtree(leftover)

    def find_imagenet(self) -> None:
        """Notes in the cell of the ImageNet weights whether they are there, and whether they can be used as they are.

        Nobody is asked for them where no unfinished cell needs them.
        """
        for cell in self.plan.cells:
            waiting = any(other.start is cell and not self.result(other) for other in self.plan.cells)
            if cell.script == CONVERSION and cell.options[0] and waiting:
                cell.ready, self.absent[cell.name] = find_weights(cell.options[0])

    def blocked(self, cell: Cell, anywhere: bool = False) -> str | None:
        """Why the weights that a cell starts from, directly or not, cannot be had; None where they can.

        Args:
            cell: Of the plan.
            anywhere: On whichever machine, and not on this one: as the file has it.
        """
        problem = cell.problem or (None if anywhere else self.absent.get(cell.name))
        if problem or not cell.start or (not anywhere and self.has_weights(cell.start)):
            return problem
        return self.blocked(cell.start, anywhere)

    def skipped(self, anywhere: bool = False) -> dict[str, str]:
        """{arm or pre-training: why it cannot be run}, see `blocked`"""
        reasons = {}
        for cell in self.plan.cells:
            if cell.kind != "imagenet" and not self.result(cell) and (reason := self.blocked(cell, anywhere)):
                arm = self.plan.arms.get(cell.facts.get("arm"))
                reasons[arm["label"] if arm else f"pre-training {cell.facts['pretraining']}"] = reason
        return reasons


def launcher(num_processes: int) -> list[str]:
    """What starts a train script in several processes, on GPUs where there are any."""
    if num_processes == 1:
        return ["python"]
    if torch.accelerator.is_available():
        return ["accelerate", "launch", "--multi_gpu", "--num_processes", str(num_processes)]
    return ["torchrun", "--nproc_per_node", str(num_processes)]  # accelerate's would start one process on a CPU


def command(cell: Cell, directories: dict[str, str | None], work: Path, num_processes: int) -> list[str]:
    """The words of a cell's command, with corpora in `directories` and output folders in `work`."""
    output = cell.ready or str(work / cell.name)
    if cell.script == CONVERSION:
        return ["python", *CONVERSION.split(), cell.options[0], output, *cell.options[1:]]
    words = [*launcher(num_processes), cell.script]
    for name in cell.corpora:
        words += ["--corpus", f"{name}={directories[name]}" if directories[name] else name]
    if cell.start:
        words += ["--model_name_or_path", cell.start.ready or str(work / cell.start.name)]
    elif cell.script == FINE_TUNING:
        words += ["--init", "scratch"]
    return [*words, *cell.options, "--output_dir", output]


def measured(results: dict) -> dict:
    """What the report needs of a script's all_results.json, as it stands in the CSV."""
    found = {}
    if runs := list(results.get("folds", {}).values()):
        found = {name: [run[name] for run in runs] for name in ("test_clips", "test_clips_heard_in_pretraining")}
        found["folds"] = [int(fold) for fold in results["folds"]]
        start = "accuracy_at_start" in runs[0]
        found["epochs"] = list(range(0 if start else 1, len(runs[0]["accuracy_per_epoch"]) + 1))
        for name in ("accuracy", "seconds"):
            found[name] = [([run[f"{name}_at_start"]] if start else []) + run[f"{name}_per_epoch"] for run in runs]
        if "running_accuracy_per_epoch" in runs[0]:
            found["running_accuracy"] = [run["running_accuracy_per_epoch"] for run in runs]
    elif history := [entry for entry in results.get("history", []) if "knn_accuracy" in entry]:
        found = {name: results[name] for name in ("clips", "excluded_folds", "knn")}
        found["epochs"] = [entry["epoch"] for entry in history]
        corpora = history[0]["knn_accuracy"]
        found["knn_accuracy"] = {name: [entry["knn_accuracy"][name] for entry in history] for name in corpora}
    if environment := results.get("environment"):
        found |= {name: environment[name] for name in ("hardware", "threads", "precision", "commit")}
        found["versions"] = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
        options = results["options"].items()
        found["options"] = {name: value for name, value in options if name not in DIFFERENT_OPTIONS}
    return found


def network(folder: Path) -> dict:
    """What must be the same for two runs to be comparable: the network's structure and the signal settings."""
    config, signal = (read_object(folder / name) or {} for name in ("config.json", "preprocessor_config.json"))
    found = {name: config.get(name) for name in STRUCTURE} | signal
    return {name: value for name, value in found.items() if name not in ("auto_map", "feature_extractor_type")}


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
    except Exception:  # the Hub's client has many ways to fail, which all mean that there are no weights
        return None, f"{given} is neither here nor to be had from the Hub"
    return (given if (read_object(config) or {}).get("model_type") == "esresnet" else None), None


def local_weights(given: str) -> str:
    """What `find_weights` found, as a file or folder."""
    return given if Path(given).exists() else snapshot_download(given, allow_patterns=["*.json", "*.safetensors"])
