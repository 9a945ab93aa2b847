"""What `reproduce.py` is to run: one YAML file -> cells, each of them one run of one script. Imports no torch."""

import hashlib
import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path

from datasets_scripts.errors import UserError

from .sections import OWN_OPTIONS, Section, read_yaml

PRETRAINING, FINE_TUNING = "train_npid.py", "train_classification.py"
CONVERSION = "-m modeling_dls.convert_esresnet_checkpoint"
IMAGENET, SCRATCH = "imagenet", "none"
# They become parts of file names.
MOST_FOLDS = 1000
VALUE = re.compile(r"[\w.+-]+", re.ASCII)


@dataclass(eq=False)
class Cell:
    """One run of one script.

    Attributes:
        name: Of its result and its log.
        kind: "imagenet", "pretrain", "finetune" or "search".
        where: The key of the file that its options come from.
        script: PRETRAINING, FINE_TUNING or CONVERSION.
        options: Without corpora, start and output folder, whose paths differ between machines.
        corpora: Names.
        start: Whose weights it starts from; None starts from scratch.
        facts: What the report tells it by: arm, setting, pretraining, seed, fold (None: all), change.
        turn: Of its seed among the seeds, from 0.
        ready: A folder or Hub id that holds what this cell would make; None where it has to run.
        problem: Why it cannot run; None where it can.
    """

    name: str
    kind: str
    where: str
    script: str
    options: list[str]
    corpora: list[str] = field(default_factory=list)
    start: "Cell | None" = None
    facts: dict = field(default_factory=dict)
    turn: int = 0
    ready: str | None = None
    problem: str | None = None

    @property
    def key(self) -> str:
        """Digest of everything that decides the result, as far as the plan says it."""
        parts = [self.script, self.corpora, self.options, self.start and self.start.key]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


@dataclass
class Plan:
    """Everything that the file declares.

    Attributes:
        file: The YAML file.
        title: Of the report.
        notes: Markdown for its reader, without numbers; what is measured is computed.
        directories: Corpus -> its folder, archive or Hub id; None where it needs none.
        corpus: The labelled one.
        target: Accuracy to which seconds are counted.
        arms: Name -> {"label", "pretraining", "seeds"}.
        settings: Name -> options of each fine-tuning setting.
        cells: In an order in which each comes after what it starts from, and early seeds come first.
    """

    file: Path
    title: str
    notes: str
    directories: dict[str, str | None] = field(default_factory=dict)
    corpus: str = ""
    target: float = 0.8
    arms: dict[str, dict] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)


def read_plan(file: Path, directories: dict[str, str | None]) -> Plan:
    """What a file, which docs/reproduce.md describes, declares; with corpora in `directories`, as far as named there.

    Raises:
        UserError: naming the file and the key, or --corpus.
    """
    return Planner(read_yaml(file), directories).plan


class Planner:
    """Takes the file's keys from top to bottom and makes the cells.

    Attributes:
        plan: The outcome.
        starts: Whatever can be started from -> for each of its seeds, {fold that it left out, None if none: its cell}.
    """

    def __init__(self, top: Section, directories: dict[str, str | None]):
        self.plan = plan = Plan(top.file, top.take("title", str, top.file.stem), top.take("notes", str, "").strip())
        plan.target = top.take("target", float, 0.8)
        self.top, self.common, self.cells = top, top.options(), {}
        plan.directories = self.read_corpora(directories)
        plan.corpus = top.take("corpus", str)
        top.check_known(plan.corpus, plan.directories, "corpus")
        self.folds, self.some_folds = self.read_folds()
        self.starts: dict[str, list[dict[int | None, Cell]]] = {IMAGENET: [{None: self.read_imagenet()}]}
        for name, section in top.sections("pretraining").items():
            self.starts[name] = self.read_pretraining(name, section)
        for name, section in top.sections("arms").items():
            plan.arms[name] = self.read_arm(name, section)
        for number, content in enumerate(top.take("fine_tuning", list, [])):
            self.read_setting(top.section(f"fine_tuning[{number}]", content))
        if (search := top.take("search", dict, None)) is not None:
            self.read_search(top.section("search", search))
        top.close()
        if not self.cells:
            top.fail("there is nothing to run in it: expected pretraining, fine_tuning or search")
        plan.cells = ordered(self.cells.values())

    def read_corpora(self, directories: dict[str, str | None]) -> dict[str, str | None]:
        from datasets_scripts import CORPUS_NAMES

        section = self.top.section("corpora", self.top.take("corpora", dict))
        corpora = {name: section.take(name, str, None) for name in list(section.content)}
        for name in corpora:
            if name not in CORPUS_NAMES:
                section.fail(f"there is no such corpus; choose from {', '.join(CORPUS_NAMES)}", name)
        for name in directories:
            if name not in corpora:
                raise UserError(f"--corpus {name}: {self.top.file} has {', '.join(corpora)}")
        return corpora | directories

    def read_folds(self) -> tuple[list[int], bool]:
        """The folds to hold out, as far as they are known, and whether these are some of the corpus's."""
        from datasets_scripts.loading import CORPORA

        if isinstance(self.top.content.get("folds"), list):
            return self.top.numbers("folds", minimum=1), True
        number = self.top.take("folds", int, None)
        if number is not None and not 1 < number <= MOST_FOLDS:
            self.top.fail(f"must be from 2 to {MOST_FOLDS}, not {number}", "folds")
        return list(CORPORA[self.plan.corpus].fold_sizes) if number is None else list(range(1, number + 1)), False

    def known_folds(self, section: Section) -> list[int]:
        if not self.folds:
            section.fail(f"the file must say how many folds {self.plan.corpus} has (folds: N)", "folds")
        return self.folds

    def read_imagenet(self) -> Cell:
        """Weights from elsewhere: a folder that can be used as it is, one to convert, or none."""
        section = self.top.section(IMAGENET, self.top.take(IMAGENET, dict, {}))
        given, options = section.take("path", str, None), section.options()
        section.close()
        cell = Cell(IMAGENET, "imagenet", IMAGENET, CONVERSION, [given or "", *options])
        if given is None:
            cell.problem = f"{self.top.file.name} names no ImageNet weights (imagenet.path)"
        return cell

    def make(self, what: list[str], where: str, script: str, words, corpora, start, turn, **facts) -> Cell:
        """A cell, see `Cell`; `what` it is, its seed and its fold make its name, of which there may be one already."""
        seed, fold = facts["seed"], facts["fold"] if what[0] != "search" else None
        name = ".".join([*what, f"seed{seed}", *([f"fold{fold}"] if fold else [])])
        cell = Cell(name, what[0], where, script, [*words, "--seed", str(seed)], corpora, start, facts, turn)
        return self.cells.setdefault(name, cell)

    def read_pretraining(self, name: str, section: Section) -> list[dict[int | None, Cell]]:
        if name in (IMAGENET, SCRATCH):
            section.fail("this name is taken: choose another")
        corpora, seeds = section.choices("corpora", self.plan.directories), section.numbers("seeds", [0])
        options, folds = section.options(), section.take("folds", str, "none")
        section.check_known(folds, ("none", "all", "excluded"), "folds")
        if folds != "none" and self.plan.corpus not in corpora:
            section.fail(f"its corpora do not include {self.plan.corpus}, so it has no fold to leave out", "folds")
        if folds == "excluded":
            options += self.left_out(*self.known_folds(section))
        held_out = self.known_folds(section) if folds == "all" else [None]
        start = section.take("start", str, None)
        if start is not None:
            section.check_known(start, self.starts, "start")
            if folds == "none" and None not in self.starts[start][0]:
                section.fail(f"{start} leaves folds out, which this would hear again (folds: all)", "start")
        section.close()
        cells = [{} for _ in seeds]
        for (turn, seed), fold in product(enumerate(seeds), held_out):
            cells[turn][fold] = self.make(
                ["pretrain", name], f"pretraining.{name}", PRETRAINING,
                [*self.common, *options, *self.left_out(fold)], corpora, self.start_cell(start, turn, fold), turn,
                pretraining=name, seed=seed, fold=fold,
            )  # fmt: skip
        return cells

    def left_out(self, *folds: int | None) -> list[str]:
        return [word for fold in folds if fold for word in ("--exclude_fold", f"{self.plan.corpus}={fold}")]

    def start_cell(self, name: str | None, turn: int, fold: int | None) -> Cell | None:
        """What the run of a seed starts from: seeds of a pre-training take turns."""
        if name in (None, SCRATCH):
            return None
        by_fold = self.starts[name][turn % len(self.starts[name])]
        return by_fold.get(fold) or by_fold[None]

    def read_arm(self, name: str, section: Section) -> dict:
        arm = {"label": section.take("label", str, name), "pretraining": section.take("pretraining", str)}
        arm["seeds"] = section.numbers("seeds") if "seeds" in section.content else None
        if any(arm["label"] == other["label"] for other in self.plan.arms.values()):
            section.fail(f"another arm is called {arm['label']!r}", "label")
        section.check_known(arm["pretraining"], [SCRATCH, *self.starts], "pretraining")
        section.close()
        return arm

    def read_setting(self, section: Section) -> None:
        name, options = section.take("name", str), section.options()
        section.check_name(name)
        if name in self.plan.settings:
            section.fail(f"there is another {name!r}", "name")
        self.plan.settings[name] = shlex.join(options)
        chosen, seeds = section.choices("arms", self.plan.arms), section.numbers("seeds", [0])
        section.close()
        for arm in chosen:
            own, source = self.plan.arms[arm]["seeds"] or seeds, self.plan.arms[arm]["pretraining"]
            if not set(seeds).intersection(own):
                section.fail(f"arm {arm} is for seeds {own}, none of which is here", "seeds")
            where = f"{section.where} ({name}), arm {arm}"
            per_fold = source != SCRATCH and None not in self.starts[source][0]
            folds = self.folds if per_fold or (self.some_folds and len(self.folds) == 1) else [None]
            together = ",".join(map(str, self.folds)) if self.some_folds else "all"
            own_turns = [(turn, seed) for turn, seed in enumerate(seeds) if seed in own]
            for (turn, seed), fold in product(own_turns, folds):
                words, start = (
                    [*self.common, *options, "--fold", str(fold or together)],
                    self.start_cell(source, turn, fold),
                )
                facts = {"arm": arm, "setting": name, "seed": seed, "fold": fold}
                self.make(["finetune", name, arm], where, FINE_TUNING, words, [self.plan.corpus], start, turn, **facts)

    def read_search(self, section: Section) -> None:
        """The base, and one change at a time, or all combinations."""
        corpora, seeds = section.choices("corpora", self.plan.directories), section.numbers("seeds", [0])
        if self.plan.corpus not in corpora:
            section.fail(f"must include {self.plan.corpus}, one fold of which decides", "corpora")
        fold, base, grid = section.take("fold", int, 1), section.options(), section.take("grid", bool, False)
        vary = section.section("vary", section.take("vary", dict))
        lists = {option: [str(value) for value in vary.take(option, list)] for option in list(vary.content)}
        for option, values in lists.items():
            if not option.startswith("--") or option in OWN_OPTIONS:
                vary.fail("is no option of train_npid.py that can be varied", option)
            if not all(VALUE.fullmatch(value) for value in values):
                vary.fail(f"values can have letters, digits and _.+- only, not {values}", option)
        section.close()
        words = [*self.common, *base]
        for (turn, seed), change in product(enumerate(seeds), changes(words, lists, grid)):
            options = [*with_changes(words, change), *self.left_out(fold)]
            changed = ",".join(f"{option.lstrip('-')}={value}" for option, value in change.items()) or "base"
            facts = {"change": change, "seed": seed, "fold": fold}
            self.make(["search", changed], "search", PRETRAINING, options, corpora, None, turn, **facts)


def changes(base: list[str], lists: dict[str, list[str]], grid: bool) -> list[dict[str, str]]:
    """{option: value} of every run of a search, first the base's: {}. A value that the base has is no change."""
    if grid:
        tried = [dict(zip(lists, values, strict=True)) for values in product(*lists.values())]
    else:
        tried = [{option: value} for option, values in lists.items() for value in values]
    own = dict(pairwise(base))
    return [{}, *({option: v for option, v in change.items() if own.get(option) != v} for change in tried)]


def with_changes(words: list[str], change: dict[str, str]) -> list[str]:
    """The options with other values, or with more options."""
    words = list(words)
    for option, value in change.items():
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, value]
    return words


def ordered(targets: Iterable[Cell]) -> list[Cell]:
    """Each after what it starts from, and of each thing the first seed before anything's second.

    Kinds follow the alphabet: fine-tuning comes first, and a pre-training when it is needed.
    """
    cells: dict[str, Cell] = {}

    def add(cell: Cell) -> None:
        if cell.start:
            add(cell.start)
        cells.setdefault(cell.name, cell)

    for cell in sorted(targets, key=lambda cell: (cell.turn, cell.kind)):
        add(cell)
    return list(cells.values())
