"""Pre-training with the recommended recipe: its step, whole runs, every core, and a machine that does something else.

    python benchmarks/pretraining.py --corpus esc10=/data/ESC-10

Steps are taken on pictures that lie ready: forward, exact softmax over the bank, backward, AdamW. Runs are those of
train_npid.py, from the start of the process to its end; epochs are as fast as the run itself says. The obvious way to
use every core is to compute each operator in as many threads, as torch does by itself. Beside a run, other processes
each keep a core busy as long as it lasts.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import REPOSITORY, Arm, finish, paired, ratio_line, run, spread, summarise, take_turns

BATCH, STEPS, MATRIX = 32, 20, 2048
SOME_STEPS = 10  # of runs that all but stop
OBVIOUS = """
import dls_training.loop, dls_training.runtime
dls_training.loop.parts_of_a_batch = dls_training.runtime.parts_of_a_batch = lambda *_: 1
"""
SCRIPT = """
import sys, train_npid
from dls_training.settings import PretrainingSettings
sys.exit(train_npid.run_command(train_npid.main, PretrainingSettings.parsed()))
"""
AT_WORK = contextlib.ExitStack()  # never closed: until a process ends, those that it has forked are there
ONE, EVERY, THREADS = "one core", "every core", "every core, operators in threads"


def train(obvious: bool, *options) -> subprocess.Popen:
    """train_npid.py, as it is, or with torch's own threads."""
    code = (OBVIOUS if obvious else "") + SCRIPT
    words = [sys.executable, "-c", code, "--recipe", "recommended", "--report_to", "none", *options]
    return subprocess.Popen(list(map(str, words)), stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)


@contextlib.contextmanager
def competitors(count: int):
    """Other processes, each of which keeps a core busy."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def run_arms(corpus: str, epochs: int, few_epochs: int, folder: str) -> dict[str, Arm]:
    """Whole runs; what their epochs say of themselves is appended to FOLDER/rates.jsonl."""

    def arm(name: str, length: list, beside: int, cores: int, obvious: bool) -> Arm:
        def whole_run():
            number[0] += 1
            output = Path(folder) / f"run-{number[0]}"
            options = ["--corpus", corpus, *length, "--num_threads", cores, "--knn_interval", 20]
            with competitors(beside):
                finish(train(obvious, *options, "--output_dir", output))
            history = json.loads((output / "all_results.json").read_text())["history"]
            rate = statistics.median([entry["clips_per_second"] for entry in history[1:]][-few_epochs + 1 :])
            with (Path(folder) / "rates.jsonl").open("a") as file:
                file.write(json.dumps([name, rate]) + "\n")

        return Arm(whole_run, epochs * number_of_clips(corpus), "clips")

    cores, number = os.cpu_count(), [0]
    arms = {"whole run": (["--num_train_epochs", epochs], 0, cores, False)}
    for name, own_cores, obvious in ((ONE, 1, False), (EVERY, cores, False), (THREADS, cores, True)):
        for beside in (0, 1, 4):
            also = f", beside {beside} busy process(es)" if beside else ""
            length = ["--num_train_epochs", few_epochs]
            length += ["--max_train_steps", SOME_STEPS] if obvious and beside else []
            arms[f"run, {name}{also}"] = (length, beside, own_cores, obvious)
    return {name: arm(name, *settings) for name, settings in arms.items()}


def number_of_clips(corpus: str) -> int:
    from datasets_scripts import load_corpus
    from datasets_scripts.options import named_source

    return len(load_corpus(*named_source(corpus), allow_partial=True))


def step_arms(name: str, cores: int, obvious: bool) -> dict[str, Arm]:
    """Steps of the recipe's network alone, and what as many cores do at best."""
    import torch

    from dls_training.cores import BackboneOnCores
    from dls_training.instance_discrimination import InstanceDiscrimination
    from dls_training.memory_bank import MemoryBank
    from dls_training.optimization import make_optimizer
    from dls_training.runtime import choose_device_and_precision
    from modeling_dls import ESResNetConfig, ESResNetForInstanceDiscrimination

    _, precision = choose_device_and_precision("auto")
    parts = 1 if obvious else cores
    torch.set_num_threads(cores // parts)
    torch.manual_seed(0)
    model = ESResNetForInstanceDiscrimination(ESResNetConfig.from_preset("small_mel")).train()
    model = model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer("adamw", model.parameters(), 1e-3, 0.01)
    objective = InstanceDiscrimination(MemoryBank(2000, 128), "softmax", temperature=0.1)
    pictures, indices = torch.randn(BATCH, 1, 3, 32, 256), torch.arange(BATCH)
    on_cores = BackboneOnCores(model.base_model, parts, BATCH)
    AT_WORK.enter_context(on_cores.at_work())

    def steps():
        for _ in range(STEPS):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                embeddings = model(pictures).embeddings
            objective(embeddings, indices, None).mean().backward()
            on_cores.collect_gradients()
            optimizer.step()
            optimizer.zero_grad()

    left, right = torch.randn(2, MATRIX, MATRIX).bfloat16()
    product = torch.empty_like(left)
    arms = {f"steps, {name}": Arm(steps, STEPS * BATCH, "clips")}
    if name == ONE:
        gigaflops = 2e-9 * MATRIX**3
        arms["bf16 matrix product, one core"] = Arm(lambda: torch.mm(left, right, out=product), gigaflops, "GFLOP")
    return arms


def measure(args) -> list[dict]:
    from training_step import gigaflops_per_clip

    cores = os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        makers = [
            *(
                (step_arms, arguments)
                for arguments in ((ONE, 1, False), (EVERY, cores, False), (THREADS, cores, True))
            ),
            (run_arms, (args.corpus, args.epochs, args.few_epochs, folder)),
        ]
        arms, seconds = take_turns(makers, args.rounds)
        said = [json.loads(line) for line in (Path(folder) / "rates.jsonl").read_text().splitlines()]
    rates = {name: [rate for own, rate in said if own == name][1:] for name in arms if "run" in name}
    one, every, threads = (f"steps, {name}" for name in (ONE, EVERY, THREADS))
    relative = arms[one].amount * gigaflops_per_clip("small_mel") / arms["bf16 matrix product, one core"].amount
    whole = {name: arm for name, arm in arms.items() if not name.startswith("run, ")}  # those are of several lengths
    lines = summarise(whole, seconds)
    for name, own in rates.items():
        if name not in whole:
            lines.append({"what": f"{name}, epochs", **spread("rate", own), "unit": "clips/s"})

    def compare(what: str, over: str, under: str, reach: str = "") -> None:
        ratios = [a / b for a, b in zip(rates[f"run, {over}"], rates[f"run, {under}"], strict=True)]
        lines.append(ratio_line(what, ratios, reach))

    shares = (relative * best / own for own, best in paired(seconds, one, "bf16 matrix product, one core"))
    lines.append(ratio_line("step on one core, share of the bf16 matrix product", shares, ">= 0.4"))
    for own, name in ((every, EVERY), (threads, THREADS)):
        lines.append(ratio_line(f"step, {name} / one core", (a / b for a, b in paired(seconds, one, own))))
    scale = arms["whole run"].amount / arms[every].amount
    ratios = (scale * b / a for a, b in paired(seconds, "whole run", every))
    lines.append(ratio_line(f"whole run of {args.epochs} epochs / steps alone, in clips/s", ratios, ">= 0.92"))
    for name, reaches in ((EVERY, (">= 1.75", ">= 0.5", ">= 0.2")), (THREADS, ("", "", "")), (ONE, ("", "", ""))):
        if name != ONE:
            compare(f"epochs, {name} / one core", name, ONE, reaches[0])
        for beside, reach in zip((1, 4), reaches[1:], strict=True):
            also = f", beside {beside} busy process(es)"
            compare(f"epochs, {name}{also} / alone", name + also, name, reach)
    return lines


if __name__ == "__main__":
    run(
        measure,
        corpus=("synthetic", "NAME[=DIR]"),
        epochs=(40, "of the whole run"),
        few_epochs=(3, "of the others"),
        rounds=2,
    )
