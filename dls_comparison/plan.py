"""What `reproduce.py` is to run: one YAML file -> cells, each of them one run of one script. Imports no torch."""

import hashlib
import json
import re
import shlex
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path

from datasets_scripts.errors import UserError

from .sections import OWN_OPTIONS, Section, read_yaml

PRETRAINING, FINE_TUNING = "train_npid.py", "train_classification.py"
CONVERSION = "-m modeling_dls.convert_esresnet_checkpoint"
IMAGENET, SCRATCH = "imagenet", "none"
# They become parts of file names.
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
        said = [self.script, self.corpora, self.options, self.start and self.start.key]
        return hashlib.blake2b(json.dumps(said).encode(), digest_size=8).hexdigest()


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
    directories: dict[str, str | None]
    corpus: str
    target: float
    arms: dict[str, dict]
    settings: dict[str, str]
    cells: list[Cell]


class Planner:
    """Reads the file from top to bottom and makes the cells.

    Attributes:
        plan: The outcome.
    """

    def __init__(self, file: Path, directories: dict[str, str | None]):
        """
        Args:
            file: YAML; docs/reproduce.md describes it.
            directories: Corpus -> folder, instead of what the file says.

        Raises:
            UserError: naming the file and the key, or --corpus.
        """
        self.top = top = Section(read_yaml(file), file, "")
        title, notes = top.take("title", str, file.stem), top.take("notes", str, "").strip()
        target = top.take("target", float, 0.8)
        self.common = top.options()
        self.directories = self.read_corpora(directories)
        self.corpus = top.take("corpus", str)
        top.check_known(self.corpus, self.directories, "corpus")
        self.folds, self.each_fold = self.read_folds()
        self.imagenet = self.read_imagenet()
        self.pretrained: dict[str, list[dict[int | None, Cell]]] = {}
        for name, section in top.sections("pretraining").items():
            self.pretrained[name] = self.read_pretraining(name, section)
        arms = {}
        for name, section in top.sections("arms").items():
            arms[name] = self.read_arm(name, section, [arm["label"] for arm in arms.values()])
        settings, fine_tuned = {}, []
        for number, content in enumerate(top.take("fine_tuning", list, [])):
            section = top.section(f"fine_tuning[{number}]", content)
            name, options = section.take("name", str), section.options()
            section.check_name(name)
            if name in settings:
                section.fail(f"there is another {name!r}", "name")
            settings[name] = shlex.join(options)
            fine_tuned += self.read_setting(name, section, options, arms)
        cells = ordered([*fine_tuned, *self.pretraining_cells(), *self.read_search()])
        top.close()
        if not cells:
            top.fail("there is nothing to run in it: expected pretraining, fine_tuning or search")
        self.plan = Plan(file, title, notes, self.directories, self.corpus, target, arms, settings, cells)

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
        """The folds to hold out, as far as they are known, and whether each is to be a cell of its own."""
        from datasets_scripts.loading import CORPORA

        if isinstance(self.top.content.get("folds"), list):
            return self.top.numbers("folds", minimum=1), True
        number = self.top.take("folds", int, None)
        return list(CORPORA[self.corpus].fold_sizes) if number is None else list(range(1, number + 1)), False

    def known_folds(self, section: Section) -> list[int]:
        if not self.folds:
            section.fail(f"the file must say how many folds {self.corpus} has (folds: N)", "folds")
        return self.folds

    def read_imagenet(self) -> Cell:
        """Weights from elsewhere: a folder that can be used as it is, one to convert, or none."""
        section = self.top.section("imagenet", self.top.take("imagenet", dict, {}))
        given, options = section.take("path", str, None), section.options()
        section.close()
        cell = Cell(IMAGENET, "imagenet", "imagenet", CONVERSION, [given or "", *options])
        if given is None:
            cell.problem = f"{self.top.file} names no ImageNet weights (imagenet.path)"
        return cell

    def starts(self, name: str) -> list[dict[int | None, Cell]]:
        """For each seed of a pre-training, {fold that it left out, None if none: its cell}."""
        return [{None: self.imagenet}] if name == IMAGENET else self.pretrained[name]

    def read_pretraining(self, name: str, section: Section) -> list[dict[int | None, Cell]]:
        if name in (IMAGENET, SCRATCH):
            section.fail("this name is taken: choose another")
        corpora, seeds = section.choices("corpora", self.directories), section.numbers("seeds", [0])
        options, folds = section.options(), section.take("folds", str, "none")
        section.check_known(folds, ("none", "all", "excluded"), "folds")
        if folds != "none" and self.corpus not in corpora:
            section.fail(f"its corpora do not include {self.corpus}, so it has no fold to leave out", "folds")
        if folds == "excluded":
            options += self.left_out(*self.known_folds(section))
        held_out = self.known_folds(section) if folds == "all" else [None]
        start = section.take("start", str, None)
        if start is not None:
            section.check_known(start, [IMAGENET, *self.pretrained], "start")
            if folds == "none" and None not in self.starts(start)[0]:
                section.fail(f"{start} leaves folds out, which this would hear again (folds: all)", "start")
        section.close()
        return [
            {fold: self.pretraining_cell(name, index, seed, fold, corpora, options, start) for fold in held_out}
            for index, seed in enumerate(seeds)
        ]

    def pretraining_cell(self, name, index, seed, fold, corpora, options, start) -> Cell:
        words = [*self.common, *options, *self.left_out(fold), "--seed", str(seed)]
        facts = {"pretraining": name, "seed": seed, "fold": fold}
        begins = start and self.start_cell(start, index, fold)
        cell_name = joined("pretrain", name, f"seed{seed}", fold and f"fold{fold}")
        return Cell(cell_name, "pretrain", f"pretraining.{name}", PRETRAINING, words, corpora, begins, facts, index)

    def left_out(self, *folds: int | None) -> list[str]:
        return [word for fold in folds if fold for word in ("--exclude_fold", f"{self.corpus}={fold}")]

    def start_cell(self, name: str, index: int, fold: int | None) -> Cell:
        """What the run number `index` starts from: seeds of a pre-training take turns."""
        runs = self.starts(name)
        by_fold = runs[index % len(runs)]
        return by_fold.get(fold) or by_fold[None]

    def read_arm(self, name: str, section: Section, labels: list[str]) -> dict:
        arm = {"label": section.take("label", str, name), "pretraining": section.take("pretraining", str)}
        arm["seeds"] = section.numbers("seeds") if "seeds" in section.content else None
        if arm["label"] in labels:
            section.fail(f"another arm is called {arm['label']!r}", "label")
        section.check_known(arm["pretraining"], [SCRATCH, IMAGENET, *self.pretrained], "pretraining")
        section.close()
        return arm

    def read_setting(self, name: str, section: Section, options: list[str], arms: dict[str, dict]) -> list[Cell]:
        chosen, seeds = section.choices("arms", arms), section.numbers("seeds", [0])
        section.close()
        for arm in chosen:
            if not set(seeds).intersection(arms[arm]["seeds"] or seeds):
                section.fail(f"arm {arm} is for seeds {arms[arm]['seeds']}, none of which is here", "seeds")
        cells = []
        for (index, seed), arm in product(enumerate(seeds), chosen):
            if seed not in (arms[arm]["seeds"] or seeds):
                continue
            source = arms[arm]["pretraining"]
            per_fold = source != SCRATCH and None not in self.starts(source)[0]
            for fold in self.folds if self.each_fold or per_fold else [None]:
                start = None if source == SCRATCH else self.start_cell(source, index, fold)
                words = [*self.common, *options, "--fold", str(fold or "all"), "--seed", str(seed)]
                facts = {"arm": arm, "setting": name, "seed": seed, "fold": fold}
                cell_name = joined("finetune", name, arm, f"seed{seed}", fold and f"fold{fold}")
                where = f"{section.where} ({name}), arm {arm}"
                cells.append(
                    Cell(cell_name, "finetune", where, FINE_TUNING, words, [self.corpus], start, facts, index)
                )
        return cells

    def pretraining_cells(self) -> list[Cell]:
        return [cell for runs in self.pretrained.values() for by_fold in runs for cell in by_fold.values()]

    def read_search(self) -> list[Cell]:
        """The base, and one change at a time, or all combinations."""
        content = self.top.take("search", dict, None)
        if content is None:
            return []
        section = self.top.section("search", content)
        corpora, seeds = section.choices("corpora", self.directories), section.numbers("seeds", [0])
        if self.corpus not in corpora:
            section.fail(f"must include {self.corpus}, one fold of which decides", "corpora")
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
        cells = {}
        for (index, seed), change in product(enumerate(seeds), changes(words, lists, grid)):
            options = [*with_changes(words, change), *self.left_out(fold)]
            said = ",".join(f"{option.lstrip('-')}={value}" for option, value in change.items()) or "base"
            facts = {"change": change, "seed": seed, "fold": fold}
            name = joined("search", said, f"seed{seed}")
            options += ["--seed", str(seed)]
            cells[name] = Cell(name, "search", "search", PRETRAINING, options, corpora, None, facts, index)
        return list(cells.values())


def joined(*parts: str | None) -> str:
    """A cell's name."""
    return ".".join(part for part in parts if part)


def changes(base: list[str], lists: dict[str, list[str]], grid: bool) -> list[dict[str, str]]:
    """{option: value} of every run of a search, first the base's: {}. A value that the base has is no change."""
    if grid:
        tried = [dict(zip(lists, values, strict=True)) for values in product(*lists.values())]
    else:
        tried = [{option: value} for option, values in lists.items() for value in values]
    said = dict(pairwise(base))
    return [{}, *({option: v for option, v in change.items() if said.get(option) != v} for change in tried)]


def with_changes(words: list[str], change: dict[str, str]) -> list[str]:
    """The options with other values, or with more options."""
    words = list(words)
    for option, value in change.items():
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, value]
    return words


def ordered(targets: list[Cell]) -> list[Cell]:
    """Each after what it starts from, and of each thing the first seed before anything's second."""
    cells: dict[str, Cell] = {}

    def add(cell: Cell) -> None:
        if cell.start:
            add(cell.start)
        cells.setdefault(cell.name, cell)

    for cell in sorted(targets, key=lambda cell: cell.turn):
        add(cell)
    return list(cells.values())
