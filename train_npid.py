"""Pre-trains ESResNet on unlabelled audio: every clip is its own class (NPID, as in the DLS paper).

    accelerate launch train_npid.py --corpus esc10=/data/ESC-10 --output_dir runs/npid

The output folder loads with `from_pretrained`, and holds the memory bank and `all_results.json`.
"""
# ruff: noqa: E402

from dls_training.arguments import at_least, finish_parsing, fraction, make_parser

RECIPES = {
    "paper": {
        "preset": "esresnet50",
        "num_train_epochs": 200,
        "per_device_train_batch_size": 64,
        "optimizer": "sgd",
        "learning_rate": 0.03,
        "weight_decay": 1e-4,
        "lr_scheduler_type": "multistep",
        "output_dir": "runs/npid",
    },
    "recommended": {
        "preset": "small_mel",
        "augmentation": "spectrogram",
        "keep_spectrograms": True,
        "objective": "softmax",
        "nce_t": 0.1,
        "num_train_epochs": 200,
        "per_device_train_batch_size": 32,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.3,
    },
}
REASONS = """The defaults are those of --recipe paper (DLS: ESResNet-50, d 128, K 64, temperature 0.4, batch 64, 200
epochs, SGD; NPID: rate 0.03, momentum 0.9, weight decay 1e-4, steps at 60 % and 80 %). Three things differ: precision
is bf16 where the processor computes in it, because that is faster; "time inversion" plays a clip backwards, as the
ESResNet paper says, where its code swaps channels; and in k-NN, sigma is 0.1 and not the temperature, so that runs
with different temperatures are measured alike.
--recipe recommended is what worked best on a small machine (see results/)."""


def excluded_fold(text: str) -> tuple[str | None, int]:
    """An argparse type: N, or CORPUS=N."""
    corpus, _, fold = text.rpartition("=")
    return corpus or None, int(fold)


def parse_args(argv: list[str] | None = None):
    parser = make_parser(__doc__.splitlines()[0], RECIPES, REASONS)
    add = parser.add_argument_group("instance discrimination").add_argument
    add("--objective", choices=("nce", "softmax"), default="nce", help="NCE, or the exact softmax (default: nce)")
    add("--nce_k", type=at_least(1), default=64, help="negatives per clip (default: 64)")
    add("--nce_t", type=at_least(1e-3, float), default=0.4, help="temperature of either objective (default: 0.4)")
    add("--nce_exclude_positive", action="store_true", help="never draw a clip as its own negative; the original does")
    add("--nce_z_momentum", type=fraction, help="keep a running estimate of Z (default: the first batch's for good)")
    add("--embedding_dim", type=at_least(1), help="default: 128, or the checkpoint's")
    add("--bank_momentum", type=fraction, default=0.5, help="default: 0.5")
    add(
        "--shard_bank", action="store_true", help="spread the bank's rows over the processes (default: a copy in each)"
    )
    add("--exclude_fold", action="append", type=excluded_fold, default=[], metavar="[CORPUS=]N",
        help="leave a fold out of the training, so that it can be tested on")  # fmt: skip
    add("--knn_interval", type=at_least(1), default=5, help="epochs between k-NN evaluations (default: 5)")
    add("--knn_k", type=at_least(1), default=5, help="neighbours (default: 5, as in the paper)")
    return finish_parsing(parser, RECIPES, argv)


# Arguments are read before anything heavy is imported: --help answers at once.
ARGS = parse_args() if __name__ == "__main__" else None

import logging
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset

from datasets_scripts import ClipIdentities, combine_corpora, corpus_report
from datasets_scripts.command_line import run_command
from datasets_scripts.errors import UserError
from datasets_scripts.files import files_moved_into_place, write_json
from dls_training.checkpoints import claim_output_dir
from dls_training.clips import ClipStore
from dls_training.health import Visits, bank_similarity
from dls_training.input_pipeline import (
    ViewMaker,
    evaluation_loader,
    load_corpora,
    mean_over_windows,
    training_loader,
)
from dls_training.instance_discrimination import KNN_SIGMA, InstanceDiscrimination, knn_accuracy_by_fold
from dls_training.loop import GlobalBatch, TrainingLoop, describe
from dls_training.memory_bank import BANK_FILE, MemoryBank, ShardedMemoryBank
from dls_training.networks import make_config, make_extractor, make_model
from dls_training.record import RECORD_FILE, begun, parent_of, to_go_on_from
from dls_training.runtime import ends_with_the_others, environment, make_accelerator, start_tracking
from hub_cards import write_card
from hub_cards.publishing import claim_repository, publish
from modeling_dls import ESResNetForInstanceDiscrimination
from modeling_dls.modeling_esresnet import frozen_batch_norm_statistics

logger = logging.getLogger("dls")


def excluded_folds(args, name: str) -> set[int]:
    return {fold for corpus, fold in args.exclude_fold if corpus in (None, name)}


def training_clips(args, corpora: list[tuple[str, Dataset]]) -> tuple[Dataset, dict]:
    """Every clip of the folds that are not excluded, once; and what the report says about the data."""
    for corpus, fold in args.exclude_fold:
        if not any(corpus in (None, name) and fold in dataset["fold"][:] for name, dataset in corpora):
            raise UserError(f"--exclude_fold {corpus + '=' if corpus else ''}{fold}: no --corpus has this fold")
    excluded = {name: excluded_folds(args, name) for name, _ in corpora}
    clips, combined = combine_corpora(corpora, excluded)
    logger.info(f"{len(clips)} clips: {combined['clips']}, {combined['removed']} duplicates removed")
    return clips, {
        "clips": combined["clips"],
        "duplicates_removed": combined["removed_pairs"],
        "skipped_files": {name: skipped for name, d in corpora if (skipped := corpus_report(d)["skipped"])},
        "excluded_folds": {name: sorted(folds) for name, folds in excluded.items() if folds},
    }


def make_bank(args, checkpoint: Path | None, keys: torch.Tensor, embedding_dim: int) -> tuple[MemoryBank, int]:
    """The checkpoint's memory bank; or a new one, with what the bank of --model_name_or_path knows of these clips.

    Returns:
        The bank, and the number of clips that a bank of --model_name_or_path knew.

    Raises:
        UserError: if there is no usable bank where one must be.
    """
    bank_class = ShardedMemoryBank if args.shard_bank else MemoryBank
    earlier = Path(args.model_name_or_path or "") / BANK_FILE
    try:
        if checkpoint is not None:
            bank = bank_class.load(checkpoint / BANK_FILE, args.bank_momentum)
            own_keys = keys[bank.first : bank.first + len(bank.vectors)]
            if bank.vectors.shape[1] != embedding_dim or not torch.equal(bank.keys, own_keys):
                raise ValueError(f"{checkpoint / BANK_FILE} has rows of other clips than this run, or other columns")
            return bank, 0
        bank = bank_class(len(keys), embedding_dim, args.bank_momentum, keys, args.seed)
        if not (args.model_name_or_path and earlier.is_file()):
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


class NearestNeighbourTests:
    """Weighted k-NN accuracy of the embedding on every corpus that has labels.

    Excluded folds are held out; where none is, each official fold in turn; without folds, every fifth clip.
    """

    def __init__(self, args, corpora, store: ClipStore, make_views: ViewMaker, accelerator):
        self.accelerator, self.make_views = accelerator, make_views
        self.k, self.sigma = args.knn_k, KNN_SIGMA
        self.tests, times = {}, Counter()
        self.names: dict[str, list[str]] = {}
        self.embeddings: dict[str, torch.Tensor] = {}  # the newest
        for name, corpus in corpora:
            labels, folds = corpus["label"][:], torch.tensor(corpus["fold"][:])
            if None in labels or len(set(labels)) < 2:
                continue
            if len(folds.unique()) < 2:
                folds = torch.arange(len(labels)) % 5 + 1
            existing = folds.unique().tolist()
            held_out = sorted(excluded_folds(args, name).intersection(existing)) or existing
            loader = evaluation_loader(store, corpus, args)
            times[name] += 1
            shown_as = name if times[name] == 1 else f"{name}-{times[name]}"  # a second folder of one's own
            self.names[shown_as] = corpus.features["label"].names
            self.tests[shown_as] = (
                accelerator.prepare(loader),
                torch.tensor(labels),
                folds,
                held_out,
            )

    def __call__(self, model) -> dict[str, float]:
        """{corpus: accuracy 0..1, mean of the held-out folds}"""
        model.eval()
        accuracies = {}
        for name, (loader, labels, folds, held_out) in self.tests.items():
            self.embeddings[name] = self.embed(model, loader)
            by_fold = knn_accuracy_by_fold(self.embeddings[name], labels, folds, held_out, self.k, self.sigma)
            accuracies[name] = sum(by_fold.values()) / len(by_fold)
        model.train()
        return accuracies

    def draw_first(self, path: Path) -> None:
        """A map of the first labelled corpus' embeddings, as they were last; none without labels."""
        from dls_training.report import draw_embedding  # matplotlib takes its time, and is needed once, at the end

        if self.embeddings:
            name, embeddings = next(iter(self.embeddings.items()))
            title = f"{name}, two principal components of the embedding"
            draw_embedding(path, embeddings, self.tests[name][1].numpy(), self.names[name], title)

    def embed(self, model, loader) -> torch.Tensor:
        """Every clip of a corpus, in order: (clips, embedding_dim), the mean over a clip's windows at unit length."""

        def score(batch):
            return model(self.make_views.unchanged(batch)).embeddings

        return F.normalize(mean_over_windows(self.accelerator, loader, score), dim=-1)


class PretextStep:
    """One optimizer step of instance discrimination, over however many processes and batches it is split."""

    def __init__(self, accelerator, loop: TrainingLoop, objective: InstanceDiscrimination, make_views: ViewMaker):
        self.accelerator, self.loop, self.objective, self.make_views = accelerator, loop, objective, make_views
        self.needs_normaliser = objective.needs_normaliser()
        self.visits = Visits(len(objective.bank), accelerator.device, within_epoch=loop.progress.batches > 0)

    def __call__(self, batch: GlobalBatch) -> torch.Tensor:
        """Updates the network, and then, once, the bank. Returns the loss summed over the clips."""
        views = [self.make_views(part) for part in batch.batches]
        indices = [part["index"] for part in batch.batches]
        candidates = self.objective.candidates(indices, batch.places, batch.slots, batch.step)
        if self.needs_normaliser:
            self.estimate_normaliser(batch, views, candidates)
            self.needs_normaliser = False
        embeddings = []

        def clip_losses(number):
            embeddings.append(self.loop.model(views[number]).embeddings)
            return self.objective.loss(embeddings[number], indices[number], candidates[number])

        loss_sum = self.loop.optimize(batch, clip_losses)
        embeddings = [embedding.detach() for embedding in embeddings]
        if self.objective.z_momentum is not None:
            self.update_normaliser(batch, embeddings, candidates)
        # After the step and outside of backward, so that it happens once however many batches were accumulated.
        self.update_bank(batch, torch.cat(indices), torch.cat(embeddings))
        return loss_sum

    def update_bank(self, batch: GlobalBatch, indices: torch.Tensor, embeddings: torch.Tensor) -> None:
        places = torch.cat(batch.places)
        places, indices, embeddings = self.accelerator.gather((places, indices, embeddings))
        # Clips that fill up a ragged batch become copies of its first clip, of which only the first counts.
        indices = torch.where(places < batch.clips, indices, indices[0])
        self.objective.bank.update(indices, embeddings)
        self.visits.add(indices)

    @torch.no_grad()
    def estimate_normaliser(self, batch: GlobalBatch, views, candidates) -> None:
        """Z from the first global batch, before any loss is taken: how the batch is split must not matter."""
        with frozen_batch_norm_statistics(self.loop.model):
            self.update_normaliser(batch, [self.loop.model(view).embeddings for view in views], candidates)

    def update_normaliser(self, batch: GlobalBatch, embeddings, candidates) -> None:
        means = self.objective.mean_exp(torch.cat(embeddings), torch.cat(candidates))
        own_sum = (means * (torch.cat(batch.places) < batch.clips)).sum()
        mean = self.accelerator.reduce(own_sum) / batch.clips
        self.objective.bank.update_normaliser(mean, self.objective.z_momentum or 0.0)


@ends_with_the_others()
def main() -> None:
    args = ARGS
    accelerator = make_accelerator(args)
    if args.shard_bank and accelerator.num_processes == 1:
        raise UserError("--shard_bank spreads the bank over processes, but there is only one: leave it out")
    claim_output_dir(accelerator, args.output_dir, resuming=args.resume_from_checkpoint is not None)
    if args.push_to_hub and accelerator.is_main_process:
        claim_repository(args.hub_model_id, "npid", args.hub_private_repo)
    extractor = make_extractor(args)
    config = make_config(args, **({"embedding_dim": args.embedding_dim} if args.embedding_dim else {}))
    start_tracking(args, accelerator)
    corpora = load_corpora(args)
    clips, data_report = training_clips(args, corpora)
    identities = ClipIdentities.of(clips)
    record = begun(
        args, "npid", parent_of(args, config), corpora, identities, config, extractor, with_labels=False,
        clips=data_report["clips"], excluded_folds=data_report["excluded_folds"], environment=environment(accelerator),
    )  # fmt: skip
    checkpoint, record = to_go_on_from(record, args.resume_from_checkpoint, args.output_dir)
    store = ClipStore([corpus for _, corpus in corpora], extractor, args)
    loader = training_loader(store, clips, args)
    model = make_model(ESResNetForInstanceDiscrimination, checkpoint or args.model_name_or_path, config, args.seed)
    keys = torch.from_numpy(identities.digests())
    bank, known = make_bank(args, checkpoint, keys, config.embedding_dim)
    bank = bank.to(accelerator.device)
    objective = InstanceDiscrimination(
        bank, args.objective, args.nce_k, args.nce_t, args.nce_exclude_positive, args.nce_z_momentum, args.seed
    )

    def save_model(folder):
        bank.save(folder and folder / BANK_FILE)
        if folder:
            accelerator.unwrap_model(model).save_pretrained(folder)
            extractor.save_pretrained(folder)

    loop = TrainingLoop(args, accelerator, model, loader, save_model, args.output_dir, checkpoint, record)
    make_views = ViewMaker(extractor, args.augmentation, args.augmentation_strength, store.keeps_spectrograms)
    nearest_neighbours = NearestNeighbourTests(args, corpora, store, make_views, accelerator)
    step = PretextStep(accelerator, loop, objective, make_views)

    def evaluate(epoch, is_last):
        if loop.at_end_of_epoch:
            step.visits.end_epoch(epoch, loop.clips_per_epoch)
        evaluated = is_last or epoch % args.knn_interval == 0
        accuracy = {"knn_accuracy": nearest_neighbours(loop.model)} if evaluated else {}
        return {"bank_similarity": bank_similarity(bank, epoch)} | accuracy

    if not loop.progress.history:
        start = {"epoch": 0, "known_clips": known, "knn_accuracy": nearest_neighbours(loop.model)}
        loop.progress.history.append(start)
        logger.info(f"before training: {describe(loop.progress.history[0])}")
    loop.train(step, evaluate)
    if not nearest_neighbours.embeddings:  # everything was done before this process began
        nearest_neighbours(loop.model)

    record = record.with_facts(seconds=loop.progress.seconds)
    results = {
        **{name: record.own.facts[name] for name in ("task", "corpora", "seed", "command", "options", "environment")},
        **data_report,
        "objective": args.objective,
        "knn": {"k": nearest_neighbours.k, "sigma": nearest_neighbours.sigma},
        "history": loop.progress.history,
        "seconds": loop.progress.seconds,
        "run": record.own.identity_digest,
    }
    if not accelerator.is_main_process:
        save_model(None)
    else:
        with files_moved_into_place(args.output_dir, last=RECORD_FILE) as folder:
            save_model(folder)
            record.save(folder)
            nearest_neighbours.draw_first(folder / "embedding.png")
            write_json(folder / "all_results.json", results)
            write_card(folder)
        logger.info(f"{args.output_dir} holds the model, its memory bank, all_results.json and a card")
    accelerator.end_training()
    if args.push_to_hub and accelerator.is_main_process:  # after the run's end, for which no other process waits
        publish(args.output_dir, args.hub_model_id, args.hub_private_repo)


if __name__ == "__main__":
    sys.exit(run_command(main))
