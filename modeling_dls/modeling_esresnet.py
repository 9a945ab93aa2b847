"""ESResNet: stages of a ResNet or DenseNet with ESResNet's attention in parallel, summed over audio channels."""

import math
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # of one process, or synchronised over several
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
    ModelOutput,
)
from transformers.models.resnet.modeling_resnet import ResNetEmbeddings, ResNetStage
from transformers.utils.generic import can_return_tuple

from .configuration_esresnet import ESResNetConfig
from .pooling_esresnet import StatisticsPooling

# ESResNet alternates attention along frequency and along time, and looks both ways after the last stage.
STAGE_KERNELS = ((3, 1), (1, 5))
HEAD_KERNEL = (3, 5)
# Names of a batch norm and of the convolution before it, in ResNet layers, in the attention, and in DenseNet layers.
CONVOLUTION_AND_NORM = (("convolution", "normalization"), ("conv_point", "bn"), ("conv1", "norm2.normalization"))
BOTTLENECK_SIZE = 4  # times the growth rate: width of a dense layer's 1x1 convolution (DenseNet-BC)


@dataclass
class InstanceDiscriminationOutput(ModelOutput):
    """Output of [`ESResNetForInstanceDiscrimination`].

    Attributes:
        embeddings: (batch, embedding_dim), unit length, float32 at least.
        pooler_output: (batch, hidden_size).
        hidden_states: See [`ESResNetModel`].
    """

    embeddings: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


def max_pool_to(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Adaptive max-pooling of (batch, channels, height, width) to `size`, by the cheapest exact way."""
    height, width = x.shape[-2:]
    if (height, width) == tuple(size):
        return x
    if height % size[0] == 0 and width % size[1] == 0:
        return F.max_pool2d(x, (height // size[0], width // size[1]))
    if torch.compiler.is_exporting():  # ONNX has no adaptive maximum
        return _adaptive_maximum(_adaptive_maximum(x, 2, size[0]), 3, size[1])
    return F.adaptive_max_pool2d(x, size)


def _adaptive_maximum(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Adaptive max-pooling along one dimension, as maxima of picked places."""
    places = torch.arange(size, device=x.device)
    first, last = places * x.shape[dim] // size, -(-(places + 1) * x.shape[dim] // size) - 1
    picked = [x.index_select(dim, torch.minimum(first + offset, last)) for offset in range(x.shape[dim] // size + 2)]
    return torch.stack(picked).amax(dim=0)


class ESResNetAttention(nn.Module):
    """sigmoid(BN(point-wise conv(depth-wise conv(max-pool(x))))), at the size of the features it gates (ESResNet)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: tuple[int, int]):
        super().__init__()
        padding = (kernel_size[0] // 2, kernel_size[1] // 2)
        self.conv_depth = nn.Conv2d(in_channels, in_channels, kernel_size, padding=padding, groups=in_channels)
        self.conv_point = nn.Conv2d(in_channels, out_channels, kernel_size=1)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return self.bn(self.conv_point(self.depthwise(max_pool_to(x, size)))).sigmoid()

    def depthwise(self, x: torch.Tensor) -> torch.Tensor:
        convolution = self.conv_depth
        if convolution.kernel_size[0] > 1 or x.is_contiguous():
            return convolution(x)
        # Along time alone, each row is a picture of its own, which can as well stand upright, and without a copy where
        # channels come last: oneDNN is slow in the gradient of low pictures' weights.
        rows = x.permute(0, 2, 3, 1)
        upright = rows.flatten(0, 1).unsqueeze(2).permute(0, 3, 1, 2)
        weight, padding = convolution.weight.transpose(2, 3), convolution.padding[::-1]
        upright = F.conv2d(upright, weight, convolution.bias, padding=padding, groups=convolution.groups)
        return upright.permute(0, 2, 3, 1).squeeze(2).unflatten(0, rows.shape[:2]).permute(0, 3, 1, 2)


class ESResNetStem(ResNetEmbeddings):
    """transformers' stem, whose ReLU comes after the pooling, where there is a quarter to do: a maximum permits it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.embedder
        return layer.activation(self.pooler(layer.normalization(layer.convolution(x))))


class DenseStage(nn.Sequential):
    """A dense block and its transition, both timm's; after the last block, the final norm and activation instead.

    Raises:
        ImportError: if timm is not installed.
    """

    def __init__(self, config: ESResNetConfig, index: int):
        # In a try block, where transformers does not look for what a checkpoint's code needs: ResNets go without timm.
        try:
            from timm.models.densenet import DenseBlock, DenseTransition
        except ImportError as error:
            raise ImportError(f"a network with growth_rate is timm's DenseNet: pip install timm ({error})") from error

        def norm_and_activation(channels: int, **factory) -> nn.Sequential:
            # timm's own have the activation within the batch norm, and lose it where torch synchronises batch norm.
            norm = nn.BatchNorm2d(channels, **factory)
            return nn.Sequential(OrderedDict(normalization=norm, activation=ACT2FN[config.hidden_act]))

        in_channels = config.hidden_sizes[index - 1] if index else config.embedding_size
        depth, out_channels = config.depths[index], config.hidden_sizes[index]
        block = DenseBlock(depth, in_channels, BOTTLENECK_SIZE, config.growth_rate, norm_layer=norm_and_activation)
        if index < len(config.depths) - 1:
            channels = in_channels + depth * config.growth_rate
            transition = DenseTransition(channels, out_channels, norm_layer=norm_and_activation)
        else:
            transition = norm_and_activation(out_channels)
        super().__init__(OrderedDict(block=block, transition=transition))


@contextmanager
def frozen_batch_norm_statistics(module: nn.Module):
    """Batch norm normalises as before inside this context, but leaves its running statistics alone."""
    # A momentum of zero, because without tracking fewer tensors are saved for backward: checkpointing counts them.
    norms = {m: (m.momentum, m.num_batches_tracked) for m in module.modules() if isinstance(m, _BatchNorm)}
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, num_batches_tracked) in norms.items():
            norm.momentum, norm.num_batches_tracked = momentum, num_batches_tracked


class ESResNetStage(GradientCheckpointingLayer):
    """One ResNet or DenseNet stage, gated by attention on the stage's input where the configuration asks for it."""

    def __init__(self, config: ESResNetConfig, index: int):
        super().__init__()
        in_channels = config.hidden_sizes[index - 1] if index else config.embedding_size
        out_channels = config.hidden_sizes[index]
        if config.growth_rate is None:
            stride = 2 if index else 1
            self.residual = ResNetStage(config, in_channels, out_channels, stride, config.depths[index])
        else:
            self.dense = DenseStage(config, index)
        kernel_size = STAGE_KERNELS[index % len(STAGE_KERNELS)]
        self.attention = ESResNetAttention(in_channels, out_channels, kernel_size) if config.attention else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Gradient checkpointing runs a stage once more, within backward: the batch has been counted by then.
        counted = self.training and self.gradient_checkpointing and torch._C._current_graph_task_id() != -1
        with frozen_batch_norm_statistics(self) if counted else nullcontext():
            features = self.dense(x) if hasattr(self, "dense") else self.residual(x)
            return features if self.attention is None else features * self.attention(x, features.shape[-2:])


class ESResNetPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the interface for downloading and loading pre-trained models."""

    batch_norm_folded = False

    config_class = ESResNetConfig
    base_model_prefix = "esresnet"
    main_input_name = "input_values"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ESResNetStage"]  # noqa: RUF012 (transformers' own idiom)

    @torch.no_grad()
    def _init_weights(self, module):
        # transformers.initialization skips what was loaded from a checkpoint, plain nn.init would overwrite it.
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, _BatchNorm):
            if module.affine:
                init.ones_(module.weight)
                init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)

    def fold_batch_norm(self):
        """Makes each batch norm part of the convolution before it, for repeated inference; in place.

        The answers are the same but for rounding. What is left can neither be trained nor saved. In a DenseNet the
        batch norms that follow no convolution stay.

        Returns:
            The model itself.

        Raises:
            ValueError: if the model is in training mode, in which batch norm depends on the batch.
        """
        if self.training:
            raise ValueError("batch norm can only be folded in evaluation mode: call eval() first")
        modules = dict(self.named_modules())
        for name, norm in modules.items():
            for convolution, suffix in CONVOLUTION_AND_NORM:
                before = name.removesuffix(suffix) + convolution
                if isinstance(norm, _BatchNorm) and name.endswith(suffix) and before in modules:
                    self.set_submodule(before, fuse_conv_bn_eval(modules[before], norm).requires_grad_(False))
                    self.set_submodule(name, nn.Identity())
        self.batch_norm_folded = True
        return self

    def train(self, mode: bool = True):
        if mode and self.batch_norm_folded:
            raise ValueError("batch norm has been folded into this model: load it anew to train it")
        return super().train(mode)

    def save_pretrained(self, *args, **kwargs):
        if self.batch_norm_folded:
            raise ValueError("batch norm has been folded into this model: load it anew to save it")
        return super().save_pretrained(*args, **kwargs)


class ESResNetModel(ESResNetPreTrainedModel):
    """ESResNet without a head: pooled features of three-band spectrograms, summed over audio channels.

    The same network runs on each audio channel, all channels as one batch. In training, batch norm therefore sees all
    channels together, where the original ran them one after the other; in evaluation there is no difference.

    Attributes:
        config (ESResNetConfig): The network's configuration.
    """

    def __init__(self, config: ESResNetConfig):
        super().__init__(config)
        self.embedder = (ESResNetStem if config.hidden_act == "relu" else ResNetEmbeddings)(config)
        self.stages = nn.ModuleList([ESResNetStage(config, index) for index in range(len(config.depths))])
        statistics = config.pooling == "statistics"
        size = config.hidden_sizes[-1]
        self.attention = ESResNetAttention(size, size, HEAD_KERNEL) if config.attention and not statistics else None
        self.pooling = StatisticsPooling(config) if statistics else None
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """Runs the network.

        Args:
            input_values: (batch, audio_channels, 3, height, width), from [`ESResNetFeatureExtractor`].
            output_hidden_states: Whether to return the stem's and every stage's output.

        Returns:
            `last_hidden_state` (batch, audio_channels, channels, h, w), `pooler_output` (batch, hidden_size), and
            `hidden_states`, a tuple of (batch, audio_channels, channels, h, w).

        Raises:
            ValueError: if `input_values` has another number of dimensions or bands.
        """
        if input_values.ndim != 5 or input_values.shape[2] != self.config.num_channels:
            raise ValueError(
                f"expected input_values of shape (batch, audio_channels, {self.config.num_channels}, height, width), "
                f"not {tuple(input_values.shape)}: use ESResNetFeatureExtractor"
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        # Each layer gets the view that is returned, so that gradients with respect to what is returned exist.
        pictures = [input_values]
        for layer in (self.embedder, *self.stages):
            features = layer(pictures[-1].flatten(0, 1))
            pictures.append(features.unflatten(0, input_values.shape[:2]))
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=pictures[-1],
            pooler_output=self._pool(pictures),
            hidden_states=tuple(pictures[1:]) if output_hidden_states else None,
        )

    def _pool(self, pictures: list[torch.Tensor]) -> torch.Tensor:
        """The spectrogram, the stem's and every stage's output -> (batch, hidden_size), summed over audio channels."""
        if self.pooling is not None:
            pooled = self.pooling(pictures)
        else:
            x = pictures[-1].flatten(0, 1)
            pooled = x.mean(dim=(2, 3), keepdim=True)
            if self.attention is not None:
                pooled = pooled * self.attention(x, (1, 1))
            pooled = pooled.flatten(1).unflatten(0, pictures[-1].shape[:2]).sum(dim=1)
        return pooled.asinh() if self.config.pooler_act == "asinh" else pooled


class ESResNetForInstanceDiscrimination(ESResNetPreTrainedModel):
    """ESResNet with a linear projection to the unit sphere, for NPID (Wu et al., 2018) and for retrieval."""

    def __init__(self, config: ESResNetConfig):
        super().__init__(config)
        self.esresnet = ESResNetModel(config)
        self.projection = nn.Linear(config.hidden_size, config.embedding_dim)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs
    ) -> InstanceDiscriminationOutput:
        """Embeds clips on the unit sphere.

        Args:
            input_values: (batch, audio_channels, 3, height, width), from [`ESResNetFeatureExtractor`].
            output_hidden_states: See [`ESResNetModel`].

        Returns:
            `embeddings` (batch, embedding_dim) of unit length, `pooler_output`, `hidden_states`.
        """
        outputs = self.esresnet(input_values, output_hidden_states=output_hidden_states, return_dict=True)
        projected = self.projection(outputs.pooler_output)
        # Half precision is too coarse for similarities that are divided by a temperature and exponentiated.
        projected = projected if projected.dtype == torch.float64 else projected.float()
        return InstanceDiscriminationOutput(
            embeddings=F.normalize(projected, dim=-1),
            pooler_output=outputs.pooler_output,
            hidden_states=outputs.hidden_states,
        )


class ESResNetForAudioClassification(ESResNetPreTrainedModel):
    """ESResNet with a linear classifier on the pooled features."""

    def __init__(self, config: ESResNetConfig):
        super().__init__(config)
        self.loss_type = "ForSequenceClassification"  # one label a clip; regression and multi-label by problem_type
        self.esresnet = ESResNetModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def freeze_feature_encoder(self) -> None:
        """Leaves the classifier alone to be trained; transformers' example scripts call this by default."""
        self.esresnet.requires_grad_(False)

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutputWithNoAttention:
        """Classifies clips.

        Args:
            input_values: (batch, audio_channels, 3, height, width), from [`ESResNetFeatureExtractor`].
            labels: (batch,) class indices; (batch, num_labels) for a multi-label problem.
            output_hidden_states: See [`ESResNetModel`].

        Returns:
            `logits` (batch, num_labels), `loss` where labels are given, `hidden_states`.
        """
        outputs = self.esresnet(input_values, output_hidden_states=output_hidden_states, return_dict=True)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """(…, num_labels) logits -> of each class alone for a multi-label problem, else such that their sum is 1."""
        return logits.sigmoid() if self.config.problem_type == "multi_label_classification" else logits.softmax(-1)


# The list of heads, which the package reads to register and export them. A saved checkpoint carries its own code, so
# that trust_remote_code=True works where this package is not installed.
ESResNetModel.register_for_auto_class("AutoModel")
ESResNetForAudioClassification.register_for_auto_class("AutoModelForAudioClassification")
ESResNetForInstanceDiscrimination.register_for_auto_class("AutoModelForAudioXVector")
