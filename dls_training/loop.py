"""The loop that both train scripts run: optimizer steps over global batches, checkpoints, logs, an orderly end."""

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, skip_first_batches
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from datasets_scripts.command_line import SignalWatch
from datasets_scripts.errors import Interrupted, UserError

from .checkpoints import TENSOR_FILE, Progress, load_checkpoint, save_checkpoint
from .cores import BackboneOnCores
from .health import has_finite_weights
from .input_pipeline import ViewMaker
from .optimization import check_optimizer_state, make_optimizer, make_scheduler
from .record import Record
from .runtime import MEMORY_FORMATS, parts_of_a_batch
from .settings import TrainingSettings

logger = logging.getLogger("dls")

# On a GPU, to ask costs a wait for all that was queued.
STEPS_BETWEEN_AGREEMENTS = {"cpu": 1, "cuda": 10}


@dataclass
class GlobalBatch:
    """The clips of one optimizer step, as far as they fall to this process.

    Attributes:
        batches: One or, with gradient accumulation, several.
        places: For each batch, its clips' places in the global batch, (batch,), int64: the same whether the global
            batch is split over processes, over accumulated batches, or not at all.
        slots: Places in the global batch.
        clips: Places taken: ragged last batches are filled up with clips seen before, and these do not count.
        step: Optimizer steps before this one.
    """

    batches: list[dict[str, torch.Tensor]]
    places: list[torch.Tensor]
    slots: int
    clips: int
    step: int


class TrainingLoop:
    """Prepares model, optimizer and data for Accelerate, goes on from a checkpoint, and trains.

    Attributes:
        model: Prepared by Accelerate.
        progress: Where the run is, with one history entry per epoch.
        finished: Whether all steps are done.
        evaluated: Whether the newest step's evaluation is in the history.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        accelerator: Accelerator,
        model: PreTrainedModel,
        loader: DataLoader,
        save_model: Callable[[Path | None], None],
        output_dir: Path,
        checkpoint: Path | None,
        record: Record,
        log_prefix: str = "",
    ):
        """
        Args:
            settings: The script's settings.
            accelerator: From `make_accelerator`.
            model: In training mode; already holds the checkpoint's weights, where there is one.
            loader: From `training_loader`.
            save_model: Writes into a folder what `from_pretrained` needs, and what else the script must restore.
                Called in every process, with None in all but the main one: there it hands over what only they have.
            output_dir: Where checkpoints go.
            checkpoint: Of this run, see `find_checkpoint` and `check_same_run`.
            record: Of this run.
            log_prefix: Of this loop's names in the log and the tracker.

        Raises:
            UserError: if the checkpoint is damaged, or already beyond the end of the run.
        """
        self.settings, self.accelerator, self.output_dir, self.save_model = (
            settings,
            accelerator,
            output_dir,
            save_model,
        )
        self.log_prefix, self.clock = log_prefix, time.perf_counter()
        self.record = record
        self.progress, saved = load_checkpoint(checkpoint) if checkpoint else (Progress(), None)
        self.clips_per_epoch = len(loader.sampler)
        trained = [named for named in model.named_parameters() if named[1].requires_grad]
        optimizer = make_optimizer(settings.optimizer, trained, settings.learning_rate, settings.weight_decay)
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            # Statistics of the global batch. No other back end has it: there, each process normalises its own part.
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = model.to(memory_format=MEMORY_FORMATS[settings.memory_format])
        self.model, self.optimizer, self.loader = accelerator.prepare(model, optimizer, loader)
        parts = parts_of_a_batch(settings, accelerator)
        self.on_cores = BackboneOnCores(model.base_model, parts, settings.per_device_train_batch_size)
        self.steps_per_epoch = math.ceil(len(self.loader) / settings.gradient_accumulation_steps)
        self.total_steps = settings.max_train_steps or settings.num_train_epochs * self.steps_per_epoch
        # Not prepared: Accelerate would step it once per process.
        self.scheduler = make_scheduler(
            settings.lr_scheduler_type, optimizer, self.total_steps, self.steps_per_epoch, settings.warmup_steps
        )
        if saved:
            self.restore(checkpoint, saved, optimizer)
            logger.info(f"going on from {checkpoint}: epoch {self.progress.epoch + 1}, step {self.progress.step}")

    def share_views(self, make_views: ViewMaker) -> None:
        """Where batches are computed in parts, whoever computes a part reads its clips and makes their views, too."""
        batches = self.loader.dataset
        if self.on_cores.parts > 1 and not self.loader.num_workers:
            self.on_cores.make_views = lambda keys: make_views(batches.for_training(keys))
            batches.make_views = self.on_cores.views

    def restore(self, checkpoint: Path, saved: dict, optimizer: torch.optim.Optimizer) -> None:
        """Gives optimizer, schedule and gradient scaler the states that they had.

        Args:
            checkpoint: Its name, for messages.
            saved: The tensors from `load_checkpoint`.
            optimizer: The bare one.
        """
        if self.progress.step > self.total_steps:
            raise UserError(
                f"{checkpoint} is at step {self.progress.step}, but this run is to end at step {self.total_steps}: "
                "raise --num_train_epochs or --max_train_steps"
            )
        try:
            check_optimizer_state(optimizer, saved["optimizer"])
            if saved["scheduler"]["last_epoch"] != self.progress.step:
                raise ValueError(f"its schedule is at step {saved['scheduler']['last_epoch']}")
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scheduler.load_state_dict(saved["scheduler"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(saved["scaler"])
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{checkpoint / TENSOR_FILE} does not fit this run: {reason}") from error

    @property
    def seconds(self) -> float:
        """What the run took so far, in all its stretches, evaluation included; not what a killed stretch lost."""
        return self.progress.seconds + time.perf_counter() - self.clock

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.total_steps

    @property
    def evaluated(self) -> bool:
        return any(entry.get("step") == self.progress.step for entry in self.progress.history)

    @property
    def at_end_of_epoch(self) -> bool:
        """Whether every clip of the current epoch is done."""
        return self.progress.clips == self.clips_per_epoch

    def train(self, step: Callable[[GlobalBatch], torch.Tensor], evaluate: Callable[[int, bool], dict]) -> None:
        """Trains until all steps are done.

        Args:
            step: Takes one optimizer step and returns the loss summed over the global batch's clips.
            evaluate: Called after each epoch with its number (from 1) and whether it is the last; returns metrics.

        Raises:
            Interrupted: after SIGINT or SIGTERM, with everything saved.
            UserError: if the loss is no longer a number.
        """
        with SignalWatch() as watch, self.on_cores.at_work():
            # A run that was stopped between its last step and the end of the evaluation has that still to do.
            while not (self.finished and self.evaluated):
                self.train_epoch(step, evaluate, watch)

    def train_epoch(self, step, evaluate, watch) -> None:
        progress = self.progress
        started, clips_before = time.perf_counter(), progress.clips
        loss_sum = torch.tensor(progress.loss_sum, dtype=torch.float64, device=self.accelerator.device)
        with self.progress_bar() as bar:
            for batch in self.global_batches():
                loss_sum += step(batch)
                progress.step += 1
                progress.batches += len(batch.batches)
                progress.clips += batch.clips
                bar.update(batch.clips)
                received = self.agreed(watch.received)
                steps = self.settings.checkpointing_steps
                if received or (steps != "epoch" and progress.step % steps == 0):
                    progress.loss_sum = loss_sum.item()
                    self.check_numbers(progress.loss_sum)
                    self.checkpoint()
                if received:
                    raise Interrupted(received)
                if self.finished:
                    break
        rate = (progress.clips - clips_before) / (time.perf_counter() - started)
        self.end_epoch(loss_sum.item(), rate, evaluate)

    def agreed(self, received: int) -> int:
        """The signal that any process received: all must leave the loop at the same step.

        Several processes ask one another only every so many steps, because that makes a GPU wait.
        """
        if self.accelerator.num_processes == 1:
            return received
        if self.progress.step % STEPS_BETWEEN_AGREEMENTS[self.accelerator.device.type]:
            return 0
        found = torch.tensor([received], device=self.accelerator.device)
        return int(self.accelerator.gather(found).max())

    def end_epoch(self, loss_sum: float, rate: float, evaluate) -> None:
        """Evaluates, logs, and saves."""
        progress = self.progress
        whole = self.at_end_of_epoch
        loss = loss_sum / progress.clips
        self.check_numbers(loss)
        if not whole:  # --max_train_steps ends within an epoch; the run can still go on from there
            progress.loss_sum = loss_sum
            self.checkpoint()
        entry = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "loss": loss,
            "learning_rate": self.scheduler.get_last_lr()[0],
            **evaluate(progress.epoch + 1, self.finished),
        }
        logger.info(f"{self.log_prefix}{describe(entry)}, {rate:.1f} clips/s")
        self.accelerator.log(flatten(entry, self.log_prefix), step=progress.step)
        progress.history.append(entry | {"clips_per_second": rate, "seconds": self.seconds})
        if whole:
            progress.epoch, progress.batches, progress.loss_sum, progress.clips = progress.epoch + 1, 0, 0.0, 0
            if self.finished or self.settings.checkpointing_steps == "epoch":
                self.checkpoint()

    def check_numbers(self, loss: float) -> None:
        """Before anything is saved.

        Raises:
            UserError: if the loss or a weight is no longer a number.
        """
        if not math.isfinite(loss):
            problem = f"the loss is {loss}"
        elif not has_finite_weights(self.model):
            problem = "weights of the network are no longer numbers"
        else:
            return
        raise UserError(
            f"{problem} in epoch {self.progress.epoch + 1}, step {self.progress.step}: lower --learning_rate, or try "
            "--mixed_precision no; earlier checkpoints are intact"
        )

    def global_batches(self) -> Iterator[GlobalBatch]:
        """What is left of the current epoch; nothing once all steps are done."""
        if self.finished:
            return
        progress, processes = self.progress, self.accelerator.num_processes
        self.loader.set_epoch(progress.epoch)
        batches = iter(skip_first_batches(self.loader, progress.batches) if progress.batches else self.loader)
        batch_size = self.settings.per_device_train_batch_size
        while group := list(itertools.islice(batches, self.settings.gradient_accumulation_steps)):
            first = self.accelerator.process_index * batch_size
            places = [
                torch.arange(len(batch["index"]), device=batch["index"].device) + first + i * processes * batch_size
                for i, batch in enumerate(group)
            ]
            slots = len(group) * processes * batch_size
            left = self.clips_per_epoch - progress.batches * processes * batch_size
            yield GlobalBatch(group, places, slots, min(slots, left), progress.step)

    def optimize(self, batch: GlobalBatch, clip_losses: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """One optimizer step on the mean loss of a global batch's clips.

        Args:
            batch: From `global_batches`.
            clip_losses: Number of a batch in `batch.batches` -> the loss of each of its clips, (batch,).

        Returns:
            The loss summed over the global batch's clips.
        """
        loss_sum = 0
        for number, places in enumerate(batch.places):
            # Only the last backward pass exchanges gradients between processes.
            last = number == len(batch.places) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = (clip_losses(number) * (places < batch.clips)).sum()
                # Accelerate averages gradients over processes; the mean is to be over clips.
                self.accelerator.backward(loss * self.accelerator.num_processes / batch.clips)
            loss_sum = loss_sum + loss.detach().double()
        self.on_cores.collect_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return self.accelerator.reduce(loss_sum)

    def checkpoint(self) -> None:
        """Saves everything that the run needs to go on."""
        self.progress.seconds, self.clock = self.seconds, time.perf_counter()
        if not self.accelerator.is_main_process:
            self.save_model(None)
        else:
            tensors = {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
            if self.accelerator.scaler is not None:  # with fp16: its scale decides which steps are taken
                tensors["scaler"] = self.accelerator.scaler.state_dict()
            limit = self.settings.checkpoints_total_limit
            save_checkpoint(self.output_dir, self.progress, self.save_model, tensors, self.record, limit)
        self.accelerator.wait_for_everyone()

    def progress_bar(self) -> tqdm:
        last_epoch = math.ceil(self.total_steps / self.steps_per_epoch)
        return tqdm(
            desc=f"{self.log_prefix}epoch {self.progress.epoch + 1}/{last_epoch}",
            total=self.clips_per_epoch,
            initial=self.progress.clips,
            unit=" clips",
            leave=False,
            disable=not self.accelerator.is_local_main_process,
        )


def flatten(entry: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a/b": 1}, the names that trackers plot."""
    flat = {}
    for name, value in entry.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def describe(entry: dict) -> str:
    """One log line of an epoch's numbers."""
    return ", ".join(f"{name} {value:.4g}" for name, value in flatten(entry).items())
