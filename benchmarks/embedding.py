"""Embedding a folder with dls embed, beside decoding and the forward pass alone; folded batch norm; latency of a clip.

    python benchmarks/embedding.py --corpus esc10=/data/ESC-10

What overlaps computes on the same cores: nothing can be faster than all of its work on all of them.
"""

import tempfile
from pathlib import Path

from measuring import Arm, ceilings, paired, ratio_line, run, summarise, take_turns
from training_step import gigaflops_per_clip

PRESETS = {"esresnet50": 8, "esresnet18": 80, "small_mel": 200}  # and batches of the forward pass alone


def save_network(preset: str, folder: Path, head: str = "ESResNetForInstanceDiscrimination") -> None:
    """A network as a train script leaves it, with random weights."""
    import torch

    import modeling_dls
    from modeling_dls import ESResNetConfig, ESResNetFeatureExtractor

    torch.manual_seed(0)
    getattr(modeling_dls, head)(ESResNetConfig.from_preset(preset, num_labels=10)).save_pretrained(folder)
    extractor = ESResNetFeatureExtractor.from_preset(preset, max_length=220500, audio_channels=1)
    extractor.save_pretrained(folder)


def sounds(corpus: str, folder: Path) -> Path:
    """The corpus's folder; the generated corpus is written into one."""
    from datasets_scripts import load_corpus
    from datasets_scripts.options import named_source

    name, source = named_source(corpus)
    if source is None:
        folder.mkdir()
        for row in load_corpus(name):
            (folder / f"{row['clip_id']}.wav").write_bytes(row["audio"]["bytes"])
    return Path(source or folder)


def folder_arms(preset: str, recordings: Path, model: Path, batches: int) -> dict[str, Arm]:
    """A folder's way through `dls embed`'s engine, and each half of it alone, in as many threads.

    The network gets pictures that lie ready, as it is made ready for `dls embed`, and as it was saved.
    """
    import torch

    from dls_sounds import engine
    from dls_sounds.network import Embedder
    from dls_sounds.settings import EmbedSettings
    from dls_sounds.work import recordings as divided
    from dls_training.cores import cores_in_use
    from dls_training.waveforms import in_order, one_core_each, sound_blocks, stream_windows

    embedder, threads = Embedder(str(model), None, None, "auto"), cores_in_use()
    batch = EmbedSettings(input=[recordings], output=model.with_suffix(".parquet")).batch_size
    files = divided((path.name, path) for path in engine.find_files([recordings]))
    pictures = embedder.extractor.spectrogram(0.1 * torch.randn(batch, 1, embedder.length)).to(embedder.dtype)
    plain = type(embedder.model).from_pretrained(model).eval().to(memory_format=torch.channels_last)

    def whole():
        windows = engine.decoded(files, embedder, embedder.length, None, threads)
        for _ in engine.computed(engine.batches(windows, batch), embedder, threads):
            pass

    def decode():
        def pictures_of(file):
            blocks = sound_blocks({"bytes": None, "path": file.path}, embedder.extractor)
            return [embedder.extractor.spectrogram(found) for _, found in stream_windows(blocks, embedder.length)]

        for _ in in_order(pictures_of, files, threads):
            pass

    def each_batch(network):
        def compute(_):
            with torch.inference_mode():
                network()

        with one_core_each(threads) as pool:
            list(pool.map(compute, range(batches)))

    def unfolded():
        with torch.autocast("cpu", torch.bfloat16, enabled=embedder.dtype == torch.bfloat16):
            plain(pictures.float())

    return {
        f"{preset}, dls embed": Arm(whole, len(files), "clips"),
        f"{preset}, decoding and spectrograms alone": Arm(decode, len(files), "clips"),
        f"{preset}, forward pass alone": Arm(
            lambda: each_batch(lambda: embedder.model(pictures)), batches * batch, "clips"
        ),
        f"{preset}, forward pass, batch norm not folded": Arm(lambda: each_batch(unfolded), batches * batch, "clips"),
    }


def pipeline_arm(preset: str) -> dict[str, Arm]:
    """One clip through transformers' pipeline."""
    import torch
    from transformers import pipeline

    import modeling_dls  # noqa: F401
    from modeling_dls import ESResNetConfig, ESResNetFeatureExtractor, ESResNetForAudioClassification

    clip = 0.1 * torch.randn(220500).numpy()
    network = ESResNetForAudioClassification(ESResNetConfig.from_preset(preset, num_labels=10)).eval()
    extractor = ESResNetFeatureExtractor.from_preset(preset, max_length=220500, audio_channels=1)
    classify = pipeline("audio-classification", model=network, feature_extractor=extractor)
    return {f"{preset}, pipeline, one clip, fp32": Arm(lambda: classify(clip.copy()), 1, "clips")}


def measure(args) -> list[dict]:
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        recordings = sounds(args.corpus, Path(temporary) / "sounds")
        for preset, batches in PRESETS.items():
            model = Path(temporary) / preset
            save_network(preset, model)
            makers = [
                (folder_arms, (preset, recordings, model, batches)),
                (pipeline_arm, (preset,)),
                (ceilings, ()),
            ]
            arms, seconds = take_turns(makers, args.rounds)
            whole, decoding = f"{preset}, dls embed", f"{preset}, decoding and spectrograms alone"
            alone, unfolded = f"{preset}, forward pass alone", f"{preset}, forward pass, batch norm not folded"
            clips = arms[whole].amount / arms[alone].amount
            halves = zip(*(seconds[name] for name in (whole, decoding, alone)), strict=True)
            shares = [max(decoded, clips * computed) / own for own, decoded, computed in halves]
            product = "bf16 matrix product"
            gigaflops = arms[alone].amount * gigaflops_per_clip(preset, backward=False) / arms[product].amount
            of_product = [gigaflops * best / own for own, best in paired(seconds, alone, product)]
            folding = (without / own for own, without in paired(seconds, alone, unfolded))
            lines += [
                *(line for line in summarise(arms, seconds) if line["what"].startswith(preset)),
                ratio_line(f"{alone}, share of the {product}", of_product),
                ratio_line(f"{whole} / the slower of both halves alone, in clips/s", shares, ">= 0.85"),
                ratio_line(f"{preset}, folding batch norm, times faster", folding),
            ]
    return lines


if __name__ == "__main__":
    run(measure, corpus=("synthetic", "NAME[=DIR] of five-second sounds"), rounds=3)
