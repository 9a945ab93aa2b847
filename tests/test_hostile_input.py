"""Whatever comes from outside, changed at random: it is taken, or refused in one line that names it, and nothing else.

`make test` tries some of each kind, always the same ones; `make test-hostile` thousands, and sums them up in
results/hostile_input.csv.
"""

import contextlib
import copy
import csv
import io
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripts import ROOT, SETTINGS
from sound_networks import RATE, save

from datasets_scripts.archives import unpack
from datasets_scripts.audio import opened_sound
from datasets_scripts.errors import UserError
from datasets_scripts.loading import CORPORA, load_corpus
from dls_comparison.plan import read_plan
from dls_sounds.network import Classifier, Embedder
from dls_sounds.settings import EmbedSettings, PredictSettings, SearchSettings
from dls_training.checkpoints import Progress, load_checkpoint, read_state, save_checkpoint
from dls_training.memory_bank import BANK_FILE, MemoryBank
from dls_training.record import Record
from hub_cards.publishing import finished_run
from modeling_dls import ESResNetForAudioClassification, ESResNetForInstanceDiscrimination

FEW, MANY = 150, 2000
MOST_SECONDS, MOST_BYTES = 60, 2 << 30
tried: dict[str, Counter] = {}
memory_before: dict[str, int] = {}
amounts = pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.soak)])

# What numbers, texts and containers of a stranger can be; in bytes, and as JSON and YAML have them.
ODD_BYTES = [b"", b"\0", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0" * 8, b"\xff" * 8, b"\xef\xbb\xbf", b'"', b"\n", b",,"]
ODD_WORDS = [
    b"1e999", b"-1", b"0", b"NaN", b"1" + b"0" * 30, b"9" * 5000, b"null", b"[]", b"{}", b"[[1]]", b"true", b'"x"',
    b"../x", b"/etc/passwd", b"{a: 1}", b"*a", b"&a [*a]", b"2001-13-45", b"!!python/object:os.system x", b"[" * 3000,
]  # fmt: skip
ODD_VALUES = [
    None, True, -1, 0, 10**30, float("nan"), float("inf"), "", "x" * 5000, "../../x", "a\nb", [], [[]], {}, {"a": {}},
]  # fmt: skip

places = st.floats(0, 1, exclude_max=True)
edits = st.lists(
    st.tuples(places, st.integers(0, 12), st.one_of(st.binary(max_size=4), st.sampled_from(ODD_BYTES + ODD_WORDS))),
    min_size=1,
    max_size=4,
)
replacements = st.lists(st.tuples(places, st.sampled_from(ODD_VALUES)), min_size=1, max_size=3)


def edited(content: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    """With pieces of some length at some places replaced; of 12 bytes: cut off there."""
    for share, length, new in changes:
        place = int(share * (len(content) + 1))
        content = content[:place] + new + (b"" if length == 12 else content[place + length :])
    return content


def replaced(content, changes: list[tuple[float, object]]):
    """JSON with some of its values replaced, whole objects and lists among them."""
    content = json.loads(json.dumps(content))
    for share, new in changes:
        spots = list(spots_of(content))
        if spots:
            container, key = spots[int(share * len(spots))]
            container[key] = copy.deepcopy(new)
    return content


def spots_of(content):
    for key in list(content) if isinstance(content, dict) else range(len(content)):
        yield content, key
        if isinstance(content[key], (dict, list)):
            yield from spots_of(content[key])


def run(examples: int, *strategies, test: Callable) -> None:
    """Calls `test` with that many draws from the strategies, always the same ones."""
    how = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    settings(max_examples=examples, **how)(given(*strategies)(test))()


def taken(kind: str) -> int:
    return tried.get(kind, Counter())["taken"]


def memory(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since `forget_the_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{name}:")[2].split()[0])


@pytest.fixture(autouse=True)
def forget_the_peak():
    """What tests before needed is not counted."""
    Path("/proc/self/clear_refs").write_text("5")
    memory_before["VmRSS"] = memory("VmRSS")


def check(kind: str, attempt: Callable[[], object], *names: str, longest: int = 5000) -> None:
    """Taken, or refused by a `UserError` in one line with one of the names; soon, and without much memory."""
    began, outcome = time.monotonic(), "taken"
    try:
        attempt()
    except UserError as error:
        outcome, said = "refused", str(error)
        assert "\n" not in said and len(said) < longest, said[:longest]
        assert any(name in said for name in names), said
    assert time.monotonic() - began < MOST_SECONDS
    assert memory("VmHWM") - memory_before["VmRSS"] < MOST_BYTES
    tried.setdefault(kind, Counter())[outcome] += 1


@pytest.fixture(scope="module", autouse=True)
def summary(request):
    """Where --hostile_results names a file: what became of the inputs of each kind."""
    yield
    if file := request.config.getoption("hostile_results"):
        with file.open("w", newline="", encoding="utf-8") as table:
            writer = csv.writer(table, lineterminator="\n")
            writer.writerow(("kind", "inputs", "taken", "refused in one line"))
            writer.writerows((kind, n.total(), n["taken"], n["refused"]) for kind, n in sorted(tried.items()))


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> dict[str, bytes]:
    folder, random = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    samples = 0.1 * random.standard_normal((RATE // 4, 2))
    for name in ("a.wav", "a.flac", "a.ogg", "a.mp3", "a.aiff", "a.au", "a.caf", "a.w64"):
        soundfile.write(folder / name, samples, RATE)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A classifier's and a pre-training's folder with all that belongs to them, and a checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    for name, head in (("classes", ESResNetForAudioClassification), ("npid", ESResNetForInstanceDiscrimination)):
        model = save(head, folder / name)
        facts = {"clips": {}, "folds": {}, "corpus": "esc50", "history": [], "knn": {}, "corpora": {}, "options": {}}
        facts |= {"task": "npid" if name == "npid" else "classification", "seed": 0, "command": "train.py"}
        (model / "all_results.json").write_text(json.dumps(facts))
        (model / "README.md").write_text("A card.")
        MemoryBank(4, 16, 0.5, torch.zeros(4, 16, dtype=torch.uint8), 0).save(model / BANK_FILE)
        Record().followed_by({"task": None, "name": "x"}, None).save(model)
    save_checkpoint(
        folder, Progress(step=1), lambda own: shutil.copy(folder / "npid" / "config.json", own),
        {"optimizer": {"step": torch.ones(3)}}, Record().followed_by({"task": None, "name": "x"}, None), 1,
    )  # fmt: skip
    return folder


def heard(path: Path) -> None:
    with opened_sound({"bytes": None, "path": str(path)}) as sound:
        for block in sound.blocks(0, 60):
            assert np.isfinite(block).all()


@amounts
def test_sound_files(examples, sounds, tmp_path):
    def test(name, changes, in_header):
        if in_header:  # which is where they say what they are
            changes = [(share * 64 / len(sounds[name]), length, new) for share, length, new in changes]
        path = tmp_path / name
        path.write_bytes(edited(sounds[name], changes))
        check("sound file", lambda: heard(path), name)

    for name in sounds:
        test(name, [], False)
    assert taken("sound file") >= len(sounds), "unchanged, all are good"
    run(examples, st.sampled_from(sorted(sounds)), edits, st.booleans(), test=test)


TABLES = {
    "metadata.csv": b"file_name,label,fold,source_id\na.wav,dog,1,x\nb.wav,cat,2,y\n",
    "metadata.jsonl": b'{"file_name": "a.wav", "label": "dog", "fold": 1}\n{"file_name": "b.wav", "label": "cat"}\n',
    "labels.csv": b"file_name,start,end,label,present\na.wav,0,0.1,dog,1\nb.wav,0.1,0.2,dog,0\n",
    "a.selections.txt": b"Selection\tBegin Time (s)\tEnd Time (s)\tSpecies\n1\t0.0\t0.1\tdog\n2\t0.1\t0.2\tcat\n",
}


@amounts
def test_tables(examples, sounds, tmp_path):
    def test(name, changes):
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            for sound in ("a.wav", "b.wav"):
                Path(folder, sound).write_bytes(sounds["a.wav"] + sound.encode())
            Path(folder, name).write_bytes(edited(TABLES[name], changes))
            check("table", lambda: read(folder), folder)

    def read(folder):
        CORPORA["audiofolder"].read(Path(folder))
        load_corpus("audiofolder", folder, cache_dir=Path(folder, ".cache"), allow_partial=True)

    for name in TABLES:
        test(name, [])
    assert taken("table") >= len(TABLES), "unchanged, all are good"
    run(examples, st.sampled_from(sorted(TABLES)), edits, test=test)


def used(folder: Path, kind: str, checkpoint: Path) -> None:
    """All that reads a model's folder, one after the other; what one refuses, others may take."""
    windows = {"windows": None, "mixed_precision": "no"}
    readers = [
        lambda: Classifier(str(folder), **windows) if kind == "classes" else Embedder(str(folder), None, **windows),
        lambda: Record.read(folder),
        lambda: finished_run(folder),
        lambda: read_state(checkpoint) and load_checkpoint(checkpoint),
    ]
    refusals = []
    for read in readers:
        try:
            read()
        except UserError as error:
            refusals.append(error)
    with contextlib.suppress(ValueError):
        MemoryBank.load(folder / BANK_FILE)
    for refusal in refusals:
        assert "\n" not in str(refusal)
    if refusals:
        raise refusals[0]


@amounts
def test_models_records_and_checkpoints(examples, runs, tmp_path):
    texts = sorted(path.name for path in (runs / "npid").glob("*.json"))
    others = sorted(path.name for path in (runs / "npid").glob("*.safetensors"))

    def test(kind, name, changes, values, in_header):
        with tempfile.TemporaryDirectory(dir=tmp_path) as place:
            folder = Path(shutil.copytree(runs / kind, Path(place, "model")))
            checkpoint = Path(shutil.copytree(runs / "checkpoint-1", Path(place, "checkpoint-1")))
            path = next(file for file in (folder / name, checkpoint / name) if file.exists())
            if name.endswith(".json") and values:
                path.write_text(json.dumps(replaced(json.loads(path.read_text()), values)))
            elif in_header:
                head, rest = path.read_bytes()[:400], path.read_bytes()[400:]
                path.write_bytes(edited(head, changes) + rest)
            else:
                path.write_bytes(edited(path.read_bytes(), changes))
            check("model, record or checkpoint", lambda: used(folder, kind, checkpoint), place)

    names = st.sampled_from([*texts, *others, "trainer_state.json", "training_state.pt"])
    for kind in ("classes", "npid"):
        test(kind, "config.json", [], [], False)
    assert taken("model, record or checkpoint") >= 2, "unchanged, both are good"
    values = st.one_of(st.just([]), replacements)
    run(examples, st.sampled_from(["classes", "npid"]), names, edits, values, st.booleans(), test=test)


@amounts
def test_plans(examples, tmp_path):
    plans = [path.read_bytes() for path in sorted((ROOT / "results").glob("*.yaml"))]

    def test(content, changes):
        path = tmp_path / "plan.yaml"
        path.write_bytes(edited(content, changes))
        check("plan", lambda: read_plan(path, {}), str(path))

    for content in plans:
        test(content, [])
    assert taken("plan") >= len(plans), "unchanged, all are good"
    run(examples, st.sampled_from(plans), edits, test=test)


@amounts
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives(examples, sounds, tmp_path):
    (tmp_path / "tree" / "b").mkdir(parents=True)
    for name, content in sounds.items():
        (tmp_path / "tree" / "b" / name).write_bytes(content[:600])
    kinds = ("zip", "tar", "gztar", "bztar", "xztar")
    packed = {kind: Path(shutil.make_archive(str(tmp_path / kind), kind, tmp_path / "tree")) for kind in kinds}
    contents = {path.name: path.read_bytes() for path in packed.values()}

    def test(name, changes):
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            path = Path(folder, name)
            path.write_bytes(edited(contents[name], changes))
            before = set(Path(folder).iterdir())
            check("archive", lambda: unpack(path, Path(folder, "out")), str(path))
            assert set(Path(folder).iterdir()) - before <= {Path(folder, "out")}
            assert not [found for found in Path(folder, "out").rglob("*") if found.is_symlink()]

    for name in contents:
        test(name, [])
    assert taken("archive") >= len(contents), "unchanged, all are good"
    run(examples, st.sampled_from(sorted(contents)), edits, test=test)


@amounts
def test_command_lines(examples):
    commands = [*SETTINGS.values(), EmbedSettings, PredictSettings, SearchSettings]
    options = sorted({f"--{name}" for command in commands for name in command.__dataclass_fields__})
    odd = st.sampled_from([word.decode(errors="replace") for word in ODD_WORDS])
    words = st.lists(st.one_of(st.sampled_from(options), odd, st.text(max_size=8)), max_size=8)

    def test(command, words):
        said = io.StringIO()

        def attempt():
            try:
                with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                    command.parsed(words)
            except SystemExit as end:
                if end.code:
                    assert end.code == 2
                    raise UserError(said.getvalue().splitlines()[-1]) from None

        check("command line", attempt, "error: ", longest=5000 + 8 * sum(map(len, words)))  # which it repeats, escaped

    test(PredictSettings, ["-", "--output", "x.csv", "--model", "m"])
    assert taken("command line"), "this one is good"
    run(examples, st.sampled_from(commands), words, test=test)
