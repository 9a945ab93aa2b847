"""Publishing end to end: the real huggingface_hub client against the Hub-like server of hub_server.py."""

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib import import_module
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
from hub_server import READ_TOKEN, TOKEN, HubServer
from scripts import ROOT, SMALL, fail
from test_remote_code import BEFORE, HERE

from datasets_scripts.__main__ import main as export_or_describe

CODE = {path.name for path in (ROOT / "modeling_dls").glob("*_esresnet.py")}
RECORD = {"record.json", "heard_clips.safetensors"}
PUBLISHED = {
    "README.md",
    "all_results.json",
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    *CODE,
    *RECORD,
}
OF_A_CLASSIFIER = PUBLISHED | {"confusion_matrix.png", "embedding.png"}
OF_A_PRETRAINING = PUBLISHED | {"memory_bank.safetensors", "accuracy.png", "embedding.png"}
# The client waits for seconds before it tries again.
IMPATIENT = "import time\nwaiting = time.sleep\ntime.sleep = lambda seconds: waiting(min(seconds, 0.01))\n"

STRANGER = """
import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, AutoModelForAudioXVector, pipeline

clip = np.random.RandomState(0).uniform(-0.5, 0.5, 22050).astype(np.float32)


def look(source, auto_class, output):
    extractor = AutoFeatureExtractor.from_pretrained(source, trust_remote_code=True)
    model = auto_class.from_pretrained(source, trust_remote_code=True).eval()
    with torch.no_grad():
        return model(**extractor(clip, sampling_rate=44100, return_tensors="pt"))[output].tolist()


answer = {}
for kind, place in job["sources"].items():
    answer[kind] = {
        "logits": look(place["classifier"], AutoModelForAudioClassification, "logits"),
        "embedding": look(place["embedder"], AutoModelForAudioXVector, "embeddings"),
        "pipeline": pipeline("audio-classification", model=place["classifier"], trust_remote_code=True)(clip),
    }
print(json.dumps(answer))
"""

LOAD_DATASET = """
import hashlib
from datasets import load_dataset

dataset = load_dataset(job["name"], split="train")
rows = [[row["clip_id"], row["label"], row["fold"], hashlib.md5(row["audio"]["bytes"]).hexdigest()] for row in dataset]
print(json.dumps({"rows": rows, "names": dataset.features["label"].names}))
"""


def run_process(hub: HubServer, folder: Path, *command, token=TOKEN) -> tuple[int, str]:
    """Exit code and output of `python COMMAND` in `folder`, told by its environment that `hub` is the Hub.

    The token is never printed.
    """
    (folder / "patience").mkdir(exist_ok=True)
    (folder / "patience" / "sitecustomize.py").write_text(IMPATIENT)
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder / "home"),
        "HF_TOKEN": token,
        "PYTHONPATH": f"{folder / 'patience'}:{ROOT}",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    finished = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=inherited | settings, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    assert TOKEN not in finished.stdout
    return finished.returncode, finished.stdout


@contextlib.contextmanager
def hub_of_this_process(hub: HubServer | str, folder: Path, token=TOKEN, offline=False):
    """As if this process had been started in `folder` with such an environment."""
    url, home = getattr(hub, "url", hub), folder / "home"
    constants = {
        "ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as changed:
        changed.chdir(folder)
        changed.setenv("HF_TOKEN", token)
        changed.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01)))
        changed.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
        for name, value in constants.items():
            changed.setattr(huggingface_hub.constants, name, value)
        yield


def run(hub: HubServer | str, folder: Path, module: str, *words, **how) -> tuple[int, str]:
    """The same of `python -m MODULE WORDS`, in this process."""
    printed, root, ours = io.StringIO(), logging.getLogger(), logging.getLogger("dls")
    handler, level = logging.StreamHandler(printed), ours.level
    root.addHandler(handler)
    try:
        with (
            hub_of_this_process(hub, folder, **how),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            code = import_module(f"{module}.__main__").main([str(word) for word in words])
    finally:
        root.removeHandler(handler)
        ours.setLevel(level)
    assert TOKEN not in printed.getvalue()
    return code, printed.getvalue()


def publish(hub, folder: Path, run_folder: Path, name: str, *options, **how) -> tuple[int, str]:
    return run(hub, folder, "hub_cards", "publish", run_folder, "--hub_model_id", name, *options, **how)


def refused(outcome: tuple[int, str]) -> str:
    """The one line in which it ended."""
    code, output = outcome
    assert code == 2 and "Traceback" not in output, output
    assert output.count("error: ") == 1 and output.splitlines()[-1].startswith("error: "), output
    return output.splitlines()[-1]


def stranger(hub: HubServer, folder: Path, script: str, **job) -> dict:
    """What a script prints in a process that finds none of our code and has no token."""
    job["hidden"] = sorted(HERE)
    code, output = run_process(hub, folder, "-I", "-c", BEFORE + script, json.dumps(job), token="")
    assert code == 0, output
    return json.loads(output.splitlines()[-1])


def contents(folder: Path) -> dict[str, bytes]:
    """The files in a folder's root."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def trained(sound_folder, tmp_path_factory):
    """A pre-training whose push fails at the last step, a fine-tuning that pushes itself, and the Hub of both."""
    folder = tmp_path_factory.mktemp("trained")
    common = [*SMALL, "--corpus", f"audiofolder={sound_folder}", "--num_train_epochs", "1", "--push_to_hub"]
    with HubServer() as hub:
        hub.fail("POST .*/commit/", 500)
        private = ["--hub_model_id", "you/private", "--hub_private_repo"]
        failed = run_process(hub, folder, ROOT / "train_npid.py", *common, "--output_dir", "npid", *private)
        hub.mend()
        fine_tuning = [ROOT / "train_classification.py", *common, "--model_name_or_path", "npid", "--fold", "all"]
        finished = run_process(hub, folder, *fine_tuning, "--output_dir", "classifier")
        yield folder, hub, failed, finished


@pytest.fixture
def pretrained(trained, tmp_path) -> Path:
    """A copy of the pre-training's folder."""
    return Path(shutil.copytree(trained[0] / "npid", tmp_path / "npid"))


def test_a_published_run_gives_the_same_elsewhere(trained, hub, tmp_path):
    folder = Path(shutil.copytree(trained[0], tmp_path / "runs", ignore=shutil.ignore_patterns("home", "patience")))
    for name in ("notes.txt", "holiday.png", "notes_esresnet.py"):
        (folder / "classifier" / name).write_text("not for others")
    assert {"fold-1", "fold-2"} <= {path.name for path in (folder / "classifier").iterdir()}
    code, output = publish(hub, folder, "classifier", "dogs")  # "you" is whose token it is
    assert code == 0 and publish(hub, folder, "npid", "you/npid")[0] == 0, output
    (_, created), (commit, files) = hub.repositories["models/you/dogs"].revisions
    assert output.splitlines()[-1] == f"published: {hub.url}/you/dogs/commit/{commit}"
    assert set(created) == {".gitattributes"} and set(files) - set(created) == OF_A_CLASSIFIER
    assert set(hub.files("models/you/npid")) == OF_A_PRETRAINING | {".gitattributes"}
    local = contents(folder / "classifier")
    assert all(files[name] == local[name] for name in files.keys() - created)
    sources = {
        "here": {"classifier": str(folder / "classifier"), "embedder": str(folder / "npid")},
        "hub": {"classifier": "you/dogs", "embedder": "you/npid"},
    }
    answer = stranger(hub, tmp_path, STRANGER, sources=sources)
    assert answer["hub"] == answer["here"]
    assert np.shape(answer["hub"]["logits"]) == (1, 4) and np.ptp(answer["hub"]["logits"]) > 0
    assert any(re.search(r"GET /you/dogs/resolve/\w+/model.safetensors 200", entry) for entry in hub.requests)


def test_push_to_hub_after_training(trained):
    folder, hub, _, (code, output) = trained
    repository = hub.repositories["models/you/classifier"]  # named after the output folder
    assert code == 0 and f"published: {hub.url}/you/classifier/commit/{repository.revisions[-1][0]}" in output, output
    assert "HTTP Request" not in output and not repository.private and len(repository.revisions) == 2
    local = contents(folder / "classifier")
    published = hub.files("models/you/classifier")
    assert published.keys() - {".gitattributes"} == OF_A_CLASSIFIER
    assert all(published[name] == local[name] for name in OF_A_CLASSIFIER)


def test_a_push_that_fails_leaves_the_finished_run(trained):
    folder, hub, failed, _ = trained
    repository = hub.repositories["models/you/private"]
    message = refused(failed)
    assert "the published revision of you/private is unchanged" in message and len(repository.revisions) == 1
    assert json.loads((folder / "npid" / "all_results.json").read_text())["task"] == "npid"
    command = re.search("`python (-m hub_cards publish npid .*)` goes on", message)[1]
    assert "--hub_private_repo" in command
    assert run_process(hub, folder, *command.split())[0] == 0 and len(repository.revisions) == 2
    assert repository.private and len(hub.asked("POST /api/repos/create .*200")) == 2
    for place in ("/api/models/you/private", "/you/private/resolve/main/config.json"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(hub.url + place)


def test_pushing_is_checked_before_training(trained, sound_folder, tmp_path):
    _, hub, *_ = trained
    options = [*SMALL, "--corpus", f"audiofolder={sound_folder}"]
    options += ["--output_dir", tmp_path / "new", "--hub_model_id", "private"]
    with hub_of_this_process(hub, tmp_path):
        message = fail("train_classification.py", *options, "--push_to_hub")
    assert "you/private holds something else" in message and not list((tmp_path / "new").glob("*"))
    assert "--push_to_hub publishes: add that" in fail("train_classification.py", *options)


def test_the_token_is_written_nowhere(trained):
    folder, hub, *_ = trained
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    published = [content for r in hub.repositories.values() for _, files in r.revisions for content in files.values()]
    assert len(written) > 20 and len(published) > 5
    assert not any(TOKEN.encode() in content for content in written + published)


def test_a_retry_sends_only_what_is_missing(pretrained, hub, tmp_path):
    large = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in pretrained.iterdir()
             if path.suffix in (".safetensors", ".png")}  # fmt: skip
    assert len(large) == 5
    hub.fail(f"PUT /upload/{large['memory_bank.safetensors']}", status=None)
    message = refused(publish(hub, tmp_path, "npid", "npid"))
    assert "connection" in message and "published revision of you/npid is unchanged" in message
    assert "`python -m hub_cards publish npid --hub_model_id npid` goes on" in message
    assert [set(files) for _, files in hub.repositories["models/you/npid"].revisions] == [{".gitattributes"}]
    assert hub.uploads and large["memory_bank.safetensors"] not in hub.uploads
    hub.mend()
    assert publish(hub, tmp_path, "npid", "npid")[0] == 0
    received = [entry for entry in hub.asked("PUT /upload") if entry.endswith(" 200")]
    assert sorted(received) == sorted(f"PUT /upload/{digest} 200" for digest in large.values())
    assert len(hub.repositories["models/you/npid"].revisions) == 2

    asked_before = len(hub.requests)
    code, output = publish(hub, tmp_path, "npid", "npid")
    assert code == 0 and "nothing to send" in output
    assert not [entry for entry in hub.requests[asked_before:] if entry.startswith(("POST", "PUT"))]


def test_a_second_publication_changes_what_differs(pretrained, hub, tmp_path):
    assert publish(hub, tmp_path, "npid", "npid")[0] == 0
    repository = hub.repositories["models/you/npid"]
    repository.add_revision(hub.files("models/you/npid") | {"notes.md": b"the user's own"}, "by hand")
    (pretrained / "README.md").write_text("---\ntags: [audio]\n---\nanother card\n")
    (pretrained / "memory_bank.safetensors").unlink()
    asked_before = len(hub.requests)
    code, output = publish(hub, tmp_path, "npid", "npid", "--dry_run")
    assert code == 0 and len(repository.revisions) == 3
    fates = {words[-1]: words for words in map(str.split, output.splitlines())}
    assert fates["send"][1] == "README.md" and fates["remove"][0] == "memory_bank.safetensors"
    assert output.count("is there already") == len(OF_A_PRETRAINING) - 2
    assert publish(hub, tmp_path, "npid", "npid")[0] == 0
    before, after = (files for _, files in repository.revisions[-2:])
    removed = {"memory_bank.safetensors": before["memory_bank.safetensors"]}
    assert after | removed == before | {"README.md": (pretrained / "README.md").read_bytes()}
    assert not removed.keys() & after.keys()
    assert not [entry for entry in hub.requests[asked_before:] if entry.startswith("PUT")]


def test_a_lost_answer_to_the_commit_is_looked_up(pretrained, hub, tmp_path):
    hub.fail("POST .*/commit/", status=None, times=1, after=True)
    code, output = publish(hub, tmp_path, "npid", "npid")
    commit = hub.repositories["models/you/npid"].revisions[-1][0]
    assert code == 0 and output.splitlines()[-1].endswith(f"/you/npid/commit/{commit}")
    assert len(hub.repositories["models/you/npid"].revisions) == 2


def test_a_change_meanwhile_is_not_overwritten(pretrained, hub, tmp_path):
    def by_somebody():
        hub.repositories["models/you/npid"].add_revision({"README.md": b"somebody else's"}, "meanwhile")

    hub.meanwhile("POST .*/commit/", by_somebody)
    message = refused(publish(hub, tmp_path, "npid", "npid"))
    assert "412" in message and "somebody else" in message
    assert hub.files("models/you/npid") == {"README.md": b"somebody else's"}
    assert "holds something else" in refused(publish(hub, tmp_path, "npid", "npid"))


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        ("GET /api/whoami-v2", 500, "you/npid is left as it is"),
        ("POST /api/repos/create", 403, "the token must be allowed to write there"),
        ("GET /api/models/you/npid/tree", 500, "nothing was sent to you/npid"),
        ("POST .*/preupload/", 503, "unchanged"),
        ("PUT /upload", 403, "unchanged"),
        ("POST .*/commit/", 500, "unchanged"),
        ("(POST .*/commit/|GET /api/models/you/npid$)", None, "cannot be seen"),
    ],
)
def test_a_failing_server(request_, status, words, pretrained, hub, tmp_path):
    if status:
        hub.fail(request_, status, message=f"sorry, {TOKEN}")
    else:
        hub.meanwhile("POST .*/preupload", lambda: hub.fail(request_, status))
    message = refused(publish(hub, tmp_path, "npid", "you/npid"))
    assert words in message and "goes on" in message
    assert (f"the Hub answered {status}" if status else "the connection to the Hub failed") in message
    revisions = hub.repositories["models/you/npid"].revisions if "models/you/npid" in hub.repositories else []
    assert all(set(files) == {".gitattributes"} for _, files in revisions)


@pytest.mark.parametrize(
    ("name", "how", "words"),
    [
        ("npid", {"token": ""}, "run `hf auth login` once, or set"),
        ("npid", {"offline": True}, "HF_HUB_OFFLINE is set"),
        ("npid", {"token": "hf_unknown"}, "the Hub answered 401"),
        ("npid", {"token": READ_TOKEN}, "the token can only read"),
        ("my model", {}, "--hub_model_id my model: expected NAME or NAMESPACE/NAME"),
        ("somebody/npid", {}, 'rights to create a model under the namespace "somebody"'),
    ],
)
def test_what_the_user_must_change(name, how, words, pretrained, hub, tmp_path):
    message = refused(publish(hub, tmp_path, "npid", name, **how))
    assert words in message
    assert not hub.repositories


def test_nothing_else_is_overwritten(trained, hub, tmp_path):
    folder, *_ = trained
    assert publish(hub, folder, "classifier", "mine")[0] == 0
    assert "expected model_type esresnet and task npid" in refused(publish(hub, folder, "npid", "mine"))
    assert "mine is public" in refused(publish(hub, folder, "classifier", "mine", "--hub_private_repo"))
    repository = hub.repositories["models/you/mine"]
    for others in ({"config.json": b'{"model_type": "bert"}'}, {"README.md": b"hello"}, {"config.json": b"[]"}):
        repository.add_revision(others, "others")
        assert "holds something else" in refused(publish(hub, folder, "classifier", "mine"))
        assert hub.files("models/you/mine") == others
    assert "holds something else" in refused(publish(hub, folder, "classifier", "mine", "--dry_run"))


def test_dry_run_without_network_or_token(trained):
    folder, *_ = trained
    for how in ({"token": ""}, {"offline": True}, {}):
        code, output = publish("http://127.0.0.1:9", folder, "npid", "npid", "--dry_run", **how)
        assert code == 0 and "npid was not looked at: " in output and "nothing was changed" in output
        listed = {words[1]: int(words[0].replace(",", "")) for words in map(str.split, output.splitlines()[1:])}
        assert listed == {name: len(content) for name, content in contents(folder / "npid").items()}
    assert "the connection to the Hub failed" in output


def test_links_are_not_followed(pretrained, hub, tmp_path):
    (tmp_path / "secret").write_text("not for others")
    (pretrained / "embedding.png").unlink()
    (pretrained / "embedding.png").symlink_to(tmp_path / "secret")
    code, output = publish(hub, tmp_path, "npid", "npid")
    assert code == 0, output
    assert set(hub.files("models/you/npid")) == OF_A_PRETRAINING - {"embedding.png"} | {".gitattributes"}
    (pretrained / "config.json").rename(tmp_path / "config.json")
    (pretrained / "config.json").symlink_to(tmp_path / "config.json")
    assert "config.json is a link, which is not followed" in refused(publish(hub, tmp_path, "npid", "npid"))


@pytest.mark.parametrize("change", [{"corpora": []}, {"options": 3}, {"clips": None}, {"command": ["a"]}])
def test_results_of_other_types(change, pretrained, hub, tmp_path):
    results = json.loads((pretrained / "all_results.json").read_text())
    (pretrained / "all_results.json").write_text(json.dumps(results | change))
    assert "npid holds no all_results.json of train_npid.py" in refused(publish(hub, tmp_path, "npid", "npid"))


def test_a_run_that_is_not_complete(pretrained, hub, tmp_path):
    imported = (pretrained / "presets_esresnet.py").rename(tmp_path / "elsewhere.py")
    assert "npid/presets_esresnet.py is missing; " in refused(publish(hub, tmp_path, "npid", "npid"))
    imported.rename(pretrained / "presets_esresnet.py")
    (pretrained / "modeling_esresnet.py").unlink()
    message = refused(publish(hub, tmp_path, "npid", "npid"))
    assert "npid/modeling_esresnet.py is missing; `python train_npid.py --preset tiny" in message
    (pretrained / "config.json").write_text("{")
    assert "config.json is damaged" in refused(publish(hub, tmp_path, "npid", "npid"))
    (pretrained / "all_results.json").unlink()
    message = refused(publish(hub, tmp_path, "npid", "npid"))
    assert "npid holds no all_results.json" in message and "--resume_from_checkpoint latest" in message
    assert "there/is/none holds no all_results.json" in refused(publish(hub, tmp_path, "there/is/none", "npid"))
    assert not hub.requests


def test_an_export_is_published_and_loaded(sound_folder, hub, tmp_path):
    export = ["export", "audiofolder", "--data_dir", sound_folder, "--output_dir", "sounds"]
    push = ["datasets_scripts", *export, "--push_to_hub", "--hub_dataset_id", "you/tones"]
    hub.fail("PUT /upload", None)
    message = refused(run(hub, tmp_path, *push))
    assert "unchanged" in message and set(hub.files("datasets/you/tones")) == {".gitattributes"}
    hub.mend()
    code, output = run(hub, tmp_path, *push)
    assert code == 0 and "sounds holds this export already" in output and "published: " in output, output
    repository = hub.repositories["datasets/you/tones"]
    shards = {f"data/fold-{fold}.00000.parquet" for fold in (1, 2)}
    assert len(repository.revisions) == 2
    assert set(hub.files("datasets/you/tones")) == {".gitattributes", "README.md", *shards}
    answer = stranger(hub, tmp_path, LOAD_DATASET, name="you/tones")
    sounds = {hashlib.md5(path.read_bytes()).hexdigest() for path in sound_folder.glob("*.wav")}
    assert len(answer["rows"]) == 40 and {row[-1] for row in answer["rows"]} == sounds
    assert answer["names"] == [f"class-{label}" for label in range(4)]

    assert run(hub, tmp_path, *push)[0] == 0 and len(repository.revisions) == 2
    repository.add_revision({"README.md": b"---\ndls_corpus: {corpus: esc10}\n---\n"}, "others")
    assert "found one of esc10" in refused(run(hub, tmp_path, *push))


def test_another_export_is_not_taken_for_this_one(sound_folder, hub, tmp_path, monkeypatch, capsys):
    shutil.copytree(sound_folder, tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home" / "datasets")
    export = ["export", "audiofolder", "--data_dir", "in", "--output_dir", "sounds"]
    assert export_or_describe(export) == 0
    table = tmp_path / "in" / "metadata.csv"
    table.write_text(table.read_text().replace("00.wav,class-0", "00.wav,class-1"))
    message = refused(run(hub, tmp_path, "datasets_scripts", *export, "--push_to_hub"))
    assert "not an empty folder" in message and set(hub.files("datasets/you/sounds")) == {".gitattributes"}
    assert export_or_describe(export) == 2  # without --push_to_hub as ever
    assert export_or_describe([*export, "--hub_private_repo"]) == 2
    assert "--push_to_hub publishes: add that" in capsys.readouterr().err
