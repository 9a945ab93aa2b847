"""What the reports' raw numbers say of the DLS paper's claims (docs/paper.md), and, in README, at a glance.

    python -m dls_comparison.paper

Hornauer et al., "Unsupervised Discriminative Learning of Sounds for Audio Event Classification".
"""

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from datasets_scripts.markdown import Markdown, table
from dls_training.report import draw_curves

from .outcomes import Runs, gather, paired_difference
from .plan import Plan, read_plan
from .results import read_results

ROOT = Path(__file__).resolve().parents[1]
HEADLINE = re.compile(r"(<!-- headline -->\n).*?(<!-- end -->)", re.DOTALL)
# Settings of closed-form classifiers, by how many labels a class they have; all of ESC-50's training folds are 32.
BY_LABELS = {1: "1-label", 5: "5-labels", 10: "10-labels", 20: "20-labels", 32: "closed-form"}
ASINH = "with `--pooler_act asinh`"
LABELS = {
    "closed-form": "all labels", "20-labels": "20 labels a class", "5-labels": "5 labels a class",
    "1-label": "1 label a class", "5-labels-self-trained": "5 labels a class, with self-training",
    "closed-form-asinh": f"all labels, {ASINH}", "5-labels-asinh": f"5 labels a class, {ASINH}",
}  # fmt: skip
FEW_AND_ALL = {setting: LABELS[setting] for setting in ("closed-form", "5-labels")}
NOT_YET = "not run yet: `python reproduce.py results/{}.yaml`"


@dataclass
class Report:
    """A comparison that is committed, or will be.

    Attributes:
        name: Of its YAML file.
        plan: What that declares.
        settings: {setting: {arm: its runs}}.
        cells: {name: result}.
    """

    name: str
    plan: Plan
    settings: dict[str, dict[str, Runs]]
    cells: dict[str, dict]

    @classmethod
    def read(cls, name: str) -> "Report":
        file = ROOT / "results" / f"{name}.yaml"
        plan, cells = read_plan(file, {}), read_results(file.with_suffix("") / "cells.csv")
        return cls(name, plan, gather(plan, list(cells.values())), cells)

    def arms(self, setting: str, *arms: str) -> list[Runs] | None:
        """The runs of some arms; None where one is missing."""
        found = [self.settings.get(setting, {}).get(arm) for arm in arms]
        return None if None in found else found


def mean(runs: Runs, epoch: int, running: bool = False) -> float:
    """Mean accuracy over seeds and folds after an epoch; 0 is the closed form."""
    chosen = runs.running if running else runs
    return chosen.accuracy[:, :, list(chosen.epochs).index(min(epoch, chosen.epochs[-1]))].mean()


def counted(seeds: int) -> str:
    return f"{seeds} seed{'s' if seeds > 1 else ''}"


def first_epochs(report: Report, setting: str = "new-classifier") -> str | None:
    """The arms that are there after the first epochs, with re-estimated and with running statistics."""
    names = {"DLS": "dls", "scratch": "scratch"}
    found = {name: arms[0] for name, arm in names.items() if (arms := report.arms(setting, arm))}
    parts = []
    for epoch in (1, 3, 15) if found else ():
        accuracies = ", ".join(f"{name} {mean(runs, epoch):.3f}" for name, runs in found.items())
        lagging = ", ".join(f"{mean(runs, epoch, running=True):.3f}" for runs in found.values())
        parts.append(f"epoch {epoch}: {accuracies} (running: {lagging})")
    return f"{'; '.join(parts)}; {counted(min(len(runs.seeds) for runs in found.values()))}" if found else None


def papers_network(report: Report) -> str | None:
    """The same of the paper's own network and recipe."""
    return first_epochs(report, "paper")


def scratch_curve(report: Report) -> str:
    """How much running statistics explain of the paper's curve of training from scratch; a sentence, or nothing."""
    if not (found := report.arms("paper", "scratch")):
        return ""
    re_estimated, running = (mean(found[0], 3, each) for each in (False, True))
    return textwrap.fill(
        "Of the paper's own curve of training from scratch, under 40 % after three epochs of ESC-10, it explains "
        f"little: the paper's network and recipe then have {re_estimated:.3f} with statistics estimated anew and "
        f"{running:.3f} with the running ones ([gpu](../results/gpu/README.md)).",
        width=120, break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def closed_forms(report: Report) -> str | None:
    """DLS less scratch in closed form, by labels."""
    parts = []
    for setting, labels in LABELS.items():
        if found := report.arms(setting, "dls", "scratch"):
            difference, low, high, *_ = paired_difference(*found)
            sure = f" ({low:+.3f} to {high:+.3f})" if np.isfinite(low) else ""
            parts.append(f"{labels}: DLS {mean(found[0], 0):.3f}, {difference:+.3f}{sure}")
    return "; ".join(parts) or None


def frozen(report: Report) -> str | None:
    """Fine-tuning of all layers beside a classifier alone, trained and in closed form."""
    settings = ("new-classifier", "linear-probe", "closed-form")
    whole, probe, closed = (report.arms(setting, "dls") for setting in settings)
    if not (probe and whole and closed):
        return None
    return (
        f"after 20 epochs: all layers {mean(whole[0], 20):.3f}, classifier alone {mean(probe[0], 20):.3f}; classifier "
        f"alone in closed form {mean(closed[0], 0):.3f}"
    )


def beside_imagenet(report: Report) -> str | None:
    """Training from scratch and the pre-trainings that are there: closed forms, and after some epochs."""
    parts = []
    for setting, epoch, what in (("closed-form", 0, "classifier in closed form"), ("paper", 10, "after 10 epochs")):
        arms = (report.arms(setting, arm) for arm in ("dls", "imagenet", "imagenet-dls", "scratch"))
        if found := [runs[0] for runs in arms if runs]:
            parts.append(f"{what}: {', '.join(f'{runs.label} {mean(runs, epoch):.3f}' for runs in found)}")
    return "; ".join(parts) or None


def levels(report: Report, setting: str, epoch: int, *arms: str) -> str:
    """The accuracies of the arms that are there."""
    found = [runs for arm in arms for runs in report.arms(setting, arm) or []]
    return "; ".join(f"{runs.label} {mean(runs, epoch):.3f} ({counted(len(runs.seeds))})" for runs in found)


def folded_in(report: Report) -> str | None:
    """Closed forms without the folds that are tested on, with them joined later, and with all heard from the start."""
    parts = []
    for setting, labels in FEW_AND_ALL.items():
        arms = ("dls-other-corpora", "dls-new-sound", "dls")
        if not report.arms(setting, *arms):
            return None
        parts.append(f"{labels}: {levels(report, setting, 0, *arms)}")
    shown = (report.cells[name] for name in ("pretrain.other-corpora.seed0", "pretrain.all-sound.seed0"))
    without, heard = (sum(cell["clips"].values()) * cell["epochs"][-1] for cell in shown)
    return ". ".join([*parts, f"Pre-training without them showed {without / heard:.2f} times as many clips"])


def heard_or_not(report: Report) -> str | None:
    """DLS less scratch in closed form, on the seeds of all arms, by what was heard of the tested clips unlabelled."""
    parts = []
    for setting, labels in FEW_AND_ALL.items():
        arms = ("scratch", "dls", "dls-training-folds", "dls-other-corpora")
        found = [runs[0] for arm in arms if (runs := report.arms(setting, arm))]
        common = sorted(set.intersection(*(set(runs.seeds) for runs in found))) if len(found) > 1 else []
        if not common:
            return None
        less = found[0].early(common).mean()
        differences = (f"{runs.label} {runs.early(common).mean() - less:+.3f}" for runs in found[1:])
        parts.append(f"{labels} ({counted(len(common))}): {', '.join(differences)}")
    return f"less scratch, with {'; with '.join(parts)}"


def ways(report: Report, settings: dict[str, str]) -> str:
    """The closed forms of settings, each after the words for it, that are there."""
    found = {words: levels(report, setting, 0, "dls", "dls-training-folds") for setting, words in settings.items()}
    return "; ".join(words + accuracies for words, accuracies in found.items() if accuracies)


def all_labels(report: Report) -> str:
    return ways(report, {"closed-form": "", "closed-form-asinh": f"{ASINH}: "})


def five_labels(report: Report) -> str:
    settings = {"5-labels": "", "5-labels-asinh": f"{ASINH}: ", "5-labels-self-trained": "with self-training: "}
    return ways(report, settings)


def fine_tuned(report: Report) -> str:
    return levels(report, "new-classifier", 20, "dls")


def imagenet_in_closed_form(report: Report) -> str:
    return levels(report, "closed-form", 0, "dls", "imagenet")


def held_out_neighbours(report: Report) -> str | None:
    """k-NN accuracy on folds that were not heard, a network for each; by fold, because these differ."""
    cells = {cell["fold"]: cell for cell in report.cells.values() if cell.get("pretraining") == "training-folds"}
    found = {fold: cell["knn_accuracy"]["esc50"][-1] for fold, cell in sorted(cells.items())}
    by_fold = ", ".join(f"{accuracy:.3f} (fold {fold})" for fold, accuracy in found.items())
    return f"{np.mean(list(found.values())):.3f}: {by_fold}" if found else None


def pretraining_time(report: Report) -> str | None:
    cells = [
        cell for cell in report.cells.values() if cell.get("pretraining") == "all-sound" and cell["kind"] == "pretrain"
    ]
    if not cells:
        return None
    minutes, clips = np.mean([cell["wall_seconds"] for cell in cells]) / 60, sum(cells[0]["clips"].values())
    epochs = cells[0]["epochs"][-1]
    return f"{minutes:.0f} minutes on one core for {clips:,} clips and {epochs} epochs of the recommended network"


def few_labels(report: Report) -> dict[str, dict]:
    """{arm's label: its curve over labels a class}, for `draw_curves`; empty where not all of it has been run."""
    found = {labels: report.arms(setting, "scratch", "dls") for labels, setting in BY_LABELS.items()}
    if not all(found.values()):
        return {}
    curves = {}
    for number in range(2):
        runs = [arms[number] for arms in found.values()]
        by_fold = np.stack([arm.accuracy[:, :, 0].mean(axis=0) for arm in runs])
        curves[runs[0].label] = {
            "epochs": list(found), "mean_accuracy_per_epoch": by_fold.mean(axis=1),
            "std_accuracy_per_epoch": by_fold.std(axis=1), "folds": runs[0].folds,
        }  # fmt: skip
    return curves


def and_unheard(report: Report, setting: str) -> str:
    """README's words for networks that had not heard the held-out fold; none where these were not run."""
    found = report.arms(setting, "dls-training-folds")
    if not found:
        return ""
    return f", and {mean(found[0], 0):.3f} where the held-out fold was not heard ({counted(len(found[0].seeds))})"


def further_sentences(report: Report, with_more_rows: Report) -> str:
    """README's, of what adds to the recommended recipe; each where it has been run."""
    said = ""
    if found := report.arms("5-labels-self-trained", "dls", "scratch"):
        said += (
            " With 5 labels and [self-training](docs/training.md#clips-without-a-label): "
            f"{mean(found[0], 0):.3f} against {mean(found[1], 0):.3f}."
        )
    asinh, rows = report.arms("closed-form-asinh", "dls"), with_more_rows.arms("closed-form", "dls")
    both = with_more_rows.arms("closed-form-asinh", "dls", "scratch")
    if asinh and rows and both:
        said += (
            f" With all 32, `--pooler_act asinh` has {mean(asinh[0], 0):.3f}, `--spec_height 64`, at twice the work, "
            f"{mean(rows[0], 0):.3f}, both (`--recipe thorough`) {mean(both[0], 0):.3f} "
            f"({counted(len(both[0].seeds))}; untrained {mean(both[1], 0):.3f})"
            f"{and_unheard(with_more_rows, 'closed-form-asinh')} ("
            "[esc50_rows](results/esc50_rows/README.md))."
        )
    return said


def headline(report: Report, with_more_rows: Report) -> str:
    """README's sentences: what pre-training is worth, and what it is not; and of spectrograms with more rows."""
    curves = few_labels(report)
    if not curves:
        return NOT_YET.format(report.name) + "\n"
    scratch, dls = (curve["mean_accuracy_per_epoch"] for curve in curves.values())
    all_of_them = report.arms("closed-form", "dls", "scratch")
    _, low, high, seeds, folds = paired_difference(*all_of_them)
    included = ", the held-out clips' included," if (all_of_them[0].heard == all_of_them[0].clips).all() else ""
    sure = f" (the difference's 95 % interval: {low:+.3f} to {high:+.3f})" if np.isfinite(low) else ""
    runs = f"{folds} folds and {counted(seeds)}"
    told = and_unheard(report, "closed-form")
    return textwrap.fill(
        f"ESC-50, a classifier in closed form on a frozen network, mean of {runs}: with 5 "
        f"labels a class {dls[1]:.3f} after pre-training on unlabelled sound{included} against {scratch[1]:.3f} of "
        f"the same network untrained, with all 32 {dls[-1]:.3f} against {scratch[-1]:.3f}{sure}{told} "
        "([results/esc50](results/esc50/README.md), `python reproduce.py results/esc50.yaml`)."
        f"{further_sentences(report, with_more_rows)}",
        width=120, break_long_words=False, break_on_hyphens=False,
    ) + "\n"  # fmt: skip


def draw_headline(path: Path, report: Report) -> None:
    """README's picture."""
    curves = few_labels(report)
    if not curves:
        return
    figure = Figure((6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    draw_curves(axes, curves)
    axes.set(title="ESC-50, classifier in closed form", xlabel="labels a class", xticks=list(BY_LABELS))
    figure.savefig(path, dpi=110)


@dataclass
class Claim:
    """Something that the paper says.

    Attributes:
        where: In the paper.
        says: What.
        report: Whose numbers answer it; None where there is none.
        answer: Report -> what was measured, None where it has not been run; or why it cannot be.
        conditions: How that differs from the paper's.
    """

    where: str
    says: str
    report: str | None
    answer: Callable[[Report], str | None] | str
    conditions: str = ""


SMALL = "recommended network, not ESResNet-50; folds 2 and on"
FINER = "; 64 rows a band, at twice the work: with asinh, `--recipe thorough`"
CLAIMS = [
    Claim("figure 4, ESC-10", "DLS reaches 80 % within 3 epochs, scratch stays under 40 %", "esc10", first_epochs,
          SMALL),
    Claim("figure 4, ESC-10", "the same", "gpu", papers_network,
          "the paper's network and recipe; five folds"),
    Claim("figure 4, ESC-50", "DLS is over 60 % in 15 epochs", "esc50", first_epochs, SMALL),
    Claim("figure 4, UrbanSound8K", "DLS is ahead of scratch for 5 to 6 epochs", "urbansound8k", first_epochs,
          f"{SMALL}; 2,148 of 8,732 clips"),
    Claim("figure 4, DCASE2013", "DLS goes towards 50 % and is the best arm for the first 11 epochs", None,
          "not measured: the recordings were not to be had; `--corpus dcase2013` is tested with generated files"),
    Claim("text", "few labels are enough", "esc50", closed_forms, f"{SMALL}; classifier in closed form"),
    *(Claim("text", "the same", report, closed_forms, f"{SMALL}; classifier in closed form{more}")
      for report, more in (("esc10", ""), ("urbansound8k", ""), ("esc50_rows", FINER), ("esc10_rows", FINER),
                           ("urbansound8k_rows", FINER))),
    Claim("setup", "pre-training hears all clips, those that are tested on, too", "esc50", heard_or_not,
          f"{SMALL}; classifier in closed form"),
    *(Claim("setup", "the same", report, heard_or_not, f"{SMALL}; classifier in closed form{more}")
      for report, more in (("esc10", ""), ("urbansound8k", ""), ("esc50_rows", "; 64 rows a band"))),
    Claim("text", "new recordings can be folded in after deployment", "esc50", folded_in,
          f"{SMALL}; classifier in closed form"),
    Claim("text", "on par with ImageNet pre-training", "paper_esc10", beside_imagenet,
          "the paper's network, 60 epochs of pre-training on ESC-10; folds 2 to 5, one seed; ImageNet's last stage "
          "was not to be had, a random one is in its place"),
    Claim("text", "the same", "esc10", beside_imagenet, f"{SMALL}; three seeds; ESC-50 and UrbanSound8K heard, too"),
    Claim("text", "fine-tuning all layers is better than a frozen backbone", "esc50", frozen, SMALL),
    Claim("text", "DenseNet gains, too", "densenet", closed_forms,
          "DenseNet-121 at half its width, the recipe chosen for the recommended network; classifier in closed "
          "form, of the last stage's mean alone; folds 2 to 5, one seed"),
    Claim("text", "200 epochs over about 11,000 clips take 4 hours on four GTX 1080 Ti", "esc50", pretraining_time,
          "another network, fewer clips, a processor"),
]  # fmt: skip


TRIED = "[networks, temperature, augmentation, resolution, three epochs of training](../results/choice/README.md)"
ROWS = "what fold 1 prefers ([choice](../results/choice/README.md)), at twice the work a clip"
# What was hoped for, before it was measured; the same kind of row.
AIMS = [
    Claim("closed form, all labels", "0.76", "esc50", all_labels,
          f"{TRIED}; [other ways to learn from a frozen network](training.md#ways-to-learn-from-a-frozen-network)"),
    Claim("closed form, all labels, 64 rows a band", "0.76", "esc50_rows", all_labels, ROWS),
    Claim("closed form, 5 labels a class", "0.58", "esc50", five_labels,
          "the same, and [self-training](training.md#clips-without-a-label)"),
    Claim("closed form, 5 labels a class, 64 rows a band", "0.58", "esc50_rows", five_labels, ROWS),
    Claim("fine-tuned", "0.80", "esc50", fine_tuned,
          f"a new classifier and all layers for 20 epochs; {TRIED}: the closed form stays ahead"),
    Claim("closed form, DLS less scratch", "+0.14, the interval over +0.10", "esc50", closed_forms,
          "as above: other ways to learn help the untrained network nearly as much"),
    Claim("closed form, DLS less scratch, 64 rows a band", "+0.14, the interval over +0.10", "esc50_rows",
          closed_forms, ROWS),
    Claim("k-NN, the tested fold not heard", "0.62", "esc50", held_out_neighbours, TRIED),
    Claim("k-NN, the tested fold not heard, 64 rows a band", "0.62", "esc50_rows", held_out_neighbours, ROWS),
    Claim("ESC-10, the paper's network in closed form, beside ImageNet's first three stages", "ahead", "paper_esc10",
          imagenet_in_closed_form, "the recommended network, in the table above"),
]  # fmt: skip


def answered(claim: Claim, reports: dict[str, Report]) -> str:
    """What stands in the table."""
    if isinstance(claim.answer, str):
        return claim.answer
    report = reports[claim.report]
    found = claim.answer(report)
    return f"{found} ([{report.name}](../results/{report.name}/README.md))" if found else NOT_YET.format(report.name)


def document() -> str:
    """The whole page."""
    names = dict.fromkeys(claim.report for claim in (*CLAIMS, *AIMS) if claim.report)
    reports = {name: Report.read(name) for name in names}

    def rows(claims: list[Claim], *columns: str) -> str:
        cells = ((claim.where, claim.says, answered(claim, reports), claim.conditions) for claim in claims)
        return table([dict(zip(columns, map(Markdown, row), strict=True)) for row in cells])

    return f"""# The paper's claims, one by one

Hornauer et al., "Unsupervised Discriminative Learning of Sounds for Audio Event Classification". Made by
`python -m dls_comparison.paper` from the reports' raw numbers; a test makes it again.

Accuracy after the first epochs depends on batch-norm statistics: after one epoch of few steps the running ones of a
network from scratch still hold a good part of their initial values, and hide what its weights have learned. Both are
measured here: with statistics estimated anew on the training clips, and with the running ones.
{scratch_curve(reports["gpu"])}

{rows(CLAIMS, "where", "the paper", "here", "conditions")}

## What was aimed at

On ESC-50, folds 2 to 5, with the recommended network, unless said otherwise; no weights and no labels from elsewhere.

{rows(AIMS, "what", "aim", "reached", "what was tried for it")}

An encoder that was trained on AudioSet, with a linear classifier, is likely to be more accurate where it fits: 0.83 to
0.98 on ESC-50 are published (BYOL-A to CLAP). People score 0.813.
"""


def with_headline(readme: str) -> str:
    """README with its sentence as the numbers have it."""
    sentences = headline(Report.read("esc50"), Report.read("esc50_rows"))
    return HEADLINE.sub(lambda found: found[1] + sentences + found[2], readme)


if __name__ == "__main__":
    (ROOT / "docs" / "paper.md").write_text(document(), encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(with_headline(readme.read_text(encoding="utf-8")), encoding="utf-8")
    draw_headline(ROOT / "docs" / "headline.png", Report.read("esc50"))
