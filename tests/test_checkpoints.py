"""Writing that never leaves half a file, and going on from what was written."""

import copy
import json
import logging
import os
import pickle
import resource
import signal
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from scripts import MEASURED, Forked
from torch.utils.data import DataLoader

from datasets_scripts.errors import Interrupted, LostProcess, UserError
from datasets_scripts.files import (
    file_digest,
    files_moved_into_place,
    folder_moved_into_place,
    json_digest,
    write_json,
)
from dls_training.checkpoints import (
    STATE_FILE,
    TENSOR_FILE,
    Progress,
    checkpoint_number,
    claim_output_dir,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from dls_training.input_pipeline import ShuffledClips
from dls_training.loop import TrainingLoop
from dls_training.record import RECORD_FILE, Record
from dls_training.runtime import ends_with_the_others

MODEL_FILE = "model.bin"


def save(folder, step, limit=100, content=b"weights", **progress):
    def save_model(checkpoint):
        (checkpoint / MODEL_FILE).write_bytes(content)

    state = {"optimizer": {"step": step}}
    save_checkpoint(folder, Progress(step=step, **progress), save_model, state, Record(), limit)
    return folder / f"checkpoint-{step}"


def tree(folder):
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Moved into place


def test_folder_appears_only_when_it_is_complete(tmp_path):
    final = tmp_path / "new" / "model"
    with folder_moved_into_place(final) as folder:
        (folder / "a").write_text("1")
        assert not final.exists()
        assert folder.stat().st_dev == final.parent.stat().st_dev  # or the move would copy
    assert tree(final) == {"a": b"1"}
    assert names(final.parent) == ["model"]
    # As readable as any folder, which temporary ones are not.
    (tmp_path / "plain").mkdir()
    assert final.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_folder_replaces_the_old_one_whole(tmp_path):
    final = tmp_path / "model"
    for content in ("a", "b"):
        with folder_moved_into_place(final) as folder:
            (folder / content).write_text(content)
    assert tree(final) == {"b": b"b"} and names(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_folder_that_fails_leaves_the_old_one_and_nothing_else(tmp_path, error):
    final = tmp_path / "model"
    with folder_moved_into_place(final) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(UserError if error is OSError else error), folder_moved_into_place(final) as folder:
        (folder / "a").write_text("new")
        raise error("half way")
    assert tree(final) == {"a": b"old"} and names(tmp_path) == ["model"]


def test_files_join_the_folder_only_when_all_are_written(tmp_path):
    with files_moved_into_place(tmp_path / "runs") as folder:
        (folder / "a").write_text("1")
        (folder / "b").write_text("1")
        assert not (tmp_path / "runs" / "a").exists()
    (tmp_path / "runs" / "kept").write_text("kept")
    with files_moved_into_place(tmp_path / "runs") as folder:
        (folder / "b").write_text("2")
    assert tree(tmp_path / "runs") == {"a": b"1", "b": b"2", "kept": b"kept"}
    assert names(tmp_path / "runs") == ["a", "b", "kept"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_files_that_fail_leave_the_old_ones_and_nothing_else(tmp_path, error):
    (tmp_path / "a").write_text("old")
    with pytest.raises(UserError if error is OSError else error), files_moved_into_place(tmp_path) as folder:
        (folder / "a").write_text("new")
        (folder / "b").write_text("new")
        raise error("half way")
    assert tree(tmp_path) == {"a": b"old"} and names(tmp_path) == ["a"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_what_is_written_can_be_read_by_whom_the_umask_lets(umask, mode, tmp_path):
    """Safetensors' own files are for their owner alone."""
    before = os.umask(umask)
    try:
        with files_moved_into_place(tmp_path) as folder:
            save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
        with folder_moved_into_place(tmp_path / "checkpoint") as folder:
            save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    finally:
        os.umask(before)
    for path in (tmp_path / "model.safetensors", tmp_path / "checkpoint" / "model.safetensors"):
        assert path.stat().st_mode & 0o777 == mode


def test_write_json(tmp_path):
    write_json(tmp_path / "a.json", {"café": [1, None]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"café": [1, None]}
    assert text.endswith("}\n") and "café" in text


# Saving


def test_checkpoint_round_trip(tmp_path):
    progress = Progress(4, 123, 2, 6.5, 32, 78.9, [{"epoch": 1, "loss": 0.1, "knn_accuracy": {"esc10": 0.5}}])
    state = {"momentum": torch.randn(3), "lr": 0.1}
    torch.manual_seed(5)
    save_checkpoint(
        tmp_path, progress, lambda folder: None, {"optimizer": state, "scheduler": {"last": 3}}, Record(), 2
    )
    expected = torch.rand(4)
    torch.manual_seed(99)
    again, tensors = load_checkpoint(tmp_path / "checkpoint-123")
    assert again == progress and asdict(again) == asdict(progress)
    assert torch.equal(torch.rand(4), expected)  # the random state went on
    assert set(tensors) == {"optimizer", "scheduler"} and tensors["scheduler"] == {"last": 3}
    assert torch.equal(tensors["optimizer"]["momentum"], state["momentum"])


def test_rotation_keeps_the_newest_by_number_and_what_is_not_a_checkpoint(tmp_path):
    for other in ("checkpoint-best", "checkpoint-", "checkpoint-1a", "logs"):
        (tmp_path / other).mkdir()
    (tmp_path / "checkpoint-notes.txt").write_text("mine")
    others = names(tmp_path)
    for step in (8, 9, 10, 100):
        save(tmp_path, step, limit=2)
    assert names(tmp_path) == sorted([*others, "checkpoint-10", "checkpoint-100"])


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_rotation_after_going_on_from_an_earlier_checkpoint_keeps_what_it_wrote(tmp_path, limit):
    for step in (5, 10, 15):
        save(tmp_path, step)
    # 10 and 15 belong to a continuation that was given up, or cannot be read.
    save(tmp_path, 6, limit=limit)
    kept = {1: [6], 2: [5, 6], 3: [5, 6, 15]}[limit]
    assert sorted(checkpoint_number(path) for path in tmp_path.iterdir()) == kept


def test_the_old_checkpoint_goes_only_when_the_new_one_is_there(tmp_path, monkeypatch):
    seen = []
    remove = __import__("shutil").rmtree

    def watch(path, *arguments, **options):
        if Path(path).name.startswith("checkpoint-"):
            seen.append((Path(path).name, find_checkpoint("latest", tmp_path).name))
        remove(path, *arguments, **options)

    save(tmp_path, 1, limit=1)
    monkeypatch.setattr("dls_training.checkpoints.shutil.rmtree", watch)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(tmp_path, Progress(step=2), lambda folder: 1 / 0, {}, Record(), 1)
    assert not seen and names(tmp_path) == ["checkpoint-1"]
    save(tmp_path, 2, limit=1)
    assert seen == [("checkpoint-1", "checkpoint-2")] and names(tmp_path) == ["checkpoint-2"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    save(tmp_path, 3, content=b"old", limit=1)
    save(tmp_path, 3, content=b"newer", limit=1)
    assert (tmp_path / "checkpoint-3" / MODEL_FILE).read_bytes() == b"newer"
    assert names(tmp_path) == ["checkpoint-3"] and find_checkpoint("latest", tmp_path) is not None


def test_saving_below_a_file_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"checkpoint-1 cannot be written \((Not a directory|File exists)\)"):
        save(tmp_path / "file", 1)
    with pytest.raises(UserError, match="file cannot be written"), files_moved_into_place(tmp_path / "file"):
        pass
    assert tree(tmp_path) == {"file": b"in the way"}


def save_on_a_full_disk(folder: Path) -> None:
    """Whatever is large, and whoever writes it; prints the messages."""
    large = {"tensor": torch.zeros(100_000)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    def save_with(write=lambda path: None, tensors=None):
        save_checkpoint(folder, Progress(step=2), write, tensors or {}, Record(), 1)

    def save_results():
        with files_moved_into_place(folder) as temporary:
            save_file(large, temporary / "model.bin")

    for save_something in (
        lambda: save_with(tensors={"optimizer": large}),
        lambda: save_with(lambda path: save_file(large, path / "model")),
        lambda: save_with(lambda path: (path / "text").write_text("a" * 200_000)),
        save_results,
    ):
        try:
            save_something()
        except UserError as error:
            print(error)


def test_full_disk(tmp_path):
    run = tmp_path / "run"
    save(run, 1)
    (run / MODEL_FILE).write_text("final")
    before = tree(run)
    with Forked(tmp_path / "log", save_on_a_full_disk, run) as process:
        code, output = process.end()
    assert code == 0, output
    messages = output.splitlines()
    assert len(messages) == 4 and all("cannot be written (" in message for message in messages), messages
    assert all("checkpoint-2" in message and "is intact" in message for message in messages[:3])
    assert str(run) in messages[3]
    assert tree(run) == before and names(run) == ["checkpoint-1", MODEL_FILE]
    assert find_checkpoint("latest", run).name == "checkpoint-1"
    assert load_checkpoint(run / "checkpoint-1")[0].step == 1


def test_the_limit_of_this_process_is_left_alone():
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


# Finding


def test_no_choice_starts_from_the_beginning(tmp_path):
    save(tmp_path, 1)
    assert find_checkpoint(None, tmp_path) is None


def test_latest_is_the_highest_number(tmp_path):
    for step in (9, 10, 2):
        save(tmp_path, step)
    assert find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize("folder", ["", "missing"])
def test_latest_of_none(tmp_path, folder):
    assert find_checkpoint("latest", tmp_path / folder) is None


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_text(path, old, new):
    path.write_text(path.read_text().replace(old, new))


DAMAGE = {
    "missing model": lambda folder: (folder / MODEL_FILE).unlink(),
    "missing tensors": lambda folder: (folder / TENSOR_FILE).unlink(),
    "missing state": lambda folder: (folder / STATE_FILE).unlink(),
    "truncated model": lambda folder: (folder / MODEL_FILE).write_bytes(b"wei"),
    "truncated tensors": lambda folder: os.truncate(folder / TENSOR_FILE, 100),
    "a flipped bit": lambda folder: flip_a_bit(folder / MODEL_FILE),
    "a flipped bit in tensors": lambda folder: flip_a_bit(folder / TENSOR_FILE),
    "a flipped bit in the record": lambda folder: flip_a_bit(folder / RECORD_FILE),
    "another step": lambda folder: replace_text(folder / STATE_FILE, '"batches": 0', '"batches": 1'),
    "truncated state": lambda folder: os.truncate(folder / STATE_FILE, 50),
    "empty state": lambda folder: os.truncate(folder / STATE_FILE, 0),
    "zeros for a state": lambda folder: (folder / STATE_FILE).write_bytes(bytes(500)),
    "no text": lambda folder: (folder / STATE_FILE).write_bytes(b"\xff\xfe\x80"),
    "a list": lambda folder: (folder / STATE_FILE).write_text("[]"),
    "a number": lambda folder: (folder / STATE_FILE).write_text("7"),
    "null": lambda folder: (folder / STATE_FILE).write_text("null"),
    "no files": lambda folder: (folder / STATE_FILE).write_text("{}"),
    "a list of files": lambda folder: (folder / STATE_FILE).write_text('{"files": ["a"]}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_incomplete_checkpoint_is_skipped_and_named(tmp_path, damage, caplog):
    for step in (1, 2, 3):
        save(tmp_path, step)
    DAMAGE[damage](tmp_path / "checkpoint-3")
    with caplog.at_level(logging.WARNING, logger="dls"):
        assert find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-2"
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'checkpoint-3'} is incomplete or damaged, and skipped"
    ]
    with pytest.raises(UserError, match="checkpoint-3 is not a complete checkpoint"):
        find_checkpoint(str(tmp_path / "checkpoint-3"), tmp_path)
    for step in (1, 2):
        DAMAGE[damage](tmp_path / f"checkpoint-{step}")
    assert find_checkpoint("latest", tmp_path) is None


def test_a_named_folder(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    assert find_checkpoint(str(tmp_path / "checkpoint-1"), tmp_path / "elsewhere") == tmp_path / "checkpoint-1"
    for bad in (tmp_path, tmp_path / "checkpoint-7", tmp_path / "checkpoint-1" / MODEL_FILE):
        with pytest.raises(UserError, match=r"--resume_from_checkpoint .* is not a complete checkpoint"):
            find_checkpoint(str(bad), tmp_path)


@pytest.mark.parametrize(
    ("name", "number"),
    [("checkpoint-12", 12), ("checkpoint-0", 0), ("checkpoint-", -1), ("checkpoint--3", -1), ("checkpoint-²", -1),
     ("checkpoint-best", -1), ("12", -1), (".checkpoint-12", -1)],
)  # fmt: skip
def test_checkpoint_number(name, number):
    assert checkpoint_number(Path("/runs") / name) == number


# Loading


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def redeclare(folder):
    """The checkpoint's digests are made to agree with its files."""
    state = json.loads((folder / STATE_FILE).read_text())
    state = {"progress": state["progress"], "files": {name: file_digest(folder / name) for name in state["files"]}}
    write_json(folder / STATE_FILE, state | {"digest": json_digest(state)})


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_no_code_in_a_checkpoint_is_run(tmp_path, form):
    folder, trace = save(tmp_path, 1), tmp_path / "executed"
    payload = {"optimizer": Malicious(trace), "random": torch.get_rng_state()}
    if form == "torch":
        torch.save(payload, folder / TENSOR_FILE)
    else:
        (folder / TENSOR_FILE).write_bytes(pickle.dumps(payload, protocol=2))
    redeclare(folder)
    assert find_checkpoint("latest", tmp_path) == folder
    with pytest.raises(UserError, match=f"{TENSOR_FILE} is damaged, or is not what a training run wrote"):
        load_checkpoint(folder)
    assert not trace.exists()
    # The payload would have worked.
    if form == "torch":
        torch.load(folder / TENSOR_FILE, weights_only=False)
    else:
        pickle.loads((folder / TENSOR_FILE).read_bytes())
    assert trace.exists()


@pytest.mark.parametrize("content", [b"", b"damaged", b"PK\x03\x04 damaged", {"optimizer": {}}, [1]])
def test_tensors_that_cannot_be_read_are_named(tmp_path, content):
    folder = save(tmp_path, 1)
    path = folder / TENSOR_FILE
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    redeclare(folder)
    with pytest.raises(UserError, match=f"{TENSOR_FILE} is damaged"):
        load_checkpoint(folder)


# The output folder


def claim(folder, resuming=False):
    with claim_output_dir(SimpleNamespace(is_main_process=True), folder, resuming):
        pass


def test_claim_makes_the_folder(tmp_path):
    claim(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir() and not names(tmp_path / "a" / "b")


def test_only_the_main_process_claims(tmp_path):
    with claim_output_dir(SimpleNamespace(is_main_process=False), tmp_path / "a", False):
        pass
    assert not (tmp_path / "a").exists()


def test_claim_refuses_a_file_and_what_is_below_one(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"--output_dir .*file is a file"):
        claim(tmp_path / "file")
    with pytest.raises(UserError, match=r"--output_dir .*below cannot be written: Not a directory"):
        claim(tmp_path / "file" / "below")


@pytest.mark.parametrize("earlier", ["checkpoint-5", "fold-1", "all_results.json"])
def test_claim_refuses_an_earlier_run_unless_it_goes_on(tmp_path, earlier):
    (tmp_path / "logs").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    claim(tmp_path)  # what is not a run is no matter
    (tmp_path / earlier).mkdir()
    before = names(tmp_path)
    with pytest.raises(UserError, match=f"holds an earlier run \\({earlier}\\).*--resume_from_checkpoint latest"):
        claim(tmp_path)
    claim(tmp_path, resuming=True)
    assert names(tmp_path) == before


def test_claim_clears_what_a_killed_run_left(tmp_path):
    save(tmp_path, 1)
    save(tmp_path / "fold-1", 1)
    for leftover in (".checkpoint-2.abc", ".unfinished.abc", "fold-1/.checkpoint-2.abc", "fold-1/.unfinished.abc"):
        (tmp_path / leftover / "checkpoint-2").mkdir(parents=True)
        (tmp_path / leftover / "checkpoint-2" / MODEL_FILE).write_text("half")
    (tmp_path / ".hidden").mkdir()
    claim(tmp_path, resuming=True)
    assert names(tmp_path) == [".hidden", "checkpoint-1", "fold-1"]
    assert names(tmp_path / "fold-1") == ["checkpoint-1"]


def die_while_saving(folder: Path) -> None:
    def die(checkpoint):
        (checkpoint / MODEL_FILE).write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    save_checkpoint(folder, Progress(step=2), die, {}, Record(), 1)


def test_a_run_killed_while_it_saves_can_go_on(tmp_path):
    run = tmp_path / "run"
    save(run, 1)
    with Forked(tmp_path / "log", die_while_saving, run) as process:
        assert process.end()[0] == -signal.SIGKILL
    assert any(name.startswith(".checkpoint-2.") for name in names(run))
    claim(run, resuming=True)
    assert names(run) == ["checkpoint-1"]
    assert find_checkpoint("latest", run) == run / "checkpoint-1"


def test_one_run_at_a_time(tmp_path):
    leftover = tmp_path / ".checkpoint-2.abc"
    with claim_output_dir(SimpleNamespace(is_main_process=True), tmp_path, False):
        leftover.mkdir()  # as while it saves
        with pytest.raises(UserError, match=r"--output_dir .* is in use by another run"):
            claim(tmp_path, resuming=True)
        assert leftover.is_dir()
    claim(tmp_path, resuming=True)
    assert not names(tmp_path)


def test_a_killed_run_holds_nothing_though_its_processes_live_on(tmp_path):
    living, writing = os.pipe()
    if not (process := os.fork()):
        with claim_output_dir(SimpleNamespace(is_main_process=True), tmp_path, False):
            if os.fork() == 0:  # as those that compute or decode
                os.write(writing, b"lives")
                time.sleep(10)
                os._exit(0)
            os.read(living, 5)
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    claim(tmp_path)


def test_a_killed_decoding_process_is_said():
    class Killed(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, _):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(LostProcess, match=r"a decoding process has died .*lower --dataloader_num_workers"):
        ends_with_the_others()(list)(torch.utils.data.DataLoader(Killed(), num_workers=1))


# The loop's own use of it


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, key):
        return {"index": key[1], "x": torch.randn(3, 1, 1, generator=torch.Generator().manual_seed(key[1]))}


class Network(torch.nn.Conv2d):
    @property
    def base_model(self):
        return self


class Run:
    """A tiny training run in a folder, which goes on from the latest checkpoint there.

    Attributes:
        loop: Of 12 clips in batches of 4: three steps an epoch.
        seen: The clips of each step that this run took.
    """

    def __init__(self, folder, optimizer="sgd", stop_after=None, fail_in_epoch=None, scaled=False, **changes):
        settings = {
            "seed": 0, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "optimizer": optimizer,
            "learning_rate": 0.1, "weight_decay": 0.01, "lr_scheduler_type": "linear", "clip_seconds": 1.0,
            "audio_channels": 1, "num_train_epochs": 2, "max_train_steps": None, "checkpointing_steps": "epoch",
            "checkpoints_total_limit": 1, "augmentation": "waveform", "augmentation_strength": 1.0,
            "warmup_steps": 0, "keep_spectrograms": False,
            "memory_format": "auto", "num_threads": 1,
        }  # fmt: skip
        self.stop_after, self.fail_in_epoch, self.seen = stop_after, fail_in_epoch, []
        torch.manual_seed(0)
        self.model = Network(3, 2, 1)
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2) if scaled else None
        self.scaler = accelerator.scaler
        checkpoint = find_checkpoint("latest", folder)
        if checkpoint:
            self.model.load_state_dict(torch.load(checkpoint / MODEL_FILE))
        self.loop = TrainingLoop(
            SimpleNamespace(**settings | changes), accelerator, self.model,
            DataLoader(Rows(), 4, sampler=ShuffledClips(12, 4, 0)),
            lambda path: torch.save(self.model.state_dict(), path / MODEL_FILE), folder, checkpoint, Record(),
        )  # fmt: skip

    def step(self, batch):
        self.seen.append(batch.batches[0]["index"].tolist())
        if batch.step + 1 == self.stop_after:
            os.kill(os.getpid(), signal.SIGINT)
        return self.loop.optimize(batch, lambda n: self.model(batch.batches[n]["x"]).square().sum((1, 2, 3)))

    def evaluate(self, epoch, is_last):
        if epoch == self.fail_in_epoch:
            raise InterruptedError("killed while it evaluated")
        return {"score": self.model.weight.sum().item(), "is_last": is_last}

    def train(self):
        self.loop.train(self.step, self.evaluate)
        return self

    def outcome(self):
        """Weights, and the history without what a clock measured."""
        history = [{k: v for k, v in e.items() if k not in MEASURED} for e in self.loop.progress.history]
        return [parameter.tolist() for parameter in self.model.parameters()], history


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_run_that_is_stopped_at_each_step_ends_where_one_that_never_stopped_does(tmp_path, optimizer):
    whole = Run(tmp_path / "whole", optimizer).train()
    assert [entry["step"] for entry in whole.loop.progress.history] == [3, 6]
    seen = []
    for step in range(1, 7):  # the last one included: its epoch's evaluation is still to do then
        run = Run(tmp_path / "parts", optimizer, stop_after=step)
        with pytest.raises(Interrupted, match="SIGINT"):
            run.train()
        seen += run.seen
    last = Run(tmp_path / "parts", optimizer).train()
    assert not last.seen and seen == whole.seen
    assert last.outcome() == whole.outcome()
    assert names(tmp_path / "parts") == ["checkpoint-6"]
    # Once more changes nothing.
    again = Run(tmp_path / "parts", optimizer).train()
    assert not again.seen and again.outcome() == whole.outcome()


@pytest.mark.parametrize("changes", [{}, {"checkpointing_steps": 1}, {"max_train_steps": 5}])
@pytest.mark.parametrize("epoch", [1, 2])
def test_run_that_dies_while_it_evaluates_can_go_on(tmp_path, changes, epoch):
    whole = Run(tmp_path / "whole", **changes).train()
    with pytest.raises(InterruptedError):
        Run(tmp_path / "parts", fail_in_epoch=epoch, **changes).train()
    assert Run(tmp_path / "parts", **changes).train().outcome() == whole.outcome()


def test_run_that_ended_within_an_epoch_goes_on_with_more_steps(tmp_path):
    short = {"lr_scheduler_type": "constant"}
    whole = Run(tmp_path / "whole", **short).train()
    assert len(Run(tmp_path / "parts", max_train_steps=4, **short).train().loop.progress.history) == 2
    longer = Run(tmp_path / "parts", **short).train()
    assert longer.outcome() == whole.outcome()


@pytest.mark.gpu
def test_gradient_scaler_goes_on(tmp_path):
    """With fp16 the scale decides which steps are taken: a run that is stopped goes on with the scale that it had."""
    whole = Run(tmp_path / "whole", scaled=True).train()
    with pytest.raises(Interrupted):
        Run(tmp_path / "parts", scaled=True, stop_after=3).train()
    parts = Run(tmp_path / "parts", scaled=True)
    assert parts.scaler.get_scale() == 128  # doubled after every two steps
    assert parts.train().outcome() == whole.outcome()
    assert parts.scaler.state_dict() == whole.scaler.state_dict()
    with pytest.raises(UserError, match="has no 'scaler'"):
        Run(tmp_path / "unscaled").train() and Run(tmp_path / "unscaled", scaled=True)


def test_optimizer_states_that_do_not_fit_are_refused(tmp_path):
    """A fused optimizer writes wherever a state leads it: what is in the file is compared before it is used."""
    Run(tmp_path, "adam").train()
    path = tmp_path / "checkpoint-6" / TENSOR_FILE
    saved = torch.load(path)

    def refused(change):
        state = copy.deepcopy(saved)
        change(state)
        torch.save(state, path)
        redeclare(path.parent)
        with pytest.raises(UserError, match=f"{TENSOR_FILE} does not fit this run: ") as error:
            Run(tmp_path, "adam")
        return str(error.value)

    def moments(state):
        return state["optimizer"]["state"][0]

    def group(state):
        return state["optimizer"]["param_groups"][0]

    assert "exp_avg of weight is (2, 3) torch.float32, not (2, 3, 1, 1)" in refused(
        lambda state: moments(state).update(exp_avg=torch.zeros(2, 3))
    )
    assert "torch.float64, not" in refused(lambda s: moments(s).update(exp_avg=moments(s)["exp_avg"].double()))
    assert "weight has exp_avg, step, not exp_avg, exp_avg_sq, step" in refused(lambda s: moments(s).pop("exp_avg_sq"))
    assert "bias has nothing" in refused(lambda state: state["optimizer"]["state"].pop(1))
    assert "with other names" in refused(lambda state: group(state).update(param_names=["bias", "weight"]))
    assert "it has no 'optimizer'" in refused(lambda state: state.pop("optimizer"))
    assert "its schedule is at step 5" in refused(lambda state: state["scheduler"].update(last_epoch=5))
    torch.save(saved, path)
    redeclare(path.parent)
    assert Run(tmp_path, "adam").loop.finished


def test_a_run_that_is_told_to_end_before_its_checkpoint_is_refused(tmp_path):
    Run(tmp_path).train()
    with pytest.raises(UserError, match=r"checkpoint-6 is at step 6, but this run is to end at step 4: raise --num"):
        Run(tmp_path, max_train_steps=4)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    run = Run(tmp_path, learning_rate=1e30)
    with pytest.raises(UserError, match=r"loss is .* in epoch .*--learning_rate"):
        run.train()
