"""What a network's weights have heard, from their first training to the last, and what a run is.

A record travels with the weights. It is the only source for cards, licences, guards against leakage, and resuming.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers.utils import cached_file

from datasets_scripts import ClipIdentities
from datasets_scripts.errors import UserError
from datasets_scripts.files import file_digest, json_digest, read_object, write_json
from datasets_scripts.identity import WHOLE

RECORD_FILE, HEARD_FILE = "record.json", "heard_clips.safetensors"
WEIGHTS, BANK = "model.safetensors", "memory_bank.safetensors"
LAYOUT = 1  # of the two files: raise it when they change
ADVICE = (
    f"take the folder from where it came from once more; or, without {RECORD_FILE} in it, what these weights have "
    "heard counts as unknown"
)

# What a run is, is all of its options but these, and its `settings`: whatever else differs makes another run.
NOT_COMPARED = frozenset(
    (
        # Where results go, and how often they are saved.
        *("output_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "report_to"),
        *("push_to_hub", "hub_model_id", "hub_private_repo"),
        # How fast the same numbers are computed.
        *("dataloader_num_workers", "num_threads", "keep_waveforms", "cache_gigabytes", "distributed_timeout"),
        # Names of options and of files, of which what they stand for is compared.
        *("recipe", "allow_partial", "skip_unreadable", "label_pattern", "no_folder_labels"),
        *("audio_column_name", "label_column_name", "fold_column_name", "dataset_config_name"),
    )
)
FACTS = {
    **dict.fromkeys(("clips", "corpora", "excluded_folds", "options", "settings", "environment"), dict),
    **{"name": str, "task": str, "command": str, "seed": int, "with_labels": bool},
}
LENGTH = ("num_train_epochs", "max_train_steps")
# With these the rate does not depend on the length of the run, which may then grow.
ENDLESS_SCHEDULES = ("constant", "esresnet")


@dataclass(frozen=True)
class Stage:
    """One training that the weights went through, or one of which nothing is known.

    Attributes:
        facts: As JSON takes it: `name` (the folder or Hub id), `task` (`"npid"`, `"classification"`; None: unknown),
            and of a known one `with_labels`, `clips` (how many of each corpus), `corpora` (licences and citations),
            `without_label` (how many of what was heard last had none, though others had; 0 if not said),
            `excluded_folds` (left out), `options`, `settings` (what else makes the run what it is), `seed`, `command`,
            `environment` (commit, versions, machine), and `seconds` once it is finished.
        heard: The clips that it was trained on; None: unknown.
    """

    facts: dict
    heard: ClipIdentities | None

    @property
    def name(self) -> str:
        return self.facts["name"]

    @property
    def is_known(self) -> bool:
        return self.heard is not None

    @property
    def labelled(self) -> ClipIdentities:
        """What of a known stage was heard together with its labels."""
        count = len(self.heard) - self.facts.get("without_label", 0) if self.facts["with_labels"] else 0
        return self.heard[:count]

    @property
    def identity(self) -> dict:
        """What must be the same for two runs to be one: {option or setting: value}."""
        options = {name: value for name, value in self.facts["options"].items() if name not in NOT_COMPARED}
        return {"task": self.facts["task"], **options, **self.facts["settings"]}

    @property
    def identity_digest(self) -> str:
        """One word for it, as results say it."""
        return json_digest(self.identity)

    def same_length(self, other: "Stage") -> bool:
        """Whether two runs, otherwise the same, were told to take equally long."""
        return all(self.identity.get(name) == other.identity.get(name) for name in LENGTH)

    def differences(self, earlier: "Stage") -> list[str]:
        """In what this run is another than an earlier one, "--seed is 9 but was 0", …; options before what follows.

        Where the learning rate does not depend on the length of the run, that may differ: the run can go on longer.
        """
        new, old = self.identity, earlier.identity
        if self.facts["options"].get("lr_scheduler_type") in ENDLESS_SCHEDULES:
            new, old = ({name: own[name] for name in own if name not in LENGTH} for own in (new, old))
        if new["task"] != old["task"]:
            return [f"task is {new['task']!r} but was {old['task']!r}"]
        names = [name for name in {**old, **new} if new.get(name) != old.get(name)]
        typed = [name for name in names if name in self.facts["options"] or name in earlier.facts["options"]]
        found = []
        for name in typed or names:
            found += _changes(f"--{name}" if typed else name, new.get(name), old.get(name))
        return found


@dataclass(frozen=True)
class Record:
    """The stages of some weights, the first training first; none: the weights are random.

    Attributes:
        stages: See the class.
    """

    stages: tuple[Stage, ...] = ()

    @property
    def own(self) -> Stage:
        """The newest stage."""
        return self.stages[-1]

    @property
    def is_complete(self) -> bool:
        """Whether everything is known that the weights have heard."""
        return all(stage.is_known for stage in self.stages)

    @property
    def tasks(self) -> list[str]:
        """Of the known stages, repetitions left out."""
        tasks = [stage.facts["task"] for stage in self.stages if stage.is_known]
        return [task for task, before in zip(tasks, [None, *tasks], strict=False) if task != before]

    def followed_by(self, facts: dict, heard: ClipIdentities) -> "Record":
        """The record of what training these weights further makes of them."""
        return Record((*self.stages, Stage(json.loads(json.dumps(facts)), heard)))

    def with_facts(self, **facts) -> "Record":
        """With more, or other, facts on the newest stage."""
        return Record((*self.stages[:-1], replace(self.own, facts={**self.own.facts, **facts})))

    def heard(self, clips: ClipIdentities) -> int | None:
        """How many of the clips were heard in any stage, with or without labels; None if that is unknown."""
        if not self.is_complete:
            return None
        heard = [clips.shared_with(stage.heard) for stage in self.stages]
        return int(np.any(heard, axis=0).sum()) if heard else 0

    def labels_seen(self, clips: ClipIdentities) -> dict[str, int]:
        """{stage: how many of the clips it was trained on with their labels}, of the stages that saw any."""
        seen = {}
        for stage in (stage for stage in self.stages if stage.is_known):
            if count := int(clips.shared_with(stage.labelled).sum()):
                seen[stage.name] = max(count, seen.get(stage.name, 0))  # folders are moved, and names come back
        return seen

    def continues(self, earlier: "Record") -> "Record":
        """This record, as that of a run that `earlier` began: where it began counts, and where it went on is added."""
        began, now = earlier.own.facts["environment"], self.own.facts["environment"]
        others = earlier.own.facts.get("continued_in", [])
        others = others if now in (began, *others) else [*others, now]
        return self.with_facts(environment=began, **({"continued_in": others} if others else {}))

    def save(self, folder: Path) -> None:
        """Writes `record.json` and `heard_clips.safetensors` beside the weights that are already there."""
        tensors = {}
        for number, stage in enumerate(self.stages):
            if stage.is_known:
                parts = {"content": stage.heard.content}
                # Most clips are whole files without a published identity: nothing is written about either.
                if not stage.heard.is_whole.all():
                    parts["stretch"] = stage.heard.stretch
                if stage.heard.is_published.any():
                    parts["published"] = stage.heard.published
                tensors |= {f"{number}.{name}": np.ascontiguousarray(part) for name, part in parts.items()}
        save_file(tensors, folder / HEARD_FILE)
        files = [name for name in (WEIGHTS, BANK, HEARD_FILE) if (folder / name).is_file()]
        content = {
            "layout": LAYOUT,
            "files": {name: file_digest(folder / name) for name in files},
            "stages": [stage.facts for stage in self.stages],
        }
        write_json(folder / RECORD_FILE, content | {"digest": json_digest(content)})

    @classmethod
    def read(cls, source: str | Path, needs_weights: bool = True) -> "Record | None":
        """The record of a checkpoint.

        Args:
            source: A folder, or a Hub id.
            needs_weights: Whether the weights must be there: what is read goes for those, and for no others.

        Returns:
            None where there is none.

        Raises:
            UserError: if it is damaged, of another layout, or does not belong to the weights beside it.
        """
        path = find_file(source, RECORD_FILE)
        if path is None:
            return None
        content = read_object(path)
        if content is None or "layout" not in content:
            raise UserError(f"{path} is damaged: {ADVICE}")
        if content["layout"] != LAYOUT:
            raise UserError(
                f"{path} has layout {content['layout']}, and this version reads layout {LAYOUT}: use the version that "
                "wrote it, or train anew"
            )
        digest = content.pop("digest", None)
        if digest != json_digest(content):
            raise UserError(f"{path} is damaged or was changed by hand: {ADVICE}")
        for name, written in content["files"].items():
            file = find_file(source, name)
            if (file is None and name == WEIGHTS and needs_weights) or (file and file_digest(file) != written):
                problem = "is not the file" if file else "is missing,"
                raise UserError(f"{source}: {name} {problem} that {RECORD_FILE} belongs to: {ADVICE}")
        return cls(tuple(_stages(content["stages"], path.with_name(HEARD_FILE))))

    @classmethod
    def of(cls, source: str | Path, initial_weights: str | None = None) -> "Record":
        """The record of the weights that a run starts from; a single unknown stage where they have none.

        Args:
            source: A folder, or a Hub id.
            initial_weights: What the network's configuration says of their origin.

        Raises:
            UserError: see `read`.
        """
        found = cls.read(source)
        facts = {"name": str(source), "task": None, "initial_weights": initial_weights}
        return cls((Stage(facts, None),)) if found is None else found.with_facts(name=str(source))


def find_file(source: str | Path, name: str) -> Path | None:
    """A file of a folder or of a Hub repository; None where it is not there."""
    if Path(source).exists():
        return Path(source, name) if Path(source, name).is_file() else None
    found = cached_file(
        str(source), name, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
    )  # fmt: skip
    return Path(found) if found else None


def _stages(facts: list[dict], heard_file: Path) -> Iterable[Stage]:
    """What `Record.save` wrote; of a stranger's files nothing is taken for granted."""
    try:
        tensors = load_file(heard_file)
        for number, own in enumerate(facts):
            if own["task"] is None:
                yield Stage(own, None)
                continue
            if not all(isinstance(own[name], kind) for name, kind in FACTS.items()):
                raise ValueError(f"stage {number} is none that this version writes")
            content = tensors[f"{number}.content"]
            without = own.get("without_label", 0)
            if not isinstance(without, int) or not 0 <= without <= len(content):
                raise ValueError(f"stage {number} has not heard as many clips as it says had no label")
            stretch = tensors.get(f"{number}.stretch", np.tile(WHOLE, (len(content), 1)))
            published = tensors.get(f"{number}.published", np.zeros_like(content))
            yield Stage(own, ClipIdentities(content, stretch, published))
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{heard_file}, or {RECORD_FILE} beside it, is damaged: {ADVICE}") from error


def _changes(name: str, new, old) -> list[str]:
    """ "NAME is NEW but was OLD"; of what has parts, a line for each that differs."""
    if not (isinstance(new, dict) and isinstance(old, dict)):
        return [f"{name} is {new!r} but was {old!r}"]
    parts = [part for part in {**old, **new} if new.get(part) != old.get(part)]
    return [change for part in parts for change in _changes(f"{name} {part}", new.get(part), old.get(part))]
