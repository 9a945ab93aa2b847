"""Several cores compute what one computes, and nothing is left over where a process is lost."""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from scripts import MEASURED, SMALL, Forked, succeed, train

from datasets_scripts.errors import AudioError, LostProcess
from dls_training import cores
from dls_training.clips import ClipStore
from dls_training.cores import BackboneOnCores
from dls_training.input_pipeline import Key, ViewMaker, load_corpora, order_of_epoch, training_loader
from dls_training.networks import make_extractor
from dls_training.settings import PretrainingSettings
from modeling_dls import ESResNetConfig, ESResNetForInstanceDiscrimination
from modeling_dls.modeling_esresnet import frozen_batch_norm_statistics

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="batches are split on Linux alone")


def network(dtype=torch.float64, **changes) -> ESResNetForInstanceDiscrimination:
    torch.manual_seed(0)
    config = ESResNetConfig.from_preset("tiny", **changes)
    return ESResNetForInstanceDiscrimination(config).train().to(dtype, memory_format=torch.channels_last)


def pictures(clips: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(clips, 1, 3, 32, 64, generator=torch.Generator().manual_seed(clips)).to(dtype)


def learn(model, on_cores: BackboneOnCores, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """Embeddings of all batches, whose gradients are accumulated, with a weight of its own for every number."""
    embeddings = []
    for batch in batches:
        embeddings.append(model(batch).embeddings)
        weights = torch.linspace(-1, 1, embeddings[-1].numel()).view_as(embeddings[-1])
        (embeddings[-1] * weights).sum().backward()
    on_cores.collect_gradients()
    return embeddings


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("changes", [{}, {"pooling": "statistics"}], ids=["mean", "statistics"])
def test_parts_compute_what_one_process_computes(parts, changes):
    one, many = network(**changes), network(**changes)
    alone, on_cores = BackboneOnCores(one.base_model, 1, 32), BackboneOnCores(many.base_model, parts, 32)
    batches = [pictures(25), pictures(31), pictures(10)]  # uneven, and too few
    expected = learn(one, alone, batches)
    with on_cores.at_work():
        torch.testing.assert_close(learn(many, on_cores, batches), expected)
        assert len(on_cores.processes) == parts - 1
        torch.testing.assert_close(gradients(many), gradients(one))
        torch.testing.assert_close(dict(many.named_buffers()), dict(one.named_buffers()))
        for model in (one, many):  # a step: the next gradients are those of new weights, and of them alone
            torch.optim.SGD(model.parameters(), 0.01).step()
            model.zero_grad()
        expected = learn(one, alone, batches[:1])
        torch.testing.assert_close(learn(many, on_cores, batches[:1]), expected)
        torch.testing.assert_close(gradients(many), gradients(one))
        with torch.no_grad():
            torch.testing.assert_close(many.eval()(batches[1]).embeddings, one.eval()(batches[1]).embeddings)
            many.train()
            before = {name: buffer.clone() for name, buffer in many.named_buffers()}
            with frozen_batch_norm_statistics(many):
                many(batches[1])
            torch.testing.assert_close(dict(many.named_buffers()), before, rtol=0, atol=0)
    assert not multiprocessing.active_children()
    torch.testing.assert_close(many.train()(batches[0]).embeddings, one.train()(batches[0]).embeddings)


def test_statistics_without_a_momentum_are_the_mean_over_batches():
    """As `estimate_batch_norm_statistics` takes them, of an evaluation within training."""
    one, many = network(), network()
    on_cores = BackboneOnCores(many.base_model, 2, 32)
    with on_cores.at_work(), torch.no_grad():
        for model in (one, many):
            for norm in on_cores.norms() if model is many else BackboneOnCores(one.base_model, 1, 32).norms():
                norm.reset_running_stats()
                norm.momentum = None
            for batch in (pictures(32), pictures(20), pictures(10)):
                model(batch)
        torch.testing.assert_close(dict(many.named_buffers()), dict(one.named_buffers()))


def test_each_part_makes_its_own_views():
    """The views that one process makes of the clips, and none of those that were computed before."""
    one, many = network(), network()
    on_cores, clips, makers = BackboneOnCores(many.base_model, 2, 32), pictures(64), []

    def make_views(keys):
        makers.append(len(keys))  # what the others append is lost with them
        assert not torch.is_autocast_enabled("cpu")
        return clips[keys]

    on_cores.make_views = make_views
    with on_cores.at_work():
        for number, keys in enumerate([list(range(32)), list(range(20, 51)), list(range(7))]):
            views = on_cores.views(keys)
            torch.testing.assert_close(views, clips[keys], rtol=0, atol=0)
            with torch.autocast("cpu", torch.bfloat16, enabled=not number):  # within which the others are forked
                embeddings = many(views).embeddings
            if number:
                torch.testing.assert_close(embeddings, one(clips[keys]).embeddings)
            embeddings.sum().backward()
            on_cores.collect_gradients()
    assert makers == [32, 16, 7]  # alone, its part, and too few to split


def test_a_part_that_cannot_make_its_views_says_why():
    model = network()
    on_cores, first = BackboneOnCores(model.base_model, 2, 32), os.getpid()

    def make_views(keys):
        if os.getpid() != first:
            raise AudioError("clip.wav: has become shorter since it was checked")
        return pictures(len(keys))

    on_cores.make_views = make_views
    with pytest.raises(AudioError, match=r"clip\.wav: has become shorter"), on_cores.at_work():
        model(on_cores.views(list(range(32)))).embeddings.sum().backward()
        on_cores.collect_gradients()
        on_cores.views(list(range(32)))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "options",
    [
        ["--augmentation", "both", "--no-keep_spectrograms"],
        ["--augmentation", "spectrogram", "--keep_spectrograms"],
        ["--augmentation", "waveform", "--keep_waveforms"],
    ],
)
def test_views_do_not_depend_on_who_makes_them(options, sound_folder, tmp_path, monkeypatch):
    """In a run's own loader, epoch by epoch; a clip's partner is in another part, or in none."""
    words = ["--corpus", f"audiofolder={sound_folder}", *SMALL, "--dataloader_num_workers", 0, *options]
    words += ["--per_device_train_batch_size", 20]
    settings = PretrainingSettings.parsed([*map(str, words), "--output_dir", str(tmp_path)])
    corpora = load_corpora(settings)
    store = ClipStore([corpus for _, corpus in corpora], make_extractor(settings), settings)
    batches = training_loader(store, corpora[0][1], settings).dataset
    make_views = ViewMaker(store.extractor, settings.augmentation, 1.0, store.caches_spectrograms)
    model = ESResNetForInstanceDiscrimination(ESResNetConfig.from_preset("tiny")).train()
    on_cores = BackboneOnCores(model.base_model, 2, 20)
    on_cores.make_views = lambda keys: make_views(batches.for_training(keys))
    with on_cores.at_work():
        for epoch in range(3):
            keys = [Key(int(clip), epoch) for clip in order_of_epoch(len(batches), settings.seed, epoch)[:20]]
            views = on_cores.views(keys)
            torch.testing.assert_close(views, make_views(batches.for_training(keys)), rtol=0, atol=1e-5)
            model(views)
        assert len(on_cores.processes) == 1


def test_half_precision_is_of_the_weights_as_they_are():
    """Autocast keeps its copies of the weights until it is left, which who is forked within it never does."""
    model, batch = network(torch.float32), pictures(32, torch.float32)
    on_cores = BackboneOnCores(model.base_model, 2, 32)

    def embeddings():
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch).embeddings

    with on_cores.at_work():
        embeddings()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.rand_like(parameter), alpha=0.1)
        split = embeddings()
    torch.testing.assert_close(split, embeddings(), rtol=0, atol=0.02)


def test_a_backbone_that_is_not_trained_is_computed_in_parts_too():
    """--freeze_backbone: nothing to go backward through."""
    one, many = network(), network()
    for model in (one, many):
        model.base_model.eval().requires_grad_(False)
    on_cores = BackboneOnCores(many.base_model, 2, 32)
    with on_cores.at_work():
        found = learn(many, on_cores, [pictures(32)])
    torch.testing.assert_close(found, learn(one, BackboneOnCores(one.base_model, 1, 32), [pictures(32)]))
    torch.testing.assert_close(many.projection.weight.grad, one.projection.weight.grad)


def test_a_part_that_fails_says_why(monkeypatch):
    model = network()
    on_cores, first = BackboneOnCores(model.base_model, 2, 32), os.getpid()
    compute = on_cores.compute

    def fail_in_the_other(*arguments, **options):
        if os.getpid() != first:
            raise MemoryError("no room for 3 GB")
        return compute(*arguments, **options)

    on_cores.compute = fail_in_the_other
    monkeypatch.setattr(cores, "SECONDS_BETWEEN_LOOKS", 0.05)
    with pytest.raises(MemoryError, match="no room for 3 GB"), on_cores.at_work():
        model(pictures(32))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("moment", ["forward", "backward"])
def test_a_part_that_is_killed_ends_the_step(moment, monkeypatch):
    monkeypatch.setattr(cores, "SECONDS_BETWEEN_LOOKS", 0.05)
    model = network()
    on_cores = BackboneOnCores(model.base_model, 2, 32)
    with pytest.raises(LostProcess, match=r"has ended.*--resume_from_checkpoint latest"), on_cores.at_work():
        embeddings = model(pictures(32)).embeddings
        os.kill(on_cores.processes[0].pid, signal.SIGKILL)
        if moment == "forward":
            model(pictures(32))
        embeddings.sum().backward()
        on_cores.collect_gradients()
    assert not multiprocessing.active_children()


def compute_until_killed(folder: Path) -> None:
    model = network()
    on_cores = BackboneOnCores(model.base_model, 2, 32)
    with on_cores.at_work():
        model(pictures(32))
        (folder / "part").write_text(str(on_cores.processes[0].pid))
        time.sleep(60)


def test_parts_end_with_the_first_process(tmp_path):
    with Forked(tmp_path / "log", compute_until_killed, tmp_path) as first:
        first.wait_for((tmp_path / "part").exists)
        first.wait_for(lambda: (tmp_path / "part").read_text())
        part = int((tmp_path / "part").read_text())
        assert Path(f"/proc/{part}").exists()
        first.signal(signal.SIGKILL)
        first.process.join()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{part}/cmdline").exists() and Path(f"/proc/{part}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def compute_and_end() -> int:
    model = network()
    held.enter_context(BackboneOnCores(model.base_model, 2, 32).at_work())
    model(pictures(32))
    return 7


held = contextlib.ExitStack()  # of a process that ends without leaving it


def test_a_process_ends_though_nobody_ends_its_parts(tmp_path):
    with Forked(tmp_path / "log", compute_and_end) as first:
        first.process.join(timeout=60)
        assert first.process.exitcode == 7, first.output()


def test_a_run_goes_on_with_as_many_cores_as_it_had(sound_folder, tmp_path):
    """Which the last bits depend on: a run that is interrupted ends where one that never was does."""
    options = [
        "--corpus", f"audiofolder={sound_folder}", *SMALL, "--per_device_train_batch_size", 20, "--nce_k", 8,
        "--num_train_epochs", 3, "--learning_rate", 0.001, "--mixed_precision", "no", "--output_dir",
    ]  # fmt: skip
    said = succeed("train_npid.py", *options, tmp_path / "whole", "--num_threads", 2)
    assert "1 process(es) x 2 core(s) on cpu, each batch in 2 parts beside one another" in said
    first = ["train_npid.py", [*options, tmp_path / "parts", "--num_threads", 2, "--checkpointing_steps", 1]]
    with Forked(tmp_path / "log", train, *first) as run:
        run.wait_for(lambda: list((tmp_path / "parts").glob("checkpoint-[34]")))
        run.signal(signal.SIGKILL)
    again = succeed("train_npid.py", *options, tmp_path / "parts", "--resume_from_checkpoint", "latest")
    assert "x 2 core(s)" in again
    results = [json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("whole", "parts")]
    histories = [
        [{k: v for k, v in entry.items() if k not in MEASURED} for entry in run["history"]] for run in results
    ]
    assert histories[0] == histories[1]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    alone = succeed("train_npid.py", *options, tmp_path / "alone", "--num_threads", 1)
    assert "x 1 core(s) on cpu, precision" in alone
    losses = [entry["loss"] for entry in json.loads((tmp_path / "alone/all_results.json").read_text())["history"][1:]]
    assert losses == pytest.approx([entry["loss"] for entry in histories[0][1:]], rel=1e-3)
