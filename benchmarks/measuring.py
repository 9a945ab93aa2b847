"""What the benchmarks share: fair turns, the machine's ceilings, and tables that say where they come from."""

import csv
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # a benchmark measures the checkout that it lies in

MATRIX = 4096
COPIED_FLOATS = 64 << 20
FRAMES_PER_CLIP, FRAME_LENGTH = 394, 2048  # of a five-second clip


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
    """
    context = multiprocessing.get_context("spawn")
    arms, owner, processes = {}, {}, []
    try:
        for make_arms, arguments in makers:
            connection, other_end = context.Pipe()
            process = context.Process(target=serve, args=(make_arms, arguments, other_end), daemon=True)
            process.start()
            processes.append((process, connection))
            other_end.close()
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
        median = statistics.median(seconds[name])
        line = {
            "what": name,
            "seconds": median,
            "seconds_min": min(seconds[name]),
            "seconds_max": max(seconds[name]),
            "rate": arm.amount / median,
            "unit": f"{arm.unit}/s",
        }
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


def measured_on() -> dict:
    """Processor, threads, versions, commit and command."""
    import torch
    import torchaudio
    import transformers

    from dls_training.runtime import hardware, source_commit

    return {
        "hardware": hardware(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchaudio": torchaudio.__version__,
        "transformers": transformers.__version__,
        "commit": source_commit(),
        "command": " ".join(["python", os.path.relpath(sys.argv[0], REPOSITORY), *sys.argv[1:]]),
    }


def write_table(path: Path, lines: list[dict], provenance: dict) -> None:
    """Writes a CSV, moves it into place, and prints it as a table."""
    print_table(lines)
    print(", ".join(f"{name}: {value}" for name, value in provenance.items()), flush=True)
    unfinished = path.with_suffix(".unfinished")
    names = list(dict.fromkeys(name for line in lines for name in line))
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*names, *provenance], restval="")
        writer.writeheader()
        writer.writerows({**line, **provenance} for line in lines)
    unfinished.replace(path)


def print_table(lines: list[dict]) -> None:
    for line in lines:
        parts = []
        if "seconds" in line:
            parts.append(f"{line['seconds']:.4g} s ({line['seconds_min']:.4g}–{line['seconds_max']:.4g})")
        if "rate" in line:
            parts.append(f"{line['rate']:.4g} {line['unit']}")
        for name in ("share_of_ceiling", "ratio"):
            if name in line:
                of = f" of {line['ceiling']}" if name == "share_of_ceiling" else ""
                parts.append(f"{line[name]:.3g} ({line[f'{name}_min']:.3g}–{line[f'{name}_max']:.3g}){of}")
        if line.get("reach"):
            parts.append(f"reach {line['reach']}")
        print(f"{line['what']:60s} {'  '.join(parts)}")
