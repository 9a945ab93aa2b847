"""The process around the training loop: errors in words, threads, precision, signals, and where the time went."""

import contextlib
import ctypes
import logging
import multiprocessing
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.commands.config.config_args import default_config_file
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env

from datasets_scripts.errors import LostProcess, UserError

from .checkpoints import recorded_options
from .cores import MIN_PART, available_cores, cores_in_use, use_cores
from .settings import PRECISIONS, TrainingSettings

logger = logging.getLogger("dls")

# Convolutions are fastest on channels-last tensors, on CPUs and GPUs alike.
MEMORY_FORMATS = {
    "auto": torch.channels_last,
    "channels_last": torch.channels_last,
    "contiguous": torch.contiguous_format,
}
# glibc's mallopt parameters.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

# How torch's back ends begin to say that another process is gone or silent.
LOST_PROCESS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "timed out", "pair closure")


@contextlib.contextmanager
def ends_with_the_others() -> Iterator[None]:
    """Around a run of several processes, as a decorator: says in words that another is lost, and leaves them in order.

    Raises:
        LostProcess: if another process has died, or does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise LostProcess(
                f"a decoding process has died ({str(error).splitlines()[0][:200]}): if memory was short, lower "
                "--dataloader_num_workers. What was saved is intact: --resume_from_checkpoint latest goes on from it"
            ) from error
        if not lost_process(error):
            raise
        raise LostProcess(
            f"process {os.environ.get('RANK', '0')} stops: another process of this run has died or does not "
            "answer (--distributed_timeout), its own message tells why. What was saved is intact: "
            f"--resume_from_checkpoint latest goes on from there. ({str(error).splitlines()[0][:200]})"
        ) from error
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def lost_process(error: RuntimeError) -> bool:
    """Whether an error says that the processes can no longer reach one another."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    return isinstance(error, torch.distributed.DistError) or any(words in str(error).lower() for words in LOST_PROCESS)


def best_precision(device: torch.device) -> str:
    """bf16 where the hardware multiplies in it (elsewhere it is emulated and slow), fp16 on other CUDA, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        # torch has no public question for this.
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16" if native else "no"
    return "no"


def keep_freed_memory() -> None:
    """Has the C library keep what a training step frees for the next step.

    glibc returns every large block to the system and gets it back as new pages, which the system must fill with zeros:
    a third of a step's time on a CPU (docs/speed.md). Other C libraries are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def be_deterministic() -> None:
    """Has a GPU add in the same order each time, as resuming exactly needs, as far as torch's operators can."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for; read when it starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # for those who read what they never wrote
    # Which operators cannot is in docs/scaling.md, and no user can change it.
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")


def choose_device_and_precision(mixed_precision: str) -> tuple[torch.device, str]:
    """The device that torch will compute on, prepared for it, and "no", "bf16" or "fp16".

    Args:
        mixed_precision: One of these, or "auto": see `best_precision`.

    Raises:
        UserError: if the device cannot do what is asked for.
    """
    # Apple's GPUs have no float64, which Z and sums over an epoch need: there, the CPU computes.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or torch.backends.mps.is_available()
    device = torch.device("cuda" if torch.cuda.is_available() and not on_cpu else "cpu")
    if device.type == "cpu":
        use_cores(available_cores())
        keep_freed_memory()
    else:
        be_deterministic()
    precision = configured_precision() or best_precision(device) if mixed_precision == "auto" else mixed_precision
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU: on this CPU choose bf16 or no")
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision} (accelerate config) is not for these networks: choose bf16 or no")
    return device, precision


def configured_precision() -> str | None:
    """What `accelerate config` says; None where nobody has said anything, for which the launcher's word is "no"."""
    said = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return None if said == "no" and not Path(default_config_file).is_file() else said


def check_launcher() -> None:
    """Raises UserError for what `accelerate config` can ask for and a network of this size has no use for."""
    for what in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if parse_flag_from_env(f"ACCELERATE_USE_{what}"):
            raise UserError(
                f"accelerate is configured for {what}, which splits networks that do not fit a device; these fit, and "
                "are trained with a copy in each process: accelerate launch --multi_gpu, or a configuration without it"
            )


def check_tracker(name: str) -> None:
    """Raises UserError if the tracker is not installed: accelerate would go on without it, and not say so."""
    if name != "none" and name not in map(str, get_available_trackers()):
        raise UserError(f"--report_to {name}: it is not installed (pip install {name.replace('_', '-')})")


def decoding_processes(device: torch.device, settings: TrainingSettings) -> int:
    """None on a CPU, where they would take cores from the network, whose threads then wait for one another.

    And none where nothing is to be decoded: to copy a batch out of a cache takes less than to hand it over.
    """
    cached = settings.keep_waveforms or settings.keep_spectrograms
    return 0 if cached or device.type == "cpu" else min(8, os.cpu_count())


def start_logging(level: int = logging.INFO) -> None:
    """Our own lines; libraries keep their informational ones to themselves."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=level)
    for name in ("datasets", "httpx", "httpx2", "httpcore", "fsspec", "urllib3", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()


def make_accelerator(settings: TrainingSettings) -> Accelerator:
    """Sets up threads, memory, logging and Accelerate, and says in the log's first line what the run has got."""
    check_launcher()
    check_tracker(settings.report_to)
    device, precision = choose_device_and_precision(settings.mixed_precision)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_dir=str(settings.output_dir),
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=settings.distributed_timeout))],
    )
    start_logging(logging.INFO if accelerator.is_main_process else logging.ERROR)
    if settings.dataloader_num_workers is None:
        settings.dataloader_num_workers = decoding_processes(device, settings)
    if settings.num_threads is None:  # resuming is exact with as many as before
        before = recorded_options(settings).get("num_threads")
        settings.num_threads = before if isinstance(before, int) and before > 0 else available_cores()
    parts = parts_of_a_batch(settings, accelerator)
    use_cores(settings.num_threads, parts)
    workers = settings.dataloader_num_workers
    decoding = f"in {workers} processes" if workers else "between steps"
    split = f", each batch in {parts} parts beside one another" if parts > 1 else ""
    logger.info(
        f"{accelerator.num_processes} process(es) x {settings.num_threads} core(s) on {accelerator.device}{split}, "
        f"precision {'fp32' if precision == 'no' else precision}, {MEMORY_FORMATS[settings.memory_format]} tensors, "
        f"decoding {decoding}"
    )
    return accelerator


def parts_of_a_batch(settings: TrainingSettings, accelerator: Accelerator) -> int:
    """In how many processes `BackboneOnCores` computes a batch: on Linux, by --num_threads and the batch alone."""
    # macOS has fork, but its libraries do not survive it, and a daemon may not fork. Of several processes, each has a
    # part already.
    may_fork = sys.platform.startswith("linux") and not multiprocessing.current_process().daemon
    if accelerator.device.type != "cpu" or accelerator.num_processes > 1 or not may_fork:
        return 1
    return max(1, min(settings.num_threads, settings.per_device_train_batch_size // MIN_PART))


def start_tracking(settings: TrainingSettings, accelerator: Accelerator) -> None:
    """Opens the tracker and tells it the options: TensorBoard's files in OUTPUT_DIR/logs, a project in the others."""
    if settings.report_to != "none":
        options = {name: value for name, value in settings.plain().items() if isinstance(value, (int, float, str))}
        accelerator.init_trackers("logs" if settings.report_to == "tensorboard" else "dls-sounds", config=options)


def environment(accelerator: Accelerator) -> dict:
    """What a reader needs to judge a measured number: versions, hardware, commit."""
    packages = ("torch", "torchaudio", "transformers", "datasets", "accelerate")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    with contextlib.suppress(PackageNotFoundError):  # run from a folder, without being installed
        versions["dls-sounds"] = version("dls-sounds")
    return {
        "versions": versions,
        "hardware": hardware(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": cores_in_use(),
        "precision": accelerator.mixed_precision,
        "commit": source_commit(),
    }


def hardware(device: torch.device) -> str:
    """The accelerator's or the processor's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return platform.processor() or platform.machine()


def source_commit() -> str | None:
    """This project's commit, with "+" where its source differs from it; None outside a checkout of it.

    What is measured (tables, pictures, the documents that they go into) is no source: one measurement after another
    can be of the same commit. An installed copy may lie in a repository that is somebody else's, such as a virtual
    environment's.
    """
    root = Path(__file__).resolve().parents[1]

    def git(*command):
        return subprocess.run(["git", "-C", root, *command], capture_output=True, text=True, check=True).stdout.strip()

    try:
        tracked = git("ls-files", "--error-unmatch", "--", __file__) and Path(git("rev-parse", "--show-toplevel"))
        if tracked.resolve() != root:
            return None
        measured = [f":(exclude){name}" for name in ("*.csv", "*.png", "docs", "README.md", "results/**/README.md")]
        changed = git("status", "--porcelain", "-uno", "--", ".", *measured)
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
