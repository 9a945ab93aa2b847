"""The settings of `dls`'s commands. Imports nothing heavy: `--help` and a mistyped option are answered at once."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from datasets_scripts.errors import UserError
from datasets_scripts.options import Options, flag, one_of, option, path, path_or_id, real, whole
from dls_training.settings import AS_LONG_AS_CLIPS, PRECISIONS, window_length

STANDARD_INPUT = "-"
AUTO = "auto"
TABLES = (".csv", ".parquet", ".txt")
# What `dls embed` takes where no model is named: pre-trained without labels on ESC-50 and a part of UrbanSound8K. A
# checkout has it, an installed package has not, for its sounds' licences are not the code's.
PRETRAINED = Path(__file__).resolve().parents[1] / "checkpoints" / "small_mel"


def threshold(value) -> float | str:
    """Reads a score, or "auto"."""
    return value if value == AUTO else real(0, 1)(value)


@dataclass(kw_only=True)
class NetworkOptions(Options):
    """Network."""

    model: str | None = option(
        None, path_or_id,
        "a trained folder or a Hub id (default: the index's own; to make one, this checkout's checkpoints/small_mel)",
    )  # fmt: skip
    batch_size: int = option(8, whole(1, 1 << 16), "windows at a time")
    mixed_precision: str = option(
        "auto", one_of(*PRECISIONS), "auto: bf16 where the processor computes in it, else fp16 on CUDA, else no"
    )


@dataclass(kw_only=True)
class RecordingOptions(NetworkOptions):
    """Recordings."""

    input: list[Path] = option([], path, "sound files, or folders with them at any depth", many=True, positional=True)
    windows: float | str | None = option(
        None, window_length, bare=AS_LONG_AS_CLIPS, metavar="SECONDS",
        help="length of a window (default: of the clips that the model was trained on, or 5)",
    )  # fmt: skip
    overlap: float = option(0.0, real(0, below=1), "of a window with the next", metavar="SHARE")

    def check(self) -> None:
        if not self.input:
            raise UserError("argument INPUT: must be given: sound files, or folders with them")
        if self.output.is_dir():
            raise UserError(f"--output {self.output} is a folder: give the name of a file")


@dataclass(kw_only=True)
class EmbedSettings(RecordingOptions):
    """Embeds recordings: a vector for each file, or for each window, into an index that can grow."""

    SCRIPT: ClassVar[str] = "dls embed"

    output: Path = option(None, path, "the index, a .parquet file; new files join one that is there", required=True)
    layer: str | None = option(
        None, one_of("projection", "pooled"),
        help="projection: unit vectors of instance discrimination; pooled: the features before any head (default: "
        "projection where the checkpoint has one)",
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        if self.output.suffix.lower() != ".parquet":
            raise UserError(f"--output {self.output}: expected a name that ends in .parquet")
        if self.overlap and self.windows is None:
            raise UserError("--overlap says how --windows cuts recordings up: add that")
        if Path(STANDARD_INPUT) in self.input:
            raise UserError("argument INPUT: dls embed takes files and folders: an index tells where its sounds are")


@dataclass(kw_only=True)
class SearchSettings(NetworkOptions):
    """Finds what sounds most alike in an index of `dls embed`."""

    SCRIPT: ClassVar[str] = "dls search"

    query: Path = option(None, path, "a sound file, or its name in the index", positional=True, required=True)
    start: float = option(0.0, real(0), "of the stretch that is looked for, in s")
    end: float | None = option(None, real(0), "of it, in s (default: the file's end)")
    index: Path = option(None, path, "a .parquet file of dls embed", required=True)
    top_k: int = option(10, whole(1), "how many are shown, best first")
    output: Path | None = option(None, path, "a .csv file (default: printed)")

    def check(self) -> None:
        if self.end is not None and self.end <= self.start:
            raise UserError(f"--start {self.start:g} --end {self.end:g}: expected a start before the end")
        if self.output and (self.output.is_dir() or self.output.suffix.lower() != ".csv"):
            raise UserError(f"--output {self.output}: expected the name of a .csv file")


@dataclass(kw_only=True)
class PredictSettings(RecordingOptions):
    """Classifies recordings window by window into a table of detections."""

    SCRIPT: ClassVar[str] = "dls predict"

    output: Path = option(
        None, path, required=True, help="a .csv or .parquet file, or a .txt file: a Raven selection table"
    )
    threshold: float | str | None = option(
        None, threshold, metavar="T|auto",
        help="detections: every label whose score reaches it, neighbouring windows in one. auto: the model's own; "
        "without one the best label, or with several labels a clip those from 0.5 (default: auto, or none with "
        "--top_k)",
    )  # fmt: skip
    top_k: int | None = option(None, whole(1), "scores: the best labels of each stretch, whatever their score")
    sampling_rate: int | None = option(
        None, whole(100, 1_000_000), metavar="HZ",
        help="of INPUT -, raw 16-bit little-endian mono samples from standard input (default: the model's)",
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        if self.model is None:
            raise UserError("argument --model: must be given")
        if self.output.suffix.lower() not in TABLES:
            raise UserError(f"--output {self.output}: expected a name that ends in {', '.join(TABLES)}")
        streamed = Path(STANDARD_INPUT) in self.input
        if streamed and len(self.input) > 1:
            raise UserError("argument INPUT: - (standard input) goes with no other")
        if self.sampling_rate and not streamed:
            raise UserError("--sampling_rate is that of standard input (INPUT -): files tell their own")


@dataclass(kw_only=True)
class LabelSettings(NetworkOptions):
    """Opens a page to hear, name and correct what is in an index, and to teach a classifier by that."""

    SCRIPT: ClassVar[str] = "dls label"

    index: Path = option(None, path, "a .parquet file of dls embed", positional=True, required=True)
    labels: Path | None = option(None, path, "the table of answers (default: labels.csv among the recordings)")
    run_folder: Path | None = option(None, path, "a finished run, to try any sound on in a tab of its own")
    port: int = option(7860, whole(1, 65535), "of 127.0.0.1")

    def check(self) -> None:
        if self.labels and self.labels.suffix.lower() != ".csv":
            raise UserError(f"--labels {self.labels}: expected the name of a .csv file")


@dataclass(kw_only=True)
class ExportSettings(Options):
    """Writes a fine-tuned network as one ONNX file, and beside it what runs it without torch."""

    SCRIPT: ClassVar[str] = "dls export"

    run: str = option(None, path_or_id, "a trained folder or a Hub id", positional=True, required=True)
    output: Path = option(None, path, "an .onnx file", required=True)
    int8: bool = option(False, flag, "whole numbers of 8 bits in place of most weights: a quarter of the size")
    calibration: Path | None = option(
        None, path, metavar="FOLDER",
        help="with --int8: sounds like those that the network will hear, some dozens or more; where they are "
        "labelled, as --corpus audiofolder=FOLDER reads them, the accuracy that is lost is measured on them",
    )  # fmt: skip

    def check(self) -> None:
        if missing := [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]:
            raise UserError(f"dls export needs {', '.join(missing)}: pip install 'dls-sounds[export]'")
        if self.output.is_dir() or self.output.suffix.lower() != ".onnx":
            raise UserError(f"--output {self.output}: expected the name of an .onnx file")
        if self.int8 != bool(self.calibration):
            raise UserError("--int8 and --calibration FOLDER go together: give both or neither")
        if self.calibration and not self.calibration.is_dir():
            raise UserError(f"--calibration {self.calibration}: there is no such folder")
