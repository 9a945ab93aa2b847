"""A finished run's folder -> a folder that is a Space of the Hub: the page, the model, and the code of both."""

import logging
import shutil
import sys
from importlib import import_module
from importlib.metadata import files as installed_files
from importlib.metadata import requires, version
from pathlib import Path

from huggingface_hub import SpaceCardData

from datasets_scripts.errors import UserError
from datasets_scripts.exporting import is_hub_id
from datasets_scripts.files import folder_moved_into_place, read_object
from datasets_scripts.markdown import Markdown, rendered
from dls_sounds.page import load_app
from dls_sounds.page.analysis import MAX_SECONDS
from dls_training.licences import licence_of
from dls_training.record import Record
from dls_training.tasks import Classification

from .card import TEMPLATES
from .publishing import finished_run

logger = logging.getLogger("dls")

DISTRIBUTION = "dls-sounds"
# Beside app.py, where Python finds them: it is not on PyPI, and a wheel may come after a Space's requirements.
PACKAGES = ("modeling_dls", "datasets_scripts", "dls_training", "dls_sounds")
APP, LICENCE, MODEL = "app.py", "LICENSE", "model"


def write_space(run_folder: Path, output_dir: Path) -> None:
    """Writes a Space for the classes of a run.

    Args:
        run_folder: Written by `train_classification.py`.
        output_dir: New, empty, or what this has written before, which is replaced as a whole.

    Raises:
        UserError: if the run is no finished classifier, the folder holds something else, or Gradio is not installed.
    """
    app = load_app()
    results, _, files = finished_run(run_folder)
    if results["task"] != Classification.name:
        raise UserError(
            f"{run_folder} has no classes of its own: a Space shows a run of train_classification.py; without "
            "--output_dir this page opens here"
        )
    if output_dir.exists() and not is_replaceable(output_dir):
        raise UserError(f"--output_dir {output_dir} holds something else: name a new folder, or an empty one")
    with folder_moved_into_place(output_dir) as folder:
        (folder / MODEL).mkdir()
        for name, file in files.items():
            shutil.copyfile(file, folder / MODEL / name)
        for name in PACKAGES:
            source = Path(import_module(name).__path__[0])
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        (licence,) = (file for file in installed_files(DISTRIBUTION) or () if file.name == LICENCE)
        shutil.copyfile(licence.locate(), folder / LICENCE)
        shutil.copyfile(TEMPLATES / APP, folder / APP)
        (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements()), encoding="utf-8")
        (folder / "README.md").write_text(card(run_folder, results, app), encoding="utf-8")
    logger.info(f"{output_dir}: `python {output_dir / APP}` serves it here; docs/space.md tells how to upload it")


def is_replaceable(folder: Path) -> bool:
    """Whether a folder is empty, or a Space that `write_space` wrote, perhaps of an earlier version."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return folder.is_dir()
    app = folder / APP
    return app.is_file() and "from dls_sounds.page" in app.read_text(encoding="utf-8", errors="replace")


def requirements() -> list[str]:
    """What this project declares for itself and its page."""
    needed = [line.partition(";") for line in requires(DISTRIBUTION) or ()]
    return [own.strip() for own, _, marker in needed if "extra ==" not in marker or 'extra == "space"' in marker]


def card(run_folder: Path, results: dict, app) -> str:
    """README.md, whose front matter configures the Space."""
    record = Record.read(run_folder, needs_weights=False)
    claimed = licence_of(record) if record else {}
    config = read_object(run_folder / "config.json") or {}  # `finished_run` has seen to it that there is one
    labels = list(config["id2label"].values())
    classes = f"{len(labels)} class{'es' if len(labels) > 1 else ''}"
    title = f"What is this sound? {classes} of {results['corpus']}"
    related = [record and record.own.facts.get("base_model"), results["options"].get("hub_model_id")]
    data = SpaceCardData(
        title=title,
        sdk="gradio",
        sdk_version=version("gradio"),
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file=APP,
        models=[name for name in related if name and is_hub_id(name)] or None,
        **claimed,
    )
    return rendered(
        (TEMPLATES / "space.md").read_text(encoding="utf-8"),
        card_data=Markdown(data.to_yaml()),
        title=title,
        labels=labels,
        classes=classes,
        corpus=results["corpus"],
        packages=PACKAGES,
        version=version(DISTRIBUTION),
        seconds=f"{MAX_SECONDS:.0f}",
        waiting=app.WAITING,
        yes_no=config.get("problem_type") == "multi_label_classification",
        license=claimed.get("license"),
    )
