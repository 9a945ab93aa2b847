"""Conversion of the original's checkpoints: what comes out, and what a wrong file is answered with."""

import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from golden import deterministic as golden
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

from modeling_dls import ESResNetForAudioClassification
from modeling_dls.convert_esresnet_checkpoint import (
    ConversionError,
    convert_state_dict,
    main,
    read_labels,
    read_state_dict,
)

MODULE = "modeling_dls.convert_esresnet_checkpoint"
NAMES = ["dog", "rain", "sea waves", "crying baby", "clock tick", "sneeze", "chainsaw"]


def light(state):
    """The same names and shapes in next to no bytes, where only the answer to a wrong file matters."""
    return {name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in state.items()}


@pytest.fixture(scope="module")
def seven():
    """The original with attention and seven classes."""
    return golden.original_state_dict(attention=True, num_classes=7)


def save(content, folder, name="original.pt"):
    torch.save(content, folder / name)
    return folder / name


def assert_refused(capsys, arguments, *messages, output_dir=None):
    """Exit code 2, one error message that says these things, and nothing left behind."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("error: ") == 1 and "Traceback" not in error
    for message in messages:
        assert re.search(message, error), error
    output_dir = Path(output_dir or arguments[1])
    assert not output_dir.exists()
    if output_dir.parent.is_dir():
        assert not list(output_dir.parent.glob(f".{output_dir.name}-*"))


# --- What comes out ---


def test_command_line_gives_the_originals_logits(tmp_path, capsys):
    source = save(golden.original_state_dict(attention=True), tmp_path)
    assert main([str(source), str(tmp_path / "new" / "converted")]) == 0
    assert str(tmp_path / "new" / "converted") in capsys.readouterr().out
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "new" / "converted")
    model = AutoModelForAudioClassification.from_pretrained(tmp_path / "new" / "converted")
    case = "burst_mono_5s"
    inputs = extractor(golden.waveform(case), sampling_rate=golden.RATE, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0].double()
    expected = torch.tensor(golden.CASES[case]["ESResNetAttention_logits"], dtype=torch.float64)
    assert (logits - expected).abs().max() <= 2e-4 * expected.abs().max()


def module_prefix(state):
    return {f"module.{name}": tensor for name, tensor in state.items()}


WRAPPINGS = {
    "bare": lambda state: state,
    "module": module_prefix,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": module_prefix(state), "optimizer": {"lr": 0.1}},
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_usual_wrappings_are_understood(wrap, seven, tmp_path):
    state = read_state_dict(save(wrap(light(seven)), tmp_path))
    assert {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in seven.items()}


def test_without_attention_and_window(tmp_path):
    state = golden.original_state_dict(attention=False)
    del state["window"]
    assert main([str(save(module_prefix(state), tmp_path)), str(tmp_path / "out")]) == 0
    model = ESResNetForAudioClassification.from_pretrained(tmp_path / "out")
    assert not model.config.attention and model.config.num_labels == 10
    converted = convert_state_dict(state, model)
    assert converted.keys() == model.state_dict().keys() and len(converted) == len(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, converted[name]), name


def test_attention_class_count_labels_and_settings_arrive(seven, tmp_path):
    (tmp_path / "labels.txt").write_text("\n".join(NAMES) + "\n\n")
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    settings = {"n_fft": 4096, "win_length": 1654, "hop_length": 500, "spec_height": 90, "spec_width": 80}
    options = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    labels = ["--labels", str(tmp_path / "labels.txt")]
    assert main([str(save(seven, tmp_path)), str(tmp_path / "out"), *labels, *options]) == 0
    model = AutoModelForAudioClassification.from_pretrained(tmp_path / "out")
    assert model.config.attention
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.label2id == {name: index for index, name in enumerate(NAMES)}
    assert torch.equal(model.classifier.weight, seven["classifier.weight"])
    assert torch.equal(model.esresnet.attention.conv_depth.weight, seven["att5.conv_depth.weight"])
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "out")
    assert {name: getattr(extractor, name) for name in settings} == settings
    assert not extractor.do_normalize


def test_labels_as_a_json_list(tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps(["Geräusch", 2]))
    assert read_labels(tmp_path / "labels.json", 2) == ["Geräusch", "2"]


# --- What a wrong file is answered with ---


def test_missing_unexpected_and_misshapen_keys_are_all_named(seven, tmp_path, capsys):
    broken = {name: tensor for name, tensor in light(seven).items() if not name.startswith("layer4.2.bn3.")}
    broken |= {"surprise": torch.zeros(1), "conv1.weight": torch.zeros(64, 1, 7, 7)}
    names = [f"layer4.2.bn3.{n}" for n in ("bias", "num_batches_tracked", "running_mean", "running_var", "weight")]
    assert_refused(
        capsys,
        [save(broken, tmp_path), tmp_path / "out"],
        f"  5 missing: {', '.join(names)}\n",
        "  1 unexpected: surprise\n",
        r"  1 of another shape: conv1.weight \(64, 1, 7, 7\) instead of \(64, 3, 7, 7\)\n",
    )


def without(*names):
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


INCOMPLETE = {
    "no bias": (without("att3.bn.bias"), r"1 missing: att3\.bn\.bias\n"),
    "no classifier": (without("classifier.weight", "classifier.bias"), r"2 missing: classifier\.bias, classifier"),
    "empty": (lambda state: {}, "missing: .*conv1.weight"),
    "other count": (lambda state: state | {"classifier.bias": torch.zeros(9)}, r"bias \(9,\) instead of \(7,\)"),
    "scalar": (lambda state: state | {"classifier.weight": torch.tensor(0.0)}, r"weight \(\) instead of"),
    "window": (lambda state: state | {"window": torch.zeros(1000)}, "window of 1000 samples: set --win_length"),
    "scalar window": (lambda state: state | {"window": torch.tensor(0.0)}, "window of 1 samples"),
    "number as a name": (lambda state: {0: torch.zeros(1)}, "holds no state dict"),
    "no tensors": (lambda state: {"epoch": 3}, "holds no state dict"),
    "list": (lambda state: list(state.values()), "holds no state dict"),
    "tensor": (lambda state: torch.zeros(3), "holds no state dict"),
}


@pytest.mark.parametrize("change, message", INCOMPLETE.values(), ids=INCOMPLETE)
def test_incomplete_files_are_refused(change, message, seven, tmp_path, capsys):
    assert_refused(capsys, [save(change(light(seven)), tmp_path), tmp_path / "out"], message)


def test_missing_keys_come_before_labels(seven, tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("\n".join(NAMES))
    source = save(without("classifier.weight")(light(seven)), tmp_path)
    arguments = [source, tmp_path / "out", "--labels", tmp_path / "labels.txt"]
    assert_refused(capsys, arguments, "1 missing: classifier.weight")


def test_a_smaller_resnet_is_refused(tmp_path, capsys):
    state = {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)}
    messages = [
        r"layer1\.0\.conv1\.weight \(64, 64, 3, 3\) instead of \(64, 64, 1, 1\)",
        "missing: .*layer4.2.bn3.weight",
    ]
    assert_refused(capsys, [save(state, tmp_path), tmp_path / "out"], *messages)


class Exploit:
    """Unpickled without care, this runs code."""

    def __init__(self, proof):
        self.proof = str(proof)

    def __reduce__(self):
        return Path.touch, (Path(self.proof),)


def write_exploit(path):
    torch.save({"conv1.weight": torch.zeros(1), "x": Exploit(path.parent / "executed")}, path)


@pytest.mark.parametrize(
    "write",
    [
        write_exploit,
        lambda path: path.write_text("not a checkpoint"),
        lambda path: path.write_bytes(b""),
        lambda path: path.mkdir(),
        lambda path: None,
    ],
    ids=["pickled code", "text", "empty", "folder", "no file"],
)
def test_files_that_are_no_checkpoints_are_refused(write, tmp_path, capsys):
    source = tmp_path / "original.pt"
    write(source)
    assert_refused(capsys, [source, tmp_path / "out"], re.escape(str(source)))
    assert not (tmp_path / "executed").exists()


def test_a_truncated_file_is_refused(seven, tmp_path, capsys):
    source = save(light(seven), tmp_path)
    os.truncate(source, source.stat().st_size // 2)
    assert_refused(capsys, [source, tmp_path / "out"], re.escape(str(source)))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_process_ends_with_exit_code_2(tmp_path, capsys, monkeypatch):
    source = tmp_path / "original.pt"
    write_exploit(source)
    monkeypatch.setattr(sys, "argv", [MODULE, str(source), str(tmp_path / "out")])
    with pytest.raises(
        SystemExit
    ) as ended:  # as python -m does it, without the seconds that a new process imports for
        runpy.run_module(MODULE, run_name="__main__")
    assert ended.value.code == 2
    # Advice to load it all the same would be the wrong thing to tell someone with a file of unknown origin.
    assert "weights_only" not in capsys.readouterr().err
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("labels.json", json.dumps(NAMES[:6]), "7 different names"),
        ("labels.json", json.dumps([*NAMES[:6], NAMES[0]]), "7 different names"),
        ("labels.json", json.dumps({"dog": 0}), "7 different names"),
        ("labels.json", "[", r"labels\.json: .*line 1"),
        ("labels.txt", "\n".join([*NAMES, "one more"]), "7 different names"),
        ("labels.txt", None, "No such file"),
    ],
)
def test_wrong_labels_are_refused(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConversionError, match=message) as error:
        read_labels(tmp_path / name, 7)
    assert str(error.value).startswith(f"--labels {tmp_path / name}: ")


def test_a_wrong_label_count_is_refused(seven, tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("\n".join(NAMES[1:]))
    arguments = [save(light(seven), tmp_path), tmp_path / "out", "--labels", tmp_path / "labels.txt"]
    assert_refused(capsys, arguments, "expected a list of 7 different names")


@pytest.mark.parametrize("settings", [["--win_length", "1000"], ["--n_fft", "1024"], ["--hop_length", "0"]])
def test_settings_that_do_not_fit_are_refused(settings, seven, tmp_path, capsys):
    assert_refused(capsys, [save(light(seven), tmp_path), tmp_path / "out", *settings], "win_length|hop_length")


def test_a_folder_in_use_is_left_untouched(seven, tmp_path, capsys):
    source = save(light(seven), tmp_path)
    kept = tmp_path / "out" / "config.json"
    kept.parent.mkdir()
    kept.write_text("mine")
    for output_dir in (kept.parent, kept):
        assert main([str(source), str(output_dir)]) == 2
        assert re.match(rf"error: {re.escape(str(output_dir))} .*new or empty", capsys.readouterr().err)
    assert [path.name for path in kept.parent.iterdir()] == ["config.json"]
    assert kept.read_text() == "mine"


def test_an_output_below_a_file_is_refused(seven, tmp_path, capsys):
    source = save(light(seven), tmp_path)
    # A path below a file stops even root, whom permissions do not.
    assert_refused(capsys, [source, source / "out"], re.escape(str(source)))
    assert_refused(capsys, [source, source / "deeper" / "out"], re.escape(str(source)))
    assert torch.load(source, weights_only=True).keys() == seven.keys()
