"""The settings of both train scripts. Imports nothing heavy: `--help` and a mistyped option are answered at once."""

from dataclasses import dataclass
from pathlib import Path
from runpy import run_path
from typing import ClassVar

from datasets_scripts import CORPUS_NAMES
from datasets_scripts.errors import UserError
from datasets_scripts.options import (
    Options,
    flag,
    label_pattern,
    named_source,
    one_of,
    option,
    path,
    path_or_id,
    real,
    text,
    whole,
    whole_numbers,
)

# Read by itself: importing its package would import transformers.
PRESETS = tuple(run_path(str(Path(__file__).parents[1] / "modeling_dls" / "presets_esresnet.py"))["PRESETS"])
PRECISIONS = ("auto", "no", "bf16", "fp16")
# Accelerate's, which is not imported here (`get_available_trackers`).
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab")
MEMORY_FORMATS = ("auto", "channels_last", "contiguous")
SCHEDULES = ("constant", "linear", "cosine", "multistep", "esresnet")
CACHE_GIGABYTES = 20.0
CLIP_SECONDS = real(0.05, 3600)
AS_LONG_AS_CLIPS = "clip_seconds"


def window_length(value) -> float | str:
    """Reads the length of a window in s, or "clip_seconds"."""
    return value if value == AS_LONG_AS_CLIPS else CLIP_SECONDS(value)


def steps_or_epoch(value) -> int | str:
    """Reads a positive number of steps, or "epoch"."""
    return value if value == "epoch" else whole(1)(value)


def excluded_fold(value) -> tuple[str | None, int]:
    """Reads N or CORPUS=N, or such a pair."""
    corpus, _, fold = value.rpartition("=") if isinstance(value, str) else (value[0], "", value[1])
    return corpus or None, whole(0)(fold)


def fold_choice(value) -> int | str:
    """Reads a fold's number, several with commas between, "all" or "none"."""
    if value in ("all", "none"):
        return value
    numbers = sorted({whole(1)(number) for number in str(value).split(",")})
    return numbers[0] if len(numbers) == 1 else ",".join(map(str, numbers))


@dataclass(kw_only=True)
class DataOptions(Options):
    """Data."""

    corpus: list[tuple[str, str | None]] = option(
        [("synthetic", None)], named_source, many=True, metavar="NAME[=DIR]",
        help=f"{', '.join(CORPUS_NAMES)}, and where it is; hub=ID is any audio dataset (default: synthetic)",
    )  # fmt: skip
    windows: float | str | None = option(
        None, window_length, bare=AS_LONG_AS_CLIPS, metavar="SECONDS",
        help="cut recordings up: each window of this length (default: of --clip_seconds) is a clip of its own",
    )  # fmt: skip
    overlap: float = option(0.0, real(0, below=1), "of a window with the next", metavar="SHARE")
    silence_db: float | None = option(
        None, real(-1000, 1000), metavar="DB",
        help="with --windows: leave out windows below this level, in dB below full scale, such as -60",
    )  # fmt: skip
    clip_seconds: float | None = option(None, CLIP_SECONDS, "length of a view (default: the checkpoint's, or 5)")
    sampling_rate: int | None = option(
        None, whole(100, 1_000_000), metavar="HZ",
        help="that sounds are brought to, such as 16000; spectrograms keep their times (default: the checkpoint's, or "
        "the preset's 44100)",
    )  # fmt: skip
    audio_channels: int | None = option(
        None, whole(1, 2), metavar="{1,2}",
        help="1 averages channels, 2 doubles mono (default: the checkpoint's, or 1)",
    )  # fmt: skip
    augmentation: str = option(
        "waveform", one_of("waveform", "spectrogram", "both"),
        help="waveform: ESResNet's; spectrogram: crops, mixing, gain and masks instead, which keep small corpora from "
        "being memorised",
    )  # fmt: skip
    augmentation_strength: float = option(
        1.0, real(0, 1.5), "multiplies the ranges of the augmentation; 0 leaves only playing backwards"
    )
    keep_spectrograms: bool = option(
        False, flag,
        help="with --augmentation spectrogram: compute each clip's power spectrogram once and cache it on disk, so "
        "that the network and not decoding is the limit (short clips are padded centrally, not at random)",
    )  # fmt: skip
    keep_waveforms: bool = option(False, flag, "decode and resample each clip once and cache the samples on disk")
    cache_gigabytes: float | None = option(
        None, real(0), f"disk space for what is cached, of all runs together (default: {CACHE_GIGABYTES:g})"
    )
    allow_partial: bool = option(False, flag, "accept a corpus that lacks some of its clips")
    skip_unreadable: bool = option(False, flag, "leave unreadable files out and report them")
    label_pattern: str | None = option(
        None, label_pattern, metavar="PATTERN",
        help="of an audiofolder: a regular expression with the group (?P<label>...), and perhaps (?P<source>...) for "
        "the recording, in the names of its files",
    )  # fmt: skip
    no_folder_labels: bool = option(False, flag, "of an audiofolder: its folders are neither classes nor folds")
    audio_column_name: str | None = option(None, text, "of --corpus hub=ID (default: audio)", metavar="NAME")
    label_column_name: str | None = option(None, text, "of --corpus hub=ID (default: label)", metavar="NAME")
    fold_column_name: str | None = option(
        None, text, metavar="NAME",
        help="of --corpus hub=ID (default: fold; without that column, every split but train is a fold)",
    )  # fmt: skip
    dataset_config_name: str | None = option(None, text, "of --corpus hub=ID (default: its own)", metavar="NAME")
    dataloader_num_workers: int | None = option(
        None, whole(0, 1024),
        help="decoding processes; 0 decodes between steps, on all cores (default: 0 on a CPU, where processes take "
        "cores from the network, and with --keep_*; otherwise one per core, at most 8)",
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        if (self.label_pattern or self.no_folder_labels) and "audiofolder" not in dict(self.corpus):
            raise UserError("--label_pattern and --no_folder_labels are for --corpus audiofolder=DIR: add that")
        if "hub" not in dict(self.corpus) and (
            self.audio_column_name or self.label_column_name or self.fold_column_name or self.dataset_config_name
        ):
            raise UserError(
                "--audio_column_name, --label_column_name, --fold_column_name and --dataset_config_name are for "
                "--corpus hub=ID: add that"
            )
        if self.windows is None and (self.overlap or self.silence_db is not None):
            raise UserError("--overlap and --silence_db say how --windows cuts recordings up: add that")
        if self.keep_spectrograms and self.augmentation != "spectrogram":
            raise UserError(
                "--keep_spectrograms needs --augmentation spectrogram, because waveforms are augmented before that: "
                "add that, or --no-keep_spectrograms"
            )
        if self.keep_spectrograms and self.keep_waveforms:
            raise UserError("--keep_waveforms has nothing to do beside --keep_spectrograms: leave it out")
        if self.cache_gigabytes is not None and not (self.keep_spectrograms or self.keep_waveforms):
            raise UserError(
                "--cache_gigabytes bounds what --keep_waveforms or --keep_spectrograms keeps: add one of them"
            )
        if self.cache_gigabytes is None:
            self.cache_gigabytes = CACHE_GIGABYTES


@dataclass(kw_only=True)
class ModelOptions(Options):
    """Model."""

    model_name_or_path: str | None = option(None, path_or_id, "start from this checkpoint folder or Hub id")
    preset: str | None = option(
        None, one_of(*PRESETS),
        help="network and spectrogram, where no checkpoint is given; a densenet needs timm (default: the recipe's)",
    )  # fmt: skip
    pooling: str | None = option(None, one_of("mean", "statistics"), "instead of the preset's")
    pooler_act: str | None = option(
        None, one_of("asinh"), "what pooled features go through, so that none is extreme; a checkpoint's, too"
    )
    embedding_size: int | None = option(None, whole(1, 1 << 16), "width of the stem, instead of the preset's")
    hidden_sizes: list[int] | None = option(
        None, whole_numbers(1, 1 << 16), "width of each stage, instead of the preset's", metavar="N,N,N,N"
    )
    frequency_scale: str | None = option(None, one_of("linear", "mel"), "instead of the preset's")
    spec_height: int | None = option(None, whole(1, 4096), "of each band's picture, instead of the preset's")
    spec_width: int | None = option(None, whole(1, 4096), "of each band's picture, instead of the preset's")

    def default(self, own):
        """A checkpoint brings its own network and spectrograms, and another preset than a recipe's its own ones."""
        if own.name in ("preset", "spec_height") and self.model_name_or_path:
            return None
        if own.name == "spec_height" and self.preset != super().default(self.__dataclass_fields__["preset"]):
            return None
        return super().default(own)


@dataclass(kw_only=True)
class OptimizationOptions(Options):
    """Training."""

    num_train_epochs: int = option(None, whole(0), "each takes every clip once")
    max_train_steps: int | None = option(None, whole(1), "stop after this many optimizer steps")
    per_device_train_batch_size: int = option(None, whole(2, 1 << 16), "clips at a time")
    gradient_accumulation_steps: int = option(1, whole(1), "batches per optimizer step")
    optimizer: str = option(None, one_of("sgd", "adam", "adamw"), "sgd has momentum 0.9")
    learning_rate: float = option(None, real(0), "at its highest")
    weight_decay: float = option(None, real(0), "L2 for sgd and adam, decoupled for adamw")
    lr_scheduler_type: str = option(
        None, one_of(*SCHEDULES),
        help="multistep: a tenth from 60 % and again from 80 % of the steps; esresnet: 5 epochs at a tenth, 10 of "
        "warm-up, then x 0.985 per epoch",
    )  # fmt: skip
    warmup_steps: float = option(
        0.0, real(0),
        help="optimizer steps, or share of all steps if below 1, in which cosine and linear rise to the learning rate",
    )  # fmt: skip
    seed: int = option(0, whole(0, 2**32 - 1), "of weights, order, views and negatives")
    mixed_precision: str = option(
        "auto", one_of(*PRECISIONS),
        help="auto: what `accelerate config` says; otherwise bf16 where the processor computes in it, else fp16 on "
        "CUDA, else no",
    )  # fmt: skip
    memory_format: str = option(
        "auto", one_of(*MEMORY_FORMATS),
        help="of the network's tensors; auto: channels_last, which is faster on CPUs and on GPUs",
    )  # fmt: skip
    num_threads: int | None = option(
        None, whole(1, 1024),
        help="cores of a CPU to compute on, which the last bits of the results depend on (default: as many as the run "
        "that goes on, or all)",
    )  # fmt: skip
    distributed_timeout: float = option(
        600.0, real(1, 1e6), metavar="SECONDS",
        help="with several processes: how long one waits for another before it gives up",
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        if self.warmup_steps and self.lr_scheduler_type not in ("linear", "cosine"):
            raise UserError(
                f"--warmup_steps goes with linear and cosine, not with --lr_scheduler_type {self.lr_scheduler_type}: "
                "add --warmup_steps 0"
            )
        if not self.num_train_epochs and getattr(self, "classifier_init", None) != "ridge":
            raise UserError(
                "--num_train_epochs 0 trains nothing: give it a number of epochs (train_classification.py --recipe "
                "recommended has none of its own), or, to train_classification.py, --classifier_init ridge"
            )


@dataclass(kw_only=True)
class OutputOptions(Options):
    """Output."""

    output_dir: Path = option(None, path, "new, or of the run that goes on")
    checkpointing_steps: int | str = option(
        "epoch", steps_or_epoch, metavar="N|epoch", help="save a checkpoint every N optimizer steps, or every epoch"
    )
    checkpoints_total_limit: int = option(2, whole(1), "newest checkpoints kept")
    resume_from_checkpoint: str | None = option(
        None, path_or_id, metavar="DIR|latest", help="go on from a checkpoint of this run"
    )
    report_to: str = option("tensorboard", one_of(*TRACKERS, "none"), "tracker; tensorboard is in OUTPUT_DIR/logs")
    push_to_hub: bool = option(False, flag, "publish the finished run; says at once if it cannot")
    hub_model_id: str | None = option(
        None, text, metavar="NAME", help="NAMESPACE/NAME, or the NAME of your own (default: the output folder's)"
    )
    hub_private_repo: bool = option(False, flag, "only for you and those whom you let in")

    def check(self) -> None:
        super().check()
        if (self.hub_model_id or self.hub_private_repo) and not self.push_to_hub:
            raise UserError("--hub_model_id and --hub_private_repo say how --push_to_hub publishes: add that")
        if self.push_to_hub and not self.hub_model_id:
            self.hub_model_id = self.output_dir.absolute().name


@dataclass(kw_only=True)
class TrainingSettings(OutputOptions, OptimizationOptions, ModelOptions, DataOptions):
    """What both train scripts have. A recipe, see below, is a set of defaults: options that are given prevail."""

    REASONS: ClassVar[str]  # which defaults depart from the papers, and why

    @classmethod
    def epilog(cls) -> str:
        return f"{cls.REASONS}\n\n{super().epilog()}"


@dataclass(kw_only=True)
class PretrainingSettings(TrainingSettings):
    """Pre-trains ESResNet on unlabelled audio: every clip is its own class (NPID, as in the DLS paper)."""

    SCRIPT: ClassVar[str] = "train_npid.py"
    RECIPES: ClassVar[dict[str, dict]] = {
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
    RECIPES["thorough"] = RECIPES["recommended"] | {"spec_height": 64}
    REASONS: ClassVar[str] = """\
The defaults are those of --recipe paper (DLS: ESResNet-50, d 128, K 64, temperature 0.4, batch 64, 200 epochs, SGD;
NPID: rate 0.03, momentum 0.9, weight decay 1e-4, steps at 60 % and 80 %). Three things differ: precision is bf16 where
the processor computes in it, because that is faster; "time inversion" plays a clip backwards, as the ESResNet paper
says, where its code swaps channels; and in k-NN, sigma is 0.1 and not the temperature, so that runs with different
temperatures are measured alike.
--recipe recommended is what worked best on a small machine (see results/), thorough does better at twice the work."""

    recipe: str = option("paper", one_of(*RECIPES), "a set of defaults, see below; options that are given prevail")
    objective: str = option("nce", one_of("nce", "softmax"), "NCE, or the exact softmax")
    nce_k: int = option(64, whole(1, 10**6), "negatives per clip")
    nce_t: float = option(0.4, real(1e-3, 1e3), "temperature of either objective")
    nce_exclude_positive: bool = option(False, flag, "never draw a clip as its own negative; the original does")
    nce_z_momentum: float | None = option(
        None, real(0, below=1), "keep a running estimate of Z (default: the first batch's for good)"
    )
    embedding_dim: int | None = option(None, whole(1, 1 << 16), "default: 128, or the checkpoint's")
    bank_momentum: float = option(0.5, real(0, below=1), "of the memory bank's rows")
    shard_bank: bool = option(False, flag, "spread the bank's rows over the processes (default: a copy in each)")
    exclude_fold: list[tuple[str | None, int]] = option(
        [], excluded_fold, many=True, metavar="[CORPUS=]N",
        help="leave a fold out of the training, so that it can be tested on",
    )  # fmt: skip
    knn_interval: int = option(5, whole(1), "epochs between k-NN evaluations")
    knn_k: int = option(5, whole(1), "neighbours (default: 5, as in the paper)")

    def excluded_folds(self, corpus: str) -> set[int]:
        """Those of a corpus that are left out."""
        return {fold for name, fold in self.exclude_fold if name in (None, corpus)}


@dataclass(kw_only=True)
class ClassificationSettings(TrainingSettings):
    """Fine-tunes ESResNet on a labelled corpus, with cross-validation over its folds, or on all of it."""

    SCRIPT: ClassVar[str] = "train_classification.py"
    RECIPES: ClassVar[dict[str, dict]] = {
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
            # Three after the closed form made it worse (results/choice).
            "num_train_epochs": 0,
            "classifier_init": "ridge",
            "freeze_batch_norm": True,
            "learning_rate": 3e-5,
        },
    }
    RECIPES["thorough"] = RECIPES["recommended"] | {"spec_height": 64, "pooler_act": "asinh"}
    REASONS: ClassVar[str] = """\
The defaults are those of --recipe paper: batch size, optimizer, rate and weight decay are ESResNet's.
Three things differ: 15 epochs instead of 300 and a constant rate instead of its schedule (--lr_scheduler_type
esresnet), whose five cold and ten warm-up epochs are longer than the few epochs that a pre-trained network needs; and
bf16 where the processor computes in it, because that is faster.
--recipe recommended is what worked best on a small machine (see results/), thorough does better at twice the work."""

    recipe: str = option("paper", one_of(*RECIPES), "a set of defaults, see below; options that are given prevail")
    fold: int | str = option(
        "all", fold_choice, metavar="N[,N]|all|none",
        help="fold held out for evaluation, or several, one after the other; where a corpus has none, folds are made. "
        "none: train on everything, measure nothing (default: all)",
    )  # fmt: skip
    init: str | None = option(
        None, one_of("pretrained", "scratch"),
        help="scratch keeps only the network and signal settings of --model_name_or_path (default: pretrained where "
        "a checkpoint is given)",
    )  # fmt: skip
    reinit_stages: int = option(
        0, whole(0, 4), "start the pre-trained network's last N stages, and what comes after them, randomly"
    )
    labels_per_class: int | None = option(None, whole(1), "train on this many clips of each class (default: all)")
    freeze_backbone: bool = option(False, flag, "train the classifier alone; the paper found that worse")
    freeze_batch_norm: bool = option(
        False, flag,
        help="keep the batch-norm statistics of the pre-training: batches of a few labelled clips estimate them badly",
    )  # fmt: skip
    precise_bn: bool = option(
        False, flag,
        help="estimate batch-norm statistics anew on the training clips after each epoch (PreciseBN): these are "
        "scored and saved; the accuracy with the running ones, which lag behind in the first epochs, stands beside",
    )  # fmt: skip
    classifier_init: str = option(
        "random", one_of("random", "ridge"),
        help="ridge: start from a closed-form classifier, ridge regression on the features of the network as it is; "
        "with --num_train_epochs 0, that alone",
    )  # fmt: skip
    self_training_rounds: int = option(
        0, whole(0, 20),
        help="have the closed-form classifier label further clips by itself and learn from them, too: those of "
        "--corpus without a label, and those that --labels_per_class leaves out. In round R it takes up to R times as "
        "many of each class as are labelled, the surest first; 5 is a good number (default: 0)",
    )  # fmt: skip
    allow_label_leakage: bool = option(
        False, flag, "go on where the weights have been trained on held-out clips with their labels; the card says so"
    )

    @property
    def has_several_folds(self) -> bool:
        """Whether folds are held out one after the other, each in a folder of its own."""
        return isinstance(self.fold, str) and self.fold != "none"

    def check(self) -> None:
        super().check()
        self.init = self.init or ("pretrained" if self.model_name_or_path else "scratch")
        if self.init == "pretrained" and not self.model_name_or_path:
            raise UserError("--init pretrained needs --model_name_or_path")
        if self.reinit_stages and self.init == "scratch":
            raise UserError("--reinit_stages is of a pre-trained network, of which --init scratch takes nothing")
        if self.freeze_backbone and self.init == "scratch":
            raise UserError("--freeze_backbone needs a pre-trained backbone: --init pretrained")
        if self.freeze_batch_norm and self.init == "scratch" and self.classifier_init != "ridge":
            raise UserError(
                "--freeze_batch_norm needs statistics: of a pre-training (--init pretrained), or those that "
                "--classifier_init ridge takes of the training clips"
            )
        if self.precise_bn and (self.freeze_batch_norm or self.freeze_backbone):
            kept = "--freeze_backbone" if self.freeze_backbone else "--freeze_batch_norm"
            raise UserError(f"--precise_bn estimates the statistics that {kept} keeps: leave one of them out")
        if self.self_training_rounds and self.classifier_init != "ridge":
            raise UserError("--self_training_rounds is of the closed-form classifier: add --classifier_init ridge")
        if self.has_several_folds and self.resume_from_checkpoint not in (None, "latest"):
            raise UserError("--resume_from_checkpoint DIR is of one fold: name it with --fold N, or give latest")
        if len(self.corpus) > 1:
            raise UserError("--corpus can be given once: fine-tuning has one label set")
