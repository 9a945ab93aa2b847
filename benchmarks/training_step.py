"""The whole training step of ESResNet-50 at full resolution, beside the plain way.

    python benchmarks/training_step.py

Sixteen five-second clips: spectrogram, forward, NPID loss over a bank of 10^4 clips (K = 64, d = 128), backward, Adam,
bank. The plain step is the same network in fp32, contiguous, eager, with torch's ordinary Adam and the spectrogram
written down as its definition reads. Then each measure is taken away in turn.
"""

from measuring import Arm, ceilings, paired, ratio_line, run, summarise, take_turns

CLIPS, SAMPLES, BANK = 16, 220500, 10**4
FAST = {"precision": "bf16", "memory_format": "channels_last", "fused": True, "keep_memory": True, "compiled": False}
PLAIN = {"precision": "no", "memory_format": "contiguous", "fused": False, "keep_memory": False, "compiled": False}
WITHOUT = {
    "fp32": {"precision": "no"},
    "contiguous tensors": {"memory_format": "contiguous"},
    "Adam that is not fused": {"fused": False},
    "memory given back to the system": {"keep_memory": False},
}
COMPILED = {"torch.compile": {"compiled": True}}


def plain_spectrogram(waveform):
    """As the definition reads: (batch, 1, samples) -> (batch, 1, 3, 341, 394)."""
    import torch

    terms = [0.35875, 0.48829, 0.14128, 0.01168]
    window = torch.signal.windows.general_cosine(1654, a=terms, sym=False)
    spectrum = torch.stft(waveform[:, 0] * 32768, 2048, 561, 1654, window, normalized=True, return_complex=True)
    power = spectrum.real**2 + spectrum.imag**2
    power = torch.where(power == 0, 1e-18, power)
    return 10 * torch.log10(power[:, :1023].unflatten(1, (3, 341)))[:, None]


def step_arms(name: str, precision: str, memory_format: str, fused: bool, keep_memory: bool, compiled: bool):
    """One training step, and the part of it that the bank takes."""
    import torch
    from torch.nn import functional as F

    from dls_training.instance_discrimination import InstanceDiscrimination
    from dls_training.memory_bank import MemoryBank
    from dls_training.optimization import make_optimizer
    from dls_training.runtime import MEMORY_FORMATS, keep_freed_memory
    from modeling_dls import ESResNetConfig, ESResNetFeatureExtractor, ESResNetForInstanceDiscrimination

    if keep_memory:
        keep_freed_memory()
    torch.manual_seed(0)
    model = ESResNetForInstanceDiscrimination(ESResNetConfig()).train()
    model = model.to(memory_format=MEMORY_FORMATS[memory_format])
    network = torch.compile(model) if compiled else model
    if fused:
        optimizer = make_optimizer("adam", model.parameters(), 1e-4, 0.0)
    else:
        optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    spectrogram = plain_spectrogram if name == "plain" else ESResNetFeatureExtractor().spectrogram
    waveform = 0.1 * torch.randn(CLIPS, 1, SAMPLES)
    bank = MemoryBank(BANK, 128)
    objective = InstanceDiscrimination(bank)
    bank.update_normaliser(torch.tensor(1.0, dtype=torch.float64))
    indices, places = torch.arange(CLIPS), torch.arange(CLIPS)

    def learn(embeddings):
        (candidates,) = objective.candidates([indices], [places], CLIPS, 0)
        objective(embeddings, indices, candidates).mean().backward()
        bank.update(indices, embeddings.detach())

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            embeddings = network(spectrogram(waveform)).embeddings
        learn(embeddings)
        optimizer.step()
        optimizer.zero_grad()

    arms = {name: Arm(step, CLIPS, "clips")}
    if name == "fast":
        embeddings = F.normalize(torch.randn(CLIPS, 128), dim=-1).requires_grad_()
        arms["bank, loss and update"] = Arm(lambda: learn(embeddings), CLIPS, "clips")
    return arms


def gigaflops_per_clip(preset: str = "esresnet50", backward: bool = True) -> float:
    """Arithmetic of one five-second clip, as torch counts it: forward, and backward where that is asked for."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from modeling_dls import ESResNetConfig, ESResNetFeatureExtractor, ESResNetForInstanceDiscrimination

    height, width = ESResNetFeatureExtractor.from_preset(preset).spectrogram(torch.zeros(SAMPLES)).shape[-2:]
    # On the meta device, so that it is counted and not done.
    with torch.device("meta"):
        model = ESResNetForInstanceDiscrimination(ESResNetConfig.from_preset(preset)).train()
        pictures = torch.randn(2, 1, 3, height, width)
    with FlopCounterMode(display=False) as counter:
        embeddings = model(pictures).embeddings
        if backward:
            embeddings.sum().backward()
    return counter.get_total_flops() / 2e9


def measure(args) -> list[dict]:
    fast = (step_arms, ("fast", *FAST.values()))
    arms, seconds = take_turns([fast, (ceilings, ())], 2 * args.rounds)
    relative = CLIPS * gigaflops_per_clip() / arms["bf16 matrix product"].amount
    shares = (relative * best / own for own, best in paired(seconds, "fast", "bf16 matrix product"))
    of_bank = (bank / own for bank, own in paired(seconds, "bank, loss and update", "fast"))
    lines = [
        *summarise(arms, seconds),
        ratio_line("fast step, share of the bf16 matrix product", shares, ">= 0.75"),
        ratio_line("bank, loss and update, share of the fast step", of_bank, "<= 0.01"),
    ]
    arms, seconds = take_turns([(step_arms, ("plain", *PLAIN.values())), fast], args.rounds)
    lines += [line for line in summarise(arms, seconds) if line["what"] == "plain"]
    ratios = (plain / own for plain, own in paired(seconds, "plain", "fast"))
    lines.append(ratio_line("fast step, times faster than plain", ratios, ">= 4.5"))
    for name, change in {**WITHOUT, **(COMPILED if args.compile else {})}.items():
        _, seconds = take_turns([fast, (step_arms, (name, *(FAST | change).values()))], args.rounds)
        ratios = (without / own for own, without in paired(seconds, "fast", name))
        lines.append(ratio_line(f"fast step with {name}, times slower", ratios))
    return lines


if __name__ == "__main__":
    run(measure, rounds=5, compile=(False, "torch.compile too, which takes minutes"))
