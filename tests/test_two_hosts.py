"""Two hosts, as two network namespaces that a cable joins: a run over both, and what becomes of it when it is cut.

Needs root and `ip` (Debian: apt-get install iproute2); `make test-hosts` runs it.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from scripts import ROOT, SMALL, start
from sound_networks import save

from modeling_dls import ESResNetForAudioClassification

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and iproute2"),
]
ADDRESSES = {"dls-host-0": "10.213.0.1", "dls-host-1": "10.213.0.2"}
CABLE = "dls-cable"  # what the network device is called in both
TIMEOUT = 20
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def on(host: str, *words) -> list:
    return ["ip", "netns", "exec", host, *words]


@pytest.fixture(scope="module")
def hosts():
    with contextlib.ExitStack() as stack:
        for host in ADDRESSES:
            ip("netns", "add", host)
            stack.callback(ip, "netns", "del", host)
        first, second = ADDRESSES
        ip("link", "add", CABLE, "netns", first, "type", "veth", "peer", "name", CABLE, "netns", second)
        for host, address in ADDRESSES.items():
            ip("-n", host, "address", "add", f"{address}/24", "dev", CABLE)
            for device in ("lo", CABLE):
                ip("-n", host, "link", "set", device, "up")
        yield list(ADDRESSES)


def on_both(hosts: list[str], *script) -> list[subprocess.Popen]:
    """Starts a script on each host, as a user does who follows docs/scaling.md."""
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": CABLE}
    meeting = ["--master_addr", ADDRESSES[hosts[0]], "--master_port", "29517"]
    return [
        start(on(host, *TORCHRUN, "--node_rank", rank, *meeting, *script), env=environment, cwd=ROOT)
        for rank, host in enumerate(hosts)
    ]


def outputs(processes: list[subprocess.Popen], code: int = 0) -> list[str]:
    """What both printed; they must have ended with this code."""
    printed = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [code, code], "\n".join(printed)
    return printed


def test_a_run_over_two_hosts_survives_a_cut_cable(hosts, sound_folder, tmp_path):
    common = [
        ROOT / "train_npid.py", *SMALL, "--corpus", f"audiofolder={sound_folder}", "--shard_bank", "--nce_k", "8",
        "--knn_interval", "100", "--checkpointing_steps", "5", "--distributed_timeout", TIMEOUT,
        "--lr_scheduler_type", "constant", "--output_dir",
    ]  # fmt: skip
    run = tmp_path / "run"
    cut = on_both(hosts, *common, run, "--num_train_epochs", "10000")
    while not list(run.glob("checkpoint-*")):
        assert all(process.poll() is None for process in cut), cut[0].stdout.read()
        time.sleep(0.05)
    ip("-n", hosts[0], "link", "set", CABLE, "down")
    since = time.monotonic()
    try:
        for rank, output in enumerate(outputs(cut, 1)):  # torchrun's; it prints the script's own
            assert f"process {rank} stops: another process of this run has died or does not answer" in output
            assert "exitcode  : 3" in output
        assert time.monotonic() - since < 3 * TIMEOUT
    finally:
        ip("-n", hosts[0], "link", "set", CABLE, "up")
    steps = max(int(path.name.rpartition("-")[2]) for path in run.glob("checkpoint-*")) + 7
    ends = ["--max_train_steps", steps]
    resumed = outputs(on_both(hosts, *common, run, *ends, "--resume_from_checkpoint", "latest"))
    assert "2 process(es) x" in resumed[0] and "going on from" in resumed[0]
    outputs(on_both(hosts, *common, tmp_path / "whole", *ends))
    for name in ("model.safetensors", "memory_bank.safetensors"):
        found, expected = load_file(run / name), load_file(tmp_path / "whole" / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found), name


def test_one_table_of_predictions_from_two_hosts(hosts, sound_folder, tmp_path):
    model = save(ESResNetForAudioClassification, tmp_path / "model")
    predict = ["-m", "dls_sounds", "predict", sound_folder, "--model", model, "--mixed_precision", "no", "--output"]
    outputs(on_both(hosts, *predict, tmp_path / "together.csv"))
    alone = start([sys.executable, *predict, tmp_path / "alone.csv"], cwd=ROOT)
    assert alone.wait(timeout=240) == 0, alone.stdout.read()
    together = (tmp_path / "together.csv").read_text().splitlines()
    assert len(together) > 40 and together == (tmp_path / "alone.csv").read_text().splitlines()
