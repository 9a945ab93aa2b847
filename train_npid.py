"""Pre-trains ESResNet on unlabelled audio: every clip is its own class (NPID, as in the DLS paper).

    accelerate launch train_npid.py --corpus esc10=/data/ESC-10 --output_dir runs/npid

The output folder loads with `from_pretrained`, and holds the memory bank and `all_results.json`.
"""
# ruff: noqa: E402

from dls_training.settings import PretrainingSettings

# Options are read before anything heavy is imported: --help answers at once.
SETTINGS = PretrainingSettings.parsed() if __name__ == "__main__" else None

import logging
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset

from datasets_scripts import ClipIdentities, combine_corpora, corpus_report
from datasets_scripts.command_line import run_command
from datasets_scripts.errors import UserError
from datasets_scripts.files import files_moved_into_place, write_json
from dls_training.checkpoints import claim_output_dir
from dls_training.clips import ClipStore
from dls_training.health import bank_similarity
from dls_training.input_pipeline import ViewMaker, load_corpora, training_loader
from dls_training.instance_discrimination import InstanceDiscrimination, PretextStep
from dls_training.loop import TrainingLoop, describe
from dls_training.memory_bank import BANK_FILE, MemoryBank
from dls_training.nearest_neighbours import NearestNeighbourTests
from dls_training.networks import make_config, make_extractor, make_model
from dls_training.record import RECORD_FILE
from dls_training.runs import begun, parent_of, to_go_on_from
from dls_training.runtime import ends_with_the_others, environment, make_accelerator, start_tracking
from dls_training.sharded_bank import ShardedMemoryBank
from dls_training.tasks import EMBEDDING
from hub_cards import write_card
from hub_cards.publishing import claim_repository, publish
from modeling_dls import ESResNetForInstanceDiscrimination

logger = logging.getLogger("dls")


def training_clips(settings: PretrainingSettings, corpora: list[tuple[str, Dataset]]) -> tuple[Dataset, dict]:
    """Every clip of the folds that are not excluded, once; and what the report says about the data."""
    for corpus, fold in settings.exclude_fold:
        if not any(corpus in (None, name) and fold in dataset["fold"][:] for name, dataset in corpora):
            raise UserError(f"--exclude_fold {corpus + '=' if corpus else ''}{fold}: no --corpus has this fold")
    excluded = {name: settings.excluded_folds(name) for name, _ in corpora}
    clips, combined = combine_corpora(corpora, excluded)
    logger.info(f"{len(clips)} clips: {combined['clips']}, {combined['removed']} duplicates removed")
    return clips, {
        "clips": combined["clips"],
        "duplicates_removed": combined["removed_pairs"],
        "skipped_files": {name: skipped for name, d in corpora if (skipped := corpus_report(d)["skipped"])},
        "excluded_folds": {name: sorted(folds) for name, folds in excluded.items() if folds},
    }


def make_bank(
    settings: PretrainingSettings, checkpoint: Path | None, keys: torch.Tensor, embedding_dim: int
) -> tuple[MemoryBank, int]:
    """The checkpoint's memory bank; or a new one, with what the bank of --model_name_or_path knows of these clips.

    Returns:
        The bank, and the number of clips that a bank of --model_name_or_path knew.

    Raises:
        UserError: if there is no usable bank where one must be.
    """
    bank_class = ShardedMemoryBank if settings.shard_bank else MemoryBank
    earlier = Path(settings.model_name_or_path or "") / BANK_FILE
    try:
        if checkpoint is not None:
            bank = bank_class.load(checkpoint / BANK_FILE, settings.bank_momentum)
            own_keys = keys[bank.first : bank.first + len(bank.vectors)]
            if bank.vectors.shape[1] != embedding_dim or not torch.equal(bank.keys, own_keys):
                raise ValueError(f"{checkpoint / BANK_FILE} has rows of other clips than this run, or other columns")
            return bank, 0
        bank = bank_class(len(keys), embedding_dim, settings.bank_momentum, keys, settings.seed)
        if not (settings.model_name_or_path and earlier.is_file()):
            return bank, 0
        if (saved_dim := MemoryBank.saved_shape(earlier)[1]) != embedding_dim:
            logger.warning(
                f"{earlier} has vectors of {saved_dim} numbers, not {embedding_dim}: the memory bank starts anew"
            )
            return bank, 0
        known = bank.take_over(earlier)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    logger.info(f"{known} of {len(keys)} clips are known to {earlier}, {len(keys) - known} are new")
    return bank, known


class Pretraining:
    """One run: its clips and record, the network with its loss, and what is measured on the way."""

    def __init__(self, settings: PretrainingSettings, accelerator: Accelerator):
        self.settings, self.accelerator = settings, accelerator
        self.extractor = make_extractor(settings)
        own = {"embedding_dim": settings.embedding_dim} if settings.embedding_dim else {}
        config = make_config(settings, **own)
        corpora = load_corpora(settings)
        clips, self.data_report = training_clips(settings, corpora)
        identities = ClipIdentities.of(clips)
        record = begun(
            settings, "npid", parent_of(settings, config), corpora, identities, config, self.extractor,
            with_labels=False, clips=self.data_report["clips"], excluded_folds=self.data_report["excluded_folds"],
            environment=environment(accelerator),
        )  # fmt: skip
        checkpoint, self.record = to_go_on_from(record, settings.resume_from_checkpoint, settings.output_dir)
        store = ClipStore([corpus for _, corpus in corpora], self.extractor, settings)
        make_views = ViewMaker(
            self.extractor, settings.augmentation, settings.augmentation_strength, store.caches_spectrograms
        )
        start = checkpoint or settings.model_name_or_path
        self.model = make_model(ESResNetForInstanceDiscrimination, start, config, settings.seed)
        keys = torch.from_numpy(identities.digests())
        bank, self.known_clips = make_bank(settings, checkpoint, keys, config.embedding_dim)
        self.objective = InstanceDiscrimination(
            bank, settings.objective, settings.nce_k, settings.nce_t, settings.nce_exclude_positive,
            settings.nce_z_momentum, settings.seed,
        ).to(accelerator.device)  # fmt: skip
        self.loop = TrainingLoop(
            settings, accelerator, self.model, training_loader(store, clips, settings), self.save_model,
            settings.output_dir, checkpoint, self.record,
        )  # fmt: skip
        self.nearest_neighbours = NearestNeighbourTests(settings, corpora, store, make_views, accelerator)
        self.step = PretextStep(accelerator, self.loop, self.objective, make_views)

    def save_model(self, folder: Path | None) -> None:
        """Writes network, memory bank and feature extractor; None in every process but the main one."""
        self.objective.bank.save(folder and folder / BANK_FILE)
        if folder:
            self.model.save_pretrained(folder)
            self.extractor.save_pretrained(folder)

    def evaluate(self, epoch: int, is_last: bool) -> dict:
        """What is said of an epoch beside its loss."""
        if self.loop.at_end_of_epoch:
            self.step.visits.end_epoch(epoch, self.loop.clips_per_epoch)
        is_due = is_last or epoch % self.settings.knn_interval == 0
        accuracy = {"knn_accuracy": self.nearest_neighbours(self.loop.model)} if is_due else {}
        return {"bank_similarity": bank_similarity(self.objective.bank, epoch)} | accuracy

    def train(self) -> None:
        history = self.loop.progress.history
        if not history:
            accuracy = self.nearest_neighbours(self.loop.model)
            history.append({"epoch": 0, "known_clips": self.known_clips, "knn_accuracy": accuracy})
            logger.info(f"before training: {describe(history[0])}")
        self.loop.train(self.step, self.evaluate)
        if not self.nearest_neighbours.are_measured:  # everything was done before this process began
            self.nearest_neighbours(self.loop.model)

    def results(self) -> dict:
        """What `all_results.json` holds."""
        own = self.record.own
        return {
            **{name: own.facts[name] for name in ("task", "corpora", "seed", "command", "options", "environment")},
            **self.data_report,
            "objective": self.settings.objective,
            "knn": {"k": self.nearest_neighbours.k, "sigma": self.nearest_neighbours.sigma},
            "history": self.loop.progress.history,
            "seconds": self.loop.progress.seconds,
            "run": own.identity_digest,
        }

    def write(self) -> None:
        """Puts model, bank, record and results into the output folder, all or nothing; then pictures and card."""
        if not self.accelerator.is_main_process:
            self.save_model(None)
            return
        output_dir = self.settings.output_dir
        with files_moved_into_place(output_dir, last=RECORD_FILE) as folder:
            self.save_model(folder)
            self.record.with_facts(seconds=self.loop.progress.seconds).save(folder)
            write_json(folder / "all_results.json", self.results())
        with files_moved_into_place(output_dir) as folder:
            self.nearest_neighbours.draw_first(folder / EMBEDDING)
        write_card(output_dir)
        logger.info(f"{output_dir} holds the model, its memory bank, all_results.json and a card")


@ends_with_the_others()
def main(settings: PretrainingSettings) -> None:
    accelerator = make_accelerator(settings)
    if settings.shard_bank and accelerator.num_processes == 1:
        raise UserError("--shard_bank spreads the bank over processes, but there is only one: leave it out")
    with claim_output_dir(accelerator, settings.output_dir, resuming=settings.resume_from_checkpoint is not None):
        if settings.push_to_hub and accelerator.is_main_process:
            claim_repository(settings.hub_model_id, "npid", settings.hub_private_repo)
        run = Pretraining(settings, accelerator)
        start_tracking(settings, accelerator)
        run.train()
        run.write()
        accelerator.end_training()
        # After the run's end, for which no other process waits.
        if settings.push_to_hub and accelerator.is_main_process:
            publish(settings.output_dir, settings.hub_model_id, settings.hub_private_repo)


if __name__ == "__main__":
    sys.exit(run_command(main, SETTINGS))
