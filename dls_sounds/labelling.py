"""Teaching by ear, without a page: what to hear next, what was answered, what is learned from it.

A `Session` is an index, a labels.csv and a `Learner`. The page of `dls label` and the simulated user
(benchmarks/simulated_user.py) both ask, learn and rank by it.
"""

import csv
import math
import shutil
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits

from datasets_scripts.corpus import read_rows
from datasets_scripts.errors import UserError
from datasets_scripts.files import files_moved_into_place
from datasets_scripts.labels import BACKGROUND, Said, normal, read_labels, with_answer

from .index import Index

# Chosen by simulated users on ESC-50's fold 1: see results/labelling.
SHRINKAGE = 0.03  # of the covariance by which vectors are whitened, in its mean variance
PENALTY = 10.0  # in the mean variance of what is learned from
COMPONENTS = 128  # of vectors that are longer than `LONGEST`
LONGEST = 512
SAMPLE = 10_000  # vectors of which a covariance is taken

PROBABLE, UNCERTAIN, SIMILAR, UNLIKE = ORDERS = ("probable", "uncertain", "similar", "unlike the rest")
COLUMNS = ("file_name", "start", "end", "label", "present")
DECIMALS = 6  # of seconds


class Learner:
    """Ranks the windows of an index for a class of which a few are known.

    Vectors are whitened by the covariance of them all and brought to unit length. Scores are then those of ridge
    regression to 1 for what is of the class and -1 for what is not, where every window counts a little as one that is
    not: most are not, and nobody has to say so. The present ones weigh as much as the absent ones, and as much as
    all windows together. Only the moments of the answers change from one answer to the next, so that a fit costs
    nothing and a ranking one matrix product.

    Attributes:
        vectors: (windows, dim), float32, whitened, of unit length.
        distance: (windows,): of each from the mean of all, in standard deviations, the greater the more unlike the
            rest.
    """

    def __init__(self, vectors: np.ndarray):
        """
        Args:
            vectors: (windows, dim), float32.
        """
        sample = vectors[np.random.default_rng(0).permutation(len(vectors))[:SAMPLE]]
        self.centre = sample.mean(axis=0)
        self.basis = whitening(sample - self.centre)
        self.distance, self.vectors = self.whitened(vectors)
        self.mean = self.vectors.mean(axis=0, dtype=np.float64)
        self.moment = (self.vectors.T @ self.vectors).astype(np.float64) / len(vectors)

    def whitened(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lengths (n,) and directions (n, dim) of (n, dim) vectors of the index's network, when they are whitened."""
        found = (vectors - self.centre) @ self.basis
        lengths = np.linalg.norm(found, axis=1)
        return lengths, found / lengths.clip(1e-12)[:, None]

    def scores(self, present: np.ndarray, absent: np.ndarray) -> np.ndarray:
        """(windows,) scores, around -1 for what is not of the class, greater for what is.

        Args:
            present: (n, dim), whitened, of unit length: of the class, at least one.
            absent: (m, dim), likewise: not of the class; may be empty.
        """
        groups = [(1.0, present.mean(axis=0), present.T @ present / len(present)), (-1.0, self.mean, self.moment)]
        if len(absent):
            groups.append((-1.0, absent.mean(axis=0), absent.T @ absent / len(absent)))
        targets = np.array([target for target, _, _ in groups])
        means = np.array([mean for _, mean, _ in groups], np.float64)
        mean, target = means.mean(axis=0), targets.mean()
        covariance = sum(moment for _, _, moment in groups) / len(groups) - np.outer(mean, mean)
        covariance[np.diag_indices_from(covariance)] += PENALTY * covariance.trace() / len(mean)
        with threadpool_limits(1):  # for so little, threads that find no free core take a thousand times as long
            weight = np.linalg.solve(covariance, (targets - target) @ means / len(groups))
            return self.vectors @ weight.astype(np.float32) + np.float32(target - mean @ weight)

    def similarity(self, present: np.ndarray) -> np.ndarray:
        """(windows,): mean cosine of each with (n, dim) whitened vectors of unit length."""
        return self.vectors @ present.mean(axis=0)


def whitening(centred: np.ndarray) -> np.ndarray:
    """(dim, components): makes of vectors such whose components vary alike, those that hardly vary held back."""
    if centred.shape[1] > LONGEST:
        _, lengths, axes = randomized_svd(centred, min(COMPONENTS, len(centred)), random_state=0)
        values, vectors = np.square(lengths) / len(centred), axes.T
    else:
        values, vectors = np.linalg.eigh(centred.T.astype(np.float64) @ centred / len(centred))
    values = values.clip(0)
    return (vectors / np.sqrt(values + SHRINKAGE * values.mean() + 1e-12)).astype(np.float32)


class Candidate(NamedTuple):
    """A window that is to be heard.

    Attributes:
        row: Of the index.
        file: Its name there.
        start, end: In s.
        score: By which it was ranked.
    """

    row: int
    file: str
    start: float
    end: float
    score: float


class Step(NamedTuple):
    """What can be undone: lines that came into labels.csv, those that went for them, or a row that was passed over."""

    added: list[dict]
    removed: list[dict]
    passed: int | None = None


class Session:
    """A person who names what is in an index.

    Attributes:
        index: The index.
        path: Of labels.csv.
        learner: Of the index's vectors.
        askable: (rows,), bool: whose file is there to be heard.
        gone: Number of files that are not.
        files, starts, ends: (rows,): of the index.
    """

    def __init__(self, index: Index, path: Path | None = None):
        """
        Args:
            index: With at least one row.
            path: Of labels.csv, which need not be there yet; None: the one among the recordings.

        Raises:
            UserError: if none of the index's files is there, or labels.csv cannot be used.
        """
        self.index, self.path = index, (path or index.root / "labels.csv").absolute()
        if self.path.is_dir():
            raise UserError(f"--labels {self.path} is a folder: give the name of a .csv file")
        table = index.opened().read(columns=["file", "start", "end"])
        if not len(table):
            raise UserError(f"{index.path} has no rows: embed some recordings first")
        self.files = np.array(table["file"].to_pylist(), dtype=object)
        self.starts, self.ends = table["start"].to_numpy(), table["end"].to_numpy()
        names, self.numbers = np.unique(self.files, return_inverse=True)
        self.number_of = {unicodedata.normalize("NFC", name): number for number, name in enumerate(names)}
        order = np.argsort(self.numbers, kind="stable")
        bounds = np.searchsorted(self.numbers[order], np.arange(len(names) + 1))
        self.rows_of = [order[first:last] for first, last in pairwise(bounds)]
        there = np.array([(index.root / name).is_file() for name in names])
        self.askable, self.gone = there[self.numbers], int((~there).sum())
        if not there.any():
            raise UserError(
                f"the files of {index.path} are no longer in {index.root}, and cannot be heard: put them back, or "
                "embed them where they are now"
            )
        vectors = np.concatenate([index.vectors(block) for block in range(index.num_blocks)])
        self.learner = Learner(vectors)
        self.examples: dict[str, list[np.ndarray]] = {}  # class -> whitened vectors of sounds from elsewhere
        self.passed: set[int] = set()
        self.steps: list[Step] = []
        self.read_as: tuple | None = None
        self.said: list[Said] = []
        self.refresh()

    @property
    def classes(self) -> list[str]:
        """Those with an answer or an example, in the order in which they came."""
        return list(dict.fromkeys([*(said.label for said in self.said), *self.examples]))

    def refresh(self) -> None:
        """Takes over what somebody else wrote into labels.csv.

        Raises:
            CorpusError: naming the line that is wrong; what was read before still holds.
        """
        try:
            stat = self.path.stat()
            state = stat.st_mtime_ns, stat.st_size, stat.st_ino
        except OSError:
            state = None
        if state != self.read_as:
            self.said = list(read_labels(self.path, self.path.name, None)) if state else []
            self.read_as = state

    def answers(self, label: str) -> dict[int, bool]:
        """{row: whether it is of a class}, of every row about which something is said; what is said later prevails.

        A window is of a class if a stretch with that label covers half of it, or lies by half in it; it is not of the
        class only if a stretch without covers half of it.
        """
        found: dict[int, bool] = {}
        for said in self.said:
            if said.label == label:
                rows = self.rows_within(said)
                found.update((row, said.present) for row in rows)
        return found

    def rows_within(self, said: Said) -> list[int]:
        number = self.number_of.get(unicodedata.normalize("NFC", said.name.replace("\\", "/")))
        if number is None:
            return []
        rows = self.rows_of[number]
        starts, ends = self.starts[rows], self.ends[rows]
        shared = np.minimum(ends, said.end) - np.maximum(starts, said.start)
        whole = ends - starts
        if said.present:
            whole = np.minimum(whole, said.end - said.start)
        return rows[shared >= 0.5 * whole - 1e-6].tolist()

    def counts(self, label: str) -> tuple[int, int]:
        """Windows that are of a class, and that are not."""
        answers = self.answers(label)
        present = sum(answers.values())
        return present, len(answers) - present

    def scores(self, label: str, order: str = PROBABLE) -> np.ndarray:
        """(rows,): the greater, the earlier a row comes.

        Without an example of the class there is nothing to go by but what is unlike the rest.

        Args:
            label: The class.
            order: One of `ORDERS`.
        """
        answers, vectors = self.answers(label), self.learner.vectors
        present = np.array([row for row, yes in answers.items() if yes], int)
        absent = np.array([row for row, yes in answers.items() if not yes], int)
        known = np.concatenate([vectors[present], *self.examples.get(label, [])])
        if order == UNLIKE or not len(known):
            return self.learner.distance
        if order == SIMILAR:
            return self.learner.similarity(known)
        scores = self.learner.scores(known, vectors[absent])
        if order == PROBABLE:
            return scores
        of_absent = scores[absent].mean() if len(absent) else scores.mean()
        of_present = scores[present].mean() if len(present) else scores.max()
        return -np.abs(scores - (of_present + of_absent) / 2)

    def candidates(self, label: str, order: str = PROBABLE, count: int = 1) -> list[Candidate]:
        """What to hear next: rows without an answer about the class, the first one first."""
        scores = self.scores(label, order)
        open_rows = self.askable.copy()
        open_rows[[*self.answers(label), *self.passed]] = False
        rows = np.flatnonzero(open_rows)
        best = rows[np.argsort(-scores[rows], kind="stable")[:count]]
        return [self.candidate(row, scores[row]) for row in best.tolist()]

    def candidate(self, row: int, score: float = math.nan) -> Candidate:
        return Candidate(row, self.files[row], float(self.starts[row]), float(self.ends[row]), float(score))

    def find(self, text: str) -> int:
        """The row that is meant: a file of the index, or what is in one file's name alone, and perhaps `@ seconds`.

        Raises:
            UserError: if there is none, or the name is in several.
        """
        name, at, time = text.strip().rpartition("@")
        try:
            seconds = float(time) if at else 0.0
        except ValueError:
            name, seconds = "", 0.0
        name = unicodedata.normalize("NFC", name.strip() if name else text.strip())
        found = [name] if name in self.number_of else [other for other in self.number_of if name and name in other]
        if len(found) != 1:
            some = f"; {', '.join(found[:3])}, …" if found else ""
            raise UserError(
                f"{name!r} is in the names of {len(found)} files of the index: expected one, such as "
                f"{self.files[0]} @ {self.starts[0]:g}{some}"
            )
        rows = self.rows_of[self.number_of[found[0]]]
        return int(rows[np.searchsorted(self.starts[rows], seconds, "right").clip(1) - 1])

    def training_command(self) -> list[str]:
        """Words after `python -m` that make a classifier of what was answered, in closed form.

        Raises:
            UserError: if there is nothing to tell apart, or labels.csv is not where train_classification.py looks
                for it.
        """
        answers: dict[tuple, dict[str, bool]] = {}
        for said in self.said:
            stretch = said.name, said.start, said.end
            answers[stretch] = with_answer(answers.get(stretch, {}), normal(said.label), said.present)
        answered = {answer for own in answers.values() for answer in own.items()}
        classes = {label for label, present in answered if present} - {BACKGROUND}
        if not classes:
            raise UserError(f"{self.path} says of nothing what it is: answer yes to some sounds first")
        if len(answered) == 1:
            raise UserError(
                f"{self.path} says yes to {min(classes)} and nothing else: answer no to some sounds too, or yes to a "
                "second class"
            )
        if self.path != (self.index.root / "labels.csv").absolute():
            raise UserError(
                f"training reads the labels among the recordings: move {self.path} to {self.index.root}/labels.csv, "
                "and start dls label without --labels"
            )
        return [
            "train_classification", "--recipe", "recommended", "--corpus", f"audiofolder={self.index.root}",
            "--fold", "none", "--model_name_or_path", self.index.facts["model"], "--report_to", "none",
            "--output_dir", str(self.models()[1]),
        ]  # fmt: skip

    def models(self) -> tuple[Path | None, Path]:
        """The newest classifier that was trained on the answers, if there is one, and where the next is to go.

        They lie beside the index: a folder each, for none is overwritten. A training that failed left an empty one.
        """
        newest, number = None, 1
        while any((found := self.index.path.with_name(f"{self.index.path.stem}_model-{number}")).glob("*")):
            newest, number = found if (found / "all_results.json").is_file() else newest, number + 1
        return newest, found

    def prediction_command(self) -> list[str]:
        """Words after `python -m` that find everything of which the classifier has learned.

        Raises:
            UserError: if there is none yet.
        """
        model, _ = self.models()
        if model is None:
            raise UserError("there is no classifier yet: train on these first")
        facts = self.index.facts
        windows = []
        if facts["seconds"] is not None:
            windows = ["--windows", f"{facts['seconds']:g}", "--overlap", f"{facts['overlap']:g}"]
        output = self.index.path.with_name(f"{self.index.path.stem}_detections.csv")
        return [
            "dls_sounds", "predict", str(self.index.root), "--model", str(model), "--output", str(output),
            *windows,
        ]  # fmt: skip

    def sounds_like(self, label: str, vector: np.ndarray) -> None:
        """Starts from a sound that is not in the index: an example of the class that is not written down.

        Args:
            label: The class.
            vector: (dim,), of the index's network.
        """
        self.examples.setdefault(label, []).append(self.learner.whitened(vector[None])[1])

    def answer(self, row: int, label: str, present: bool = True, instead_of: str | None = None) -> None:
        """Writes down what a row is or is not.

        Args:
            row: Of the index.
            label: A class.
            present: Whether the row is of it.
            instead_of: The class that was asked for, which it is not.

        Raises:
            UserError: if labels.csv is not as it should be, or cannot be written; nothing is changed then.
        """
        label = clean_label(label)
        rows = [self.line(row, label, present)]
        if instead_of is not None and instead_of != label:
            rows.append(self.line(row, instead_of, False))
        same = {tuple(line[name] for name in COLUMNS[:4]) for line in rows}
        removed = self.rewrite(lambda line: tuple(line.get(name, "") for name in COLUMNS[:4]) in same, rows)
        self.steps.append(Step(rows, removed))

    def pass_over(self, row: int) -> None:
        """Does not ask about a row again, as long as this session lasts."""
        self.passed.add(row)
        self.steps.append(Step([], [], row))

    def undo(self) -> int | None:
        """Takes back what this session did last; returns the row of it, or None if there is nothing.

        Raises:
            UserError: see `answer`.
        """
        if not self.steps:
            return None
        step = self.steps[-1]
        if step.added:
            own = [tuple(line.values()) for line in step.added]
            self.rewrite(lambda line: tuple(line.get(name, "") for name in COLUMNS) in own, step.removed)
        self.steps.pop()
        self.passed.discard(step.passed)
        if step.passed is not None:
            return step.passed
        line = step.added[0]
        number = self.number_of[unicodedata.normalize("NFC", line["file_name"])]
        starts = [self.line(row, "", True)["start"] for row in self.rows_of[number]]
        return int(self.rows_of[number][starts.index(line["start"])])

    def line(self, row: int, label: str, present: bool) -> dict[str, str]:
        """Of labels.csv; where a row of the index is a whole file, without times."""
        times = ("", "")
        if self.index.facts["seconds"] is not None:
            times = (f"{time:.{DECIMALS}f}".rstrip("0").rstrip(".") for time in (self.starts[row], self.ends[row]))
        values = self.files[row], *times, label, str(int(present))
        return dict(zip(COLUMNS, values, strict=True))

    def rewrite(self, goes, new: list[dict]) -> list[dict]:
        """Replaces lines of labels.csv for which `goes` is true by new ones, at its end; returns those that went.

        The file is whole at any time, and nobody's lines are lost, though several write.
        """
        path = self.path.resolve()
        lock, own = (path.with_name(f".{path.name}.{what}") for what in ("lock", "unfinished"))
        lock = FileLock(lock)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            shutil.rmtree(own, ignore_errors=True)  # of whom a kill has stopped
            own.mkdir()
        except OSError as error:
            lock.release()
            raise UserError(
                f"{path} cannot be written ({error.strerror}): choose another place with --labels"
            ) from error
        try:
            self.refresh()
            found = [line for _, line in read_rows(path, [], [])] if path.is_file() else []
            columns = list(dict.fromkeys([*(found[0] if found else ()), *COLUMNS]))
            gone = [line for line in found if goes(line)]
            lines = [line for line in found if not goes(line)] + new
            with (
                files_moved_into_place(path.parent, by_way_of=own) as unfinished,
                (unfinished / path.name).open("w", newline="", encoding="utf-8") as file,
            ):
                writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
                writer.writeheader()
                writer.writerows(lines)
            self.refresh()
        finally:
            shutil.rmtree(own, ignore_errors=True)
            lock.release()
        return gone


def clean_label(text: str) -> str:
    """A class's name as labels.csv holds it.

    Raises:
        UserError: if there is none.
    """
    label = " ".join(text.split())
    if not label or not label.isprintable():
        raise UserError(f"{text!r} is no name of a class: expected a word or two")
    return label
