"""What it is worth to the closed-form classifier to label further clips by itself, on a fold of ESC-50.

    python benchmarks/self_training.py --esc50 /data/ESC-50

The fold reports nothing. Means over draws of the labelled clips. What has no label is all else in the other folds; or
a pool in which classes are not as frequent as among the labelled clips, as self-training supposes.
"""

from measuring import REPOSITORY, number, run
from readouts import CLASSES, FEW, FOLD, draws, features

DRAWS = 4
LABELS = (1, FEW, 10, 20)
ROUNDS = (0, 1, 3, 5)
EVERYTHING, UNEVEN, STRANGE = "all else", "of every other class a fifth", "half are of no class that has labels"


def pool(name: str, labels, chosen) -> tuple:
    """Of some clips' labels and the rows of those that are to have theirs: these rows, and those without a label."""
    import torch

    rows = torch.tensor(sorted(set(range(len(labels))) - set(chosen.tolist())))
    if name == UNEVEN:
        own = labels[rows]
        before = (own[:, None] == own).tril(-1).sum(dim=1)  # how many clips of its class come before it
        rows = rows[(own % 2 == 1) | (before % 5 == 0)]
    if name == STRANGE:
        chosen = chosen[labels[chosen] % 2 == 0]
    return chosen, rows


def accuracy(train, labels, test, answers, rounds: int, chosen, rest) -> float:
    """Of the clips to test on, those of labelled classes count."""
    import torch

    from dls_training.closed_form import self_trained_classifier

    weight, bias = self_trained_classifier(train[chosen], labels[chosen], train[rest], CLASSES, rounds)
    right = (test @ weight.T + bias).argmax(dim=1) == answers
    return right[torch.isin(answers, labels[chosen])].float().mean().item()


def measure(args) -> list[dict]:
    found, labels, folds = features(args.esc50, args.network)
    found, held_out = found.float(), folds == FOLD
    data = found[~held_out], labels[~held_out], found[held_out], labels[held_out]
    lines = []
    for name, count in [*((EVERYTHING, count) for count in LABELS), (UNEVEN, FEW), (STRANGE, FEW)]:
        pools = [pool(name, data[1], chosen) for chosen in draws(data[1], count, DRAWS)]
        means = {rounds: sum(accuracy(*data, rounds, *each) for each in pools) / DRAWS for rounds in ROUNDS}
        lines.append({"what": name, "labels": count, **{f"rounds {rounds}": mean for rounds, mean in means.items()}})
        print(lines[-1], flush=True)
    return lines


def rows(lines: list[dict]) -> list[list[str]]:
    """The table of the document."""
    shown = [["without a label", "labels a class", *(f"{rounds} round{'s' * (rounds != 1)}" for rounds in ROUNDS)]]
    return shown + [
        [line["what"], line["labels"], *(number(line[f"rounds {rounds}"]) for rounds in ROUNDS)] for line in lines
    ]


if __name__ == "__main__":
    checkpoint = str(REPOSITORY / "checkpoints" / "small_mel")
    run(measure, esc50=("ESC-50", "the 2,000 real clips"), network=(checkpoint, "an output folder of train_npid.py"))
