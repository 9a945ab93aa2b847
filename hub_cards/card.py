"""A run's own files -> its model card. A number that is not in them is not in the card."""

import json
import shlex
from pathlib import Path

from huggingface_hub import ModelCardData

from datasets_scripts.errors import UserError
from datasets_scripts.exporting import is_hub_id
from datasets_scripts.files import files_moved_into_place
from datasets_scripts.markdown import Markdown, code, escaped, fenced, linked, rendered
from dls_training.licences import LICENCE_OF_THE_CODE, licence_of, training_data
from dls_training.record import RECORD_FILE, Record
from dls_training.tasks import ACCURACY, CONFUSION, EMBEDDING, PICTURES, TASKS, Task

TEMPLATES = Path(__file__).parent / "templates"


def write_card(folder: Path) -> None:
    """Puts README.md and its pictures beside a run's results, record, `config.json` and `preprocessor_config.json`.

    Those are in place before, and nothing here touches them: no card and no picture costs a result.

    `accuracy.png` and `confusion_matrix.png` are drawn from the results, as far as there is something to draw;
    `embedding.png` is shown if it is there.

    Args:
        folder: Written by `train_npid.py` or `train_classification.py`.

    Raises:
        OSError: if one of the files is absent.
        UserError: if the record is absent or damaged, or the folder cannot be written.
    """
    results, config, signal = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("all_results.json", "config.json", "preprocessor_config.json")
    )
    record = Record.read(folder, needs_weights=False)
    if record is None:
        raise UserError(f"{folder} has no {RECORD_FILE}: an earlier version wrote it, and its own card stands")
    task, earlier = TASKS[results["task"]], [stage.facts for stage in record.stages[:-1]]
    sources = training_data(record)
    claimed = licence_of(record)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task.pipeline_tag,
        tags=["audio", "esresnet", *task.tags],
        datasets=[facts["dataset"] for facts in sources.values() if is_hub_id(facts.get("dataset", ""))] or None,
        base_model=record.own.facts.get("base_model"),
        **task.metadata(results),
        **claimed,
    )
    citations = dict.fromkeys(facts["citation"] for facts in sources.values() if "citation" in facts)
    fields = task.card_fields(results) | {
        "results": results,
        "config": config,
        "run": record.own.facts,
        "earlier": earlier,
        "signal": signal,
        "thresholds": [{"class": name, "threshold": t} for name, t in (config.get("thresholds") or {}).items()],
        "clip_seconds": signal["max_length"] / signal["sampling_rate"],
        "accuracy": task.accuracy_rows(results),
        "sources": source_rows(sources),
        "seconds": results.get("seconds") or sum(fold["seconds"] for fold in results.get("folds", {}).values()),
        "unknown": [stage.name for stage in record.stages if not stage.is_known],
        "earlier_seconds": sum(facts.get("seconds", 0) for facts in earlier),
        "code_licence": LICENCE_OF_THE_CODE,
        "commands": fenced("bash", "\n".join(filter(None, map(command, [*earlier, record.own.facts])))),
        "version": record.own.facts["environment"]["versions"].get("dls-sounds"),
        "citations": fenced("bibtex", "\n\n".join(citations)) if citations else "",
    }
    text = "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in (task.template, "provenance.md"))
    with files_moved_into_place(folder) as unfinished:
        draw_pictures(unfinished, task, results)
        pictures = [name for name in PICTURES if ((folder if name == EMBEDDING else unfinished) / name).is_file()]
        card = rendered(
            text,
            card_data=Markdown(data.to_yaml()),
            stage_in_words=stage_in_words,
            pictures=pictures,
            **(fields | claimed),
        )
        (unfinished / "README.md").write_text(card, encoding="utf-8")


def draw_pictures(folder: Path, task: Task, results: dict) -> None:
    """What of a run's results is easier to see than to read."""
    from dls_training.report import draw_accuracy, draw_confusion_matrix  # matplotlib takes its time

    if len(task.accuracy_rows(results)) > 1:
        draw_accuracy(folder / ACCURACY, task.accuracy_curves(results), task.measured)
    if "confusion_matrix" in results:
        draw_confusion_matrix(folder / CONFUSION, results["confusion_matrix"], list(results["per_class_accuracy"]))


def source_rows(sources: dict[str, dict]) -> list[dict]:
    """A line per corpus, for the card's table."""
    return [
        {
            "corpus": linked(facts.get("title", name) if "homepage" in facts else name, facts.get("homepage")),
            "used for": ", ".join(dict.fromkeys(facts["used"])),
            "licence of the sound": facts.get("licence", "unknown"),
        }
        for name, facts in sources.items()
    ]


def command(stage: dict) -> str | None:
    """What a stage was made with, to be pasted: a stranger's record cannot make more than one command of it."""
    if not stage.get("command"):
        return None
    try:
        return shlex.join(["python", *shlex.split(stage["command"])])
    except ValueError:  # an open quote
        return shlex.join(["python", stage["command"]])


def stage_in_words(stage: dict) -> Markdown:
    """What an earlier stage did to the weights, in a sentence; see `Stage.facts`."""
    name = code(stage["name"])
    if stage["task"] is None:
        return Markdown(f"Started from {name}, of which it is not known what it has heard.")
    clips = ", ".join(f"{count} of {corpus}" for corpus, count in stage["clips"].items())
    clips += f", and {stage['without_label']} without their labels" if stage.get("without_label") else ""
    left_out = f"; left out: {stage['excluded_folds']}" if stage["excluded_folds"] else ""
    training = TASKS[stage["task"]].training if stage["task"] in TASKS else f"Trained ({stage['task']})"
    return Markdown(f"{escaped(training)} ({name}; clips: {escaped(clips + left_out)}).")
