"""Several processes on this machine (gloo): one bank, one mathematics, and no process that waits for a dead one."""

import contextlib
import json
import re
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from scripts import SMALL, Forked, fail, group, outputs, succeed, train
from torch.nn.functional import normalize

from dls_training.memory_bank import MemoryBank
from dls_training.sharded_bank import ShardedMemoryBank


def stay_in_evaluation(module: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
    return torch.nn.Module.train(module, False)


def pretrain_together(runs: list[list]) -> int:
    """In each process of a group: runs of train_npid.py, one after another.

    Batch norm stays in evaluation mode: statistics of a batch depend on how it is divided over processes, everything
    else must not.
    """
    torch.nn.BatchNorm2d.train = stay_in_evaluation
    for options in runs[:-1]:  # a group cannot be made a second time: the last run ends it
        with mock.patch.object(torch.distributed, "destroy_process_group"):
            if code := train("train_npid.py", options):
                return code
        AcceleratorState._reset_state(True)
    return train("train_npid.py", runs[-1])


def results_of(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text())


# The same mathematics

TEN_STEPS = [
    "--max_train_steps", "10", "--knn_interval", "9", "--mixed_precision", "no", "--learning_rate", "0.01",
    "--lr_scheduler_type", "constant", "--nce_k", "8",
]  # fmt: skip
OBJECTIVES = {
    "nce": ["--objective", "nce"],
    "softmax": ["--objective", "softmax"],
    "mixed": ["--objective", "softmax", "--augmentation", "spectrogram", "--keep_spectrograms"],
}
BATCH = "--per_device_train_batch_size"
ACCUMULATED = "--gradient_accumulation_steps"
# (objective, number of processes, how the global batch is divided); that is 16, or 48 with three processes.
SPLITS = [
    ("nce", 2, [BATCH, "8"]),
    ("nce", 2, [BATCH, "8", "--shard_bank"]),
    ("nce", 1, [BATCH, "8", ACCUMULATED, "2"]),
    ("nce", 2, [BATCH, "4", ACCUMULATED, "2", "--shard_bank"]),
    ("softmax", 2, [BATCH, "8"]),
    ("softmax", 2, [BATCH, "8", "--shard_bank"]),
    ("nce", 3, [BATCH, "16", "--shard_bank"]),
    ("mixed", 2, [BATCH, "8", "--shard_bank"]),
    ("mixed", 2, [BATCH, "4", ACCUMULATED, "2"]),
]


@pytest.fixture(scope="module")
def ten_steps(sound_folder, tmp_path_factory):
    """Ten steps of every split, and of the whole batch in one process: (objective, processes, split) -> folder."""
    folder, runs = tmp_path_factory.mktemp("steps"), {}
    whole = [(objective, 1, [BATCH, "16"]) for objective in OBJECTIVES]
    for objective, processes, split in [*SPLITS, *whole, ("nce", 1, [BATCH, "16", ACCUMULATED, "3"])]:
        common = [*SMALL, "--corpus", f"audiofolder={sound_folder}", *TEN_STEPS, *OBJECTIVES[objective], *split]
        output_dir = folder / str(len(runs))
        runs[objective, processes, tuple(split)] = [*common, "--output_dir", output_dir]
    for processes in (2, 3):
        together = [options for (_, count, _), options in runs.items() if count == processes]
        output = outputs(group(folder / f"of-{processes}", processes, pretrain_together, together))[0]
        assert output.count(f"{processes} process(es) x") == len(together) and "never trained on" not in output
    with mock.patch.object(torch.nn.BatchNorm2d, "train", stay_in_evaluation):
        for (_, processes, _), options in runs.items():
            if processes == 1:
                log = succeed("train_npid.py", *options)
                assert "1 process(es) x" in log and "never trained on" not in log
    return {key: options[-1] for key, options in runs.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "processes", "split"), SPLITS)
def test_any_split_of_the_global_batch_is_the_same_update(objective, processes, split, ten_steps):
    """Loss, Z, bank and weights after ten steps (four epochs of 40 clips, the last batch of each ragged).

    To rounding, which ten steps amplify: weights that differ by less than 1e-7 after two steps do by up to 2e-5 then.
    """
    run = ten_steps[objective, processes, tuple(split)]
    accumulated = (ACCUMULATED, "3") if processes == 3 else ()
    reference = ten_steps[objective, 1, (BATCH, "16", *accumulated)]
    for name in ("model.safetensors", "memory_bank.safetensors"):
        found, expected = load_file(run / name), load_file(reference / name)
        assert found.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(
                found[key], expected[key], rtol=1e-5, atol=5e-5, msg=lambda m, k=key: f"{k}: {m}"
            )
    losses, expected = ([e["loss"] for e in results_of(f)["history"][1:]] for f in (run, reference))
    assert losses == pytest.approx(expected, rel=5e-5)
    assert results_of(run)["history"][0] == results_of(reference)["history"][0]  # k-NN is global


# Sharded banks, in one process after another


def check_sharded_bank(folder: Path) -> None:
    """In each process of a group: the sharded bank against a whole one."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    keys = torch.randint(256, (70001, 16), dtype=torch.uint8)
    whole, shard = (kind(70001, 6, 0.5, keys, seed=3) for kind in (MemoryBank, ShardedMemoryBank))
    own = slice(shard.first, shard.first + len(shard.vectors))
    assert len(shard) == len(whole) and len(shard.vectors) < 70001 / world + 1
    assert torch.equal(whole.vectors[own], shard.vectors) and torch.equal(keys[own], shard.keys)
    for step in range(3):
        everyones = normalize(torch.randn(world * 5, 6, dtype=torch.float64), dim=-1)
        indices = torch.randint(70001, (world * 5,))
        candidates = torch.cat([indices[:, None], torch.randint(70001, (world * 5, 9))], dim=1)
        mine = slice(rank * 5, rank * 5 + 5)
        for name, arguments in (("similarities", (candidates,)), ("cross_entropy", (indices, 0.1))):
            gradients, values = [], []
            for bank, part in ((whole, slice(None)), (shard, mine)):
                embeddings = everyones[part].clone().requires_grad_()
                value = getattr(bank, name)(embeddings, arguments[0][part], *arguments[1:])
                weights = torch.arange(1.0, 1 + len(everyones), dtype=torch.float64)[part]
                (value.reshape(len(value), -1).square().sum(dim=1) * weights).sum().backward()
                values.append(value.detach())
                gradients.append(embeddings.grad)
            torch.testing.assert_close(values[0][mine], values[1])
            torch.testing.assert_close(gradients[0][mine], gradients[1])
        for bank in (whole, shard):
            bank.update(indices, everyones.float())
            bank.update_normaliser(torch.tensor(2.0 + step, dtype=torch.float64), 0.5)
        assert torch.equal(whole.vectors[own], shard.vectors)
    torch.testing.assert_close(whole.mean_similarity(), shard.mean_similarity())
    shard.save(folder / "shard.safetensors" if rank == 0 else None)
    if rank == 0:
        whole.save(folder / "whole.safetensors")
    dist.barrier()
    again = ShardedMemoryBank.load(folder / "shard.safetensors")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in shard.state_dict().items())
    grown = ShardedMemoryBank(70003, 6, 0.5, torch.cat([keys.flip(0), keys[:2] ^ 1]), seed=9)
    assert grown.take_over(folder / "whole.safetensors") == 70001
    fresh = MemoryBank(70003, 6, seed=9).vectors
    expected = torch.cat([whole.vectors.flip(0), fresh[-2:]])
    assert torch.equal(grown.vectors, expected[grown.first : grown.first + len(grown.vectors)])
    torch.testing.assert_close(grown.Z, whole.Z * 70003 / 70001)
    try:
        ShardedMemoryBank(world - 1)
    except ValueError as error:
        assert "cannot be spread" in str(error) or world == 1
    else:
        raise AssertionError("fewer clips than processes were accepted")
    dist.destroy_process_group()
    print("all is well")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_sharded_bank_is_the_whole_one(processes, tmp_path):
    printed = outputs(group(tmp_path / "logs", processes, check_sharded_bank, tmp_path))
    assert printed == ["all is well\n"] * processes
    assert (tmp_path / "shard.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


# When a process is lost

# With a constant rate a run may become longer, or be told to end earlier, when it goes on.
LONG = ["--num_train_epochs", "10000", "--checkpointing_steps", "5", "--knn_interval", "10000"]
LONG += ["--lr_scheduler_type", "constant"]


@pytest.fixture
def training(sound_folder, tmp_path):
    """Starts two processes of a long run with more options, and waits for its first checkpoint."""
    with contextlib.ExitStack() as running:

        def start(*more) -> list[Forked]:
            options = [
                *SMALL,
                "--corpus",
                f"audiofolder={sound_folder}",
                "--output_dir",
                tmp_path / "run",
                *LONG,
                *more,
            ]
            processes = group(tmp_path / "logs", 2, train, "train_npid.py", options)
            for process in processes:
                running.enter_context(process)
                process.wait_for(lambda: list((tmp_path / "run").glob("checkpoint-*")))
            return processes

        yield start


@pytest.mark.slow
@pytest.mark.parametrize("shard", [[], ["--shard_bank"]])
def test_a_dead_process_stops_the_others(shard, training, tmp_path):
    first, second = training(*shard)
    second.signal(signal.SIGKILL)
    code, output = first.end()
    assert code == 3 and "process 0 stops: another process of this run has died or does not answer" in output
    steps = max(int(path.name.rpartition("-")[2]) for path in (tmp_path / "run").glob("checkpoint-*"))
    (tmp_path / "logs").rename(tmp_path / "earlier_logs")
    processes = training(*shard, "--resume_from_checkpoint", "latest", "--max_train_steps", steps + 2)
    assert re.search("going on from .*checkpoint-", outputs(processes)[0])


@pytest.mark.slow
def test_a_silent_process_is_not_waited_for(training):
    first, second = training("--distributed_timeout", "10")
    second.signal(signal.SIGSTOP)
    code, output = first.end()
    assert code == 3 and "process 0 stops: another process of this run has died or does not answer" in output


@pytest.mark.slow
def test_a_signal_to_one_process_saves_in_all(training):
    first, second = training("--shard_bank")
    second.signal(signal.SIGTERM)
    (code, output), (other_code, other_output) = first.end(), second.end()
    assert code == other_code == 128 + signal.SIGTERM
    assert "SIGTERM: saved; --resume_from_checkpoint latest goes on from here" in output
    assert "Traceback" not in output + other_output


def test_shard_bank_needs_processes(sound_folder, tmp_path):
    options = [*SMALL, "--corpus", f"audiofolder={sound_folder}", "--output_dir", tmp_path / "run", "--shard_bank"]
    assert "--shard_bank" in fail("train_npid.py", *options)


@pytest.mark.parametrize("preset", ["tiny", "densenet_small"])
def test_synchronised_batch_norm_keeps_the_checkpoints_names_and_answers(preset):
    """Only a GPU trains with it; the weights' names must be the same everywhere, and no activation may go missing."""
    from modeling_dls import ESResNetConfig, ESResNetForInstanceDiscrimination
    from modeling_dls.modeling_esresnet import frozen_batch_norm_statistics

    model = ESResNetForInstanceDiscrimination(ESResNetConfig.from_preset(preset)).eval()
    names, picture = list(model.state_dict()), torch.randn(1, 1, 3, 32, 64)
    with torch.no_grad():
        expected = model(picture).embeddings
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted is model and list(model.state_dict()) == names
    norms = [module for module in model.modules() if isinstance(module, torch.nn.SyncBatchNorm)]
    with torch.no_grad():
        torch.testing.assert_close(model(picture).embeddings, expected)
    with frozen_batch_norm_statistics(model):
        assert norms and all(norm.momentum == 0.0 for norm in norms)
