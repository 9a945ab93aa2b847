"""Conversion of ImageNet weights: the source network's features come out, or a message that names file and keys.

The weights are random: what is tested is where each of them goes.
"""

import copy
import json
import re
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.densenet import DenseNet
from transformers import AutoFeatureExtractor, AutoModel, ResNetConfig, ResNetForImageClassification

from modeling_dls import ESResNetModel
from modeling_dls.convert_esresnet_checkpoint import main


def transformers_resnet(layer_type="bottleneck"):
    config = ResNetConfig(embedding_size=8, hidden_sizes=WIDTHS, depths=DEPTHS, layer_type=layer_type)
    return ResNetForImageClassification(config)


# A network, and what its shapes tell: embedding_size, hidden_sizes, depths, layer_type and growth_rate.
WIDTHS, DEPTHS = [16, 32, 64, 80], [1, 2, 1, 1]
RESNET18 = (64, [64, 128, 256, 512], [2, 2, 2, 2], "basic", None)
RESNET50 = (64, [256, 512, 1024, 2048], [3, 4, 6, 3], "bottleneck", None)
DENSENET121 = (64, [128, 256, 512, 1024], [6, 12, 24, 16], "bottleneck", 32)
SOURCES = {
    "transformers, bottleneck": (lambda: transformers_resnet(), (8, WIDTHS, DEPTHS, "bottleneck", None)),
    "transformers, basic": (lambda: transformers_resnet("basic"), (8, WIDTHS, DEPTHS, "basic", None)),
    "transformers, no head": (lambda: transformers_resnet().resnet, (8, WIDTHS, DEPTHS, "bottleneck", None)),
    "timm, resnet18": (lambda: timm.create_model("resnet18"), RESNET18),
    "timm, resnet50": (lambda: timm.create_model("resnet50"), RESNET50),
    "timm, densenet121": (lambda: timm.create_model("densenet121"), DENSENET121),
    "timm, densenet": (lambda: DenseNet(8, (2, 1, 3)), (16, [16, 12, 36], [2, 1, 3], "bottleneck", 8)),
}


@pytest.fixture(scope="module")
def small():
    return trained(transformers_resnet())


def trained(network):
    """In evaluation mode, with nothing of a batch norm at its initial value."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5, generator=generator)
    return network.eval()


@torch.no_grad()
def features(network, pictures):
    """Pooled features (batch, size) of (batch, 3, height, width), as the network's own library computes them."""
    if isinstance(network, ESResNetModel):
        return network(pictures[:, None]).pooler_output
    if hasattr(network, "forward_features"):
        return network.forward_head(network.forward_features(pictures), pre_logits=True)
    return network.base_model(pictures).pooler_output.flatten(1)


def convert(state, folder, *options):
    """A state dict -> the converted network, in evaluation mode."""
    torch.save(state, folder / "weights.pth")
    assert main([str(folder / "weights.pth"), str(folder / "out"), *options]) == 0
    return AutoModel.from_pretrained(folder / "out")


def assert_same_features(model, network):
    pictures = torch.randn(2, 3, 66, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = features(network.double(), pictures)
    network.float()
    assert expected.std(dim=0).mean() > 1e-3  # the pictures make a difference
    torch.testing.assert_close(features(model.double(), pictures), expected, rtol=1e-9, atol=1e-9)


# --- What comes out ---


def test_strides_in_the_first_convolution(tmp_path):
    """He et al.'s first layout: a transformers folder tells it, a file in torchvision's names does not."""
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=WIDTHS, depths=DEPTHS, layer_type="bottleneck", downsample_in_bottleneck=True
    )
    source = trained(ResNetForImageClassification(config))
    assert main([str(save_folder(source, tmp_path)), str(tmp_path / "a"), "--no_attention"]) == 0
    model = AutoModel.from_pretrained(tmp_path / "a")
    assert model.config.downsample_in_bottleneck
    assert_same_features(model, source)
    (tmp_path / "resnet" / "config.json").unlink()
    options = ["--no_attention", "--downsample_in_bottleneck"]
    assert main([str(tmp_path / "resnet"), str(tmp_path / "b"), *options]) == 0
    assert_same_features(AutoModel.from_pretrained(tmp_path / "b"), source)


def test_last_stages_that_are_missing(tmp_path, capsys):
    """With --allow_partial the first stages' pictures are the source's, the rest is random by the seed, and named."""
    source = trained(timm.create_model("resnet18"))
    state = {n: t for n, t in source.state_dict().items() if not n.startswith(("layer4", "fc"))}
    torch.save(state, tmp_path / "weights.pth")
    assert_refused(capsys, tmp_path / "weights.pth", "not a complete checkpoint")
    model = convert(state, tmp_path, "--no_attention", "--allow_partial")
    assert "not in the file, and random: stages.3 (" in capsys.readouterr().out
    assert model.config.depths == [2, 2, 2, 2] and model.config.hidden_sizes == [64, 128, 256, 512]
    pictures = torch.randn(2, 3, 66, 97, generator=torch.Generator().manual_seed(1))
    ours = model(pictures[:, None], output_hidden_states=True).hidden_states[3][:, 0]
    theirs = source.layer3(
        source.layer2(source.layer1(source.maxpool(source.act1(source.bn1(source.conv1(pictures))))))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert main([str(tmp_path / "weights.pth"), str(tmp_path / "again"), "--no_attention", "--allow_partial"]) == 0
    again = AutoModel.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    ambiguous = {
        n: t for n, t in trained(timm.create_model("resnet50")).state_dict().items() if "layer1" in n or "1." in n[:6]
    }
    torch.save(ambiguous, tmp_path / "first.pth")
    assert_refused(capsys, tmp_path / "first.pth", "are the beginning of 3 known ResNets", options=["--allow_partial"])


def test_real_weights_of_three_stages(shared_dir, tmp_path, capsys):
    weights = shared_dir / "data" / "weights" / "resnet50_imagenet_stages_1_to_3.safetensors"
    assert main([str(weights), str(tmp_path / "out"), "--allow_partial", "--downsample_in_bottleneck"]) == 0
    config = AutoModel.from_pretrained(tmp_path / "out").config
    assert (config.embedding_size, config.hidden_sizes, config.depths, config.layer_type) == RESNET50[:4]
    assert config.initial_weights == "imagenet" and "stages.3" in capsys.readouterr().out


@pytest.mark.parametrize("make, structure", SOURCES.values(), ids=SOURCES)
def test_features_and_structure_are_the_sources(make, structure, tmp_path):
    source = trained(make())
    model = convert(source.state_dict(), tmp_path, "--no_attention")
    config = model.config
    found = (config.embedding_size, config.hidden_sizes, config.depths, config.layer_type, config.growth_rate)
    assert found == structure and not config.attention and config.initial_weights == "imagenet"
    assert type(model) is ESResNetModel
    assert_same_features(model, source)


def without_batch_counts(state):
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def test_torchvisions_old_files(tmp_path):
    """Those of torchvision's first years count no batches, and its DenseNets have a dot more."""
    for name, network in {"resnet": timm.create_model("resnet18"), "densenet": DenseNet(8, (2, 1))}.items():
        (tmp_path / name).mkdir()
        state = without_batch_counts(trained(network).state_dict())
        state = {re.sub(r"(layer\d+\.\w+)([12])\.(?=\w+$)", r"\1.\2.", n) if name == "densenet" else n: t
                 for n, t in state.items()}  # fmt: skip
        assert name == "resnet" or "features.denseblock1.denselayer2.norm.2.running_var" in state
        assert_same_features(convert(state, tmp_path / name, "--no_attention"), network)


def save_folder(network, folder):
    network.save_pretrained(folder / "resnet")
    return folder / "resnet"


def save_safetensors(network, folder):
    save_file(network.state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def save_wrapped(network, folder):
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, folder / "weights.bin")
    return folder / "weights.bin"


@pytest.mark.parametrize("save", [save_folder, save_safetensors, save_wrapped])
def test_every_kind_of_file(save, small, tmp_path):
    assert main([str(save(small, tmp_path)), str(tmp_path / "out"), "--no_attention"]) == 0
    assert_same_features(ESResNetModel.from_pretrained(tmp_path / "out"), small)


def test_attention_starts_half_open_and_by_the_seed(small, tmp_path):
    states, before = [], torch.get_rng_state()
    for i, options in enumerate(([], ["--seed", "0"], ["--seed", "1"], ["--no_attention"])):
        (tmp_path / str(i)).mkdir()
        model = convert(small.state_dict(), tmp_path / str(i), *options)
        states.append(model.state_dict())
        if model.config.attention:
            x = torch.randn(8, 8, 16, 32, generator=torch.Generator().manual_seed(0))
            gates = copy.deepcopy(model.stages[0].attention).train()(x, (16, 32))
            assert abs(gates.mean() - 0.5) < 0.02 and 0.1 < gates.std() < 0.3
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other, plain = states
    convolutions = [name for name in first if "attention.conv" in name and name.endswith("weight")]
    assert len(convolutions) == 10
    assert all(torch.equal(first[name], same[name]) for name in convolutions)
    assert not any(torch.equal(first[name], other[name]) for name in convolutions)
    assert first.keys() - plain.keys() == {name for name in first if "attention." in name}
    assert all(torch.equal(tensor, first[name]) for name, tensor in plain.items())


def test_the_extractor_standardises_and_is_of_the_preset(small, tmp_path):
    convert(small.state_dict(), tmp_path)
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "out")
    assert extractor.do_normalize and (extractor.spec_height, extractor.n_fft) == (None, 2048)
    options = ["--preset", "esresnet18", "--spec_width", "100", "--hop_length", "500"]
    assert main([str(tmp_path / "weights.pth"), str(tmp_path / "small"), *options]) == 0
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "small")
    assert extractor.do_normalize and extractor.resize_mode == "area"
    assert (extractor.spec_height, extractor.spec_width, extractor.hop_length) == (64, 100, 500)


# --- What a wrong file is answered with ---


def assert_refused(capsys, source, *messages, options=()):
    """Exit code 2, one message that names the file and says these things, and nothing left behind."""
    output_dir = source.parent / "refused"
    capsys.readouterr()
    assert main([str(source), str(output_dir), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(source) in error and not output_dir.exists()
    for message in messages:
        assert re.search(message, error), error


def drop(*names):
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


def put(**tensors):
    return lambda state: state | {name.replace("__", "."): torch.zeros(shape) for name, shape in tensors.items()}


STEM = "resnet.embedder.embedder.convolution.weight"
WRONG = {
    "no bias": (
        drop("resnet.embedder.embedder.normalization.bias"),
        r"a ResNet in transformers' names\n  1 missing: embedder\.embedder\.normalization\.bias\n",
    ),
    "no layer": (drop(*(f"resnet.encoder.stages.1.layers.1.layer.{i}.convolution.weight" for i in range(3))),
                 "unexpected: .*encoder.stages.1.layers.1.layer.0.normalization.weight"),
    "one more": (put(surprise=1), "1 unexpected: surprise\n"),
    "one band": (lambda state: state | {STEM: state[STEM][:, :1]}, r"\(8, 1, 7, 7\) instead of \(8, 3, 7, 7\)"),
    "no stem": (drop(STEM), "embedder.embedder.convolution.weight or all layers are missing"),
    "flat stem": (lambda state: state | {STEM: torch.tensor(0.0)}, "or all layers are missing"),
    "two layouts": (put(layer1__0__conv1__weight=(8, 8, 3, 3)), r"mixes .*torchvision.*: layer1\.0\.conv1\.weight"),
    "a densenet too": (put(features__norm5__weight=8), r"mixes .*DenseNet.*: features\.norm5\.weight"),
    "two prefixes": (lambda state: state | {STEM.removeprefix("resnet."): state[STEM]}, f"twice.*: {STEM}"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_wrong_files_are_refused(change, message, small, tmp_path, capsys):
    torch.save(change(small.state_dict()), tmp_path / "weights.pt")
    assert_refused(capsys, tmp_path / "weights.pt", message)


@pytest.mark.parametrize("network", ["resnext50_32x4d", "wide_resnet50_2", "resnet18d", "seresnet18", "resnet50_gn"])
def test_other_resnets_of_timms_are_refused(network, tmp_path, capsys):
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in timm.create_model(network).state_dict().items()}
    torch.save({name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}, tmp_path / "weights.pt")
    assert_refused(capsys, tmp_path / "weights.pt", "torchvision's and timm's names")


def test_an_original_with_imagenets_head_is_refused_by_its_keys(tmp_path, capsys):
    state = timm.create_model("resnet18").state_dict()
    torch.save(state | {"att5.bn.weight": torch.zeros(512)}, tmp_path / "weights.pt")
    assert_refused(capsys, tmp_path / "weights.pt", "2 unexpected: fc.bias, fc.weight", "missing: att1.bn.bias")


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None])
def test_damaged_safetensors_are_refused(damage, small, tmp_path, capsys):
    source = save_safetensors(small, tmp_path)
    source.write_bytes(source.read_bytes()[:-9] if damage is None else damage)
    assert_refused(capsys, source, "is damaged")


def test_a_folder_without_weights_is_refused(tmp_path, capsys):
    (tmp_path / "resnet").mkdir()
    assert_refused(capsys, tmp_path / "resnet", r"cannot read .*model\.safetensors")


@pytest.mark.parametrize(
    "config, message",
    [
        ({"downsample_in_first_stage": True}, "downsample_in_first_stage is True"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ([], "config.json is no configuration"),
        ("{", "config.json is no configuration"),
    ],
)
def test_what_only_the_configuration_tells_is_read(config, message, small, tmp_path, capsys):
    folder = save_folder(small, tmp_path)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    assert_refused(capsys, folder, message)


def test_options_of_the_other_kind_are_refused(small, tmp_path, capsys):
    torch.save(small.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "labels.txt").write_text("dog\nrain")
    assert_refused(
        capsys, tmp_path / "weights.pt", "leave --labels out", options=["--labels", str(tmp_path / "labels.txt")]
    )
    torch.save({"att5.bn.weight": torch.zeros(8)}, tmp_path / "original.pt")
    for option in (
        ["--no_attention"],
        ["--preset", "esresnet18"],
        ["--allow_partial"],
        ["--downsample_in_bottleneck"],
    ):
        assert_refused(capsys, tmp_path / "original.pt", "no ImageNet weights", options=option)
    assert main([str(tmp_path / "weights.pt"), str(tmp_path / "out"), "--preset", "resnet"]) == 2
    assert "unknown preset 'resnet'" in capsys.readouterr().err


def test_a_densenet_without_timm_is_a_message(tmp_path, capsys, monkeypatch):
    torch.save(DenseNet(8, (2, 1)).state_dict(), tmp_path / "weights.pt")
    monkeypatch.setitem(sys.modules, "timm.models.densenet", None)
    assert main([str(tmp_path / "weights.pt"), str(tmp_path / "out")]) == 2
    assert "pip install timm" in capsys.readouterr().err and not (tmp_path / "out").exists()
