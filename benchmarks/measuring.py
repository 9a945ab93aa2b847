"""What the benchmarks share: their shell, fair turns, the machine's ceilings, tables that say where they come from."""

import argparse
import contextlib
import csv
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # a benchmark measures the checkout that it lies in

MATRIX = 4096
COPIED_FLOATS = 64 << 20
FRAMES_PER_CLIP, FRAME_LENGTH = 394, 2048  # of a five-second clip
FRESH = multiprocessing.get_context("spawn")


def run(measure: Callable[[argparse.Namespace], list[dict]], **options) -> Path:
    """The shell around a benchmark: its options, its table on the screen, its CSV beside it, which is returned.

    Args:
        measure: Options -> lines of the table. The first line of its module's docstring says what it measures.
        **options: Their defaults, or (default, help).
    """
    module = sys.modules[measure.__module__]
    parser = argparse.ArgumentParser(description=module.__doc__.splitlines()[0])
    options.setdefault("output", (Path(module.__file__).with_suffix(".csv"), "a CSV, the picture beside it"))
    for name, about in options.items():
        default, about = about if isinstance(about, tuple) else (about, "")
        kind = {"action": "store_true"} if default is False else {"type": type(default)}
        if isinstance(default, list):
            kind = {"type": type(default[0]), "nargs": "+"}
        parser.add_argument(f"--{name}", default=default, help=f"{about} (default: %(default)s)", **kind)
    args = parser.parse_args()
    (provenance,) = apart(
        measured_on, [(getattr(args, "device", "cpu"),)]
    )  # before: what is measured later belongs to this commit
    write_table(args.output, measure(args), provenance)
    print(markdown(args.output, module), flush=True)
    return args.output


def apart(function: Callable, arguments: list[tuple]) -> list:
    """What a function returns, called at the same time in as many fresh processes as there are arguments."""
    with ProcessPoolExecutor(len(arguments), FRESH) as processes:
        return [called.result() for called in [processes.submit(function, *each) for each in arguments]]


def start(script: str, *options, **environment: str) -> subprocess.Popen:
    """One of the project's scripts, or `dls`, in a process of its own; its log is for `finish`."""
    words = [sys.executable, *(["-m", "dls_sounds"] if script == "dls" else [REPOSITORY / script]), *options]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen) -> str:
    """The log of a script that ended well; ends this process where it did not."""
    _, log = process.communicate()
    if process.returncode:
        raise SystemExit(log)
    return log


@dataclass
class Arm:
    """One of the things that are compared.

    Attributes:
        run: Does the work once.
        amount: Work per run, in `unit`s.
        unit: What the rate counts per second: "clips", "GFLOP", …
        ceiling: Name of the arm whose rate, in the same unit, bounds this one's; None where there is none.
    """

    run: Callable[[], object] | None
    amount: float
    unit: str
    ceiling: str | None = None


def serve(make_arms: Callable[..., dict[str, Arm]], arguments: tuple, connection) -> None:
    """Runs, in a process of its own, the arms that the other end of the connection names."""
    arms = make_arms(*arguments)
    connection.send({name: Arm(None, a.amount, a.unit, a.ceiling) for name, a in arms.items()})
    while name := connection.recv():
        started = time.perf_counter()
        arms[name].run()
        connection.send(time.perf_counter() - started)


def take_turns(
    makers: Iterable[tuple[Callable[..., dict[str, Arm]], tuple]], rounds: int
) -> tuple[dict[str, Arm], dict[str, list[float]]]:
    """Every maker's arms live in a process of their own; arms take turns, so that noise falls on all alike.

    Args:
        makers: (function, arguments); the function builds the arms, in its process.
        rounds: Beside a first one that is not counted.

    Returns:
        The arms, and the seconds of each in each round.

    Raises:
        EOFError: if a maker or an arm fails; its process has printed why.
    """
    arms, owner, processes = {}, {}, []
    try:
        for make_arms, arguments in makers:
            connection, other_end = FRESH.Pipe()
            process = FRESH.Process(target=serve, args=(make_arms, arguments, other_end))
            process.start()
            processes.append((process, connection))
            other_end.close()
        for _, connection in processes:  # which make their arms beside one another
            made = connection.recv()
            arms |= made
            owner |= dict.fromkeys(made, connection)
        seconds = {name: [] for name in arms}
        for number in range(rounds + 1):
            for name, connection in owner.items():
                connection.send(name)
                seconds[name].append(connection.recv())
            print(f"round {number} of {rounds}" if number else "warmed up", file=sys.stderr, flush=True)
    finally:
        for process, connection in processes:
            with contextlib.suppress(BrokenPipeError):  # one that has failed is gone already
                connection.send(None)
            process.join()
    return arms, {name: values[1:] for name, values in seconds.items()}


def ceilings() -> dict[str, Arm]:
    """What this machine can do at best: matrix products, a copy in memory, a bare FFT of frames."""
    import torch

    left, right = torch.randn(2, MATRIX, MATRIX)
    half_left, half_right = left.bfloat16(), right.bfloat16()
    product, half_product = torch.empty_like(left), torch.empty_like(half_left)
    source = torch.randn(COPIED_FLOATS)
    target = torch.empty_like(source)
    # As many frames at a time as stay in the processor's caches.
    frames = torch.randn(FRAMES_PER_CLIP, FRAME_LENGTH)
    spectra = torch.empty(FRAMES_PER_CLIP, FRAME_LENGTH // 2 + 1, dtype=torch.complex64)

    def transform():
        for _ in range(64):
            torch.fft.rfft(frames, out=spectra)

    gigaflops = 2e-9 * MATRIX**3
    return {
        "fp32 matrix product": Arm(lambda: torch.mm(left, right, out=product), gigaflops, "GFLOP"),
        "bf16 matrix product": Arm(lambda: torch.mm(half_left, half_right, out=half_product), gigaflops, "GFLOP"),
        "memory copy": Arm(lambda: target.copy_(source), 8e-9 * COPIED_FLOATS, "GB"),
        "bare FFT": Arm(transform, 64, "clips"),
    }


def summarise(arms: dict[str, Arm], seconds: dict[str, list[float]]) -> list[dict]:
    """A line per arm: median, smallest and largest seconds, the rate, and its share of the arm's ceiling."""
    lines = []
    for name, arm in arms.items():
        line = {"what": name, **spread("seconds", seconds[name])}
        line |= {"rate": arm.amount / line["seconds"], "unit": f"{arm.unit}/s"}
        if arm.ceiling:
            shares = (best / own for own, best in paired(seconds, name, arm.ceiling))
            scale = arm.amount / arms[arm.ceiling].amount
            line |= {"ceiling": arm.ceiling, **spread("share_of_ceiling", [scale * share for share in shares])}
        lines.append(line)
    return lines


def paired(seconds: dict[str, list[float]], one: str, other: str) -> Iterable[tuple[float, float]]:
    return zip(seconds[one], seconds[other], strict=True)


def spread(name: str, values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def ratio_line(what: str, ratios: Iterable[float], reach: str = "") -> dict:
    """A line with the rounds' own ratios: what both sides had to suffer in a round cancels out."""
    return {"what": what, **spread("ratio", list(ratios)), "reach": reach}


def measured_on(device: str = "cpu") -> dict:
    """Processor or accelerator, threads, versions, commit and command."""
    import torch
    import torchaudio
    import transformers

    from dls_training.runtime import hardware, source_commit

    return {
        "hardware": hardware(torch.device(device)),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),  # of a type whose unpickling would import torch
        "torchaudio": torchaudio.__version__,
        "transformers": transformers.__version__,
        "commit": source_commit(),
        "command": " ".join(["python", *map(anywhere, sys.argv)]),
    }


def anywhere(word: str) -> str:
    """A command's word as others can read it: files of the repository as seen from there, no other place by name."""
    name, equals, place = word.rpartition("=")
    if os.sep not in place:
        return word
    found = Path(place).expanduser().resolve()
    return name + equals + (str(found.relative_to(REPOSITORY)) if found.is_relative_to(REPOSITORY) else "DIR")


def write_table(path: Path, lines: list[dict], provenance: dict) -> None:
    """Writes a CSV and moves it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    names = dict.fromkeys(name for line in lines for name in line)
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*names, *provenance], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**line, **provenance} for line in lines)
    unfinished.replace(path)


def read_table(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV, each with the values that it has."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: text for name, text in line.items() if text} for line in csv.DictReader(file)]


def markdown(path: Path, module: ModuleType) -> str:
    """A CSV as a table, and where its numbers come from.

    Args:
        path: The CSV.
        module: The benchmark. It may have a function `rows` of its own, which makes of the CSV's lines those of the
            table, the first of which names the columns.
    """
    lines = read_table(path)
    names, *rows = getattr(module, "rows", measured_rows)(lines)
    text = "\n".join(f"| {' | '.join(row)} |" for row in (names, [":---"] * len(names), *rows))
    origin = lines[0]
    threads = f", {origin['threads']} threads" if "threads" in origin else ""
    versions = "".join(f", {name} {origin[name]}" for name in ("python", "torch") if name in origin)
    return f"{text}\n\n`{origin['command']}`: {origin['hardware']}{threads}{versions}, commit {origin['commit']}.\n"


def measured_rows(lines: list[dict]) -> list[list[str]]:
    """What was measured: its ratio, or its seconds and its rate, and what it was to reach."""
    rows = [["what", "median (smallest–largest)", "rate", "reach"]]
    for line in lines:
        measured = f"**{with_spread(line, 'ratio')}**" if "ratio" in line else ""
        if "seconds" in line:
            measured = f"{with_spread(line, 'seconds')} s"
        rate = f"{number(line['rate'])} {line.get('unit', '')}".rstrip() if "rate" in line else ""
        if "share_of_ceiling" in line:
            rate += f", {number(line['share_of_ceiling'])} of {line['ceiling']}"
        rows.append([line["what"], measured, rate, line.get("reach", "")])
    return rows


def with_spread(line: dict, name: str, shown: Callable[[str], str] | None = None) -> str:
    """Median (smallest–largest), each as `shown` writes it."""
    middle, low, high = map(shown or number, (line[name], line[f"{name}_min"], line[f"{name}_max"]))
    return f"{middle} ({low}–{high})"


def number(text: str) -> str:
    value = float(text)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def draw(path: Path, panels: dict[str, tuple[list[tuple], dict]], xlabel: str, marker: str | None = None) -> None:
    """Curves side by side.

    Args:
        path: A .png file.
        panels: Title -> curves (label, x, y), those of one label in one colour, with a band where (smallest, largest)
            follow; and settings of the axes.
        xlabel: Of all.
        marker: On every point.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["font.size"] = 13
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 4), layout="constrained")
    colours = {}
    for axis, (title, (curves, settings)) in zip(axes, panels.items(), strict=True):
        for label, x, y, *bands in curves:
            known = label in axis.get_legend_handles_labels()[1]
            colour = colours.setdefault(label, f"C{len(colours)}")
            axis.plot(x, y, color=colour, marker=marker, label=None if known else label)
            for smallest, largest in bands:
                axis.fill_between(x, smallest, largest, color=colour, alpha=0.2)
        axis.set(title=title, xlabel=xlabel, **settings)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=100)
