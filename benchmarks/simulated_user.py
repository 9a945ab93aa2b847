"""Average precision of a class's ranking after one example and some answers of a user who is simulated on ESC-50.

    dls embed ESC-50/audio --model checkpoints/small_mel --layer projection --output esc50.parquet
    python benchmarks/simulated_user.py --esc50 ESC-50 --index esc50.parquet

Each seed draws ten classes, and for each an example from folds 3 to 5. The user answers about clips of these folds,
as `dls label` asks: through its `Session`, one clip after the other, each time the first of the list. What is
measured is the ranking of another fold's clips. Beside it the same with a network of random weights, whose batch
norm has seen some of the clips; other ways of asking; and, on fold 1 alone, other strengths of whitening and penalty.
"""

import csv
import sys
import tempfile
from pathlib import Path

from measuring import REPOSITORY, markdown, run

ASKED_FOLDS, CHOICE_FOLD, REPORT_FOLD = (3, 4, 5), 1, 2
SHRINKAGES, PENALTIES = (0.03, 0.1, 0.3), (1.0, 3.0, 10.0, 30.0)
GRID = len(SHRINKAGES) * len(PENALTIES)  # lines, which come first
RANDOM = "random"
BATCHES = 8  # of 64 clips, of which batch norm's statistics are taken
CLASS = "class"


def untrained_index(index, audio: Path, folder: Path) -> Path:
    """Of the same clips, by a network of the same kind with random weights."""
    import torch

    from dls_sounds.__main__ import main as dls
    from dls_training.networks import check_source
    from dls_training.waveforms import read_waveform
    from modeling_dls import ESResNetConfig, ESResNetFeatureExtractor, ESResNetForInstanceDiscrimination

    source = index.facts["model"]
    check_source("--index", source)
    torch.manual_seed(0)
    model = ESResNetForInstanceDiscrimination(ESResNetConfig.from_pretrained(source))
    extractor = ESResNetFeatureExtractor.from_pretrained(source)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the plain mean of all batches
    model.train()
    paths = sorted(audio.iterdir())[:: len(list(audio.iterdir())) // (64 * BATCHES)][: 64 * BATCHES]
    length = round(5 * extractor.sampling_rate)
    for first in range(0, len(paths), 64):
        clips = [read_waveform({"bytes": None, "path": str(path)}, extractor) for path in paths[first : first + 64]]
        batch = torch.stack([torch.nn.functional.pad(clip, (0, length - clip.shape[1]))[:, :length] for clip in clips])
        with torch.no_grad():
            model(extractor.spectrogram(batch))
    model.eval().save_pretrained(folder / "untrained")
    extractor.save_pretrained(folder / "untrained")
    output = folder / "untrained.parquet"
    if dls(["embed", str(audio), "--model", str(folder / "untrained"), "--output", str(output)]):
        raise SystemExit("the untrained network's index could not be made")
    return output


def simulate(session, truth, folds, args, order: str, ranked: int) -> list[list[float]]:
    """[average precision after 0, 1, … answers], for each class of each seed."""
    import numpy as np
    from sklearn.metrics import average_precision_score

    asked, ranked_rows, curves = np.isin(folds, ASKED_FOLDS), folds == ranked, []
    for seed in range(args.seeds):
        random = np.random.default_rng(seed)
        for number in random.choice(truth.max() + 1, args.classes, replace=False).tolist():
            label, curve, asking = f"{CLASS} {number}", [], np.random.default_rng([seed, number])
            session.path.unlink(missing_ok=True)
            session.refresh()
            session.askable = asked
            session.answer(random.choice(np.flatnonzero(asked & (truth == number))), label)
            for answered in range(args.answers + 1):
                scores = session.scores(label)[ranked_rows]
                curve.append(float(average_precision_score(truth[ranked_rows] == number, scores)))
                if answered < args.answers:
                    row = next_row(session, label, order, asking)
                    session.answer(row, label, bool(truth[row] == number))
            curves.append(curve)
    return curves


def next_row(session, label: str, order: str, random) -> int:
    import numpy as np

    if order != RANDOM:
        return session.candidates(label, order)[0].row
    open_rows = session.askable.copy()
    open_rows[list(session.answers(label))] = False
    return int(random.choice(np.flatnonzero(open_rows)))


def measure(args) -> list[dict]:
    import numpy as np

    from dls_sounds import labelling
    from dls_sounds.index import Index

    if not args.esc50 or not args.index:
        raise SystemExit("--esc50 and --index must be given")
    with (Path(args.esc50) / "meta" / "esc50.csv").open(newline="", encoding="utf-8") as file:
        facts = {line["filename"]: (int(line["target"]), int(line["fold"])) for line in csv.DictReader(file)}
    lines = []

    def line(network, session, order, ranked, shrinkage=labelling.SHRINKAGE, penalty=labelling.PENALTY):
        truth, folds = map(np.array, zip(*(facts[Path(name).name] for name in session.files), strict=True))
        curves = np.array(simulate(session, truth, folds, args, order, ranked))
        by_seed = curves.reshape(args.seeds, args.classes, -1).mean(axis=1)
        mean, values = by_seed.mean(axis=0), sorted(by_seed[:, -1].tolist())
        lines.append({
            "network": network, "asked": order, "ranked_fold": ranked, "shrinkage": shrinkage, "penalty": penalty,
            "one_example": mean[0], "after_answers": mean[-1], "after_answers_min": values[0],
            "after_answers_max": values[-1], "curve": " ".join(f"{value:.3f}" for value in mean),
        })  # fmt: skip
        print(lines[-1], flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder, index = Path(temporary), Index(Path(args.index))
        untrained = Index(untrained_index(index, Path(args.esc50) / "audio", folder))
        chosen = labelling.SHRINKAGE, labelling.PENALTY
        for shrinkage in SHRINKAGES:
            for penalty in PENALTIES:
                labelling.SHRINKAGE, labelling.PENALTY = shrinkage, penalty
                session = labelling.Session(index, folder / "labels.csv")
                line("pre-trained", session, labelling.PROBABLE, CHOICE_FOLD, shrinkage, penalty)
        labelling.SHRINKAGE, labelling.PENALTY = chosen
        orders = labelling.PROBABLE, labelling.SIMILAR, labelling.UNCERTAIN, RANDOM
        for name, source in (("pre-trained", index), ("untrained", untrained)):
            session = labelling.Session(source, folder / "labels.csv")
            for order in orders:
                for ranked in (CHOICE_FOLD, REPORT_FOLD):
                    line(name, session, order, ranked)
    draw_curves(lines, Path(args.output).with_name("answers.png"))
    return lines


def draw_curves(lines: list[dict], path: Path) -> None:
    from measuring import draw

    panels = {}
    for network in ("pre-trained", "untrained"):
        curves = []
        for line in lines:
            if line["network"] == network and int(line["ranked_fold"]) == REPORT_FOLD:
                values = [float(value) for value in line["curve"].split()]
                curves.append((line["asked"], range(len(values)), values))
        panels[network] = curves, {"ylim": (0, 0.8), "ylabel": f"average precision, fold {REPORT_FOLD}"}
    draw(path, panels, "answers after one example")


def rows(lines: list[dict]) -> list[list[str]]:
    """Of the table: what was chosen on, then what is reported."""
    found = [["network", "asked about", "ranked fold", "shrinkage", "penalty", "one example", "after the answers"]]
    for line in lines:
        after = f"{float(line['after_answers']):.3f}"
        spread = f" ({float(line['after_answers_min']):.3f}–{float(line['after_answers_max']):.3f})"
        bold = "**" if int(line["ranked_fold"]) == REPORT_FOLD else ""
        found.append([
            line["network"], f"the most {line['asked']}" if line["asked"] != RANDOM else "random clips",
            line["ranked_fold"], line["shrinkage"], line["penalty"], f"{float(line['one_example']):.3f}",
            f"{bold}{after}{bold}{spread}",
        ])  # fmt: skip
    return found


def choice(table: Path) -> str:
    """What fold 1 says of the strengths, beside what `dls label` takes, in a sentence."""
    with table.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    strengths = {(line["shrinkage"], line["penalty"]): float(line["after_answers"]) for line in lines[:GRID]}
    default, best = (lines[-1]["shrinkage"], lines[-1]["penalty"]), max(strengths, key=strengths.get)
    taken = f"`dls label` takes {' and '.join(default)}, to which fold 1 gives {strengths[default]:.3f}"
    if best == default:
        return f"{taken}, the most."
    return f"{taken}; the most it gives is {strengths[best]:.3f}, to {' and '.join(best)}, with this network."


def write_report(table: Path) -> None:
    """README.md beside the table: the figure and the numbers."""
    text = f"""# What twenty answers are worth

A user is simulated on ESC-50: one example of a class, then twenty answers, yes or no, about clips of folds 3 to 5,
asked one by one as `dls label` asks. What counts is the average precision with which another fold's 400 clips, eight
of them of the class, are ranked: mean over ten classes of fifty and three seeds, in brackets the smallest and the
largest of a seed. The network, [checkpoints/small_mel](../../checkpoints/small_mel), was pre-trained without labels on
all clips, also those that are ranked; the untrained one is of the same kind, with random weights, and batch norm's
statistics of some of the clips. ESC-50 was lossily re-encoded.

Shrinkage (of whitening) and penalty, and what is asked about, are chosen on fold 1; fold 2 is the report.
{choice(table)}

![average precision over answers](answers.png)

{markdown(table, sys.modules[__name__])}"""
    table.with_name("README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    table = run(
        measure,
        esc50=("", "the corpus's folder"),
        index=("", "of its audio folder, by dls embed --layer projection"),
        seeds=(3, "each draws classes and examples"),
        classes=(10, "that a seed draws"),
        answers=(20, "about clips of folds 3 to 5"),
        output=(REPOSITORY / "results" / "labelling" / "answers.csv", "a CSV, the picture and a README.md beside it"),
    )
    write_report(table)
