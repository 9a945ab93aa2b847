"""Command line of the train scripts. Imports nothing heavy: `--help` and a mistyped option are answered at once."""

import argparse
import shlex
import sys
import textwrap
from pathlib import Path

PRESETS = ("esresnet50", "esresnet18", "small", "small_mel", "tiny", "densenet121", "densenet_small")
PRECISIONS = ("auto", "no", "bf16", "fp16")
MEMORY_FORMATS = ("auto", "channels_last", "contiguous")
CACHE_GIGABYTES = 20.0
SCHEDULES = ("constant", "linear", "cosine", "multistep", "esresnet")


class UserError(Exception):
    """Something that the user can mend: reported in words, without a traceback, with exit code 2."""


def at_least(minimum, kind=int):
    """An argparse type: a number no smaller than `minimum`."""

    def parse(text: str):
        value = kind(text)
        if not value >= minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in its message when the text is no number
    return parse


def between(lowest: float, highest: float):
    """An argparse type: lowest <= number <= highest."""

    def parse(text: str) -> float:
        if not lowest <= float(text) <= highest:
            raise argparse.ArgumentTypeError(f"must be between {lowest:g} and {highest:g}, not {text}")
        return float(text)

    parse.__name__ = "float"  # argparse names the type in its message when the text is no number
    return parse


def fraction(text: str) -> float:
    """An argparse type: 0 <= value < 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, not {text}")
    return value


def steps_or_epoch(text: str) -> int | str:
    """An argparse type: a positive number of steps, or "epoch"."""
    return text if text == "epoch" else at_least(1)(text)


def corpus_and_source(text: str) -> tuple[str, str | None]:
    """An argparse type: NAME or NAME=DIR."""
    name, _, source = text.partition("=")
    return name, source or None


def make_parser(description: str, recipes: dict[str, dict], reasons: str) -> argparse.ArgumentParser:
    """The options that both train scripts have.

    Args:
        description: What the script does.
        recipes: Name -> values of options, which hold where an option is not given. The first is the default, and
            sets every option that has no default of its own.
        reasons: Which defaults depart from the papers, and why; shown below the options.
    """
    defaults = next(iter(recipes.values()))
    own = "\n".join(f"--recipe {name} stands for\n{described(values)}" for name, values in list(recipes.items())[1:])
    parser = argparse.ArgumentParser(
        description=description, epilog=f"{reasons}\n\n{own}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipe", choices=tuple(recipes), default=next(iter(recipes)),
        help="a set of defaults, see below; options that are given prevail (default: %(default)s)",
    )  # fmt: skip
    data = parser.add_argument_group("data")
    data.add_argument(
        "--corpus", action="append", type=corpus_and_source, metavar="NAME[=DIR]",
        help="esc10, esc50, urbansound8k, dcase2013, audiofolder or synthetic, and where it is (default: synthetic)",
    )  # fmt: skip
    data.add_argument(
        "--windows", type=at_least(0.05, float), nargs="?", const=0.0, metavar="SECONDS",
        help="cut recordings up: each window of this length (default: of --clip_seconds) is a clip of its own",
    )  # fmt: skip
    data.add_argument(
        "--overlap", type=fraction, default=0.0, metavar="SHARE", help="of a window with the next (default: 0)"
    )
    data.add_argument(
        "--silence_db", type=float, metavar="DB",
        help="with --windows: leave out windows below this level, in dB below full scale, such as -60",
    )  # fmt: skip
    data.add_argument(
        "--clip_seconds", type=at_least(0.05, float), help="length of a view (default: the checkpoint's, or 5)"
    )
    data.add_argument(
        "--audio_channels", type=int, choices=(1, 2),
        help="1 averages channels, 2 doubles mono (default: the checkpoint's, or 1)",
    )  # fmt: skip
    data.add_argument(
        "--augmentation", choices=("waveform", "spectrogram", "both"), default="waveform",
        help="waveform: ESResNet's; spectrogram: crops, mixing, gain and masks instead, which keep small corpora from "
        "being memorised (default: waveform)",
    )  # fmt: skip
    data.add_argument(
        "--augmentation_strength", type=between(0, 1.5), default=1.0,
        help="multiplies the ranges of the augmentation; 0 leaves only playing backwards (default: %(default)s)",
    )  # fmt: skip
    data.add_argument(
        "--keep_spectrograms", action=argparse.BooleanOptionalAction, default=False,
        help="with --augmentation spectrogram: compute each clip's power spectrogram once and keep it on disk, so "
        "that the network and not decoding is the limit (short clips are padded centrally, not at random)",
    )  # fmt: skip
    data.add_argument(
        "--keep_waveforms", action="store_true",
        help="decode and resample each clip once and keep the samples on disk",
    )  # fmt: skip
    data.add_argument(
        "--cache_gigabytes", type=at_least(0.0, float),
        help=f"disk space for what is kept, of all runs together (default: {CACHE_GIGABYTES:g})",
    )  # fmt: skip
    data.add_argument("--allow_partial", action="store_true", help="accept a corpus that lacks some of its clips")
    data.add_argument("--skip_unreadable", action="store_true", help="leave unreadable files out and report them")
    data.add_argument(
        "--dataloader_num_workers", type=at_least(0),
        help="decoding processes; 0 decodes between steps, on all cores (default: 0 on a CPU, where processes take "
        "cores from the network; otherwise one per core, at most 8)",
    )  # fmt: skip

    model = parser.add_argument_group("model")
    model.add_argument("--model_name_or_path", help="start from this checkpoint folder or Hub id")
    model.add_argument(
        "--preset",
        choices=PRESETS,
        help="network and spectrogram, where no checkpoint is given; a densenet needs timm (default: the recipe's)",
    )
    model.add_argument("--pooling", choices=("mean", "statistics"), help="instead of the preset's")
    model.add_argument("--frequency_scale", choices=("linear", "mel"), help="instead of the preset's")
    for name in ("spec_height", "spec_width"):
        model.add_argument(f"--{name}", type=at_least(1), help="of each band's picture, instead of the preset's")

    training = parser.add_argument_group("training")
    training.add_argument("--num_train_epochs", type=at_least(0), default=defaults["num_train_epochs"],
                          help="default: %(default)s")  # fmt: skip
    training.add_argument("--max_train_steps", type=at_least(1), help="stop after this many optimizer steps")
    training.add_argument("--per_device_train_batch_size", type=at_least(2),
                          default=defaults["per_device_train_batch_size"], help="default: %(default)s")  # fmt: skip
    training.add_argument("--gradient_accumulation_steps", type=at_least(1), default=1,
                          help="batches per optimizer step (default: %(default)s)")  # fmt: skip
    training.add_argument("--optimizer", choices=("sgd", "adam", "adamw"), default=defaults["optimizer"],
                          help="default: %(default)s")  # fmt: skip
    training.add_argument("--learning_rate", type=at_least(0.0, float), default=defaults["learning_rate"],
                          help="default: %(default)s")  # fmt: skip
    training.add_argument("--weight_decay", type=at_least(0.0, float), default=defaults["weight_decay"],
                          help="default: %(default)s")  # fmt: skip
    training.add_argument(
        "--lr_scheduler_type", choices=SCHEDULES, default=defaults["lr_scheduler_type"],
        help="multistep: a tenth from 60 %% and again from 80 %% of the steps; esresnet: 5 epochs at a tenth, 10 of "
        "warm-up, then x 0.985 per epoch (default: %(default)s)",
    )  # fmt: skip
    training.add_argument(
        "--warmup_steps", type=at_least(0.0, float), default=0,
        help="optimizer steps, or share of all steps if below 1, in which cosine and linear rise to the learning rate "
        "(default: 0)",
    )  # fmt: skip
    training.add_argument("--seed", type=at_least(0), default=0, help="of weights, order, views and negatives")
    training.add_argument(
        "--mixed_precision", choices=PRECISIONS, default="auto",
        help="auto: bf16 where the processor computes in it, else fp16 on CUDA, else no (default: auto)",
    )  # fmt: skip
    training.add_argument(
        "--memory_format", choices=MEMORY_FORMATS, default="auto",
        help="of the network's tensors; auto: channels_last, which is faster on CPUs and on GPUs (default: auto)",
    )  # fmt: skip
    training.add_argument(
        "--distributed_timeout", type=at_least(1.0, float), default=600.0, metavar="SECONDS",
        help="with several processes: how long one waits for another before it gives up (default: 600)",
    )  # fmt: skip

    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", type=Path, default=Path(defaults["output_dir"]), help="default: %(default)s")
    output.add_argument(
        "--checkpointing_steps", type=steps_or_epoch, default="epoch", metavar="N|epoch",
        help="save a checkpoint every N optimizer steps, or every epoch (default: epoch)",
    )  # fmt: skip
    output.add_argument(
        "--checkpoints_total_limit", type=at_least(1), default=2, help="newest checkpoints kept (default: %(default)s)"
    )
    output.add_argument("--resume_from_checkpoint", metavar="DIR|latest", help="go on from a checkpoint of this run")
    output.add_argument("--report_to", choices=("tensorboard", "none"), default="tensorboard",
                        help="tracker, below OUTPUT_DIR/logs (default: %(default)s)")  # fmt: skip
    output.add_argument(
        "--push_to_hub", action="store_true", help="publish the finished run; says at once if it cannot"
    )
    output.add_argument(
        "--hub_model_id", metavar="NAME", help="NAMESPACE/NAME, or the NAME of your own (default: the output folder's)"
    )
    output.add_argument("--hub_private_repo", action="store_true", help="only for you and those whom you let in")
    return parser


def described(values: dict) -> str:
    """A recipe's options as they would be typed, a few to a line."""
    options = [f"--{name}" if value is True else f"--{name} {value}" for name, value in values.items()]
    lines = textwrap.wrap(" ".join(options), 110, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)


def plain_options(args: argparse.Namespace) -> dict:
    """The options as JSON takes them, without the command that they came from."""
    options = {name: value for name, value in vars(args).items() if name != "command"}
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def finish_parsing(
    parser: argparse.ArgumentParser, recipes: dict[str, dict], argv: list[str] | None
) -> argparse.Namespace:
    """Parses, fills in the recipe and what depends on other options, and notes the command for the results."""
    recipe = dict(recipes[parser.parse_known_args(argv)[0].recipe])
    preset = recipe.pop("preset", None)
    parser.set_defaults(**recipe)
    args = parser.parse_args(argv)
    if not args.model_name_or_path:  # a checkpoint brings its own network
        args.preset = args.preset or preset
    if not args.num_train_epochs and getattr(args, "classifier_init", None) != "ridge":
        parser.error("--num_train_epochs 0 trains nothing; train_classification.py can, with --classifier_init ridge")
    if args.windows is None and (args.overlap or args.silence_db is not None):
        parser.error("--overlap and --silence_db say how --windows cuts recordings up: add that")
    if args.keep_spectrograms and args.augmentation != "spectrogram":
        parser.error(
            "--keep_spectrograms needs --augmentation spectrogram, because waveforms are augmented before that: add "
            "that, or --no-keep_spectrograms"
        )
    if args.keep_spectrograms and args.keep_waveforms:
        parser.error("--keep_waveforms has nothing to do beside --keep_spectrograms: leave it out")
    if args.cache_gigabytes is not None and not (args.keep_spectrograms or args.keep_waveforms):
        parser.error("--cache_gigabytes bounds what --keep_waveforms or --keep_spectrograms keeps: add one of them")
    if args.cache_gigabytes is None:
        args.cache_gigabytes = CACHE_GIGABYTES
    if args.warmup_steps and args.lr_scheduler_type not in ("linear", "cosine"):
        parser.error(
            f"--warmup_steps goes with linear and cosine, not with --lr_scheduler_type {args.lr_scheduler_type}: add "
            "--warmup_steps 0"
        )
    if (args.hub_model_id or args.hub_private_repo) and not args.push_to_hub:
        parser.error("--hub_model_id and --hub_private_repo say how --push_to_hub publishes: add that")
    if args.push_to_hub and not args.hub_model_id:
        args.hub_model_id = args.output_dir.absolute().name
    args.corpus = args.corpus or [("synthetic", None)]
    args.command = shlex.join([Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)])
    return args
