"""`dls export`: a fine-tuned network -> one ONNX file from waveform to logits, and what runs it without torch."""

import copy
import json
import logging
import math
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import torch
from datasets import Dataset
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn

from datasets_scripts import load_corpus
from datasets_scripts.errors import UserError
from datasets_scripts.files import files_moved_into_place
from dls_training.licences import licence_of
from dls_training.record import Record
from dls_training.runtime import start_logging
from dls_training.waveforms import sound_blocks, stream_windows

from . import run_onnx
from .network import Classifier
from .settings import ExportSettings
from .spectrogram_graph import GraphSpectrogram

logger = logging.getLogger("dls")

OPSET = 21  # the first with numbers of four bits
LARGEST_DIFFERENCE = 1e-4  # from torch, in largest logits
RUNNER = "run_onnx.py"
CALIBRATION_CLIPS = 256
# Only what a convolution multiplies is rounded: what it gives is pooled feature by feature, and one scale for all of
# its channels would cost accuracy.
EXACT_OUTPUTS = {"QuantizeBias": False, "OpTypesToExcludeOutputQuantization": ["Conv"], "DedicatedQDQPair": True}
MOSTLY_ZEROS, LARGE = 0.75, 4096  # from what share, and from how many numbers on, a matrix is stored as sparse


class Standardisation(nn.Module):
    """Batch norm without scale and shift as one difference and one product."""

    def __init__(self, norm: nn.BatchNorm1d):
        super().__init__()
        self.running_mean = nn.Buffer(norm.running_mean)
        self.scale = nn.Buffer((norm.running_var + norm.eps).rsqrt())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.running_mean) * self.scale


class WaveformClassifier(nn.Module):
    """A classifier with its feature extractor, for waveforms of one length."""

    def __init__(self, trained: Classifier):
        super().__init__()
        self.spectrogram = GraphSpectrogram(trained.extractor, trained.length)
        self.network = copy.deepcopy(trained.model.base_model)
        self.classifier = trained.model.classifier
        if self.network.pooling is not None:
            self.network.pooling.norm = Standardisation(self.network.pooling.norm)
        self.to("cpu", memory_format=torch.contiguous_format).eval()

    def forward(self, waveform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, samples), or (batch, audio_channels, samples) -> (batch, labels) and (batch, hidden_size)."""
        waveform = waveform if waveform.ndim == 3 else waveform[:, None]
        embedding = self.network(self.spectrogram(waveform)).pooler_output
        return self.classifier(embedding), embedding


def input_shape(trained: Classifier) -> tuple[int, ...]:
    """Of a waveform, without the batch."""
    channels = trained.extractor.audio_channels
    return (trained.length,) if channels == 1 else (channels, trained.length)


def to_onnx(trained: Classifier):
    """The network as an `onnx.ModelProto`, without what only the exporter's own tools read."""
    for name in ("onnxscript", "onnx_ir"):  # every step of their optimization would be a line
        logging.getLogger(name).setLevel(logging.WARNING)
    batch = torch.export.Dim("batch")
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                WaveformClassifier(trained), (torch.zeros(2, *input_shape(trained)),), dynamo=True, verbose=False,
                opset_version=OPSET, input_names=["waveform"], output_names=["logits", "embedding"],
                dynamic_shapes=({0: batch},),
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        what = str(error).strip().splitlines()[-1]
        raise UserError(f"{trained.source}: torch cannot export this network ({what})") from error
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for part in (model.graph, model):
        del part.metadata_props[:]
        part.doc_string = ""
    del model.graph.value_info[:], model.functions[:]
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "labels"  # of which others can be learned
    model.producer_name, model.producer_version = "dls export", ""
    onnx.checker.check_model(model)
    return model


def shorten_names(model) -> None:
    """Of all tensors but those that somebody asks for."""
    graph, short = model.graph, {"": ""}
    known = [*(each.name for each in (*graph.input, *graph.output)), run_onnx.WEIGHT, run_onnx.BIAS, run_onnx.SCALE]
    short |= {name: name for name in known}
    for named in (graph.initializer, *(node.output for node in graph.node)):
        for name in (getattr(each, "name", each) for each in named):
            short.setdefault(name, f"t{len(short)}")
    for tensor in graph.initializer:
        tensor.name = short[tensor.name]
    for node in graph.node:
        node.name = ""
        node.input[:], node.output[:] = ([short[name] for name in names] for names in (node.input, node.output))


def store_sparse(model) -> None:
    """Large matrices that are mostly zeros (mel filters, resizing) as their other numbers alone."""
    for tensor in list(model.graph.initializer):  # which shrinks
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.size > LARGE and (values == 0).mean() > MOSTLY_ZEROS:
            places = np.flatnonzero(values)
            own = onnx.numpy_helper.from_array(values.flat[places], tensor.name)
            indices = onnx.numpy_helper.from_array(places.astype(np.int64), f"{tensor.name}_places")
            model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(own, indices, values.shape))
            model.graph.initializer.remove(tensor)


def facts(trained: Classifier) -> dict:
    """What whoever runs the file has to know, as JSON takes it; see `run_onnx`."""
    record = Record.read(trained.source) or Record.of(trained.source)
    claimed = licence_of(record)
    stages = [
        {name: stage.facts.get(name) for name in ("name", "task", "clips", "excluded_folds", "seed", "command")}
        for stage in record.stages
    ]
    return {
        "layout": run_onnx.LAYOUT, "labels": trained.labels, "multi_label": trained.multi_label,
        "thresholds": thresholds(trained),
        "sampling_rate": trained.extractor.sampling_rate, "length": trained.length,
        "audio_channels": trained.extractor.audio_channels, "record": stages, "weights": trained.digest,
        "license": claimed.get("license_name", claimed.get("license")),
    }  # fmt: skip


def thresholds(trained: Classifier) -> list[float] | None:
    """From which score on each label holds, where the checkpoint says."""
    said = trained.threshold
    if isinstance(said, dict):
        return [float(said[label]) for label in trained.labels]
    return None if said is None else np.broadcast_to(np.array(said, float), len(trained.labels)).tolist()


def write(model, own: dict, path: Path) -> None:
    """The file, with the facts in its metadata."""
    shorten_names(model)
    store_sparse(model)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {run_onnx.KEY: json.dumps(own, ensure_ascii=False)})
    path.write_bytes(model.SerializeToString(deterministic=True))


def test_waveforms(trained: Classifier) -> np.ndarray:
    """What differs in every respect that a spectrogram knows: (6, *input_shape), float32.

    Noise, loud and faint, a rising tone, clicks, a short sound in padding, silence. Where levels have no floor, tones
    get one of noise: between their lines a network would hear what its own transform rounded.
    """
    samples, random = trained.length, np.random.default_rng(0)
    time = np.arange(samples) / samples
    noise = 0.1 * random.standard_normal((2, samples))
    floor = 0 if trained.extractor.do_normalize else 1e-3 * noise[1]
    tone = 0.5 * np.sin(0.25 * np.pi * samples * time**2)
    clicks = (np.arange(samples) % 5000 == 0).astype(float)
    padded = np.where(abs(time - 0.5) < 0.05, tone, tone[samples // 2])
    sounds = np.stack([noise[0], 1e-3 * noise[1], tone + floor, clicks, padded + floor, 0 * tone]).astype(np.float32)
    return sounds.reshape(6, *[1] * (len(input_shape(trained)) - 1), samples) * np.ones(
        input_shape(trained), np.float32
    )


def difference(trained: Classifier, exported: run_onnx.Network) -> float:
    """Between the file's logits and torch's: the largest, as a share of a sound's largest logit."""
    waveforms = test_waveforms(trained)
    channels = trained.extractor.audio_channels
    expected = trained.outputs(torch.from_numpy(waveforms).reshape(len(waveforms), channels, -1)).logits.numpy()
    together = exported(waveforms)[0]
    alone = np.concatenate([exported(waveform[None])[0] for waveform in waveforms])
    largest = abs(expected).max(axis=1)
    return float(max((abs(found - expected).max(axis=1) / largest).max() for found in (together, alone)))


def check(trained: Classifier, exported: run_onnx.Network) -> float:
    """The `difference`.

    Raises:
        UserError: if it is too large for the file to be used in the network's place.
    """
    found = difference(trained, exported)
    if not found <= LARGEST_DIFFERENCE:
        raise UserError(
            f"{trained.source}: the exported file's logits differ from torch's by {found:.1e} of the largest, more "
            f"than {LARGEST_DIFFERENCE:g}: nothing is written. Please report it with the versions of torch and onnx"
        )
    return found


def first_window(trained: Classifier, row: dict) -> np.ndarray:
    """Of a corpus's clip: (1, *input_shape)."""
    blocks = sound_blocks(row["audio"], trained.extractor, (row.get("clip_start", 0.0), row.get("clip_end", math.inf)))
    _, windows = next(stream_windows(blocks, trained.length))
    return windows[:1].numpy().reshape(1, *input_shape(trained))


def quantised(model, calibration: Iterable[np.ndarray], folder: Path):
    """The model with convolutions in whole numbers of 8 bits, and the last layer in 4, some neighbours to a scale.

    What is before the network and what pools its stages' outputs stays as it is: small, and not to be rounded.

    Args:
        model: From `to_onnx`.
        calibration: Inputs that show how large activations become.
        folder: For what is written on the way.
    """

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.waveforms = iter(calibration)

        def get_next(self):
            waveform = next(self.waveforms, None)
            return None if waveform is None else {"waveform": waveform}

    path = folder / "quantised.onnx"
    logging.disable(logging.WARNING)  # it advises steps that the exporter has done
    try:
        quantize_static(
            model, path, Reader(), quant_format=QuantFormat.QDQ, op_types_to_quantize=["Conv"], per_channel=True,
            weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8, extra_options=EXACT_OUTPUTS,
        )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
    model = onnx.load(path)
    path.unlink()
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == run_onnx.WEIGHT)
    whole, scale = run_onnx.in_four_bits(onnx.numpy_helper.to_array(weight))
    weight.ParseFromString(run_onnx.tensor(run_onnx.WEIGHT, whole))
    model.graph.initializer.append(onnx.numpy_helper.from_array(scale, run_onnx.SCALE))
    (last,) = (node for node in model.graph.node if run_onnx.WEIGHT in node.input)
    last.input[1], stored = f"{run_onnx.WEIGHT}.float", [run_onnx.WEIGHT, run_onnx.SCALE]
    back = onnx.helper.make_node("DequantizeLinear", stored, [last.input[1]], axis=1, block_size=run_onnx.GROUP)
    model.graph.node.insert(list(model.graph.node).index(last), back)
    halve_vectors(model)
    return model


def halve_vectors(model) -> None:
    """Long vectors (what pooled features are standardised by) as half precision."""
    for tensor in list(model.graph.initializer):
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 1 and tensor.dims[0] >= LARGE:
            name, values = tensor.name, onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, f"{name}.half"))
            cast = onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT)
            model.graph.node.insert(0, cast)


def rounding_costs(trained: Classifier, clips: Dataset, exact: run_onnx.Network, rounded: run_onnx.Network) -> dict:
    """What 8 bits change: `same_answer`, the share of clips whose first window is called the same; and, of those with
    a label that the network knows, `accuracy` with 8 bits and what was `lost`.
    """
    names, same, right = clips.features["label"].names, [], []
    for row in clips:
        waveform = first_window(trained, row)
        before, after = (trained.labels[network(waveform)[0].argmax()] for network in (exact, rounded))
        same.append(before == after)
        if row["label"] is not None and names[row["label"]] in trained.labels:
            right.append([name == names[row["label"]] for name in (before, after)])
    found = {"clips": len(same), "same_answer": float(np.mean(same))}
    if right:
        before, after = np.mean(right, axis=0).tolist()
        found |= {"labelled": len(right), "accuracy": after, "lost": before - after}
    return found


def write_rounded(trained: Classifier, model, own: dict, path: Path, exact: run_onnx.Network, folder: Path) -> None:
    """The file with 8 bits, and what that costs in its metadata and in words."""
    clips = load_corpus("audiofolder", folder, skip_unreadable=True)
    chosen = np.linspace(0, len(clips) - 1, min(len(clips), CALIBRATION_CLIPS)).round().astype(int)
    rounded = quantised(model, (first_window(trained, clips[int(row)]) for row in chosen), path.parent)
    write(copy.deepcopy(rounded), own, path)
    others = np.setdiff1d(np.arange(len(clips)), chosen)
    measured = clips.select(others if len(others) else chosen)
    costs = rounding_costs(trained, measured, exact, run_onnx.Network(path))
    write(rounded, own | {"int8": costs}, path)
    lost = f"; accuracy {costs['accuracy']:.4f}, {costs['lost']:.4f} lost" if "lost" in costs else ""
    logger.info(f"8 bits, {costs['clips']} clips: {costs['same_answer']:.4f} called the same{lost}")


def main(settings: ExportSettings) -> None:
    """Runs `dls export`.

    Raises:
        UserError: naming what the user can mend.
    """
    start_logging(logging.INFO)
    trained = Classifier(settings.run, None, "no")
    model, own = to_onnx(trained), facts(trained)
    with files_moved_into_place(settings.output.parent) as folder:
        path = folder / settings.output.name
        write(copy.deepcopy(model), own, path)
        exact = run_onnx.Network(path)
        logger.info(f"differs from torch by {check(trained, exact):.1e} of the largest logit")
        if settings.int8:
            write_rounded(trained, model, own, path, exact, settings.calibration)
        size = path.stat().st_size
        shutil.copy2(run_onnx.__file__, folder / RUNNER)
    logger.info(
        f"{settings.output}: {size / 1e6:.2f} MB, windows of {trained.seconds:g} s; {RUNNER} beside it runs it"
    )
