"""Full-resolution spectrograms of 64 five-second clips, beside torch.stft alone and a plain version.

    python benchmarks/spectrogram.py

Twice: in an ordinary process, and in one that keeps freed memory for itself, as training and embedding do.
"""

from measuring import Arm, ceilings, paired, ratio_line, run, summarise, take_turns

CLIPS, SAMPLES = 64, 220500


def spectrogram_arms(process: str, keep_memory: bool) -> dict[str, Arm]:
    import torch
    from training_step import plain_spectrogram

    from dls_training.runtime import keep_freed_memory
    from modeling_dls import ESResNetFeatureExtractor

    if keep_memory:
        keep_freed_memory()
    torch.manual_seed(0)
    waveform = 0.1 * torch.randn(CLIPS, 1, SAMPLES)
    mono = waveform[:, 0]
    window = torch.hann_window(1654)
    full, small = ESResNetFeatureExtractor(), ESResNetFeatureExtractor.from_preset("esresnet18")
    clips = [clip.numpy() for clip in mono]
    work = {
        "torch.stft": lambda: torch.stft(
            waveform[:, 0], 2048, 561, 1654, window, normalized=True, return_complex=True
        ),
        "plain spectrogram": lambda: plain_spectrogram(waveform),
        "extractor.spectrogram": lambda: full.spectrogram(waveform),
        "extractor(list of arrays)": lambda: full(clips, sampling_rate=44100, return_tensors="pt"),
        "extractor.spectrogram, 64 x 128": lambda: small.spectrogram(waveform),
    }
    return {f"{name}, {process}": Arm(call, CLIPS, "clips", "bare FFT") for name, call in work.items()}


def measure(args) -> list[dict]:
    processes = {"ordinary process": False, "memory kept": True}
    makers = [(spectrogram_arms, (process, keep)) for process, keep in processes.items()]
    arms, seconds = take_turns([*makers, (ceilings, ())], args.rounds)
    lines = summarise(arms, seconds)
    for process in processes:
        for name in ("plain spectrogram", "extractor.spectrogram", "extractor(list of arrays)"):
            ratios = (a / b for a, b in paired(seconds, f"{name}, {process}", f"torch.stft, {process}"))
            reach = "<= 1.7" if name == "extractor.spectrogram" else ""
            lines.append(ratio_line(f"{name} / torch.stft, {process}", ratios, reach))
    return lines


if __name__ == "__main__":
    run(measure, rounds=15)
