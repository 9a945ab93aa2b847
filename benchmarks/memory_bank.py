"""What a step costs as the memory bank grows.

    python benchmarks/memory_bank.py

For each number of rows, one process or two (gloo, on this machine), the bank whole in each or spread over them: the
bank's own work in a step (NCE loss, its gradient, update), and the whole training step of esresnet18 on random
pictures, 32 clips in all, d = 128, K = 64. The banks of all sizes take turns step by step in the same processes, so
that what else the machine does falls on all alike. Medians of --repeats rounds, the smallest and largest beside them.
"""

import os
import statistics
import sys
import tempfile
import time

from measuring import apart, draw, paired, run, spread, with_spread
from memory import memory_mib

GLOBAL_BATCH, DIM, NEGATIVES = 32, 128, 64
ARRANGEMENTS = ((1, "whole"), (2, "whole"), (2, "sharded"))
MEASURED = ("bank_seconds", "step_seconds", "bank_mib")


def measure_process(
    rank: int, processes: int, meeting_point: str, kind: str, all_rows: list[int], steps: int
) -> dict[int, dict]:
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

    dist.init_process_group("gloo", f"file://{meeting_point}", rank=rank, world_size=processes)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    torch.manual_seed(0)
    batch = GLOBAL_BATCH // processes
    objectives, bank_mib = {}, {}
    for rows in all_rows:
        before = memory_mib(os.getpid())
        bank = {"whole": MemoryBank, "sharded": ShardedMemoryBank}[kind](rows, DIM)
        bank_mib[rows] = memory_mib(os.getpid()) - before
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
    return {
        rows: dict(zip(MEASURED, (bank_seconds[rows], step_seconds[rows], bank_mib[rows]), strict=True))
        | {"precision": "bf16" if bf16 else "fp32"}
        for rows in all_rows
    }


def slowest(processes: int, kind: str, all_rows: list[int], steps: int) -> dict[int, dict]:
    """{rows: measurement}, of the slowest process, which is what a step takes."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(rank, processes, f"{folder}/store", kind, all_rows, steps) for rank in range(processes)]
        ranks = apart(measure_process, arguments)
    return {rows: {name: max(rank[rows][name] for rank in ranks) for name in ranks[0][rows]} for rows in all_rows}


def measure(args) -> list[dict]:
    rounds = {(rows, *arrangement): [] for rows in args.rows for arrangement in ARRANGEMENTS}
    for number in range(args.repeats):
        for processes, kind in ARRANGEMENTS:
            for rows, result in slowest(processes, kind, args.rows, args.steps).items():
                rounds[rows, processes, kind].append(result)
                print(f"round {number + 1}: {rows} rows, {processes} x {kind}: {result}", file=sys.stderr, flush=True)
    lines = []
    for (rows, processes, kind), results in rounds.items():
        line = {"rows": rows, "processes": processes, "bank": kind}
        for name in MEASURED:
            line |= spread(name, [result[name] for result in results])
        lines.append(line | {"precision": results[0]["precision"]})
    draw(args.output.with_suffix(".png"), panels(lines), "rows", marker="o")
    few, many = min(args.rows), max(args.rows)
    for processes, kind in ARRANGEMENTS:
        steps = {rows: [result["step_seconds"] for result in rounds[rows, processes, kind]] for rows in (few, many)}
        ratios = ", ".join(f"{more / less:.3f}" for less, more in sorted(paired(steps, few, many)))
        print(f"whole step, {many} rows / {few}, {processes} x {kind}: {ratios}")
    return lines


def panels(lines: list[dict]) -> dict[str, tuple[list[tuple], dict]]:
    """What `draw` takes."""
    axes = {
        "bank alone, s/step": {"ylim": (0, None)}, "whole step, s": {"ylim": (0, None)},
        "bank, MiB/process": {"yscale": "log"},
    }  # fmt: skip
    curves = {}
    for (title, settings), name in zip(axes.items(), MEASURED, strict=True):
        curves[title] = ([], {"xscale": "log", **settings})
        for processes, kind in ARRANGEMENTS:
            own = [line for line in lines if (line["processes"], line["bank"]) == (processes, kind)]
            curves[title][0].append((f"{processes} x {kind}", [x["rows"] for x in own], [x[name] for x in own]))
    return curves


def rows(lines: list[dict]) -> list[list[str]]:
    names = ["rows", "processes", "bank", "bank alone, ms", "whole step, ms", "bank, MiB per process"]
    return [names] + [
        [
            f"{int(line['rows']):,}",
            line["processes"],
            line["bank"],
            with_spread(line, "bank_seconds", lambda seconds: f"{1e3 * float(seconds):.2f}"),
            with_spread(line, "step_seconds", lambda seconds: f"{1e3 * float(seconds):.0f}"),
            f"{float(line['bank_mib']):.0f}",
        ]
        for line in lines
    ]


if __name__ == "__main__":
    run(measure, rows=[10**4, 10**5, 10**6, 10**7], steps=(20, "whole steps a round"), repeats=(3, "rounds"))
