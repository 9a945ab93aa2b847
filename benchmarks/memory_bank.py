"""What a step costs as the memory bank grows: the table and the plot of docs/scaling.md.

    python benchmarks/memory_bank.py --output benchmarks/memory_bank.csv

For each number of rows, one process or two (gloo, on this machine), the bank whole in each or spread over them: the
bank's own work in a step (NCE loss, its gradient, update), and the whole training step of esresnet18 on random
pictures, 32 clips in all, d = 128, K = 64. The banks of all sizes take turns step by step in the same processes, so
that what else the machine does falls on all alike. Medians of --repeats rounds, the smallest and largest beside them.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

GLOBAL_BATCH, DIM, NEGATIVES = 32, 128, 64
ARRANGEMENTS = ((1, "whole"), (2, "whole"), (2, "sharded"))


def memory_mib() -> float:
    """Anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no RssAnon")


def measure(kind: str, all_rows: list[int], steps: int) -> dict[str, dict]:
    """In each process: {rows: seconds of the bank's part and of the whole step, and the bank's memory}."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    from dls_training.instance_discrimination import InstanceDiscrimination
    from dls_training.memory_bank import MemoryBank
    from dls_training.optimization import make_optimizer
    from dls_training.runtime import best_precision
    from dls_training.sharded_bank import ShardedMemoryBank
    from modeling_dls import ESResNetConfig, ESResNetForInstanceDiscrimination

    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    torch.manual_seed(0)
    batch = GLOBAL_BATCH // processes
    objectives, bank_mib = {}, {}
    for rows in all_rows:
        before = memory_mib()
        bank = {"whole": MemoryBank, "sharded": ShardedMemoryBank}[kind](rows, DIM)
        bank_mib[rows] = memory_mib() - before
        objectives[rows] = InstanceDiscrimination(bank, "nce", NEGATIVES)
        bank.update_normaliser(torch.tensor(1.0, dtype=torch.float64))
    model = ESResNetForInstanceDiscrimination(ESResNetConfig.from_preset("esresnet18"))
    model = torch.nn.parallel.DistributedDataParallel(model.to(memory_format=torch.channels_last))
    optimizer = make_optimizer("sgd", model.parameters(), 0.01, 1e-4)
    pictures = torch.randn(batch, 1, 3, 64, 128)
    bf16 = best_precision(torch.device("cpu")) == "bf16"
    place = torch.arange(batch) + rank * batch

    def learn(objective: InstanceDiscrimination, step: int, embeddings: torch.Tensor) -> None:
        everyones = torch.randint(len(objective.bank), (GLOBAL_BATCH,), generator=torch.Generator().manual_seed(step))
        indices = everyones[place]
        (candidates,) = objective.candidates([indices], [place], GLOBAL_BATCH, step)
        objective(embeddings, indices, candidates).mean().backward()
        parts = [torch.empty_like(embeddings) for _ in range(processes)]
        dist.all_gather(parts, embeddings.detach())
        objective.bank.update(everyones, torch.cat(parts))

    def bank_alone(objective: InstanceDiscrimination, step: int) -> None:
        learn(objective, step, F.normalize(torch.randn(batch, DIM), dim=-1).requires_grad_())

    def whole_step(objective: InstanceDiscrimination, step: int) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            embeddings = model(pictures).embeddings
        learn(objective, step, embeddings)
        optimizer.step()
        optimizer.zero_grad()

    def median_seconds(work, count: int) -> dict[int, float]:
        """The banks take turns, so that whatever else the machine does falls on all alike."""
        seconds = {rows: [] for rows in all_rows}
        for step in range(3 + count):
            for rows, objective in objectives.items():
                dist.barrier()
                started = time.perf_counter()
                work(objective, step)
                seconds[rows].append(time.perf_counter() - started)
        return {rows: statistics.median(values[3:]) for rows, values in seconds.items()}

    bank_seconds, step_seconds = median_seconds(bank_alone, 5 * steps), median_seconds(whole_step, steps)
    dist.barrier()
    dist.destroy_process_group()
    precision = "bf16" if bf16 else "fp32"
    return {
        str(rows): {
            "bank_seconds": bank_seconds[rows],
            "step_seconds": step_seconds[rows],
            "bank_mib": bank_mib[rows],
            "precision": precision,
        }
        for rows in all_rows
    }


def launch(processes: int, kind: str, all_rows: list[int], steps: int) -> dict[str, dict]:
    """{rows: measurement}, of the slowest process, which is what a step takes."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, __file__,
        "--rows", *all_rows, "--steps", steps, "--worker", kind,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*map(str, command), folder], capture_output=True, check=True)
        ranks = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
    return {
        rows: {name: max(rank[rows][name] for rank in ranks) for name in measured}
        for rows, measured in ranks[0].items()
    }


def draw(lines: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    titles = {"bank_seconds": "bank alone, s/step", "step_seconds": "whole step, s", "bank_mib": "bank, MiB/process"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for processes, kind in ARRANGEMENTS:
            own = [line for line in lines if (line["processes"], line["bank"]) == (processes, kind)]
            axis.plot([x["rows"] for x in own], [x[name] for x in own], marker="o", label=f"{processes} x {kind}")
        axis.set(xscale="log", xlabel="rows", title=title)
        if name == "bank_mib":
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("memory_bank.csv"), help="a CSV; the plot goes beside it")
    parser.add_argument("--rows", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--steps", type=int, default=20, help="whole steps a round (default: 20)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        kind, folder = args.worker
        (Path(folder) / os.environ["RANK"]).write_text(json.dumps(measure(kind, args.rows, args.steps)))
        return

    import torch

    from dls_training.runtime import hardware, source_commit

    measured_on = {"hardware": hardware(torch.device("cpu")), "torch": torch.__version__, "commit": source_commit()}
    rounds = {(rows, *arrangement): [] for rows in args.rows for arrangement in ARRANGEMENTS}
    for number in range(args.repeats):
        for processes, kind in ARRANGEMENTS:
            for rows, result in launch(processes, kind, args.rows, args.steps).items():
                rounds[int(rows), processes, kind].append(result)
                print(f"round {number + 1}: {rows} rows, {processes} x {kind}: {result}", flush=True)
    lines = []
    for (rows, processes, kind), results in rounds.items():
        line = {"rows": rows, "processes": processes, "bank": kind}
        for name in ("bank_seconds", "step_seconds", "bank_mib"):
            values = [result[name] for result in results]
            line |= {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}
        line |= {"precision": results[0]["precision"], **measured_on, "command": " ".join(sys.argv)}
        lines.append(line)
    unfinished = args.output.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0].keys())
        writer.writeheader()
        writer.writerows(lines)
    unfinished.replace(args.output)
    draw(lines, args.output.with_suffix(".png"))
    print("| rows | processes | bank | bank alone, ms | whole step, ms | bank, MiB per process |\n|" + " ---: |" * 6)
    for x in lines:
        print(
            f"| {x['rows']:,} | {x['processes']} | {x['bank']} | {1e3 * x['bank_seconds']:.2f} "
            f"({1e3 * x['bank_seconds_min']:.2f}–{1e3 * x['bank_seconds_max']:.2f}) | {1e3 * x['step_seconds']:.0f} "
            f"({1e3 * x['step_seconds_min']:.0f}–{1e3 * x['step_seconds_max']:.0f}) | {x['bank_mib']:.0f} |"
        )
    few, many = min(args.rows), max(args.rows)
    for processes, kind in ARRANGEMENTS:
        pairs = zip(rounds[few, processes, kind], rounds[many, processes, kind], strict=True)
        ratios = sorted(more["step_seconds"] / less["step_seconds"] for less, more in pairs)
        print(f"whole step, {many} rows / {few}, {processes} x {kind}: {', '.join(f'{r:.3f}' for r in ratios)}")


if __name__ == "__main__":
    main()
