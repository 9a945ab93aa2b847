"""Fine-tunes ESResNet on a labelled corpus, with cross-validation over its folds, or on all of it.

    accelerate launch train_classification.py --model_name_or_path runs/npid --corpus esc50=/data/ESC-50 --fold all

The output folder loads with `from_pretrained`, and holds `all_results.json`: the held-out fold's accuracy after every
epoch. No checkpoint is chosen by it; the model is the last epoch's. With --fold none nothing is held out, or measured.
"""
# ruff: noqa: E402

from dls_training.settings import ClassificationSettings

# Options are read before anything heavy is imported: --help answers at once.
SETTINGS = ClassificationSettings.parsed() if __name__ == "__main__" else None

import copy
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader

from datasets_scripts import corpus_report
from datasets_scripts.command_line import run_command
from datasets_scripts.files import files_moved_into_place, write_json
from dls_training.checkpoints import claim_output_dir
from dls_training.clips import ClipStore
from dls_training.closed_form import (
    NO_THRESHOLD,
    batch_norm_statistics,
    estimate_batch_norm_statistics,
    start_from_ridge,
)
from dls_training.folds import RESULTS_FILE, Fold, LabelledCorpus, check_layout, make_fold
from dls_training.input_pipeline import (
    ViewMaker,
    evaluation_loader,
    load_corpora,
    mean_over_windows,
    training_loader,
)
from dls_training.loop import GlobalBatch, TrainingLoop, describe
from dls_training.metrics import ClassificationMetrics, YesNoMetrics, per_class_accuracy
from dls_training.networks import loading, make_config, make_extractor, make_model
from dls_training.record import RECORD_FILE, Record
from dls_training.runs import parent_of, to_go_on_from
from dls_training.runtime import ends_with_the_others, environment, make_accelerator, start_tracking
from dls_training.tasks import EMBEDDING
from hub_cards import final_accuracy, write_card
from hub_cards.publishing import claim_repository, publish
from modeling_dls import ESResNetConfig, ESResNetForAudioClassification

logger = logging.getLogger("dls")


# Of the last evaluation, what a fold's results have.
REPORTED = ("confusion_matrix", "macro_f1", "f1", "average_precision", "false_alarms", "background_hours")


def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The cross entropy of each clip: (clips,).

    Args:
        logits: (clips, classes).
        labels: (clips,), classes; or (clips, classes), answers with 1 for yes, 0 for no, and -1 for what is not known,
            each of which counts the same.
    """
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    truth, known = labels.clamp(min=0).to(logits.dtype), (labels >= 0).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, truth, known, reduction="none").mean(dim=1)


class FoldRun:
    """Fine-tuning with a fold held out, or none, in a folder of its own that can be resumed and is known when done."""

    def __init__(self, settings: ClassificationSettings, accelerator: Accelerator, store: ClipStore,
                 config: ESResNetConfig, fold: Fold, checkpoint: Path | None, record: Record):  # fmt: skip
        self.settings, self.accelerator, self.extractor = settings, accelerator, store.extractor
        self.make_views = ViewMaker(
            store.extractor, settings.augmentation, settings.augmentation_strength, store.caches_spectrograms
        )
        config, self.fold = copy.deepcopy(config), fold
        with loading(f"--resume_from_checkpoint {checkpoint}"):
            saved = ESResNetConfig.from_pretrained(checkpoint) if checkpoint else None
        if hasattr(saved, "thresholds"):  # they are of the weights, and no option's
            config.thresholds = saved.thresholds
        pretrained = settings.model_name_or_path if settings.init == "pretrained" else None
        self.model = make_model(
            ESResNetForAudioClassification, checkpoint or pretrained, config, settings.seed,
            reinit_stages=0 if checkpoint else settings.reinit_stages,
        )  # fmt: skip
        if settings.freeze_backbone:
            self.model.esresnet.requires_grad_(False)
        self.loop = TrainingLoop(
            settings, accelerator, self.model, training_loader(store, fold.train, settings), self.save_model,
            fold.output_dir, checkpoint, record, "" if fold.test is None else f"{fold.name}/",
        )  # fmt: skip
        self.loop.share_views(self.make_views)
        self.store = store
        self.test_loader = None if fold.test is None else self.unaugmented(fold.test)
        self.held_out: dict | None = None  # of the newest evaluation
        self.precise_statistics: dict[str, torch.Tensor] = {}  # batch norm's, which go with the newest evaluation

    def unaugmented(self, clips: Dataset) -> DataLoader:
        """Every window of some clips, in order."""
        return self.accelerator.prepare(evaluation_loader(self.store, clips, self.settings))

    def save_model(self, folder: Path | None) -> None:
        if folder is None:  # the main process has everything
            return
        self.model.save_pretrained(folder)
        self.extractor.save_pretrained(folder)

    def step(self, batch: GlobalBatch) -> torch.Tensor:
        """One optimizer step on the cross entropy."""
        if self.settings.freeze_backbone or self.settings.freeze_batch_norm:
            # Batch norm then neither learns statistics nor depends on the batch; nothing else differs in this mode.
            self.model.esresnet.eval()

        def clip_losses(number):
            part = batch.batches[number]
            logits = self.loop.model(self.make_views(part)).logits
            return losses(logits, part["labels"])

        return self.loop.optimize(batch, clip_losses)

    def evaluate(self, epoch: int, is_last: bool = False) -> dict[str, float]:
        """Accuracy on the held-out fold after an epoch; nothing where nothing is held out.

        With --precise_bn, what is scored has the statistics that it would be saved with, and `running_accuracy` is
        what the running ones give. Training goes on with these.
        """
        if not self.settings.precise_bn or not epoch:
            return self.score()
        running = {f"running_{name}": value for name, value in self.score().items()}
        statistics = batch_norm_statistics(self.model)
        estimate_batch_norm_statistics(self.model, self.passes(), self.accelerator)
        self.precise_statistics = batch_norm_statistics(self.model)
        found = self.score()
        self.model.load_state_dict(statistics, strict=False)
        return found | running

    @torch.no_grad()
    def passes(self) -> Iterator[None]:
        """Sends the training clips through the backbone, with the views and in the batches of the first epoch."""
        self.loop.loader.set_epoch(0)
        for batch in self.loop.loader:
            with self.accelerator.autocast():
                yield self.model.esresnet(self.make_views(batch))

    def score(self) -> dict[str, float]:
        """Accuracy on the held-out fold, of which `held_out` then has all metrics and, of its clips in order, `labels`
        and `features`. Means over a clip's windows count: the prediction is the class of the largest probability, or
        all classes whose probability reaches their threshold. Nothing where nothing is held out.
        """
        if self.test_loader is None:
            return {}

        def probabilities_and_features(batch):
            with self.accelerator.autocast():
                features = self.model.esresnet(self.make_views.unchanged(batch)).pooler_output
                logits = self.model.classifier(features).float()
                return torch.cat([self.model.probabilities(logits), features.float()], dim=1)

        self.model.eval()
        means = mean_over_windows(self.accelerator, self.test_loader, probabilities_and_features)
        self.model.train()
        classes = self.model.config.num_labels
        probabilities, features = means.split([classes, means.shape[1] - classes], dim=1)
        labels = self.test_loader.dataset.labels
        if labels.ndim == 1:
            metrics = ClassificationMetrics(keep_in_memory=True)
            found = metrics.compute(predictions=probabilities.argmax(-1), references=labels, num_classes=classes)
        else:
            found = self.answered(probabilities, labels)
        self.held_out = {"labels": labels, "features": features, **found}
        return {"accuracy": found["accuracy"]}

    def answered(self, probabilities: torch.Tensor, answers: torch.Tensor) -> dict:
        """The metrics of answers with yes or no, what is of one class each by the classes' names."""
        names = list(self.model.config.id2label.values())
        thresholds = getattr(self.model.config, "thresholds", None) or dict.fromkeys(names, NO_THRESHOLD)
        frames, rates = (np.array(self.fold.test[column][:]) for column in ("num_frames", "sampling_rate"))
        thresholds = [thresholds[name] for name in names]
        found = YesNoMetrics(keep_in_memory=True).compute(
            predictions=probabilities, references=answers, thresholds=thresholds, seconds=frames / rates
        )
        return found | {name: dict(zip(names, found[name], strict=True)) for name in ("f1", "average_precision")}

    def train(self) -> dict:
        """Trains and returns the fold's results."""
        history = self.loop.progress.history
        if self.settings.classifier_init == "ridge" and not history:
            if self.settings.init == "scratch":  # statistics of random weights describe nothing
                estimate_batch_norm_statistics(self.model, self.passes(), self.accelerator)
            further = self.fold.unlabelled
            start_from_ridge(
                self.model, self.unaugmented(self.fold.train), self.make_views.unchanged, self.accelerator,
                self.fold.train["source_id"][:], further and self.unaugmented(further),
                self.settings.self_training_rounds,
            )  # fmt: skip
            history.append({"epoch": 0, "step": 0, **self.evaluate(0), "seconds": self.loop.seconds})
            logger.info(f"{self.loop.log_prefix}before training: {describe(history[0])}")
        self.loop.train(self.step, self.evaluate)
        if self.held_out is None and not self.precise_statistics:  # all was done before this process began
            self.evaluate(self.loop.progress.epoch)
        self.model.load_state_dict(self.precise_statistics, strict=False)
        # Their decoding processes end with the last reference to them. With one that is left to the garbage collector,
        # torch waits for each of its processes, five seconds.
        self.loop.loader = self.test_loader = None
        self.accelerator.free_memory()  # it would also keep every fold's network and optimizer
        return self.results()

    def results(self) -> dict:
        """Of the fold, after its last epoch."""
        history = self.loop.progress.history
        start = [entry for entry in history if not entry["epoch"]]
        epochs = [entry for entry in history if entry["epoch"]]
        measured = {}
        if self.held_out is not None:
            measured = {
                **({"accuracy_at_start": start[0]["accuracy"]} if start else {}),
                "accuracy_per_epoch": [entry["accuracy"] for entry in epochs],
                **(
                    {"running_accuracy_per_epoch": [entry["running_accuracy"] for entry in epochs]}
                    if self.precise_statistics
                    else {}
                ),
                **{name: self.held_out[name] for name in REPORTED if name in self.held_out},
            }
        return measured | {
            **({"seconds_at_start": start[0]["seconds"]} if start else {}),
            "loss_per_epoch": [entry["loss"] for entry in epochs],
            "clips_per_second": [entry["clips_per_second"] for entry in epochs],
            "seconds_per_epoch": [entry["seconds"] for entry in epochs],
            "seconds": self.loop.seconds,
        }

    def draw_features(self, path: Path) -> None:
        """A map of the held-out clips' features, after `train`."""
        from dls_training.report import draw_embedding  # matplotlib takes its time, and is needed once, at the end

        names = list(self.model.config.id2label.values())
        title = "held-out clips, two principal components of the features"
        labels = self.held_out["labels"].numpy()
        if labels.ndim == 2:  # only clips of one class have its colour
            labels = np.where((labels == 1).sum(axis=1) == 1, labels.argmax(axis=1), -1)
        draw_embedding(path, self.held_out["features"], labels, names, title)


def run_fold(settings: ClassificationSettings, accelerator: Accelerator, store: ClipStore, config: ESResNetConfig,
             fold: Fold) -> dict:  # fmt: skip
    """Trains with one fold held out, or finds that this was done before. Returns the fold's results."""
    checkpoint, record = to_go_on_from(fold.record, settings.resume_from_checkpoint, fold.output_dir)
    if fold.is_finished():
        logger.info(f"{fold.name} was finished before")
    else:
        held_out = "none" if fold.test is None else len(fold.test)
        further = f", {len(fold.unlabelled)} without a label to learn from" if fold.unlabelled else ""
        logger.info(f"{fold.name}: {len(fold.train)} clips to train on{further}, {held_out} held out")
        run = FoldRun(settings, accelerator, store, config, fold, checkpoint, record)
        results = fold.facts | run.train()
        if accelerator.is_main_process:
            with files_moved_into_place(fold.output_dir, last=RECORD_FILE) as folder:
                run.save_model(folder)
                record.with_facts(seconds=results["seconds"]).save(folder)
                write_json(folder / RESULTS_FILE, results)
            if run.held_out is not None:
                with files_moved_into_place(fold.output_dir) as folder:
                    run.draw_features(folder / EMBEDDING)
        accelerator.wait_for_everyone()
    return json.loads(fold.results_file.read_text(encoding="utf-8"))


def arm_of(init: str, config: ESResNetConfig, parent: Record) -> str:
    """What the network had learned before: "scratch", "imagenet", "npid", "imagenet+npid"; "pretrained" if unknown."""
    if init == "scratch":
        return "scratch"
    return "+".join(filter(None, [config.initial_weights, *parent.tasks])) or "pretrained"


def over_folds(folds: dict[int, dict], names: list[str]) -> dict:
    """Means and standard deviations of what was measured in each fold, and the confusion of all held-out clips; where
    each class is answered with yes or no, means over folds of each class, and all false alarms.
    """
    found = {}
    for curve in ("accuracy_per_epoch", "running_accuracy_per_epoch", "accuracy_at_start", "macro_f1"):
        if all(fold.get(curve) is not None for fold in folds.values()):
            by_fold = np.array([fold[curve] for fold in folds.values()])
            found |= {f"mean_{curve}": by_fold.mean(axis=0).tolist(), f"std_{curve}": by_fold.std(axis=0).tolist()}
    if "confusion_matrix" not in next(iter(folds.values())):
        return found | over_answers(list(folds.values()), names)
    matrix = np.sum([fold["confusion_matrix"] for fold in folds.values()], axis=0).tolist()
    per_class = dict(zip(names, per_class_accuracy(matrix), strict=True))
    return found | {"confusion_matrix": matrix, "per_class_accuracy": per_class}


def over_answers(folds: list[dict], names: list[str]) -> dict:
    """Of answers with yes or no, over folds; None of a class that none of them could test, and without background."""

    def mean(values: list[float | None]) -> float | None:
        tested = [value for value in values if value is not None]
        return float(np.mean(tested)) if tested else None

    found = {
        metric: {name: mean([fold[metric][name] for fold in folds]) for name in names}
        for metric in ("f1", "average_precision")
    }
    alarms, hours = (sum(fold[what] for fold in folds) for what in ("false_alarms", "background_hours"))
    found |= {"false_alarms": alarms, "background_hours": hours}
    return found | {"false_alarms_per_hour": alarms / hours if hours else None}


def write_results(output_dir: Path, first_fold_dir: Path, results: dict) -> None:
    """Puts the first fold's model, the results of all folds and their card into the output folder."""
    own = Record.read(first_fold_dir).own.facts  # as it was when the fold was trained
    results |= {name: own[name] for name in ("task", "corpora", "seed", "command", "options", "environment")}
    if results["folds"]:
        last = np.array([final_accuracy(fold) for fold in results["folds"].values()])
        spread = f" ± {last.std():.4f} over {len(last)} folds" if len(last) > 1 else ""
        logger.info(f"accuracy {last.mean():.4f}{spread} at the end")
    with files_moved_into_place(output_dir, last=RECORD_FILE) as folder:
        # The root loads as the first fold's model; with a single fold, it is that model.
        for path in first_fold_dir.iterdir():
            if path.is_file() and path.name != RESULTS_FILE:
                shutil.copy2(path, folder)
        write_json(folder / "all_results.json", results)
    write_card(output_dir)
    logger.info(f"{output_dir} holds the model, all_results.json and a card")


def cross_validate(settings: ClassificationSettings, accelerator: Accelerator) -> None:
    """Fine-tunes once for each fold that is held out, or on everything, and writes what came of it."""
    extractor = make_extractor(settings)
    ((name, dataset),) = load_corpora(settings)
    corpus = LabelledCorpus.of(name, dataset, settings.fold)
    names = corpus.classes
    own = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    own["problem_type"] = "multi_label_classification" if corpus.answers_each_class else None
    if settings.init == "scratch":
        own["initial_weights"] = None
    config = make_config(settings, **own)
    vars(config).pop("thresholds", None)  # of a parent's classes
    parent, measured_on = parent_of(settings, config), environment(accelerator)
    folds = [
        make_fold(settings, number, corpus, parent, config=config, extractor=extractor, environment=measured_on)
        for number in corpus.folds_to_run(settings.fold)
    ]
    check_layout(settings)
    start_tracking(settings, accelerator)
    to_hear = [corpus.clips, *([corpus.unlabelled] if settings.self_training_rounds and corpus.unlabelled else [])]
    store = ClipStore(to_hear, extractor, settings)
    found = {fold.number: run_fold(settings, accelerator, store, config, fold) for fold in folds}
    if accelerator.is_main_process:
        results = {"corpus": name, "arm": arm_of(settings.init, config, parent), "folds": {}}
        if settings.fold == "none":
            results |= found[None]
        else:
            results |= {"folds": {str(number): fold for number, fold in found.items()}, **over_folds(found, names)}
        left_out = 0 if settings.self_training_rounds else len(corpus.unlabelled)
        results |= {"skipped_files": corpus_report(dataset)["skipped"], "left_out": {"without_label": left_out}}
        results |= {"made_folds": corpus.made_folds}
        write_results(settings.output_dir, folds[0].output_dir, results)


@ends_with_the_others()
def main(settings: ClassificationSettings) -> None:
    accelerator = make_accelerator(settings)
    with claim_output_dir(accelerator, settings.output_dir, resuming=settings.resume_from_checkpoint is not None):
        if settings.push_to_hub and accelerator.is_main_process:
            claim_repository(settings.hub_model_id, "classification", settings.hub_private_repo)
        cross_validate(settings, accelerator)
        accelerator.end_training()
        # After the run's end, for which no other process waits.
        if settings.push_to_hub and accelerator.is_main_process:
            publish(settings.output_dir, settings.hub_model_id, settings.hub_private_repo)


if __name__ == "__main__":
    sys.exit(run_command(main, SETTINGS))
