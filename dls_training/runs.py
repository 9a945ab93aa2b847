"""What a run is, and what it goes on from: its own earlier part, and nothing else."""

import inspect
from pathlib import Path

from datasets import Dataset

from datasets_scripts import ClipIdentities, corpus_facts
from datasets_scripts.errors import UserError
from datasets_scripts.exporting import is_hub_id
from datasets_scripts.files import file_digest, json_digest
from modeling_dls import ESResNetConfig, ESResNetFeatureExtractor

from .checkpoints import PREFIX, find_checkpoint
from .input_pipeline import ANSWERS
from .record import BANK, RECORD_FILE, WEIGHTS, Record, find_file
from .settings import TrainingSettings

RESULTS = ("all_results.json", "fold_results.json", "model.safetensors")


def weights_digest(source: str | Path) -> str:
    """In words what a run starts from: digests of the weights and of the memory bank beside them."""
    files = {
        "weights": find_file(source, WEIGHTS),
        "bank": Path(source, BANK) if Path(source, BANK).is_file() else None,
    }
    return ", ".join(f"{what} {file_digest(path)[:16]}" for what, path in files.items() if path)


def check_same_run(record: Record, folder: Path) -> Record:
    """Makes sure that a run goes on from its own folder or checkpoint, and from nothing else.

    Args:
        record: Of the run that is to go on.
        folder: What it would go on from.

    Returns:
        The record, with what the earlier part of the run says of itself.

    Raises:
        UserError: naming every option that differs; or if there is no record, or a damaged one.
    """
    earlier = Record.read(folder)
    if earlier is None:
        raise UserError(
            f"{folder} was written by an earlier version, which did not record what a run is, and cannot go on: "
            "finish it with that version, or start anew in another --output_dir"
        )
    if changes := record.own.differences(earlier.own):
        raise UserError(
            f"{folder} belongs to a different run: {'; '.join(changes)}. Repeat its options, or start anew in another "
            "--output_dir"
        )
    return record.continues(earlier)


def begun(
    settings: TrainingSettings,
    task: str,
    parent: Record,
    corpora: list[tuple[str, Dataset]],
    heard: ClipIdentities,
    config: ESResNetConfig,
    extractor: ESResNetFeatureExtractor,
    also: dict | None = None,
    **facts,
) -> Record:
    """The record of a run that begins.

    Args:
        settings: The script's settings, as they hold.
        task: `"npid"` or `"classification"`.
        parent: Of the weights that it starts from; empty where they are random.
        corpora: What it was given, whole.
        heard: What of that it trains on.
        config, extractor: Of the network.
        also: What makes the run what it is, beside its options and what every run has.
        **facts: Others of `Stage.facts`, `environment` among them.
    """
    environment = facts["environment"]
    also = (also or {}) | {
        "corpus": ", ".join(described(name, clips) for name, clips in corpora),
        "model_name_or_path": weights_digest(settings.model_name_or_path) if parent.stages else None,
        "mixed_precision": environment["precision"],
        "number of processes": environment["processes"],
        "network": constructor_values(config),
        "feature extractor": constructor_values(extractor),
    }
    known = {
        "name": str(settings.output_dir),
        "task": task,
        "corpora": {name: corpus_facts(name) | published_as(settings, name) for name, _ in corpora},
        "options": settings.plain(),
        "seed": settings.seed,
        "command": settings.command,
        "base_model": hub_id_of(settings.model_name_or_path) if parent.stages else None,
    }
    return parent.followed_by(known | facts | {"settings": also}, heard)


def parent_of(settings: TrainingSettings, config: ESResNetConfig) -> Record:
    """The record of what --model_name_or_path brings; an empty one where weights are random.

    Raises:
        UserError: if it is damaged.
    """
    if not settings.model_name_or_path or getattr(settings, "init", None) == "scratch":
        return Record()
    return Record.of(settings.model_name_or_path, config.initial_weights)


def hub_id_of(source: str) -> str | None:
    """The Hub id that weights were loaded by; None for those of a folder."""
    return None if Path(source).exists() else source


def published_as(settings: TrainingSettings, corpus: str) -> dict[str, str]:
    """{"dataset": the Hub id that a corpus was loaded by}; empty for one from elsewhere."""
    source = dict(settings.corpus).get(corpus)
    return {"dataset": source} if source and hub_id_of(source) and is_hub_id(source) else {}


def described(name: str, clips: Dataset) -> str:
    """A corpus in words, the same only for the same clips in the same order with the same labels and folds."""
    content = [ClipIdentities.of(clips).digest_of_all(), clips["label"][:], clips["fold"][:]]
    if ANSWERS in clips.column_names:
        content.append(clips[ANSWERS][:])
    return f"{name} ({len(clips)} clips, {json_digest(content)[:16]})"


def constructor_values(thing) -> dict:
    """What an object was made with: the values of its constructor's named arguments."""
    names = inspect.signature(type(thing).__init__).parameters
    return {name: getattr(thing, name) for name in names if hasattr(thing, name)}


def to_go_on_from(record: Record, choice: str | None, output_dir: Path) -> tuple[Path | None, Record]:
    """Where a run goes on, and its record.

    Args:
        record: Of the run.
        choice: --resume_from_checkpoint.
        output_dir: Of the run.

    Returns:
        A checkpoint, None to start from the beginning; and the record, see `check_same_run`.

    Raises:
        UserError: if what is there is another run's, or damaged.
    """
    checkpoint = find_checkpoint(choice, output_dir)
    if choice is None:
        return None, record
    finished = [name for name in (RECORD_FILE, *RESULTS) if (output_dir / name).is_file()]
    # Without a checkpoint or a record, results are an earlier version's; with a checkpoint, a run was killed while it
    # put them into place.
    places = [output_dir] if RECORD_FILE in finished or (finished and checkpoint is None) else []
    if choice != "latest":  # what is there, this run would join, or delete
        places += [path for path in output_dir.glob(f"{PREFIX}*") if (path / RECORD_FILE).is_file()]
    continued = [check_same_run(record, place) for place in [*places, *([checkpoint] if checkpoint else [])]]
    if continued and checkpoint is None and not record.own.same_length(Record.read(output_dir).own):
        raise UserError(
            f"{output_dir} holds a finished run of another length, whose checkpoints are gone: it cannot become "
            "longer or shorter. Repeat its options, or start anew in another --output_dir"
        )
    return checkpoint, continued[-1] if continued else record
