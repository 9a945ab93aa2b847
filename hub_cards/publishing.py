"""A finished run's folder -> a model repository on the Hub, in one commit."""

import os
import re
import shlex
from pathlib import Path

from datasets_scripts.errors import HubUnreachable, UserError
from datasets_scripts.files import read_object
from datasets_scripts.hub import HubRepository, Publication
from dls_training.tasks import PICTURES, TASKS, task_of

# What a run's folder publishes, and what it is. Not so checkpoints, logs, and the folds' folders.
PARTS = {
    "README.md": "model card",
    "config.json": "network",
    "preprocessor_config.json": "feature extractor",
    "model.safetensors": "weights",
    "all_results.json": "results",
    "memory_bank.safetensors": "memory bank",
    "record.json": "record",
    "heard_clips.safetensors": "record",
    "*_esresnet.py": "code",
    **dict.fromkeys(PICTURES, "picture"),
}
REQUIRED = ("README.md", "config.json", "preprocessor_config.json", "model.safetensors")


def run_of(task: str) -> Publication:
    """The publication that runs of a task are, "npid" or "classification", and that replaces nothing else."""

    def found_instead(repository: HubRepository) -> str | None:
        config, results = (read_object(repository.fetch(name)) or {} for name in ("config.json", "all_results.json"))
        model_type, its_task = config.get("model_type"), results.get("task")
        if model_type == "esresnet" and its_task == task:
            return None
        return f"model_type {model_type or 'none'} in config.json, task {its_task or 'none'} in all_results.json"

    return Publication("model", PARTS, f"model_type esresnet and task {task}", found_instead)


def claim_repository(repo_id: str, task: str, private: bool = False) -> None:
    """Makes sure, before hours of work, that its result can be published; creates the repository if there is none.

    Args:
        repo_id: NAMESPACE/NAME, or the NAME of one of the user's own.
        task: See `run_of`.
        private: Whether it must not be public.

    Raises:
        UploadError: see `HubRepository`.
    """
    HubRepository(run_of(task), repo_id, private).create_if_absent()


def publish(folder: Path, repo_id: str, private: bool = False) -> str:
    """Publishes a finished run in one commit, with what an earlier publication lacks or has with other content.

    Args:
        folder: Written by `train_npid.py` or `train_classification.py`.
        repo_id: NAMESPACE/NAME, or the NAME of one of the user's own. Created if there is none.
        private: Whether it must not be public.

    Returns:
        The URL of the published revision.

    Raises:
        UserError: if the folder is not that of a finished run.
        UploadError: if nothing was published; the message says why, and how to go on.
    """
    results, publication, files = finished_run(folder)
    options = ["--hub_model_id", repo_id, *(["--hub_private_repo"] if private else [])]
    again = f"`{shlex.join(['python', '-m', 'hub_cards', 'publish', str(folder), *options])}`"
    repository = HubRepository(publication, repo_id, private, again).create_if_absent()
    return repository.publish(files, TASKS[results["task"]].title(results))


def print_plan(folder: Path, repo_id: str, private: bool = False) -> None:
    """Prints what `publish` would do: every file with its size, what it is, and what would happen to it.

    Raises:
        UserError, UploadError: as `publish` does, but for a Hub that cannot be asked.
    """
    _, publication, files = finished_run(folder)
    fates = dict.fromkeys(files, "")
    try:
        repository = HubRepository(publication, repo_id, private)
        changes = repository.changes(files)
        fates = {name: "send" if name in changes.send else "is there already" for name in files}
        fates |= dict.fromkeys(changes.remove, "remove")
        state = "exists" if repository.commit else f"would be created{', private' if private else ''}"
        print(f"{repository.repo_id} {state}. A dry run: nothing was changed.")
    except HubUnreachable as error:
        print(f"{repo_id} was not looked at: {error}. A dry run: nothing was changed.")
    for name, fate in fates.items():
        size = f"{files[name].stat().st_size:,}" if name in files else ""
        print(f"{size:>14}  {name:<32}  {publication.part_of(name):<17}  {fate}".rstrip())


def finished_run(folder: Path) -> tuple[dict, Publication, dict[str, Path]]:
    """A run's results, the publication that it is, and the files that it publishes.

    Raises:
        UserError: if the run is not finished, or a file of it is missing or damaged.
    """
    results = read_object(folder / "all_results.json") or {}
    task = task_of(results)
    if task is None:
        raise UserError(
            f"{folder} holds no all_results.json of train_npid.py or train_classification.py: to finish the run, "
            "repeat the command that trained there, with --resume_from_checkpoint latest; of a fold-N folder, publish "
            "the one that it is in"
        )
    publication = run_of(task.name)
    files = publication.files(folder)
    signal, config = read_object(folder / "preprocessor_config.json"), read_object(folder / "config.json")
    code = {name for settings in (config, signal) if settings for name in code_of(settings, files)}
    files = {name: file for name, file in files.items() if publication.part_of(name) != "code" or name in code}
    for name in (*REQUIRED, *sorted(code)):
        if name not in files or (name.endswith(".json") and read_object(files[name]) is None):
            problem = "damaged" if name in files else "missing"
            problem = "a link, which is not followed" if os.path.islink(folder / name) else problem
            raise UserError(
                f"{folder / name} is {problem}; `python {results['command']} --resume_from_checkpoint latest` writes "
                "it anew"
            )
    return results, publication, files


def code_of(settings: dict, files: dict[str, Path]) -> set[str]:
    """The files that `trust_remote_code` loads for a config.json: those that it names, and those that they import."""
    named = settings.get("auto_map")
    left = (
        [f"{str(reference).partition('.')[0]}.py" for reference in named.values()] if isinstance(named, dict) else []
    )
    code = set()
    while left:
        code.add(name := left.pop())
        text = files[name].read_text(encoding="utf-8", errors="replace") if name in files else ""
        imported = {f"{module}.py" for module in re.findall(r"^from \.(\w+) import", text, re.M)}
        left += imported.difference(code)
    return code
