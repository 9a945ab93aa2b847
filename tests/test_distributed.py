"""Several processes on this machine (gloo): one bank, one mathematics, and no process that waits for a dead one."""

import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scripts import ROOT, SMALL, start

ON_CPU = {"ACCELERATE_USE_CPU": "true"}


def torchrun(processes: int) -> list:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes]
    return [*launcher, "--master_port", port]


def finish(process, timeout=300) -> tuple[int, str]:
    output = process.communicate(timeout=timeout)[0]
    return process.returncode, output


def run(processes: int, script, *options, timeout=300) -> str:
    process = start([*torchrun(processes), script, *options], env=ON_CPU)
    code, output = finish(process, timeout)
    assert code == 0, output
    return output


def results_of(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text())


# The same mathematics

STEPS = Path(__file__).with_name("distributed_steps.py")
TEN_STEPS = [
    "--max_train_steps", "10", "--knn_interval", "9", "--mixed_precision", "no", "--learning_rate", "0.01",
    "--lr_scheduler_type", "constant", "--nce_k", "8",
]  # fmt: skip
OBJECTIVES = {
    "nce": ["--objective", "nce"],
    "softmax": ["--objective", "softmax"],
    "mixed": ["--objective", "softmax", "--augmentation", "spectrogram", "--keep_spectrograms"],
}


@pytest.fixture(scope="module")
def one_process(sound_folder, tmp_path_factory):
    """Ten steps of batch 16 in one process, for each objective: {objective: folder}."""
    folders = {}
    for objective, words in OBJECTIVES.items():
        folders[objective] = tmp_path_factory.mktemp("one") / objective
        common = [*SMALL, "--corpus", f"audiofolder={sound_folder}", *TEN_STEPS, *words]
        batch = ["--per_device_train_batch_size", "16"]
        run(1, STEPS, *common, *batch, "--output_dir", folders[objective])
    return folders


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "processes", "split"),
    [
        ("nce", 2, ["--per_device_train_batch_size", "8"]),
        ("nce", 2, ["--per_device_train_batch_size", "8", "--shard_bank"]),
        ("nce", 1, ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2"]),
        ("nce", 2, ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--shard_bank"]),
        ("softmax", 2, ["--per_device_train_batch_size", "8"]),
        ("softmax", 2, ["--per_device_train_batch_size", "8", "--shard_bank"]),
        ("nce", 3, ["--per_device_train_batch_size", "16", "--shard_bank"]),
        ("mixed", 2, ["--per_device_train_batch_size", "8", "--shard_bank"]),
        ("mixed", 2, ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]),
    ],
)
def test_any_split_of_the_global_batch_is_the_same_update(
    objective, processes, split, one_process, sound_folder, tmp_path
):
    """Loss, Z, bank and weights after ten steps (four epochs of 40 clips, the last batch of each ragged).

    To rounding, which ten steps amplify: weights that differ by less than 1e-7 after two steps do by up to 2e-5 then.
    """
    common = [*SMALL, "--corpus", f"audiofolder={sound_folder}", *TEN_STEPS, *OBJECTIVES[objective], *split]
    reference = one_process[objective]
    if processes == 3:  # a global batch of 48: against three batches of 16, accumulated
        reference = tmp_path / "one"
        accumulated = ["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "3"]
        run(1, STEPS, *common[: -len(split)], *accumulated, "--output_dir", reference)
    log = run(processes, STEPS, *common, "--output_dir", tmp_path / "run")
    assert f"{processes} process(es) x" in log and "never trained on" not in log
    for name in ("model.safetensors", "memory_bank.safetensors"):
        found, expected = load_file(tmp_path / "run" / name), load_file(reference / name)
        assert found.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(
                found[key], expected[key], rtol=1e-5, atol=5e-5, msg=lambda m, k=key: f"{k}: {m}"
            )
    losses, expected = ([e["loss"] for e in results_of(f)["history"][1:]] for f in (tmp_path / "run", reference))
    assert losses == pytest.approx(expected, rel=5e-5)
    before, start_of = results_of(tmp_path / "run")["history"][0], results_of(reference)["history"][0]
    assert before == start_of  # k-NN is global


# Sharded banks, in one process after another

BANK_CHECK = """
import sys
import torch
import torch.distributed as dist
from torch.nn.functional import normalize
from dls_training.memory_bank import MemoryBank
from dls_training.sharded_bank import ShardedMemoryBank

dist.init_process_group("gloo")
rank, world, folder = dist.get_rank(), dist.get_world_size(), sys.argv[1]
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
shard.save(folder + "/shard.safetensors" if rank == 0 else None)
if rank == 0:
    whole.save(folder + "/whole.safetensors")
dist.barrier()
again = ShardedMemoryBank.load(folder + "/shard.safetensors")
assert all(torch.equal(again.state_dict()[name], value) for name, value in shard.state_dict().items())
grown = ShardedMemoryBank(70003, 6, 0.5, torch.cat([keys.flip(0), keys[:2] ^ 1]), seed=9)
assert grown.take_over(folder + "/whole.safetensors") == 70001
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
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_sharded_bank_is_the_whole_one(processes, tmp_path):
    (tmp_path / "check.py").write_text(BANK_CHECK)
    process = start([*torchrun(processes), tmp_path / "check.py", tmp_path], env={"PYTHONPATH": str(ROOT)})
    code, output = finish(process)
    assert code == 0 and output.count("all is well") == processes, output
    assert (tmp_path / "shard.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


# When a process is lost


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def workers(process, log: Path) -> list[int]:
    """The training processes, once training goes on."""
    while not list(log.glob("checkpoint-*")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    found = {}
    for child in children(process.pid):
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = [entry[5:] for entry in environment if entry.startswith(b"RANK=")]
        if rank:
            found[int(rank[0])] = child
    assert sorted(found) == [0, 1]
    return [found[0], found[1]]


# With a constant rate a run may become longer, or be told to end earlier, when it goes on.
LONG = ["--num_train_epochs", "10000", "--checkpointing_steps", "5", "--knn_interval", "10000"]
LONG += ["--lr_scheduler_type", "constant"]


@pytest.mark.slow
@pytest.mark.parametrize("shard", [[], ["--shard_bank"]])
def test_a_dead_process_stops_the_others(shard, sound_folder, tmp_path):
    common = [*SMALL, "--corpus", f"audiofolder={sound_folder}", "--output_dir", tmp_path / "run", *shard]
    process = start([*torchrun(2), ROOT / "train_npid.py", *common, *LONG], env=ON_CPU)
    os.kill(workers(process, tmp_path / "run")[1], signal.SIGKILL)
    code, output = finish(process, timeout=60)
    assert code != 0 and "process 0 stops: another process of this run has died or does not answer" in output
    steps = max(int(path.name.rpartition("-")[2]) for path in (tmp_path / "run").glob("checkpoint-*"))
    resume = ["--resume_from_checkpoint", "latest", "--max_train_steps", steps + 2]
    log = run(2, ROOT / "train_npid.py", *common, *LONG, *resume)
    assert re.search("going on from .*checkpoint-", log)


@pytest.mark.slow
def test_a_silent_process_is_not_waited_for(sound_folder, tmp_path):
    common = [*SMALL, "--corpus", f"audiofolder={sound_folder}", "--output_dir", tmp_path / "run"]
    options = [*common, *LONG, "--distributed_timeout", "5"]
    process = start([*torchrun(2), ROOT / "train_npid.py", *options], env=ON_CPU)
    silent = workers(process, tmp_path / "run")[1]
    os.kill(silent, signal.SIGSTOP)
    try:
        started = time.monotonic()
        while process.poll() is None and time.monotonic() - started < 60:
            if not any(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children(process.pid) if pid != silent):
                break
            time.sleep(0.2)
    finally:
        os.kill(silent, signal.SIGCONT)
    code, output = finish(process, timeout=60)
    assert code != 0 and "process 0 stops: another process of this run has died or does not answer" in output


@pytest.mark.slow
def test_a_signal_to_one_process_saves_in_all(sound_folder, tmp_path):
    common = [*SMALL, "--corpus", f"audiofolder={sound_folder}", "--output_dir", tmp_path / "run", "--shard_bank"]
    process = start([*torchrun(2), ROOT / "train_npid.py", *common, *LONG], env=ON_CPU)
    os.kill(workers(process, tmp_path / "run")[1], signal.SIGTERM)
    code, output = finish(process, timeout=60)
    assert code != 0 and "SIGTERM: saved; --resume_from_checkpoint latest goes on from here" in output
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in output


def test_shard_bank_needs_processes(sound_folder, tmp_path):
    options = [*SMALL, "--corpus", f"audiofolder={sound_folder}", "--output_dir", tmp_path / "run", "--shard_bank"]
    code, output = finish(start([sys.executable, ROOT / "train_npid.py", *options]))
    assert code == 2 and "--shard_bank" in output.splitlines()[-1]


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
