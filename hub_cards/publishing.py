"""A finished run's folder -> a model repository on the Hub, in one commit."""

import logging
import shlex
from fnmatch import fnmatchcase
from pathlib import Path

from datasets_scripts.errors import UploadError, UserError
from datasets_scripts.files import read_object
from datasets_scripts.hub import HubRepository

from .card import ACCURACY, CONFUSION, EMBEDDING

logger = logging.getLogger("dls")

# What a run's folder publishes, and what it is. Everything else stays at home: checkpoints, logs, the folds' folders.
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
    ACCURACY: "picture",
    CONFUSION: "picture",
    EMBEDDING: "picture",
}
REQUIRED = ("README.md", "config.json", "preprocessor_config.json", "model.safetensors")


def part_of(path: str) -> str | None:
    """What a path is in a published run; None if it is no part of it."""
    if "/" in path:
        return None
    return next((what for pattern, what in PARTS.items() if fnmatchcase(path, pattern)), None)


def finished_run(folder: Path) -> tuple[dict[str, Path], dict]:
    """The files that a run publishes, and its results.

    Raises:
        UserError: if the run is not finished, or a file of it is missing or damaged.
    """
    results = read_object(folder / "all_results.json")
    if results is None or results.get("task") not in ("npid", "classification"):
        raise UserError(
            f"{folder} holds no all_results.json of train_npid.py or train_classification.py: to finish the run, "
            "repeat the command that trained there, with --resume_from_checkpoint latest; of a fold-N folder, publish "
            "the one that it is in"
        )
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and part_of(path.name)}
    signal, config = read_object(folder / "preprocessor_config.json"), read_object(folder / "config.json")
    code = {f"{module}.py" for settings in (config, signal) if settings for module in modules_of(settings)}
    for name in (*REQUIRED, *sorted(code)):
        if name not in files or (name.endswith(".json") and read_object(files[name]) is None):
            problem = "damaged" if name in files else "missing"
            raise UserError(
                f"{folder / name} is {problem}; `python {results['command']} --resume_from_checkpoint latest` writes "
                "it anew"
            )
    return files, results


def modules_of(settings: dict) -> set[str]:
    """The modules beside a config.json that `trust_remote_code` loads for it."""
    return {reference.partition(".")[0] for reference in settings.get("auto_map", {}).values()}


def open_repository(repo_id: str, task: str, private: bool, again: str) -> HubRepository:
    """Looks at a model repository, and changes nothing.

    Args:
        repo_id: NAMESPACE/NAME, or the NAME of one of the user's own.
        task: Of the run that is to be published: "npid" or "classification".
        private: Whether it must not be public.
        again: What the user can run to go on after a failure.

    Raises:
        UploadError: if the repository holds anything but an earlier publication of such a run; or see `HubRepository`.
    """
    repository = HubRepository(repo_id, "model", private, again)
    if repository.is_empty:
        return repository
    config, results = (read_object(repository.fetch(name)) for name in ("config.json", "all_results.json"))
    model_type, its_task = ((config or {}).get("model_type"), (results or {}).get("task"))
    if model_type != "esresnet" or its_task != task:
        found = f"model_type {model_type or 'none'} in config.json, task {its_task or 'none'} in all_results.json"
        raise UploadError(
            f"{repository.repo_id} holds something else: expected model_type esresnet and task {task}, found {found}. "
            "Nothing was sent: choose another --hub_model_id, or delete that repository first"
        )
    return repository


def claim_repository(repo_id: str, task: str, private: bool = False) -> None:
    """Makes sure, before hours of work, that its result can be published; creates the repository if there is none.

    Raises:
        UploadError: see `open_repository`.
    """
    open_repository(repo_id, task, private, "the same command").create_if_absent()


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
    files, results = finished_run(folder)
    options = ["--hub_model_id", repo_id, *(["--hub_private_repo"] if private else [])]
    again = f"`{shlex.join(['python', '-m', 'hub_cards', 'publish', str(folder), *options])}`"
    repository = open_repository(repo_id, results["task"], private, again)
    repository.create_if_absent()
    changes = repository.changes(files, part_of)
    if not any(changes):
        logger.info(f"nothing to send: {repository.url} holds exactly this")
        return repository.url
    logger.info(f"{repository.repo_id}: {len(changes.send)} of {len(files)} files to send")
    url = repository.commit_changes(files, changes, title(results))
    logger.info(f"published: {url}")
    return url


def title(results: dict) -> str:
    if results["task"] == "npid":
        return f"ESResNet pre-trained on {', '.join(results['clips'])}, seed {results['seed']}"
    return f"ESResNet trained on {results['corpus']}, seed {results['seed']}"
