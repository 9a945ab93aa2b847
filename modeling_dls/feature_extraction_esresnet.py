"""From waveform to `input_values`: ESResNet's three-band power spectrogram in decibels, normalisation included."""

import math

import numpy as np
import torch
from transformers import BatchFeature, FeatureExtractionMixin
from transformers.utils import PaddingStrategy, logging

from .presets_esresnet import preset
from .spectrogram_esresnet import NUM_BANDS, by_parts, power_to_decibel, three_band_power

logger = logging.get_logger(__name__)

MIN_NEW_SHARE = 0.1  # of a window that a last one must add to those before it


def fit_length(waveform: torch.Tensor, length: int) -> torch.Tensor:
    """Central crop or padding to a fixed length, as ESResNet evaluates.

    Padding repeats the mean over channels of the first and of the last sample. A crop much quieter than its clip
    (standard deviation below half) is replaced by the clip's head, or, where that is as quiet, by its tail.

    Args:
        waveform: (channels, samples).
        length: In samples.

    Returns:
        (channels, length).
    """
    surplus = waveform.shape[-1] - length
    if surplus <= 0:
        left = -surplus // 2
        fitted = waveform.new_empty(*waveform.shape[:-1], length)
        fitted[..., left : length + surplus + left] = waveform
        fitted[..., :left] = waveform[..., 0].mean()
        fitted[..., length + surplus + left :] = waveform[..., -1].mean()
        return fitted
    threshold = waveform.std() / 2
    centre = surplus // 2
    for start in (centre, 0):
        crop = waveform[..., start : start + length]
        if crop.std() >= threshold:
            return crop
    return waveform[..., surplus:]


def window_starts(samples: int, length: int, step: int | None = None) -> list[int]:
    """Where the windows of a clip begin, `step` (None: their length) after one another; [0] where one holds it.

    The last window ends with the clip, unless it would bring next to nothing new.
    """
    step = step or length
    count = 1 + max(0, math.ceil(beyond_first(samples, length) / step))
    return [0] if count == 1 else [min(i * step, samples - length) for i in range(count)]


def beyond_first(samples: int, length: int) -> float:
    """Samples that the first window leaves for others: as many windows as begin within them follow it."""
    return samples - MIN_NEW_SHARE * length - length


def evaluation_windows(waveform: torch.Tensor, length: int, step: int | None = None) -> torch.Tensor:
    """A clip from each of its `window_starts` on: (windows, channels, length). Where one holds it, it is padded
    centrally.
    """
    starts = window_starts(waveform.shape[1], length, step)
    if len(starts) == 1:
        return fit_length(waveform, length)[None]
    return torch.stack([waveform[:, start : start + length] for start in starts])


def _to_waveform(raw) -> torch.Tensor:
    """Anything array-like -> (channels, samples) float32 in +-1."""
    if isinstance(raw, torch.Tensor):
        tensor = raw.detach()
    else:
        array = np.asarray(raw)
        # torch takes no negative strides (a reversed clip), no foreign byte order, and warns of read-only memory.
        tensor = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    if tensor.is_floating_point():
        tensor = tensor.to(torch.float32)
    elif tensor.dtype in (torch.int16, torch.int32):
        tensor = tensor.to(torch.float32) / -float(torch.iinfo(tensor.dtype).min)
    elif tensor.dtype == torch.uint8:
        tensor = (tensor.to(torch.float32) - 128) / 128
    else:
        raise ValueError(
            f"cannot tell the full scale of {tensor.dtype} samples: pass floats in ±1, or uint8, int16 or int32 PCM"
        )
    if tensor.ndim == 1:
        tensor = tensor[None]
    if tensor.ndim != 2:
        raise ValueError(
            f"expected one waveform of shape (samples,) or (channels, samples), not {tuple(tensor.shape)}"
        )
    if tensor.numel() == 0:
        raise ValueError(f"the waveform is empty: expected at least one sample, not shape {tuple(tensor.shape)}")
    if tensor.shape[0] > tensor.shape[1]:
        raise ValueError(
            f"a waveform of shape {tuple(tensor.shape)} has more channels than samples: expected (channels, samples), "
            "transpose it"
        )
    lowest, highest = torch.stack(tensor.aminmax()).tolist()  # NaN where any sample is NaN
    if not math.isfinite(highest - lowest):
        raise ValueError("the waveform has NaN or infinite samples: expected finite samples in ±1")
    if max(-lowest, highest) > 16:
        logger.warning_once("Samples far outside ±1: float waveforms are expected in ±1, not in integer units.")
    return tensor


def _is_batch(raw) -> bool:
    """A list of waveforms (or a 3-D array), as against one waveform."""
    if isinstance(raw, (np.ndarray, torch.Tensor)):
        return raw.ndim == 3
    return isinstance(raw, (list, tuple)) and len(raw) > 0 and not np.isscalar(raw[0]) and np.ndim(raw[0]) > 0


class ESResNetFeatureExtractor(FeatureExtractionMixin):
    r"""Turns waveforms into ESResNet's three-band spectrograms. The defaults are the original's settings.

    Args:
        sampling_rate (`int`, defaults to 44100): In Hz; the rate that the network was trained at.
        n_fft (`int`, defaults to 2048): FFT length in samples.
        win_length (`int`, defaults to 1654): Length of the Blackman-Harris window in samples.
        hop_length (`int`, defaults to 561): In samples.
        spec_height, spec_width (`int`, *optional*): Size of each band's picture; None keeps the STFT's own.
        resize_mode (`str`, defaults to `"bilinear"`): How the power is resized: `"bilinear"` or `"area"`.
        frequency_scale (`str`, defaults to `"linear"`): How the rows of the three bands divide the frequencies:
            `"linear"`, as the original's do, or `"mel"`, which needs `spec_height`: low sounds then have as many rows
            as high ones.
        do_normalize (`bool`, defaults to `False`): Whether to floor the level at `min_db` and standardise it. The
            original network takes plain decibels.
        min_db, mean, std (`float`): In dB relative to one 16-bit unit; -9.7 is 100 dB below full scale's power of 1.
        max_length (`int`, *optional*): Samples per clip; longer clips are cropped, shorter ones padded, centrally.
            None keeps each clip's length, and pads a batch to its longest.
        audio_channels (`int`, *optional*): 1 averages channels, 2 doubles mono clips; None takes what comes.
        padding_value (`float`, defaults to 0.0): Where transformers' pipelines look up their fill value to batch.

    Raises:
        ValueError: if `resize_mode` or `frequency_scale` is unknown, a size, rate or `std` is not positive, or a mel
            scale has no `spec_height`.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_dls import ESResNetFeatureExtractor

    >>> extractor = ESResNetFeatureExtractor()
    >>> extractor(np.zeros(220500, dtype=np.float32), sampling_rate=44100, return_tensors="pt")["input_values"].shape
    torch.Size([1, 1, 3, 341, 394])
    ```
    """

    model_input_names = ["input_values"]  # noqa: RUF012 (transformers' own idiom)

    def __init__(
        self,
        sampling_rate: int = 44100,
        n_fft: int = 2048,
        win_length: int = 1654,
        hop_length: int = 561,
        spec_height: int | None = None,
        spec_width: int | None = None,
        resize_mode: str = "bilinear",
        frequency_scale: str = "linear",
        do_normalize: bool = False,
        min_db: float = -9.7,
        mean: float = 45.3,
        std: float = 20.0,
        max_length: int | None = None,
        audio_channels: int | None = None,
        padding_value: float = 0.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if resize_mode not in ("bilinear", "area"):
            raise ValueError(f"resize_mode must be 'bilinear' or 'area', not {resize_mode!r}")
        if frequency_scale not in ("linear", "mel"):
            raise ValueError(f"frequency_scale must be 'linear' or 'mel', not {frequency_scale!r}")
        if frequency_scale == "mel" and spec_height is None:
            raise ValueError("frequency_scale='mel' needs spec_height, the rows of each band")
        if not 0 < win_length <= n_fft or hop_length <= 0:
            raise ValueError(
                f"expected 0 < win_length ({win_length}) <= n_fft ({n_fft}) and hop_length > 0 ({hop_length})"
            )
        if sampling_rate <= 0 or std <= 0:
            raise ValueError(f"expected sampling_rate ({sampling_rate}) > 0 and std ({std}) > 0")
        self.sampling_rate = sampling_rate
        self.n_fft = n_fft
        self.win_length = win_length
        self.hop_length = hop_length
        self.spec_height = spec_height
        self.spec_width = spec_width
        self.resize_mode = resize_mode
        self.frequency_scale = frequency_scale
        self.do_normalize = do_normalize
        self.min_db = min_db
        self.mean = mean
        self.std = std
        self.max_length = max_length
        self.audio_channels = audio_channels
        self.padding_value = padding_value
        for name in ("spec_height", "spec_width", "max_length", "audio_channels"):
            size = getattr(self, name)
            if size is not None and size <= 0:
                raise ValueError(f"{name} must be positive or None, not {size}")

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "ESResNetFeatureExtractor":
        """Builds the extractor that goes with `ESResNetConfig.from_preset(name)`.

        Raises:
            ValueError: if the preset is unknown.
        """
        return cls(**preset(name)["signal"] | overrides)

    def power(self, waveform: torch.Tensor, oversampling: int = 1) -> torch.Tensor:
        """`three_band_power` with this extractor's settings: (..., samples) -> (..., 3, height, width).

        Training augments between this and `decibel`; one after the other they are `three_band_spectrogram`.

        Args:
            waveform: (..., samples) in ±1.
            oversampling: How much finer than `spec_height` and `spec_width` the picture is, for an augmentation that
                resizes it; never finer than the STFT, and without effect where these are None.
        """
        bins, frames = (self.n_fft // 2 + 1) // NUM_BANDS, waveform.shape[-1] // self.hop_length + 1
        return three_band_power(
            waveform,
            n_fft=self.n_fft,
            win_length=self.win_length,
            hop_length=self.hop_length,
            spec_height=self.spec_height and max(self.spec_height, min(oversampling * self.spec_height, bins)),
            spec_width=self.spec_width and max(self.spec_width, min(oversampling * self.spec_width, frames)),
            resize_mode=self.resize_mode,
            mel_rate=self.sampling_rate if self.frequency_scale == "mel" else None,
        )

    def decibel(self, power: torch.Tensor) -> torch.Tensor:
        """`power_to_decibel` with this extractor's normalisation; any shape."""
        normalisation = (self.min_db, self.mean, self.std) if self.do_normalize else ()
        return power_to_decibel(power, *normalisation)

    def spectrogram(self, waveform: torch.Tensor) -> torch.Tensor:
        """`three_band_spectrogram` with this extractor's settings: (..., samples) -> (..., 3, height, width)."""
        return by_parts(lambda part: self.decibel(self.power(part)))(waveform)

    def fit_channels(self, waveform: torch.Tensor) -> torch.Tensor:
        """(channels, samples) -> (audio_channels, samples).

        Raises:
            ValueError: if a clip with several channels has neither one nor `audio_channels` of them.
        """
        channels = waveform.shape[0]
        if self.audio_channels is None or channels == self.audio_channels:
            return waveform
        if self.audio_channels == 1:
            return waveform.mean(dim=0, keepdim=True)
        if channels == 1:
            return waveform.expand(self.audio_channels, -1)
        raise ValueError(f"cannot make {self.audio_channels} audio channels of {channels}")

    def __call__(
        self,
        raw,
        sampling_rate: int | None = None,
        padding: bool | str | PaddingStrategy = True,
        truncation: bool = True,
        max_length: int | None = None,
        return_tensors: str | None = None,
        device: str | torch.device | None = None,
    ) -> BatchFeature:
        """Turns one or more waveforms into `input_values`.

        Args:
            raw: One waveform (samples,), one multi-channel waveform (channels, samples), or a list of either; NumPy,
                torch or lists, floats in ±1 or PCM integers.
            sampling_rate: Of `raw`, in Hz.
            padding: How shorter clips are padded, centrally, after longer ones have been cropped: `"max_length"`;
                `"longest"`, to the longest of the batch; True, to `max_length` where that is set, else to the longest;
                `"do_not_pad"` or False, not at all.
            truncation: Crops longer clips centrally to `max_length`, where that is set.
            max_length: In samples; overrides the extractor's own.
            return_tensors: `"pt"` or `"np"`; None gives a list of arrays.
            device: Where to compute; None means the CPU.

        Returns:
            `input_values`: float32, (batch, audio_channels, 3, height, width).

        Raises:
            ValueError: for another sampling rate, NaN or infinite samples, an unknown integer type, a clip shorter
                than one analysis window, clips that cannot be batched, an unknown `padding`, or `"max_length"` where
                neither the call nor the extractor sets it.
        """
        if sampling_rate is None:
            logger.warning_once(f"No sampling_rate given: {self.sampling_rate} Hz is assumed.")
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"this feature extractor was made for {self.sampling_rate} Hz, but the audio has {sampling_rate} Hz: "
                "resample it first, e.g. with "
                f"torchaudio.functional.resample(waveform, {sampling_rate}, {self.sampling_rate})"
            )
        clips = [self.fit_channels(_to_waveform(clip)) for clip in (raw if _is_batch(raw) else [raw])]
        if not clips:
            raise ValueError("the batch is empty: expected at least one waveform")
        max_length = self.max_length if max_length is None else max_length
        if max_length is not None and max_length <= 0:
            raise ValueError(f"max_length must be positive or None, not {max_length}")
        if padding is True:
            padding = "max_length" if max_length else "longest"
        elif padding is False:
            padding = "do_not_pad"
        if padding not in tuple(PaddingStrategy):
            raise ValueError(f"padding must be True, False, 'longest', 'max_length' or 'do_not_pad', not {padding!r}")
        if padding == "max_length" and max_length is None:
            raise ValueError("padding='max_length' needs max_length, here or in the extractor's settings")
        if truncation and max_length:
            clips = [fit_length(clip, max_length) if clip.shape[-1] > max_length else clip for clip in clips]
        if padding != "do_not_pad":
            longest = max(clip.shape[-1] for clip in clips)
            length = longest if padding == "longest" or max_length is None else max_length
            clips = [fit_length(clip, length) if clip.shape[-1] < length else clip for clip in clips]
        shapes = {tuple(clip.shape) for clip in clips}
        if len(shapes) > 1:
            raise ValueError(
                f"clips of different shapes {sorted(shapes)} (channels, samples) cannot form one batch: set padding, "
                "max_length and audio_channels so that they agree"
            )
        spectrograms = self.spectrogram(torch.stack(clips).to(device or "cpu"))
        if return_tensors == "pt":
            return BatchFeature({"input_values": spectrograms})
        return BatchFeature({"input_values": list(spectrograms.cpu().numpy())}, tensor_type=return_tensors)

    def windows(self, raw, sampling_rate: int | None = None) -> BatchFeature:
        """Turns a sound of any length, rate and number of channels into the windows whose mean is its answer.

        Accuracies are measured so: of `model(**extractor.windows(samples, rate)).logits`, the mean of the softmax.

        Args:
            raw: One waveform (samples,) or (channels, samples), as `__call__` takes it.
            sampling_rate: Of `raw`, in Hz; another than the extractor's is resampled, by torchaudio.

        Returns:
            `input_values`: float32, (windows, audio_channels, 3, height, width).

        Raises:
            ValueError: for NaN or infinite samples, an unknown integer type, or an extractor without `max_length`.
            ImportError: if torchaudio is needed and cannot be loaded.
        """
        if self.max_length is None:
            raise ValueError("windows need a length: set max_length")
        waveform = self.fit_channels(_to_waveform(raw))
        if sampling_rate not in (None, self.sampling_rate):
            # In a try block, where transformers does not look for what a checkpoint's code needs.
            try:
                from torchaudio.functional import resample
            except (ImportError, OSError) as error:  # also of libraries that it is linked with
                raise ImportError(
                    f"to resample {sampling_rate} Hz: pip install torchaudio, of torch's own release ({error})"
                ) from error
            waveform = resample(waveform, sampling_rate, self.sampling_rate)
        return BatchFeature({"input_values": self.spectrogram(evaluation_windows(waveform, self.max_length))})


__all__ = ["ESResNetFeatureExtractor"]
