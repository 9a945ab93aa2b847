"""Parity with the original ESResNet, the network against a slow version, what transformers promises of a model."""

import copy
import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from golden import deterministic as golden
from torch import nn
from transformers import AutoModel, AutoModelForAudioClassification
from transformers.models.resnet.modeling_resnet import ResNetEmbeddings

import modeling_dls
from modeling_dls import (
    ESResNetConfig,
    ESResNetFeatureExtractor,
    ESResNetForAudioClassification,
    ESResNetForInstanceDiscrimination,
    ESResNetModel,
    three_band_spectrogram,
)
from modeling_dls.configuration_esresnet import AUTO_MAP
from modeling_dls.convert_esresnet_checkpoint import convert_state_dict
from modeling_dls.modeling_esresnet import ESResNetAttention, ESResNetStem, max_pool_to
from modeling_dls.pooling_esresnet import RowStatistics, averaged_rows

HEADS = {getattr(modeling_dls, name): getattr(transformers, auto) for name, auto in modeling_dls.MODELS.items()}
every_head = pytest.mark.parametrize("head", HEADS)
with_and_without_attention = pytest.mark.parametrize("attention", [True, False])
LAYERS = {
    "basic": {},
    "bottleneck": {"layer_type": "bottleneck"},
    "dense": {"layer_type": "bottleneck", "hidden_sizes": None, "growth_rate": 8},
}
every_layer = pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)


def tiny_config(**overrides):
    return ESResNetConfig.from_preset("tiny", **{"num_labels": 4, "embedding_dim": 32, **overrides})


def pictures(batch=2, audio_channels=1, height=33, width=61, seed=0):
    return torch.randn(batch, audio_channels, 3, height, width, generator=torch.Generator().manual_seed(seed))


def randomised(head, config, seed=0):
    """A model in evaluation mode with nothing at its initial value, batch-norm statistics included."""
    model = head(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.normal_(0, 1 if tensor.ndim == 1 else tensor[0].numel() ** -0.5, generator=generator)
    return model


def assert_same_state(model, expected):
    """Every tensor of `expected` (name -> tensor) is in the model, to the bit."""
    state = model.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


@pytest.fixture(autouse=True)
def threads(request):
    """One thread for the tiny networks, whose threads only wait for each other on a busy machine."""
    count = torch.get_num_threads()
    torch.set_num_threads(count if "original" in request.fixturenames else 1)
    yield
    torch.set_num_threads(count)


# --- Parity with the original ---


@pytest.fixture(scope="module", params=[True, False], ids=["attention", "plain"])
def original(request):
    """The original's ResNet-50 in float32 and float64, and the name of its logits in golden.json."""
    model = ESResNetForAudioClassification(ESResNetConfig(num_labels=10, attention=request.param)).eval()
    model.load_state_dict(convert_state_dict(golden.original_state_dict(request.param), model))
    logits = "ESResNetAttention_logits" if request.param else "ESResNet_logits"
    return {torch.float32: model, torch.float64: copy.deepcopy(model).double()}, logits


def test_parameter_count_is_the_originals(original):
    models, logits = original
    expected = {"ESResNetAttention_logits": 30_552_138, "ESResNet_logits": 23_528_522}[logits]
    assert models[torch.float32].num_parameters() == expected


@pytest.mark.parametrize("case", golden.CASES)
def test_logits_are_the_originals(original, case):
    models, name = original
    expected = torch.tensor([golden.CASES[case][name]], dtype=torch.float64)
    waveform = golden.waveform(case)
    single = ESResNetFeatureExtractor()(waveform, sampling_rate=golden.RATE, return_tensors="pt")["input_values"]
    double = three_band_spectrogram(torch.from_numpy(waveform).double())[None]
    with torch.no_grad():
        logits = models[torch.float32](single).logits
        precise = models[torch.float64](double).logits
    assert logits.dtype == torch.float32 and precise.dtype == torch.float64
    assert (logits - expected).abs().max() <= 2e-4 * expected.abs().max()
    assert (precise - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("case", golden.CASES)
def test_spectrogram_is_the_originals(case):
    expected = golden.CASES[case]
    features = ESResNetFeatureExtractor()(golden.waveform(case), sampling_rate=golden.RATE, return_tensors="pt")
    spectrogram = features["input_values"]
    assert spectrogram.dtype == torch.float32
    assert list(spectrogram.shape) == expected["spectrogram_shape"]
    above_zero = floor = 0
    for *index, decibel in expected["spectrogram_db_points"]:
        if decibel > 0:
            above_zero += 1
            assert abs(spectrogram[0][tuple(index)] - decibel) <= 0.01, index
        elif decibel == -180:
            floor += 1
            assert spectrogram[0][tuple(index)] == -180, index
    assert above_zero >= 20
    assert floor > 0 or case != "half_silent_mono_5s"
    # In float64, where quiet cells are exact too, so that the mean sees every cell of a band.
    precise = three_band_spectrogram(torch.from_numpy(golden.waveform(case)).double())
    np.testing.assert_allclose(precise.mean(dim=(2, 3)), expected["spectrogram_db_mean_per_band"], rtol=0, atol=1e-4)


# --- The network against a slow version ---


def slow_max_pool(x, size):
    rows, columns = x.shape[-2:]
    pooled = x.new_empty(*x.shape[:-2], *size)
    for i in range(size[0]):
        for j in range(size[1]):
            top, bottom = i * rows // size[0], -(-(i + 1) * rows // size[0])
            left, right = j * columns // size[1], -(-(j + 1) * columns // size[1])
            pooled[..., i, j] = x[..., top:bottom, left:right].amax(dim=(-2, -1))
    return pooled


def slow_esresnet(state, config, picture):
    """Pooled features of one audio channel (3, height, width), from the formulas of the paper, batch norm fixed."""

    def norm(x, name):
        shape = (-1, 1, 1)
        x = (x - state[f"{name}.running_mean"].view(shape)) / (state[f"{name}.running_var"].view(shape) + 1e-5).sqrt()
        return x * state[f"{name}.weight"].view(shape) + state[f"{name}.bias"].view(shape)

    def convolve(x, name, stride=1):
        weight = state[f"{name}.weight"]
        padding = (weight.shape[2] // 2, weight.shape[3] // 2)
        groups = x.shape[1] if "conv_depth" in name else 1
        return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, padding, groups=groups)

    def convolve_norm(x, name, stride=1):
        return norm(convolve(x, f"{name}.convolution", stride), f"{name}.normalization")

    def attend(x, size, name):
        x = convolve(convolve(slow_max_pool(x, size), f"{name}.conv_depth"), f"{name}.conv_point")
        return 1 / (1 + (-norm(x, f"{name}.bn")).exp())

    def norm_relu_convolve(x, norm_name, name):
        return convolve(norm(x, f"{norm_name}.normalization").clamp(min=0), name)

    def dense(x, i, depth):
        for j in range(1, depth + 1):
            name = f"stages.{i}.dense.block.denselayer{j}"
            new = norm_relu_convolve(x, f"{name}.norm1", f"{name}.conv1")
            x = torch.cat([x, norm_relu_convolve(new, f"{name}.norm2", f"{name}.conv2")], dim=1)
        name = f"stages.{i}.dense.transition"
        if i == len(config.depths) - 1:
            return norm(x, f"{name}.normalization").clamp(min=0)
        x = norm_relu_convolve(x, f"{name}.norm", f"{name}.conv")
        x = x[..., : x.shape[-2] // 2 * 2, : x.shape[-1] // 2 * 2]
        return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4

    def residual(x, i, depth):
        for j in range(depth):
            name = f"stages.{i}.residual.layers.{j}"
            stride = 2 if i and not j else 1
            shortcut = (
                convolve_norm(x, f"{name}.shortcut", stride) if f"{name}.shortcut.convolution.weight" in state else x
            )
            if config.layer_type == "basic":
                x = convolve_norm(x, f"{name}.layer.0", stride).clamp(min=0)
                x = convolve_norm(x, f"{name}.layer.1")
            else:  # v1.5: the stride is in the 3x3 convolution
                x = convolve_norm(x, f"{name}.layer.0").clamp(min=0)
                x = convolve_norm(x, f"{name}.layer.1", stride).clamp(min=0)
                x = convolve_norm(x, f"{name}.layer.2")
            x = (x + shortcut).clamp(min=0)
        return x

    x = convolve_norm(picture[None], "embedder.embedder", stride=2).clamp(min=0)
    x = F.max_pool2d(x, 3, 2, 1)
    for i, depth in enumerate(config.depths):
        stage_input = x
        x = residual(x, i, depth) if config.growth_rate is None else dense(x, i, depth)
        if config.attention:
            x = x * attend(stage_input, x.shape[-2:], f"stages.{i}.attention")
    pooled = x.mean(dim=(2, 3), keepdim=True)
    return (pooled * attend(x, (1, 1), "attention") if config.attention else pooled).flatten()


@pytest.mark.parametrize("height, width", [(32, 64), (33, 61), (70, 47)])
@every_layer
@with_and_without_attention
def test_network_equals_a_slow_version(attention, layers, height, width):
    config = tiny_config(attention=attention, depths=(2, 1, 1, 2), **layers)
    model = randomised(ESResNetModel, config).double()
    x = pictures(2, 2, height, width).double()
    expected = torch.stack([sum(slow_esresnet(model.state_dict(), config, one) for one in clip) for clip in x])
    torch.testing.assert_close(model(x).pooler_output, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("act", [None, "asinh"])
@pytest.mark.parametrize("height, width", [(32, 64), (70, 47), (5, 9)])
def test_statistics_equal_a_slow_version(height, width, act):
    model = randomised(ESResNetModel, tiny_config(pooling="statistics", pooler_act=act)).double()
    x = pictures(2, 2, height, width).double()
    outputs = model(x, output_hidden_states=True)
    state = model.state_dict()
    for clip in range(2):
        numbers = []
        pictures_of_clip = [x[clip], *(stage[clip].detach() for stage in outputs.hidden_states)]
        for picture, rows in zip(pictures_of_clip, (16, 8, 8, 4, 2, 1), strict=True):
            old, frames = picture.shape[2:]  # of (audio channels, channels, height, width)
            kept = [
                picture[:, :, i * old // rows : -(-(i + 1) * old // rows)].numpy().mean(axis=2) for i in range(rows)
            ]
            kept = np.stack(kept, axis=2)
            change = [np.abs(kept[..., t] - kept[..., t - 1]) for t in range(1, frames)] or [np.zeros(kept.shape[:3])]
            for statistic in (kept.mean(3), np.sqrt(kept.var(3) + 1e-4), kept.max(3), np.mean(change, axis=0)):
                numbers += statistic.sum(axis=0).flatten().tolist()
        mean, variance = state["pooling.norm.running_mean"].numpy(), state["pooling.norm.running_var"].numpy()
        expected = (np.array(numbers) - mean) / np.sqrt(variance + 1e-5)
        expected = np.arcsinh(expected) if act else expected
        np.testing.assert_allclose(outputs.pooler_output[clip].detach().numpy(), expected, rtol=1e-9, atol=1e-9)
    assert outputs.pooler_output.shape[1] == model.config.hidden_size == 4 * (16 * 3 + 8 * (16 + 4 * 16))


def slow_row_statistics(picture):
    """(batch, channels, height, width) -> (batch, 4, channels, height), by torch's own operators."""
    picture = picture if picture.dtype == torch.float64 else picture.float()
    variance, mean = torch.var_mean(picture, dim=3, correction=0)
    change = picture.diff(dim=3).abs().sum(dim=3) / max(picture.shape[3] - 1, 1)
    return torch.stack([mean, (variance + 1e-4).sqrt(), picture.amax(dim=3), change], dim=1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(3, 5, 4, 7), (2, 4, 1, 6), (2, 1, 3, 4), (2, 3, 4, 1)])
def test_row_statistics_have_the_gradients_that_finite_differences_have(size, layout):
    x = torch.randn(size, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    assert torch.autograd.gradcheck(RowStatistics.apply, x)
    torch.testing.assert_close(RowStatistics.apply(x), slow_row_statistics(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_row_statistics_equal_a_slow_version(dtype, tolerance, layout):
    """Frames that share a maximum, frames that do not change, and rows where nothing does, included."""
    x = torch.randn(4, 6, 5, 33).relu() + 3
    x[0], x[1, 2], x[2, ..., 10:20] = 3, 5, 0
    x = x.to(dtype, memory_format=layout).requires_grad_()
    ours, slow = RowStatistics.apply(x), slow_row_statistics(x)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, slow, rtol=1e-5, atol=1e-5)
    of_statistics = torch.randn(4, 4, 6, 5)
    gradient, expected = (torch.autograd.grad(found, x, of_statistics)[0] for found in (ours, slow))
    assert gradient.dtype == dtype and gradient.is_contiguous(memory_format=layout)
    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [16, 8, 5, 3, 1, 40])
def test_averaged_rows_are_adaptive_average_pooling(rows):
    x = torch.randn(2, 3, 16, 7, dtype=torch.float64)
    torch.testing.assert_close(averaged_rows(x, rows), F.adaptive_avg_pool2d(x, (rows, 7)), rtol=1e-12, atol=1e-12)


def test_statistics_of_constant_pictures_have_gradients():
    model = ESResNetForInstanceDiscrimination(tiny_config(pooling="statistics")).train()
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = model(torch.zeros(3, 1, 3, 32, 64)).embeddings
    assert embeddings.dtype == torch.float32
    (embeddings * torch.randn(3, 32)).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    whole = model.eval().to(torch.bfloat16)(torch.zeros(3, 1, 3, 32, 64, dtype=torch.bfloat16))
    assert whole.pooler_output.dtype == torch.bfloat16


@pytest.mark.parametrize("size", [(8, 12), (4, 6), (2, 12), (5, 7), (1, 1), (3, 12)])
def test_max_pool_equals_a_slow_version(size):
    x = torch.randn(2, 3, 8, 12)
    assert torch.equal(max_pool_to(x, size), slow_max_pool(x, size))


def test_attention_kernels_alternate_and_the_head_looks_both_ways():
    model = ESResNetModel(ESResNetConfig.from_preset("esresnet18"))
    kernels = [m.conv_depth.kernel_size for m in model.modules() if isinstance(m, ESResNetAttention)]
    assert kernels == [(3, 1), (1, 5), (3, 1), (1, 5), (3, 5)]
    widths = [
        (m.conv_depth.in_channels, m.conv_point.out_channels) for m in model.modules() if hasattr(m, "conv_depth")
    ]
    assert widths == [(64, 64), (64, 128), (128, 256), (256, 512), (512, 512)]


def test_audio_channels_are_summed_after_pooling():
    model = randomised(ESResNetForAudioClassification, tiny_config())
    stereo = pictures(3, 2)
    with torch.no_grad():
        both = model.esresnet(stereo).pooler_output
        left, right = (model.esresnet(stereo[:, i : i + 1]).pooler_output for i in (0, 1))
        logits = model(stereo).logits
    torch.testing.assert_close(both, left + right)
    torch.testing.assert_close(logits, F.linear(left + right, model.classifier.weight, model.classifier.bias))


def test_clips_of_a_batch_are_independent_in_evaluation():
    model = randomised(ESResNetForAudioClassification, tiny_config())
    x = pictures(3, 2)
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, torch.cat([model(clip[None]).logits for clip in x]))


@pytest.mark.parametrize("kernel_size", [(3, 1), (1, 5), (3, 5)])
def test_the_depthwise_convolution_is_one_in_value_and_gradient(kernel_size):
    attention = ESResNetAttention(6, 8, kernel_size).double()
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(3, 6, 4, 9, dtype=torch.float64).to(memory_format=layout).requires_grad_()
        outputs = attention.depthwise(x), attention.conv_depth(x)
        by_output = torch.randn_like(x)
        variables = (x, *attention.conv_depth.parameters())
        ours, expected = ([y, *torch.autograd.grad(y, variables, by_output)] for y in outputs)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
        assert ours[0].is_contiguous(memory_format=layout)


def test_the_stem_is_transformers_in_value_and_gradient_where_a_maximum_permits_it():
    torch.manual_seed(0)
    ours = ESResNetModel(tiny_config()).embedder
    theirs = ResNetEmbeddings(tiny_config())
    theirs.load_state_dict(ours.state_dict())
    assert type(ours) is ESResNetStem and type(ESResNetModel(tiny_config(hidden_act="gelu")).embedder) is type(theirs)
    x = torch.randn(4, 3, 33, 61)
    by_output, found = torch.randn(4, 16, 9, 16), []
    for stem in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            stem(x).backward(by_output.bfloat16())
        with torch.no_grad():
            found.append([stem(x), stem.eval()(x), *stem.state_dict().values(), *(p.grad for p in stem.parameters())])
    torch.testing.assert_close(*found, rtol=0, atol=0)


# --- Configuration ---


def test_default_config_is_the_papers_network():
    config = ESResNetConfig()
    assert config.to_dict() == ESResNetConfig.from_preset("esresnet50").to_dict()
    assert (config.hidden_sizes, config.depths, config.layer_type) == (
        [256, 512, 1024, 2048],
        [3, 4, 6, 3],
        "bottleneck",
    )
    assert (config.attention, config.embedding_dim) == (True, 128)


@every_head
def test_auto_map_is_always_complete(head, tmp_path):
    randomised(head, tiny_config()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert (tmp_path / "configuration_esresnet.py").exists()
    assert (tmp_path / "modeling_esresnet.py").exists()
    assert ESResNetConfig(auto_map={"AutoModel": "other.Model"}).auto_map == {**AUTO_MAP, "AutoModel": "other.Model"}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"layer_type": "dense"}, "layer_type must be 'basic' or 'bottleneck', not 'dense'"),
        ({"pooling": "max"}, "pooling must be 'mean' or 'statistics', not 'max'"),
        ({"pooler_act": "tanh"}, "pooler_act must be 'asinh' or None, not 'tanh'"),
        ({"depths": (1, 1)}, "hidden_sizes and depths must be equally long"),
        ({"growth_rate": 8, "hidden_sizes": None}, r"hidden_sizes \[12, 10, 9, 17\], not 'basic' and None"),
        ({"growth_rate": 8, "layer_type": "bottleneck"}, r"not 'bottleneck' and \(16, 32, 64, 128\): leave them out"),
    ],
)
def test_impossible_configs_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**settings)


def test_sizes_of_densenets():
    sizes = {"densenet121": [128, 256, 512, 1024], "densenet_small": [64, 128, 256, 512]}
    for preset, expected in sizes.items():
        config = ESResNetConfig.from_preset(preset)
        assert config.hidden_sizes == expected and config.hidden_size == expected[-1]


@every_head
def test_a_densenet_needs_timm(head, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models.densenet", None)
    with pytest.raises(ImportError, match="pip install timm"):
        head(tiny_config(**LAYERS["dense"]))
    head(tiny_config())


# --- Calls and outputs ---


@every_head
def test_forward_starts_with_input_values(head):
    assert list(inspect.signature(head.forward).parameters)[:2] == ["self", "input_values"]
    assert head.main_input_name == "input_values"


@every_head
def test_output_shapes(head):
    outputs = randomised(head, tiny_config())(pictures(2, 2))
    expected = {
        ESResNetModel: {"last_hidden_state": (2, 2, 128, 2, 2), "pooler_output": (2, 128)},
        ESResNetForAudioClassification: {"logits": (2, 4)},
        ESResNetForInstanceDiscrimination: {"embeddings": (2, 32), "pooler_output": (2, 128)},
    }[head]
    assert {name: tuple(value.shape) for name, value in outputs.items()} == expected


@every_head
def test_hidden_states_are_the_stem_and_every_stage(head):
    model = randomised(head, tiny_config())
    x = pictures(2, 2, height=64, width=100)
    outputs = model(x, output_hidden_states=True)
    shapes = [tuple(h.shape) for h in outputs.hidden_states]
    assert shapes == [
        (2, 2, c, h, w) for c, h, w in [(16, 16, 25), (16, 16, 25), (32, 8, 13), (64, 4, 7), (128, 2, 4)]
    ]
    assert model(x).hidden_states is None
    if head is ESResNetModel:
        assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    model.config.output_hidden_states = True
    for by_config, by_argument in zip(model(x).hidden_states, outputs.hidden_states, strict=True):
        assert torch.equal(by_config, by_argument)
    assert model(x, output_hidden_states=False).hidden_states is None


def test_hidden_states_of_a_densenet_end_with_its_normalised_features():
    model = randomised(ESResNetModel, tiny_config(**LAYERS["dense"], attention=False))
    outputs = model(pictures(2, 2, height=64, width=100), output_hidden_states=True)
    shapes = [tuple(h.shape) for h in outputs.hidden_states]
    assert shapes == [(2, 2, c, h, w) for c, h, w in [(16, 16, 25), (12, 8, 12), (10, 4, 6), (9, 2, 3), (17, 2, 3)]]
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state) and (outputs.last_hidden_state >= 0).all()


@every_head
@pytest.mark.parametrize("arguments", [{}, {"output_hidden_states": True}])
def test_return_dict_false_gives_the_same_as_a_tuple(head, arguments):
    def flatten(outputs):
        return [t for o in outputs for t in (flatten(o) if isinstance(o, (tuple, list)) else [o])]

    model = randomised(head, tiny_config())
    if head is ESResNetForAudioClassification:
        arguments = {**arguments, "labels": torch.tensor([0, 3])}
    expected = flatten(model(pictures(), **arguments).to_tuple())
    by_argument = model(pictures(), **arguments, return_dict=False)
    model.config.return_dict = False
    by_config = model(pictures(), **arguments)
    for actual in (by_argument, by_config):
        assert type(actual) is tuple
        assert len(flatten(actual)) == len(expected)
        assert all(torch.equal(a, e) for a, e in zip(flatten(actual), expected, strict=True))


@every_head
def test_calls_are_deterministic_and_leave_the_input_alone(head):
    model = randomised(head, tiny_config())
    x = pictures()
    with torch.no_grad():
        first, second = model(x)[0], model(x)[0]
    assert torch.equal(first, second)
    assert torch.equal(x, pictures())


@every_head
@pytest.mark.parametrize("shape", [(3, 33, 61), (2, 3, 33, 61), (2, 1, 1, 33, 61), (2, 3, 1, 33, 61)])
def test_another_input_shape_is_refused(head, shape):
    with pytest.raises(
        ValueError, match=r"expected input_values of shape \(batch, audio_channels, 3, height, width\)"
    ):
        head(tiny_config())(torch.zeros(shape))


@every_head
def test_channels_last_gives_the_same(head):
    model = randomised(head, tiny_config())
    x = pictures(2, 2)
    expected = model(x)[0]
    model = model.to(memory_format=torch.channels_last)
    actual = model(x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 2)))[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# --- Losses and embeddings ---


def test_the_feature_encoder_can_be_frozen():
    """As run_audio_classification.py of transformers does by default."""
    model = ESResNetForAudioClassification(ESResNetConfig.from_preset("tiny", num_labels=3))
    model.freeze_feature_encoder()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_one_label_a_clip_is_cross_entropy():
    model = randomised(ESResNetForAudioClassification, tiny_config())
    labels = torch.tensor([3, 0, 1])
    outputs = model(pictures(3), labels=labels)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))
    assert model(pictures(3)).loss is None


def test_several_labels_a_clip_by_problem_type():
    config = tiny_config(problem_type="multi_label_classification")
    model = randomised(ESResNetForAudioClassification, config)
    labels = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0]])
    outputs = model(pictures(2), labels=labels)
    torch.testing.assert_close(outputs.loss, F.binary_cross_entropy_with_logits(outputs.logits, labels))
    torch.testing.assert_close(model.probabilities(outputs.logits), outputs.logits.sigmoid())
    model.config.problem_type = None
    torch.testing.assert_close(model.probabilities(outputs.logits), outputs.logits.softmax(-1))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64])
def test_embeddings_have_unit_length_in_float32_at_least(weights):
    model = randomised(ESResNetForInstanceDiscrimination, tiny_config()).to(weights)
    with torch.no_grad():
        outputs = model(pictures(5).to(weights))
    assert outputs.embeddings.dtype == (torch.float64 if weights == torch.float64 else torch.float32)
    torch.testing.assert_close(outputs.embeddings.norm(dim=-1), torch.ones(5, dtype=outputs.embeddings.dtype))
    projected = F.linear(outputs.pooler_output, model.projection.weight, model.projection.bias)
    torch.testing.assert_close(
        outputs.embeddings, F.normalize(projected.to(outputs.embeddings.dtype), dim=-1), rtol=1e-5, atol=1e-6
    )


@every_head
@every_layer
def test_bfloat16_autocast_trains(head, layers):
    torch.manual_seed(0)
    model = head(tiny_config(**layers))
    with torch.no_grad():
        expected = copy.deepcopy(model).train()(pictures(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model.train()(pictures(4))
        value = outputs.pooler_output if head is ESResNetModel else outputs[0]
    if head is ESResNetForInstanceDiscrimination:
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.norm(dim=-1), torch.ones(4))
    # The same computation, as far as eight bits of mantissa through batch norm tell.
    reference = expected.pooler_output if head is ESResNetModel else expected[0]
    assert F.cosine_similarity(value.float(), reference).min() > 0.9
    (value.float() * torch.randn(value.shape)).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


# --- Saving, loading, initialising ---


@every_head
@with_and_without_attention
@every_layer
def test_a_saved_model_loads_the_same_through_its_auto_class(head, attention, layers, tmp_path):
    model = randomised(head, tiny_config(attention=attention, **layers))
    model.save_pretrained(tmp_path)
    loaded = HEADS[head].from_pretrained(tmp_path)
    assert type(loaded) is head
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert_same_state(loaded, model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(loaded(pictures())[0], model(pictures())[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loaded_head", HEADS)
@pytest.mark.parametrize("saved_head", HEADS)
def test_the_backbone_moves_between_heads(saved_head, loaded_head, tmp_path):
    saved = randomised(saved_head, tiny_config())
    saved.save_pretrained(tmp_path)
    model, report = HEADS[loaded_head].from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is loaded_head
    assert_same_state(model.base_model, saved.base_model.state_dict())
    own = {ESResNetForAudioClassification: "classifier", ESResNetForInstanceDiscrimination: "projection"}
    missing = {f"{own[loaded_head]}.{kind}" for kind in ("weight", "bias")} if loaded_head in own else set()
    assert set(report["missing_keys"]) == (set() if loaded_head is saved_head else missing)


def assert_initial(name, module):
    """What ESResNet starts from; statistics within five standard errors."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.weight.shape[0] * module.weight[0, 0].numel()
        n = module.weight.numel()
        std = (2 / fan_out) ** 0.5
        assert abs(module.weight.std() / std - 1) < 5 / (2 * n) ** 0.5, name
        assert abs(module.weight.mean()) < 5 * std / n**0.5, name
        assert module.bias is None or not module.bias.any(), name
    elif isinstance(module, nn.BatchNorm2d):
        assert (module.weight == 1).all() and not module.bias.any(), name
        assert (module.running_var == 1).all() and not module.running_mean.any(), name
        assert module.num_batches_tracked == 0, name
    elif isinstance(module, nn.Linear):
        bound = module.in_features**-0.5
        assert bound * 0.9 < module.weight.abs().max() <= bound, name
        assert abs(module.weight.std() / (bound / 3**0.5) - 1) < 0.15, name
        assert 0 < module.bias.abs().max() <= bound, name


@every_head
@every_layer
def test_a_new_model_is_initialised(head, layers):
    torch.manual_seed(0)
    for name, module in head(tiny_config(**layers)).named_modules():
        assert_initial(name, module)


@every_layer
def test_what_a_checkpoint_lacks_is_initialised_and_what_it_has_is_kept(layers, tmp_path):
    torch.manual_seed(0)
    saved = randomised(ESResNetModel, tiny_config(attention=False, **layers))
    saved.save_pretrained(tmp_path)
    # from_pretrained builds on the meta device: what is not filled in afterwards is whatever the memory held.
    model = ESResNetForAudioClassification.from_pretrained(tmp_path, attention=True, num_labels=9)
    statistics = ESResNetModel.from_pretrained(tmp_path, pooling="statistics").pooling.norm
    assert not statistics.running_mean.any() and (statistics.running_var == 1).all()
    assert_same_state(model.esresnet, saved.state_dict())
    new = [m for m in model.named_modules() if "attention" in m[0] or m[0] == "classifier"]
    assert len(new) == 5 * 4 + 1
    for name, module in new:
        assert_initial(name, module)
    assert all(tensor.device.type == "cpu" and torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert torch.isfinite(model(pictures()).logits).all()


def test_half_loaded_modules_keep_the_loaded_half(tmp_path):
    saved = randomised(ESResNetModel, tiny_config())
    lost = {"attention.conv_point.bias", "attention.bn.running_var", "attention.bn.weight"}
    saved.save_pretrained(tmp_path, state_dict={k: v for k, v in saved.state_dict().items() if k not in lost})
    model = ESResNetModel.from_pretrained(tmp_path)
    assert_same_state(model, {name: tensor for name, tensor in saved.state_dict().items() if name not in lost})
    assert not model.attention.conv_point.bias.any()
    assert (model.attention.bn.running_var == 1).all() and (model.attention.bn.weight == 1).all()


def test_a_new_label_set_needs_ignore_mismatched_sizes(tmp_path):
    torch.manual_seed(0)
    saved = randomised(ESResNetForAudioClassification, tiny_config())
    saved.save_pretrained(tmp_path)
    labels = {"id2label": {0: "dog", 1: "rain"}, "label2id": {"dog": 0, "rain": 1}}
    with pytest.raises(RuntimeError, match="size"):
        AutoModelForAudioClassification.from_pretrained(tmp_path, **labels)
    model = AutoModelForAudioClassification.from_pretrained(tmp_path, **labels, ignore_mismatched_sizes=True)
    assert model.config.num_labels == 2 and model.config.id2label == labels["id2label"]
    assert model.classifier.weight.shape == (2, 128)
    assert_initial("classifier", model.classifier)
    assert_same_state(model.esresnet, saved.esresnet.state_dict())


def test_a_checkpoint_of_another_preset_is_refused(tmp_path):
    randomised(ESResNetModel, tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size"):
        AutoModel.from_pretrained(tmp_path, config=ESResNetConfig.from_preset("esresnet18"))


# --- Training ---


def training_step(model, x, labels=None):
    """Loss, gradients and buffers after one forward and backward in training mode."""
    model.train()
    loss = model(x, labels=labels).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return loss.detach(), gradients, dict(model.named_buffers())


@with_and_without_attention
@every_layer
def test_every_parameter_learns_and_statistics_follow(attention, layers):
    torch.manual_seed(0)
    model = ESResNetForAudioClassification(tiny_config(attention=attention, **layers))
    _, gradients, buffers = training_step(model, pictures(4, 2), torch.tensor([0, 1, 2, 3]))
    for name, gradient in gradients.items():
        assert gradient is not None and torch.isfinite(gradient).all(), name
        # A bias just before batch norm is normalised away; everything else has to move.
        assert gradient.any() or name.endswith(("conv_depth.bias", "conv_point.bias")), name
    assert all(value == 1 for name, value in buffers.items() if name.endswith("num_batches_tracked"))
    assert all(value.any() for name, value in buffers.items() if name.endswith("running_mean"))


# Later versions 5 of transformers warn of a new name; this one works in all of them.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("arguments", [None, {"use_reentrant": True}, {"use_reentrant": False}])
@with_and_without_attention
@every_layer
def test_gradient_checkpointing_changes_nothing_but_memory(attention, arguments, layers):
    torch.manual_seed(0)
    plain = ESResNetForAudioClassification(tiny_config(attention=attention, **layers))
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    assert checkpointed.is_gradient_checkpointing
    runs = []
    for stage in checkpointed.esresnet.stages:
        next(stage.children()).register_forward_pre_hook(lambda *_: runs.append(1))
    labels = torch.tensor([0, 1, 2, 3])
    for seed in (0, 1):  # the second step would see what the first one left behind
        expected = training_step(plain, pictures(4, seed=seed), labels)
        actual = training_step(checkpointed, pictures(4, seed=seed), labels)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        assert len(runs) == 8 * (seed + 1)  # forward, and once more in backward: it was in fact on
    with torch.no_grad():
        assert torch.equal(checkpointed.eval()(pictures()).logits, plain.eval()(pictures()).logits)
    checkpointed.gradient_checkpointing_disable()
    assert not checkpointed.is_gradient_checkpointing


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing_under_autocast_with_frozen_batch_norm():
    torch.manual_seed(0)
    plain = randomised(ESResNetForAudioClassification, tiny_config())
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    results = []
    for model in (plain, checkpointed):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(pictures(4), labels=torch.tensor([0, 1, 2, 3])).loss
        loss.backward()
        results.append(({n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_training_on_a_single_clip_needs_a_network_without_attention():
    # Batch norm has nothing to normalise in the head's 1x1 map; two audio channels are two values already.
    model = ESResNetForAudioClassification(tiny_config()).train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(pictures(1))
    model(pictures(1, audio_channels=2))
    ESResNetForAudioClassification(tiny_config(attention=False)).train()(pictures(1))


# Repeated inference


@every_head
@with_and_without_attention
@every_layer
def test_folded_batch_norm_gives_the_same(head, attention, layers):
    model = randomised(head, tiny_config(attention=attention, **layers)).double()
    values = pictures().double()
    with torch.no_grad():
        expected = model(values)
        assert model.fold_batch_norm() is model and model.fold_batch_norm() is model  # again changes nothing
        found = model(values)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
    kept = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    # In a DenseNet, those of concatenated features: one a layer, and one a stage.
    assert all("denselayer1.norm1." in name or ".transition." in name for name in kept)
    assert len(kept) == (8 if "growth_rate" in layers else 0)


def test_a_folded_model_is_neither_trained_nor_saved(tmp_path):
    model = ESResNetForAudioClassification(tiny_config())
    with pytest.raises(ValueError, match="call eval"):
        model.train().fold_batch_norm()
    model.eval().fold_batch_norm()
    with pytest.raises(ValueError, match="load it anew to train it"):
        model.train()
    with pytest.raises(ValueError, match="load it anew to save it"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert model.eval() is model


# Start-up

LATE = """
import sys
from transformers import AutoModelForAudioClassification
before = set(sys.modules)
import modeling_dls
added = {name.partition(".")[0] for name in set(sys.modules) - before}
assert added <= {"modeling_dls", "transformers", "torchaudio"}, added  # the latter: see torchaudio_guard
assert "transformers.modeling_utils" not in sys.modules and "modeling_dls.modeling_esresnet" not in sys.modules
config = modeling_dls.ESResNetConfig.from_preset("tiny", num_labels=3)
model = AutoModelForAudioClassification.from_config(config)
assert type(model) is modeling_dls.ESResNetForAudioClassification and model.classifier.out_features == 3
try:
    modeling_dls.ESResNetForTyping
except AttributeError as error:
    print(error)
"""


def test_importing_the_package_does_not_import_the_models():
    ended = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, check=False)
    assert ended.stdout == "module 'modeling_dls' has no attribute 'ESResNetForTyping'\n", ended.stderr
