"""Fine-tunes ESResNet on a labelled corpus, with cross-validation over its official folds.

    accelerate launch train_classification.py --model_name_or_path runs/npid --corpus esc50=/data/ESC-50 --fold all

The output folder loads with `from_pretrained`, and holds `all_results.json`: the held-out fold's accuracy after every
epoch. No checkpoint is chosen by it; the model is the last epoch's.
"""
# ruff: noqa: E402

from argparse import BooleanOptionalAction

from datasets_scripts.command_line import run_command
from datasets_scripts.errors import UserError
from dls_training.arguments import at_least, finish_parsing, make_parser

RECIPES = {
    "paper": {
        "preset": "esresnet50",
        "num_train_epochs": 15,
        "per_device_train_batch_size": 16,
        "optimizer": "adam",
        "learning_rate": 2.5e-4,
        "weight_decay": 5e-4,
        "lr_scheduler_type": "constant",
        "output_dir": "runs/classification",
    },
    "recommended": {
        "preset": "small_mel",
        "augmentation": "spectrogram",
        "augmentation_strength": 0.0,
        "keep_spectrograms": True,
        "num_train_epochs": 3,
        "classifier_init": "ridge",
        "freeze_batch_norm": True,
        "learning_rate": 3e-5,
    },
}
REASONS = """The defaults are those of --recipe paper: batch size, optimizer, rate and weight decay are ESResNet's.
Three things differ: 15 epochs instead of 300 and a constant rate instead of its schedule (--lr_scheduler_type
esresnet), whose five cold and ten warm-up epochs are longer than the few epochs that a pre-trained network needs; and
bf16 where the processor computes in it, because that is faster.
--recipe recommended is what worked best on a small machine (see results/)."""


def fold_or_all(text: str) -> int | str:
    """An argparse type: a fold's number, or "all"."""
    return text if text == "all" else int(text)


def parse_args(argv: list[str] | None = None):
    parser = make_parser(__doc__.splitlines()[0], RECIPES, REASONS)
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--fold", type=fold_or_all, default="all", metavar="N|all", help="fold held out for evaluation (default: all)")
    add("--init", choices=("pretrained", "scratch"),
        help="scratch keeps only the network and signal settings of --model_name_or_path (default: pretrained where "
        "a checkpoint is given)")  # fmt: skip
    add("--labels_per_class", type=at_least(1), help="train on this many clips of each class (default: all)")
    add("--freeze_backbone", action="store_true", help="train the classifier alone; the paper found that worse")
    add(
        "--freeze_batch_norm",
        action=BooleanOptionalAction,
        default=False,
        help="keep the batch-norm statistics of the pre-training: batches of a few labelled clips estimate them badly",
    )
    add("--classifier_init", choices=("random", "ridge"), default="random",
        help="ridge: start from a closed-form classifier, ridge regression on the features of the network as it is; "
        "with --num_train_epochs 0, that alone (default: random)")  # fmt: skip
    add(
        "--allow_label_leakage",
        action="store_true",
        help="go on where the weights have been trained on held-out clips with their labels; the card says so",
    )
    args = finish_parsing(parser, RECIPES, argv)
    args.init = args.init or ("pretrained" if args.model_name_or_path else "scratch")
    if args.init == "pretrained" and not args.model_name_or_path:
        parser.error("--init pretrained needs --model_name_or_path")
    if args.freeze_backbone and args.init == "scratch":
        parser.error("--freeze_backbone needs a pre-trained backbone: --init pretrained")
    if args.freeze_batch_norm and args.init == "scratch" and args.classifier_init != "ridge":
        parser.error(
            "--freeze_batch_norm needs statistics: of a pre-training (--init pretrained), or those that "
            "--classifier_init ridge takes of the training clips"
        )
    if args.fold == "all" and args.resume_from_checkpoint not in (None, "latest"):
        parser.error("--resume_from_checkpoint DIR is of one fold: name it with --fold N, or give latest")
    if len(args.corpus) > 1:
        parser.error("--corpus can be given once: fine-tuning has one label set")
    return args


# Arguments are read before anything heavy is imported: --help answers at once.
ARGS = parse_args() if __name__ == "__main__" else None

import json
import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from torch.nn.modules.batchnorm import _BatchNorm  # of one process, or synchronised over several

from datasets_scripts import ClipIdentities, corpus_report, train_test_folds
from datasets_scripts.files import files_moved_into_place, read_object, write_json
from dls_training.checkpoints import PREFIX, claim_output_dir
from dls_training.clips import ClipStore
from dls_training.closed_form import ridge_classifier
from dls_training.input_pipeline import (
    ViewMaker,
    evaluation_loader,
    load_corpora,
    mean_over_windows,
    training_loader,
)
from dls_training.loop import GlobalBatch, TrainingLoop, describe
from dls_training.metrics import Accuracy, ConfusionMatrix, per_class_accuracy
from dls_training.networks import make_config, make_extractor, make_model
from dls_training.record import RECORD_FILE, Record, begun, parent_of, to_go_on_from
from dls_training.runtime import ends_with_the_others, environment, make_accelerator, start_tracking
from hub_cards import final_accuracy, write_card
from hub_cards.publishing import claim_repository, publish
from modeling_dls import ESResNetConfig, ESResNetForAudioClassification

logger = logging.getLogger("dls")


def labelled(dataset: Dataset, name: str) -> list[str]:
    """The corpus's class names.

    Raises:
        UserError: if clips have no labels.
    """
    if None in dataset["label"][:] or len(dataset.features["label"].names) < 2:
        raise UserError(
            f"--corpus {name} has no labels, or one class only: put each class's clips into a folder of its own, or "
            "add a metadata.csv with file_name and label"
        )
    return dataset.features["label"].names


def folds_to_run(choice: int | str, dataset: Dataset, name: str) -> list[int]:
    """The folds to hold out, one after the other.

    Raises:
        UserError: if the corpus has no such fold, or none at all.
    """
    folds = sorted(set(dataset["fold"][:]))
    if len(folds) < 2:
        raise UserError(
            f"--corpus {name} has no folds to hold out: add a metadata.csv with file_name, label and fold to it"
        )
    if choice != "all" and choice not in folds:
        raise UserError(f"--fold {choice}: {name} has folds {', '.join(map(str, folds))}")
    return folds if choice == "all" else [choice]


def few_labels(train: Dataset, per_class: int | None, seed: int) -> Dataset:
    """A random choice of `per_class` clips of each class, the same for the same seed; all of them for None."""
    if per_class is None:
        return train
    labels, random = np.array(train["label"][:]), np.random.default_rng(seed)
    chosen = [random.permutation(np.flatnonzero(labels == label))[:per_class] for label in np.unique(labels)]
    return train.select(np.sort(np.concatenate(chosen)))


RIDGE_VIEWS = 4  # of each clip, whose features are averaged


class FoldRun:
    """Fine-tuning with one fold held out, in a folder of its own that can be resumed and is recognised when done."""

    def __init__(self, args, accelerator: Accelerator, store: ClipStore, config: ESResNetConfig, train: Dataset,
                 test: Dataset, output_dir: Path, checkpoint: Path | None, record: Record,
                 log_prefix: str):  # fmt: skip
        self.args, self.accelerator, self.extractor = args, accelerator, store.extractor
        self.make_views = ViewMaker(
            store.extractor, args.augmentation, args.augmentation_strength, store.keeps_spectrograms
        )
        pretrained = args.model_name_or_path if args.init == "pretrained" else None
        model = make_model(ESResNetForAudioClassification, checkpoint or pretrained, config, args.seed)
        if args.freeze_backbone:
            model.esresnet.requires_grad_(False)
        self.bare_model = model
        self.loop = TrainingLoop(
            args, accelerator, model, training_loader(store, train, args), self.save_model, output_dir, checkpoint,
            record, log_prefix,
        )  # fmt: skip
        self.test_loader = accelerator.prepare(evaluation_loader(store, test, args))
        self.outcome: dict[str, torch.Tensor] | None = None  # of the newest evaluation

    def save_model(self, folder: Path | None) -> None:
        if folder is None:  # the main process has everything
            return
        self.bare_model.save_pretrained(folder)
        self.extractor.save_pretrained(folder)

    def step(self, batch: GlobalBatch) -> torch.Tensor:
        """One optimizer step on the cross entropy."""
        if self.args.freeze_backbone or self.args.freeze_batch_norm:
            # Batch norm then neither learns statistics nor depends on the batch; nothing else differs in this mode.
            self.bare_model.esresnet.eval()

        def clip_losses(number):
            part = batch.batches[number]
            logits = self.loop.model(self.make_views(part)).logits
            return F.cross_entropy(logits, part["labels"], reduction="none")

        return self.loop.optimize(batch, clip_losses)

    @torch.no_grad()
    def start_from_ridge(self) -> None:
        """Sets the classifier to ridge regression on the features of augmented views of the training clips."""
        clips = self.loop.clips_per_epoch + 1  # of which the sampler may leave one out of an epoch
        config, device = self.bare_model.config, self.accelerator.device
        features = torch.zeros(clips, config.hidden_size, device=device)
        views = torch.zeros(clips, device=device)
        labels = torch.zeros(clips, dtype=torch.int64, device=device)
        if self.args.init == "scratch":
            self.estimate_batch_norm_statistics()
        self.bare_model.eval()
        for epoch in range(RIDGE_VIEWS):
            self.loop.loader.set_epoch(epoch)
            for batch in self.loop.loader:
                rows = batch["index"], batch["labels"], self.pooled(batch)
                index, own_labels, pooled = self.accelerator.gather_for_metrics(rows)
                features.index_add_(0, index, pooled)
                views.index_add_(0, index, torch.ones_like(index, dtype=views.dtype))
                labels[index] = own_labels
        seen = views > 0
        mean = features[seen] / views[seen, None]
        weight, bias = ridge_classifier(mean.cpu(), labels[seen].cpu(), config.num_labels)
        self.bare_model.classifier.weight.copy_(weight)
        self.bare_model.classifier.bias.copy_(bias)

    def pooled(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with self.accelerator.autocast():
            return self.bare_model.esresnet(self.make_views(batch)).pooler_output.float()

    def estimate_batch_norm_statistics(self) -> None:
        """Of a random network: the mean over one pass of the training clips. What it starts with describes no data."""
        norms = [module for module in self.bare_model.modules() if isinstance(module, _BatchNorm)]
        momentum = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean of all batches, however few they are
        self.bare_model.train()
        for batch in self.loop.loader:
            self.pooled(batch)
        for norm, usual in zip(norms, momentum, strict=True):
            norm.momentum = usual
            for statistic in (norm.running_mean, norm.running_var):
                statistic.copy_(self.accelerator.reduce(statistic, "mean"))

    def held_out(self) -> dict[str, torch.Tensor]:
        """The held-out clips, in order: `labels`, `predictions` and `features`, means over a clip's windows.

        The prediction is the class of the largest mean probability.
        """

        def probabilities_and_features(batch):
            with self.accelerator.autocast():
                features = self.bare_model.esresnet(self.make_views.unchanged(batch)).pooler_output
                return torch.cat([self.bare_model.classifier(features).float().softmax(-1), features.float()], dim=1)

        self.bare_model.eval()
        means = mean_over_windows(self.accelerator, self.test_loader, probabilities_and_features)
        self.bare_model.train()
        classes = self.bare_model.config.num_labels
        probabilities, features = means.split([classes, means.shape[1] - classes], dim=1)
        labels = self.test_loader.dataset.labels
        return {"labels": labels, "predictions": probabilities.argmax(-1), "features": features}

    def evaluate(self, epoch: int, is_last: bool) -> dict[str, float]:
        """Accuracy on the held-out fold."""
        self.outcome = self.held_out()
        predictions, labels = self.outcome["predictions"], self.outcome["labels"]
        return Accuracy(keep_in_memory=True).compute(predictions=predictions, references=labels)

    def train(self) -> dict:
        """Trains and returns the fold's results."""
        history = self.loop.progress.history
        if self.args.classifier_init == "ridge" and not history:
            self.start_from_ridge()
            accuracy = self.evaluate(0, is_last=False)
            history.append({"epoch": 0, "step": 0, **accuracy, "seconds": self.loop.seconds})
            logger.info(f"{self.loop.log_prefix}before training: {describe(history[0])}")
        self.loop.train(self.step, self.evaluate)
        start = [entry for entry in history if not entry["epoch"]]
        history = [entry for entry in history if entry["epoch"]]
        if self.outcome is None:  # everything was done before this process began
            self.outcome = self.held_out()
        counts = ConfusionMatrix(keep_in_memory=True).compute(
            predictions=self.outcome["predictions"],
            references=self.outcome["labels"],
            num_classes=self.bare_model.config.num_labels,
        )
        return {
            **({"accuracy_at_start": start[0]["accuracy"], "seconds_at_start": start[0]["seconds"]} if start else {}),
            "accuracy_per_epoch": [entry["accuracy"] for entry in history],
            "loss_per_epoch": [entry["loss"] for entry in history],
            "clips_per_second": [entry["clips_per_second"] for entry in history],
            "seconds_per_epoch": [entry["seconds"] for entry in history],
            "seconds": self.loop.seconds,
            **counts,
        }

    def draw_features(self, path: Path) -> None:
        """A map of the held-out clips' features, after `train`."""
        from dls_training.report import draw_embedding  # matplotlib takes its time, and is needed once, at the end

        names = list(self.bare_model.config.id2label.values())
        title = "held-out clips, two principal components of the features"
        draw_embedding(path, self.outcome["features"], self.outcome["labels"].numpy(), names, title)


def arm_of(args, config: ESResNetConfig, parent: Record) -> str:
    """What the network had learned before: "scratch", "imagenet", "npid", "imagenet+npid"; "pretrained" if unknown."""
    if args.init == "scratch":
        return "scratch"
    return "+".join(filter(None, [config.initial_weights, *parent.tasks])) or "pretrained"


@dataclass
class Fold:
    """One fold held out.

    Attributes:
        number: Official.
        train, test: Its clips; of the former as many as --labels_per_class says.
        record: Of its run.
        facts: What its results say besides what is measured.
        output_dir: Its own.
    """

    number: int
    train: Dataset
    test: Dataset
    record: Record
    facts: dict
    output_dir: Path

    @property
    def results_file(self) -> Path:
        return self.output_dir / "fold_results.json"

    def is_finished(self) -> bool:
        """Whether there are results of this very run; a shorter one goes on instead."""
        measured = read_object(self.results_file) or {}
        finished = Record.read(self.output_dir) if "confusion_matrix" in measured else None
        return finished is not None and finished.own.same_length(self.record.own)


def prepare_fold(args, number: int, corpus: str, dataset: Dataset, parent: Record, output_dir: Path, **facts) -> Fold:
    """Splits the corpus, and counts what of the held-out clips the weights have heard.

    Args:
        number: Of the fold that is held out.
        parent: The record of what the run starts from.
        output_dir: Of the fold.
        **facts: See `begun`.

    Raises:
        UserError: if the weights were trained on held-out clips with their labels, unless --allow_label_leakage.
    """
    train, test = train_test_folds(dataset, number)
    train = few_labels(train, args.labels_per_class, args.seed)
    held_out = ClipIdentities.of(test)
    seen = parent.labels_seen(held_out)
    if seen and not args.allow_label_leakage:
        stages = ", ".join(f"{count} by {name}" for name, count in seen.items())
        raise UserError(
            f"fold {number}: --model_name_or_path {args.model_name_or_path} was trained on held-out clips with their "
            f"labels, of {len(test)} clips {stages}: the accuracy would be no measure. Start from a network that has "
            "not seen them, or add --allow_label_leakage, which the card will report"
        )
    heard = {
        "training_clips": len(train),
        "test_clips": len(test),
        # From scratch there was no pre-training; None also stands for one of which that is not known.
        "test_clips_heard_in_pretraining": parent.heard(held_out) if parent.stages else None,
        "test_labels_seen_before": seen,
    }
    settings = {"fold": number, "classes": dataset.features["label"].names}
    record = begun(
        args, "classification", parent, [(corpus, dataset)], ClipIdentities.of(train), with_labels=True,
        clips={corpus: len(train)}, excluded_folds={corpus: [number]}, settings=settings,
        **facts | {"name": str(output_dir)},
    )  # fmt: skip
    return Fold(number, train, test, record, heard | {"run": record.own.identity_digest}, output_dir)


def run_fold(args, accelerator: Accelerator, store: ClipStore, config: ESResNetConfig, fold: Fold) -> dict:
    """Trains with one fold held out, or finds that this was done before. Returns the fold's results."""
    checkpoint, record = to_go_on_from(fold.record, args.resume_from_checkpoint, fold.output_dir)
    if fold.is_finished():
        logger.info(f"fold {fold.number} was finished before")
    else:
        logger.info(f"fold {fold.number}: {len(fold.train)} clips to train on, {len(fold.test)} held out")
        run = FoldRun(
            args, accelerator, store, config, fold.train, fold.test, fold.output_dir, checkpoint, record,
            f"fold {fold.number}/",
        )  # fmt: skip
        results = fold.facts | run.train()
        if accelerator.is_main_process:
            with files_moved_into_place(fold.output_dir, last=RECORD_FILE) as folder:
                run.save_model(folder)
                record.with_facts(seconds=results["seconds"]).save(folder)
                run.draw_features(folder / "embedding.png")
                write_json(folder / fold.results_file.name, results)
        accelerator.wait_for_everyone()
        accelerator.free_memory()  # it would keep every fold's network and optimizer
    return json.loads(fold.results_file.read_text(encoding="utf-8"))


def check_layout(args) -> None:
    """Raises UserError if a run with --fold all would go on as one with --fold N, or the other way round."""
    folds = sorted(path for path in args.output_dir.glob("fold-*") if path.is_dir())
    single = [*args.output_dir.glob(f"{PREFIX}*"), *args.output_dir.glob("fold_results.json")]
    if (folds and args.fold != "all") or (single and args.fold == "all"):
        found = (folds or single)[0].name
        raise UserError(
            f"--output_dir {args.output_dir} belongs to a different run: --fold is {args.fold!r}, but {found} is "
            "there. Repeat its options, or start anew in another --output_dir"
        )


def over_folds(folds: dict[str, dict], names: list[str]) -> dict:
    """Means and standard deviations of what was measured in each fold, and the confusion of all held-out clips."""
    found = {}
    for curve in ("accuracy_per_epoch", "accuracy_at_start"):
        if all(curve in fold for fold in folds.values()):
            by_fold = np.array([fold[curve] for fold in folds.values()])
            found |= {f"mean_{curve}": by_fold.mean(axis=0).tolist(), f"std_{curve}": by_fold.std(axis=0).tolist()}
    matrix = np.sum([fold["confusion_matrix"] for fold in folds.values()], axis=0).tolist()
    per_class = dict(zip(names, per_class_accuracy(matrix), strict=True))
    return found | {"confusion_matrix": matrix, "per_class_accuracy": per_class}


def write_results(output_dir: Path, first_fold_dir: Path, results: dict) -> None:
    """Puts the first fold's model, the results of all folds and their card into the output folder."""
    own = Record.read(first_fold_dir).own.facts  # as it was when the fold was trained
    results |= {name: own[name] for name in ("task", "corpora", "seed", "command", "options", "environment")}
    last = np.array([final_accuracy(fold) for fold in results["folds"].values()])
    logger.info(f"accuracy {last.mean():.4f} ± {last.std():.4f} at the end")
    with files_moved_into_place(output_dir, last=RECORD_FILE) as folder:
        # The root loads as the first fold's model; with a single fold, it is that model.
        for path in first_fold_dir.iterdir():
            if path.is_file() and path.name != "fold_results.json":
                shutil.copy2(path, folder)
        write_json(folder / "all_results.json", results)
        write_card(folder)
    logger.info(f"{output_dir} holds the model, all_results.json and a card")


@ends_with_the_others()
def main() -> None:
    args = ARGS
    accelerator = make_accelerator(args)
    claim_output_dir(accelerator, args.output_dir, resuming=args.resume_from_checkpoint is not None)
    if args.push_to_hub and accelerator.is_main_process:
        claim_repository(args.hub_model_id, "classification", args.hub_private_repo)
    start_tracking(args, accelerator)
    extractor = make_extractor(args)
    ((corpus, dataset),) = load_corpora(args)
    names = labelled(dataset, corpus)
    settings = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if args.init == "scratch":
        settings["initial_weights"] = None
    config = make_config(args, **settings)
    parent, measured_on = parent_of(args, config), environment(accelerator)
    folds = []
    for number in folds_to_run(args.fold, dataset, corpus):
        output_dir = args.output_dir / f"fold-{number}" if args.fold == "all" else args.output_dir
        folds.append(
            prepare_fold(
                args, number, corpus, dataset, parent, output_dir, config=config, extractor=extractor,
                environment=measured_on,
            )
        )  # fmt: skip
    check_layout(args)
    store = ClipStore([dataset], extractor, args)
    found = {str(fold.number): run_fold(args, accelerator, store, config, fold) for fold in folds}
    if accelerator.is_main_process:
        results = {"corpus": corpus, "arm": arm_of(args, config, parent), "folds": found}
        results |= {"skipped_files": corpus_report(dataset)["skipped"], **over_folds(found, names)}
        write_results(args.output_dir, folds[0].output_dir, results)
    accelerator.end_training()
    if args.push_to_hub and accelerator.is_main_process:  # after the run's end, for which no other process waits
        publish(args.output_dir, args.hub_model_id, args.hub_private_repo)


if __name__ == "__main__":
    sys.exit(run_command(main))
