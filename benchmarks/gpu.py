"""The paper's network on an accelerator: whole training steps at full resolution beside the device's matrix products.

    python benchmarks/gpu.py

Spectrogram, forward, NCE over a bank of 10^4 clips (K = 64, d = 128), backward, Adam and bank, in fp32 and in bf16, as
written and compiled. `make gpu` runs it after the tests that a GPU changes and before the paper's recipe on ESC-10.
`--device cpu --preset tiny --clips 8 --matrix 256` tries it in miniature where there is no accelerator.
"""

import sys

from measuring import Arm, paired, ratio_line, run, summarise, take_turns
from training_step import BANK, SAMPLES, gigaflops_per_clip

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}


def products(device: str, matrix: int) -> dict[str, Arm]:
    """Matrix products in both precisions, each until the device has done it."""
    import torch

    def arm(precision: str) -> Arm:
        left, right = torch.randn(2, matrix, matrix, device=device, dtype=getattr(torch, PRECISIONS[precision]))
        return Arm(lambda: finished(device, torch.mm, left, right), 2e-9 * matrix**3, "GFLOP")

    return {f"{precision} matrix product": arm(precision) for precision in PRECISIONS}


def finished(device: str, function, *arguments) -> None:
    """Calls a function and waits for the device."""
    import torch

    function(*arguments)
    if device != "cpu":
        torch.accelerator.synchronize()


def steps(name: str, device: str, preset: str, clips: int, precision: str, compiled: bool) -> dict[str, Arm]:
    """Whole training steps, as `train_npid.py` takes them, but for its wish that operators add in the same order."""
    import torch

    from dls_training.instance_discrimination import InstanceDiscrimination
    from dls_training.memory_bank import MemoryBank
    from dls_training.optimization import make_optimizer
    from modeling_dls import ESResNetConfig, ESResNetFeatureExtractor, ESResNetForInstanceDiscrimination

    torch.manual_seed(0)
    model = ESResNetForInstanceDiscrimination(ESResNetConfig.from_preset(preset)).train().to(device)
    model = model.to(memory_format=torch.channels_last)
    network = torch.compile(model) if compiled else model
    optimizer = make_optimizer("adam", list(model.named_parameters()), 1e-4, 0.0)
    spectrogram = ESResNetFeatureExtractor.from_preset(preset).spectrogram
    waveform = 0.1 * torch.randn(clips, 1, SAMPLES, device=device)
    objective = InstanceDiscrimination(MemoryBank(BANK, 128)).to(device)
    objective.bank.update_normaliser(torch.tensor(1.0, dtype=torch.float64, device=device))
    indices = places = torch.arange(clips, device=device)

    def step():
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            embeddings = network(spectrogram(waveform)).embeddings
        (candidates,) = objective.candidates([indices], [places], clips, 0)
        objective(embeddings, indices, candidates).mean().backward()
        objective.bank.update(indices, embeddings.detach())
        optimizer.step()
        optimizer.zero_grad()

    finished(device, step)  # what is compiled is compiled now, beside the others
    return {name: Arm(lambda: finished(device, step), clips, "clips")}


def measure(args) -> list[dict]:
    named = {
        (f"step in {precision}{', compiled' if compiled else ''}", precision): compiled
        for compiled in ((False, True) if args.compile else (False,))
        for precision in PRECISIONS
    }
    try:
        return measured(named, args)
    except EOFError:  # a compiler has many ways to fail, and a GPU's hour is not to be spent in vain
        if not args.compile:
            raise
        print("a step failed, see above: only steps as written are measured", file=sys.stderr)
        return measured({each: compiled for each, compiled in named.items() if not compiled}, args)


def measured(named: dict[tuple[str, str], bool], args) -> list[dict]:
    """Of steps (name, precision) -> whether compiled: their lines, each beside its matrix product."""
    makers = [
        (steps, (name, args.device, args.preset, args.clips, precision, compiled))
        for (name, precision), compiled in named.items()
    ]
    arms, seconds = take_turns([*makers, (products, (args.device, args.matrix))], args.rounds)
    summary = {line["what"]: line for line in summarise(arms, seconds)}
    flops = args.clips * gigaflops_per_clip(args.preset)
    lines = []
    for name, precision in named:
        product = f"{precision} matrix product"
        shares = (flops / arms[product].amount * best / own for own, best in paired(seconds, name, product))
        lines += [summary[name], ratio_line(f"{name}, share of the {product}", shares)]
    return [*lines, *(summary[f"{precision} matrix product"] for precision in PRECISIONS)]


if __name__ == "__main__":
    run(
        measure, rounds=10, device=("cuda", "of torch"), preset=("esresnet50", "network and its spectrograms"),
        clips=(64, "of five seconds in a batch"), matrix=(8192, "rows of the products"),
        compile=(False, "torch.compile too"),
    )  # fmt: skip
