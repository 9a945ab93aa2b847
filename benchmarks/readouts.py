"""Ways to learn classes from the features of a frozen network, on a fold of ESC-50 that reports nothing.

    python benchmarks/readouts.py --esc50 /data/ESC-50 --networks DLS=runs/npid untrained=

Each network is an output folder of `train_npid.py --recipe recommended … --exclude_fold esc50=1`; without a folder, it
is that recipe's with random weights. What a way has to be told (a penalty, a width), leave-one-out or five-fold
cross-validation on the training clips tells it. Five labels a class: means of ten draws.
"""

from collections.abc import Callable

from measuring import number, run

FOLD = 1  # chose the recipe, too
CLASSES, FEW, DRAWS = 50, 5, 10


def features(esc50: str, network: str) -> tuple:
    """Of all clips, (2000, size) float64, and their labels and folds."""
    import torch
    from accelerate import Accelerator

    from dls_training.clips import ClipStore
    from dls_training.closed_form import estimate_batch_norm_statistics
    from dls_training.input_pipeline import ViewMaker, evaluation_loader, load_corpora, mean_over_windows
    from dls_training.networks import make_config, make_extractor, make_model
    from dls_training.settings import ClassificationSettings
    from modeling_dls import ESResNetForInstanceDiscrimination

    words = ["--recipe", "recommended", "--corpus", f"esc50={esc50}", "--dataloader_num_workers", "0"]
    settings = ClassificationSettings.parsed([*words, *(["--model_name_or_path", network] if network else [])])
    accelerator, extractor = Accelerator(cpu=True, mixed_precision="no"), make_extractor(settings)
    model = make_model(ESResNetForInstanceDiscrimination, network or None, make_config(settings), settings.seed)
    ((_, clips),) = load_corpora(settings)
    loader = accelerator.prepare(evaluation_loader(ClipStore([clips], extractor, settings), clips, settings))
    views = ViewMaker(extractor, from_spectrograms=True)

    def pooled(batch):
        return model.esresnet(views.unchanged(batch)).pooler_output

    with torch.no_grad():
        if not network:  # random weights have no statistics yet
            estimate_batch_norm_statistics(model, map(pooled, loader), accelerator)
        model.eval()
        found = mean_over_windows(accelerator, loader, pooled).double()
    return found, torch.tensor(clips["label"][:]), torch.tensor(clips["fold"][:])


def standardised(train, test):
    """By the training clips, without what hardly varies."""
    from dls_training.closed_form import standardisation

    mean, std = standardisation(train)
    kept = std.isfinite()
    return ((each[:, kept] - mean[kept]) / std[kept] for each in (train, test))


def ridge(squash: Callable) -> Callable:
    """The project's own closed form, of standardised features that a function has changed."""

    def predict(train, labels, test):
        from dls_training.closed_form import ridge_classifier

        train, test = map(squash, standardised(train, test))
        weight, bias = ridge_classifier(train, labels, CLASSES)
        return (test @ weight.double().T + bias).argmax(dim=1)

    return predict


def searched(make: Callable) -> Callable:
    """A classifier of scikit-learn, in the space that the training clips span."""

    def predict(train, labels, test):
        import torch
        from sklearn.model_selection import GridSearchCV

        train, test = standardised(train, test)
        # A rotation, and beyond these directions training says nothing: all that is tried here sees distances alone.
        _, _, directions = torch.linalg.svd(train, full_matrices=False)
        scale = train.shape[1] ** 0.5
        train, test = ((each @ directions.T / scale).numpy() for each in (train, test))
        classifier, grid = make()
        search = GridSearchCV(classifier, grid, cv=5).fit(train, labels.numpy())
        return torch.from_numpy(search.predict(test))

    return predict


def unit_length(rows):
    return rows / rows.norm(dim=1, keepdim=True)


def logistic_regression():
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=300), {"C": [1.0, 10.0, 100.0, 1000.0]}


def linear_discriminant():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    return LinearDiscriminantAnalysis(solver="lsqr"), {"shrinkage": [0.1, 0.3, 0.6, 0.9]}


def support_vectors():
    from sklearn.svm import SVC

    return SVC(), {"C": [1.0, 10.0, 100.0], "gamma": [0.1, 0.3, 1.0]}


def readouts() -> dict[str, Callable]:
    import torch

    return {
        "ridge": ridge(lambda rows: rows),
        "ridge, features squashed by asinh": ridge(torch.asinh),
        "ridge, features squashed by tanh of half": ridge(lambda rows: (rows / 2).tanh()),
        "ridge, clips of unit length": ridge(unit_length),
        "logistic regression": searched(logistic_regression),
        "linear discriminant": searched(linear_discriminant),
        "support vectors, Gaussian": searched(support_vectors),
    }


def draws(labels, count: int = FEW, times: int = DRAWS) -> list:
    """Several times, some clips of each class: rows."""
    import torch

    generator = torch.Generator().manual_seed(0)
    of_class = [(labels == number).nonzero()[:, 0] for number in range(CLASSES)]
    return [
        torch.cat([own[torch.randperm(len(own), generator=generator)[:count]] for own in of_class])
        for _ in range(times)
    ]


def measure(args) -> list[dict]:
    lines = []
    for named in args.networks:
        name, _, folder = named.partition("=")
        found, labels, folds = features(args.esc50, folder)
        held_out = folds == FOLD
        train, answers, test = found[~held_out], labels[~held_out], found[held_out]
        for readout, predict in readouts().items():
            right = [
                (predict(train[chosen], answers[chosen], test) == labels[held_out]).double().mean().item()
                for chosen in (slice(None), *draws(answers))
            ]
            lines.append({"what": name, "readout": readout, "all": right[0], "few": sum(right[1:]) / DRAWS})
            print(lines[-1], flush=True)
    return lines


def rows(lines: list[dict]) -> list[list[str]]:
    """The table of the document."""
    shown = [["network", "readout", "32 labels a class", "5 labels a class"]]
    return shown + [[line["what"], line["readout"], number(line["all"]), number(line["few"])] for line in lines]


if __name__ == "__main__":
    run(measure, esc50=("ESC-50", "the 2,000 real clips"), networks=(["DLS=runs/npid"], "NAME=FOLDER, or NAME="))
