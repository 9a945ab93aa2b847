"""ESResNet model configuration: the network only. Signal settings live in the feature extractor."""

from transformers import PretrainedConfig

from .presets_esresnet import preset

# Every checkpoint loads through any of these, whichever head it was saved with: this package adds its models here.
AUTO_MAP = {"AutoConfig": "configuration_esresnet.ESResNetConfig"}


def dense_hidden_sizes(embedding_size: int, depths: list[int], growth_rate: int) -> list[int]:
    """Output channels of a DenseNet's stages: each layer adds `growth_rate`, each transition halves (DenseNet-BC)."""
    sizes, channels = [], embedding_size
    for stage, depth in enumerate(depths, start=1):
        channels += depth * growth_rate
        if stage < len(depths):  # no transition after the last
            channels //= 2
        sizes.append(channels)
    return sizes


class ESResNetConfig(PretrainedConfig):
    r"""Configuration of an ESResNet: a ResNet over three-band spectrograms with attention in parallel with each stage.

    From Guzhov et al., "ESResNet: Environmental Sound Classification Based on Visual Domain Models".

    The names follow transformers' `ResNetConfig`, which builds the stages. With `growth_rate` they are a DenseNet's
    instead (Huang et al., "Densely Connected Convolutional Networks"; DenseNet-BC), built by timm.

    Args:
        num_channels (`int`, defaults to 3): Frequency bands of a spectrogram (the network's "colours").
        embedding_size (`int`, defaults to 64): Width of the stem.
        hidden_sizes (`list[int]`, *optional*): Output channels of each stage: `[256, 512, 1024, 2048]`, or, with
            `growth_rate`, what the layers of each stage come to.
        depths (`list[int]`, defaults to `[3, 4, 6, 3]`): Residual or dense layers in each stage.
        layer_type (`str`, defaults to `"bottleneck"`): `"bottleneck"` (ResNet-50, DenseNet) or `"basic"` (ResNet-18).
        hidden_act (`str`, defaults to `"relu"`): Activation of the residual or dense layers.
        attention (`bool`, defaults to `True`): ESResNet-Attention, or plain ESResNet.
        pooling (`str`, defaults to `"mean"`): What the heads see: the mean of the last stage's output, gated by its
            attention (ESResNet), or `"statistics"`: how the spectrogram itself and every stage's output are
            distributed over time, in a few rows of frequency, standardised by batch norm.
        pooler_act (`str`, *optional*): What becomes of that before the heads see it: `"asinh"`, which leaves usual
            values nearly as they are and takes extreme ones as logarithms; None changes nothing.
        embedding_dim (`int`, defaults to 128): Size of the projection for instance discrimination (d in the paper);
            `embedding_size` is the stem's width, as in transformers' ResNet.
        growth_rate (`int`, *optional*): Channels that each dense layer adds; None builds a ResNet.
        downsample_in_bottleneck (`bool`, defaults to `False`): Whether bottlenecks stride in the 1x1 convolution,
            as in He et al.'s first ResNets, and not in the 3x3 convolution, as in ESResNet (v1.5).
        initial_weights (`str`, *optional*): Where the weights came from before they were trained on sounds:
            `"imagenet"`; None means that they were random.

    Raises:
        ValueError: if `layer_type`, `pooling` or `pooler_act` is unknown, `hidden_sizes` and `depths` differ in
            length, or `growth_rate` goes with another `layer_type` or other `hidden_sizes`.

    Example:

    ```python
    >>> from modeling_dls import ESResNetConfig, ESResNetForAudioClassification

    >>> # The paper's network, random weights, ten classes
    >>> config = ESResNetConfig(num_labels=10)
    >>> model = ESResNetForAudioClassification(config)

    >>> # A network for a CPU
    >>> config = ESResNetConfig.from_preset("esresnet18", num_labels=10)
    ```
    """

    model_type = "esresnet"

    def __init__(
        self,
        num_channels=3,
        embedding_size=64,
        hidden_sizes=None,
        depths=(3, 4, 6, 3),
        layer_type="bottleneck",
        hidden_act="relu",
        attention=True,
        pooling="mean",
        pooler_act=None,
        embedding_dim=128,
        growth_rate=None,
        downsample_in_bottleneck=False,
        initial_weights=None,
        **kwargs,
    ):
        if layer_type not in ("basic", "bottleneck"):
            raise ValueError(f"layer_type must be 'basic' or 'bottleneck', not {layer_type!r}")
        if pooling not in ("mean", "statistics"):
            raise ValueError(f"pooling must be 'mean' or 'statistics', not {pooling!r}")
        if pooler_act not in (None, "asinh"):
            raise ValueError(f"pooler_act must be 'asinh' or None, not {pooler_act!r}")
        if growth_rate is not None:
            dense_sizes = dense_hidden_sizes(embedding_size, depths, growth_rate)
            if layer_type != "bottleneck" or (hidden_sizes is not None and list(hidden_sizes) != dense_sizes):
                raise ValueError(
                    f"growth_rate {growth_rate} makes layer_type 'bottleneck' and hidden_sizes {dense_sizes}, not "
                    f"{layer_type!r} and {hidden_sizes}: leave them out"
                )
            hidden_sizes = dense_sizes
        elif hidden_sizes is None:
            hidden_sizes = (256, 512, 1024, 2048)
        if len(hidden_sizes) != len(depths):
            raise ValueError(f"hidden_sizes and depths must be equally long, not {hidden_sizes} and {depths}")
        self.num_channels = num_channels
        self.embedding_size = embedding_size
        self.hidden_sizes = list(hidden_sizes)
        self.depths = list(depths)
        self.layer_type = layer_type
        self.hidden_act = hidden_act
        self.attention = attention
        self.pooling = pooling
        self.pooler_act = pooler_act
        self.embedding_dim = embedding_dim
        self.growth_rate = growth_rate
        self.initial_weights = initial_weights
        # transformers' ResNetStage reads these two.
        self.downsample_in_first_stage = False
        self.downsample_in_bottleneck = downsample_in_bottleneck
        kwargs["auto_map"] = AUTO_MAP | (kwargs.get("auto_map") or {})
        super().__init__(**kwargs)

    @property
    def pooled_rows(self) -> list[int]:
        """Rows of frequency in which `pooling="statistics"` keeps the spectrogram, the stem's and each stage's output.

        They halve as the stages' pictures do: 16, 8, 8, 4, 2, 1 for four stages.
        """
        stages = [2 ** (len(self.depths) - 1 - stage) for stage in range(len(self.depths))]
        return [2 * stages[0], stages[0], *stages]

    @property
    def hidden_size(self) -> int:
        """Size of the pooled feature vector."""
        if self.pooling == "mean":
            return self.hidden_sizes[-1]
        channels = [self.num_channels, self.embedding_size, *self.hidden_sizes]
        return 4 * sum(width * rows for width, rows in zip(channels, self.pooled_rows, strict=True))

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "ESResNetConfig":
        """Builds the configuration of a named network.

        Args:
            name: A key of `PRESETS` in presets_esresnet.py; `"esresnet50"` is the paper's.
            **overrides: Any argument of the constructor, `num_labels` and `id2label` included.

        Raises:
            ValueError: if the preset is unknown.
        """
        return cls(**preset(name)["network"] | overrides)


__all__ = ["ESResNetConfig"]
