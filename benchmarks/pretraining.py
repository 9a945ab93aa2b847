"""Whole runs of train_npid.py, beside its network's step alone.

    python benchmarks/pretraining.py --corpus esc10=/data/ESC-10

A run over real files with the preset for CPUs, from the start of the process to its end, against the same number of
steps of the network alone on pictures that lie ready (forward, exact softmax over the bank, backward, AdamW).
"""

import json
import subprocess
import tempfile
from pathlib import Path

from measuring import Arm, finish, paired, ratio_line, run, start, summarise, take_turns

BATCH, PRESET = 32, "esresnet18"
RECIPE = [
    "--preset", PRESET, "--augmentation", "spectrogram", "--objective", "softmax", "--nce_t", "0.1",
    "--optimizer", "adamw", "--learning_rate", "1e-3", "--lr_scheduler_type", "cosine", "--warmup_steps", "0.3",
    "--per_device_train_batch_size", str(BATCH), "--report_to", "none",
]  # fmt: skip


def train(*options, **environment: str) -> subprocess.Popen:
    return start("train_npid.py", *RECIPE, *options, **environment)


def run_arm(corpus: str, epochs: int, folder: str) -> dict[str, Arm]:
    """The script as a user starts it."""
    rates = []

    def whole_run():
        output = Path(folder) / f"run-{len(rates)}"
        options = ["--corpus", corpus, "--keep_spectrograms", "--num_train_epochs", epochs, "--knn_interval", 20]
        finish(train(*options, "--output_dir", output))
        history = json.loads((output / "all_results.json").read_text())["history"]
        rates.append([entry["clips_per_second"] for entry in history[1:]])
        (Path(folder) / "rates.json").write_text(json.dumps(rates))

    return {"train_npid.py, whole run": Arm(whole_run, epochs * number_of_clips(corpus), "clips")}


def number_of_clips(corpus: str) -> int:
    from datasets_scripts import load_corpus
    from datasets_scripts.options import named_source

    return len(load_corpus(*named_source(corpus), allow_partial=True))


def step_arm(corpus: str, epochs: int) -> dict[str, Arm]:
    """As many clips, without everything but the network's step."""
    import torch

    from dls_training.instance_discrimination import InstanceDiscrimination
    from dls_training.memory_bank import MemoryBank
    from dls_training.optimization import make_optimizer
    from dls_training.runtime import choose_device_and_precision
    from modeling_dls import ESResNetConfig, ESResNetForInstanceDiscrimination

    _, precision = choose_device_and_precision("auto")
    clips = number_of_clips(corpus)
    torch.manual_seed(0)
    model = ESResNetForInstanceDiscrimination(ESResNetConfig.from_preset(PRESET)).train()
    model = model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer("adamw", model.parameters(), 1e-3, 0.01)
    objective = InstanceDiscrimination(MemoryBank(clips, 128), "softmax", temperature=0.1)
    pictures, indices = torch.randn(BATCH, 1, 3, 64, 128), torch.arange(BATCH)

    def steps():
        for _ in range(epochs * clips // BATCH):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                embeddings = model(pictures).embeddings
            objective(embeddings, indices, None).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    return {"the network's step alone": Arm(steps, epochs * clips // BATCH * BATCH, "clips")}


def measure(args) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        makers = [(run_arm, (args.corpus, args.epochs, folder)), (step_arm, (args.corpus, args.epochs))]
        arms, seconds = take_turns(makers, args.rounds)
        rates = json.loads((Path(folder) / "rates.json").read_text())[1:]
    whole, step = arms
    scale = arms[whole].amount / arms[step].amount
    ratios = (scale * b / a for a, b in paired(seconds, whole, step))
    epochs = (
        sorted(own)[len(own) // 2] * alone / arms[step].amount for own, alone in zip(rates, seconds[step], strict=True)
    )
    return [
        *summarise(arms, seconds),
        ratio_line("whole run / step alone, in clips/s", ratios, ">= 0.9"),
        ratio_line("the run's epochs (median) / step alone, in clips/s", epochs),
    ]


if __name__ == "__main__":
    run(measure, corpus=("synthetic", "NAME[=DIR]"), epochs=(40, "of a run"), rounds=2)
