"""The benchmarks measure what they say they measure."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from scripts import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import measuring
import memory
import memory_bank
import readouts
import self_training
import training_step
from measuring import Arm

from dls_training.augmentation import SpectrogramAugmentation
from modeling_dls import ESResNetFeatureExtractor

pytestmark = pytest.mark.benchmark


def sleeping_arms(seconds: float, name: str) -> dict[str, Arm]:
    return {name: Arm(lambda: time.sleep(seconds), 3, "naps", "short" if name == "long" else None)}


def test_arms_take_turns_in_processes_of_their_own():
    arms, seconds = measuring.take_turns([(sleeping_arms, (0.05, "short")), (sleeping_arms, (0.2, "long"))], 3)
    assert {name: len(values) for name, values in seconds.items()} == {"short": 3, "long": 3}
    assert min(seconds["short"]) >= 0.05 and min(seconds["long"]) >= 0.2
    short, long = measuring.summarise(arms, seconds)
    assert short["what"] == "short" and short["unit"] == "naps/s" and "ceiling" not in short
    assert short["rate"] == pytest.approx(3 / short["seconds"])
    assert long["ceiling"] == "short" and 0.1 < long["share_of_ceiling"] < 0.5
    line = measuring.ratio_line("long / short", (a / b for a, b in measuring.paired(seconds, "long", "short")), "< 9")
    assert 2 < line["ratio_min"] <= line["ratio"] <= line["ratio_max"] < 9 and line["reach"] == "< 9"


def test_a_table_says_where_it_comes_from(tmp_path):
    lines = [{"what": "a", **measuring.spread("ratio", [3.0, 1.0, 2.0])}, {"what": "b", "rate": 5.0, "unit": "MiB"}]
    measuring.write_table(tmp_path / "t.csv", lines, measuring.measured_on())
    with open(tmp_path / "t.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["ratio"], first["ratio_min"], first["ratio_max"], first["rate"]) == ("2.0", "1.0", "3.0", "")
    assert second["rate"] == "5.0" and second["torch"] == torch.__version__ and second["commit"] and second["command"]
    text = measuring.markdown(tmp_path / "t.csv", measuring)
    assert "| a | **2 (1–3)** |  |  |" in text and f"torch {torch.__version__}, commit {first['commit']}." in text
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_commands_name_no_place_on_this_machine(tmp_path, monkeypatch):
    words = {
        str(ROOT / "benchmarks" / "memory.py"): "benchmarks/memory.py",
        "--corpus": "--corpus",
        f"esc10={tmp_path}": "esc10=DIR",
        "../shared/data/ESC-10": "DIR",
        "synthetic": "synthetic",
        "30": "30",
    }
    assert [measuring.anywhere(word) for word in words] == list(words.values())
    monkeypatch.chdir(ROOT)
    assert measuring.anywhere("benchmarks/memory.py") == "benchmarks/memory.py"


def test_the_benchmark_itself_stays_small():
    """Where the parent of what is measured is large, so are the peaks of its children."""
    ask = (
        "from measuring import apart, measured_on; apart(measured_on, [()]); import sys; print('torch' in sys.modules)"
    )
    guarded = f"if __name__ == '__main__':\n    {ask}"
    ended = subprocess.run(
        [sys.executable, "-c", guarded], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True
    )
    assert ended.stdout == "False\n"


def test_fresh_processes_answer_and_fail():
    assert measuring.apart(divmod, [(7, 2), (9, 4)]) == [(3, 1), (2, 1)]
    with pytest.raises(ZeroDivisionError):
        measuring.apart(divmod, [(1, 0)])


def test_the_plain_step_computes_the_same_pictures():
    waveform = 0.1 * torch.randn(2, 1, 220500, generator=torch.Generator().manual_seed(0))
    plain, ours = training_step.plain_spectrogram(waveform), ESResNetFeatureExtractor().spectrogram(waveform)
    assert plain.shape == ours.shape == (2, 1, 3, 341, 394)
    # Where bins all but cancel, single precision leaves little: decibels there may differ by tenths.
    assert (plain - ours).abs().mean() < 1e-4 and (plain - ours).abs().max() < 1


def test_arithmetic_is_counted():
    """ResNet-50 alone at this size has 22.8 GFLOP forward and about twice that backward; attention comes on top."""
    assert 3 * 22.8 < training_step.gigaflops_per_clip() < 3.6 * 22.8
    assert 22.8 < training_step.gigaflops_per_clip(backward=False) < 1.2 * 22.8
    assert training_step.gigaflops_per_clip("esresnet18", backward=False) < 1.5


def test_memory_of_children_counts():
    grow = "import sys; held = bytearray(b'x') * (200 << 20); print('ready', flush=True); sys.stdin.read()"
    before = memory.memory_mib(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", grow], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    assert 200 <= memory.memory_mib(os.getpid()) - before < 260
    child.communicate()
    assert memory.memory_mib(child.pid) == 0


def measured(name: str, output: Path, *options) -> list[dict[str, str]]:
    """The lines of a benchmark that is run as a user starts it."""
    command = [sys.executable, ROOT / "benchmarks" / f"{name}.py", *options, "--output", output]
    ended = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
    assert ended.stdout.rstrip().endswith(".") and f"`python benchmarks/{name}.py" in ended.stdout
    with open(output, newline="") as file:
        return list(csv.DictReader(file))


def test_start_up(tmp_path):
    """And --help answers at once."""
    lines = {line["what"]: line for line in measured("start_up", tmp_path / "s.csv", "--rounds", "1")}
    scripts = [name for name in lines if name.endswith("--help")]
    assert len(scripts) == 3 and all(float(lines[name]["seconds"]) < 4 for name in scripts)


def test_the_bank_in_two_processes(tmp_path):
    lines = measured("memory_bank", tmp_path / "b.csv", "--rows", "2000", "400000", "--steps", "1", "--repeats", "1")
    assert len(lines) == 6 and (tmp_path / "b.png").stat().st_size > 10_000
    mib = {(line["processes"], line["bank"]): float(line["bank_mib"]) for line in lines if line["rows"] == "400000"}
    assert mib["1", "whole"] == pytest.approx(400_000 * (4 * 128 + 16) / 2**20, rel=0.1)
    assert mib["2", "sharded"] == pytest.approx(mib["2", "whole"] / 2, rel=0.1)
    header, *rows = memory_bank.rows(lines)
    assert header[0] == "rows" and rows[0][:3] == ["2,000", "1", "whole"]


def test_precisions_picture_ends_where_its_table_does(tmp_path, monkeypatch):
    import precision

    drawn = {}
    monkeypatch.setattr(precision, "draw", lambda path, panels, xlabel: drawn.update(panels))
    lines = measuring.read_table(ROOT / "benchmarks" / "precision.csv")
    precision.picture(lines, tmp_path / "picture.png")
    for title, *cells in precision.rows(lines)[1:]:
        curves, _ = drawn[title.rpartition(",")[0]]
        ends = [(middle[-1], low[-1], high[-1]) for _, _, middle, (low, high) in curves]
        assert cells == [f"{middle:.3f} ({low:.3f}–{high:.3f})" for middle, low, high in ends]


def test_every_augmentation_has_its_picture(tmp_path):
    import augmentation_picture

    shown = augmentation_picture.pictures(3, "tiny")
    clip = shown.pop("the clip")
    alone = [name for names in augmentation_picture.ALONE.values() for name in names]
    assert sorted([*alone, "floor"]) == sorted(vars(SpectrogramAugmentation()))
    assert not any(torch.equal(picture, clip) for picture in shown.values())
    command = [sys.executable, ROOT / "benchmarks" / "augmentation_picture.py", "--preset", "tiny"]
    subprocess.run([str(word) for word in [*command, "--output", tmp_path / "picture.png"]], check=True)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", readouts.readouts())
def test_every_readout_learns(name):
    """Fifty classes that are easily told apart, and a feature that says nothing but is much larger than the others."""
    torch.manual_seed(0)
    labels = torch.arange(readouts.CLASSES).repeat(12)
    features = torch.randn(readouts.CLASSES, 64)[labels] + 0.3 * torch.randn(len(labels), 64)
    features = torch.cat([features, 1000 * torch.randn(len(labels), 1)], dim=1).double()
    train = torch.arange(len(labels)) < 10 * readouts.CLASSES
    found = readouts.readouts()[name](features[train], labels[train], features[~train])
    assert (found == labels[~train]).double().mean() > 0.9


def test_draws_have_the_same_number_of_each_class():
    labels = torch.arange(readouts.CLASSES).repeat(32)
    drawn = readouts.draws(labels)
    assert all(labels[chosen].bincount().tolist() == [readouts.FEW] * readouts.CLASSES for chosen in drawn)
    assert len({tuple(chosen.tolist()) for chosen in drawn}) == readouts.DRAWS


@pytest.mark.parametrize(
    ("name", "labelled", "unlabelled"),
    [
        (self_training.EVERYTHING, [2, 2, 2, 2], [8, 8, 8, 8]),
        (self_training.UNEVEN, [2, 2, 2, 2], [2, 8, 2, 8]),
        (self_training.STRANGE, [2, 0, 2, 0], [8, 8, 8, 8]),
    ],
)
def test_pools_for_self_training(name, labelled, unlabelled):
    labels = torch.arange(4).repeat(10)
    chosen, rest = self_training.pool(name, labels, torch.arange(8, 16))
    assert not set(rest.tolist()) & set(range(8, 16))
    assert labels[chosen].bincount(minlength=4).tolist() == labelled and labels[rest].bincount().tolist() == unlabelled


@pytest.mark.parametrize("name", sorted(path.stem for path in Path(ROOT, "benchmarks").glob("*.py")))
def test_every_benchmark_explains_itself(name):
    if name == "measuring":
        return
    ended = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert ended.stdout.startswith("usage:") and ("--output" in ended.stdout) == (name != "run_all")


def test_the_gpu_benchmark_in_miniature(tmp_path):
    """The same code on the processor, with a small network: each step has its rate and its share of the product."""
    options = ["--device", "cpu", "--preset", "tiny", "--clips", "4", "--matrix", "256", "--rounds", "1", "--output"]
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", *options, tmp_path / "gpu" / "step.csv"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    with open(tmp_path / "gpu" / "step.csv", newline="") as file:
        lines = {line["what"]: line for line in csv.DictReader(file)}
    steps = [
        name for p in ("fp32", "bf16") for name in (f"step in {p}", f"step in {p}, share of the {p} matrix product")
    ]
    assert list(lines) == [*steps, "fp32 matrix product", "bf16 matrix product"]
    assert (
        float(lines["step in bf16"]["rate"]) > 0
        and float(lines["step in fp32, share of the fp32 matrix product"]["ratio"]) > 0
    )
    assert "| step in fp32 |" in printed
