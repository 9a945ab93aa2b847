"""Sound files to samples, through soundfile, refusing what libsndfile silently accepts."""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import soundfile

from .errors import AudioError
from .identity import file_digest

# What libsndfile reads and people record in; matched without regard to case.
SOUND_EXTENSIONS = frozenset(
    [
        ".wav",
        ".wave",
        ".flac",
        ".ogg",
        ".oga",
        ".opus",
        ".mp3",
        ".aif",
        ".aiff",
        ".aifc",
        ".au",
        ".snd",
        ".caf",
        ".w64",
    ]
)

# libsndfile shortens a cut-off file without an error, and only its log says so: "data : 88200 (should be 44078)".
# The RIFF line is left out on purpose: many programs write it wrong in files whose sound is whole.
_SHORTENED = re.compile(r"^\s*(?:data|SSND|riff|Riff size|Data Size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_LENGTH_NOT_KNOWN = 0x7FFFF000  # programs that write to a pipe put 0x7FFFFFFF or 0xFFFFFFFF for the length
_LONGEST_OGG_PAGE = 65307
_BLOCK = 1 << 20


class AudioFacts(NamedTuple):
    """What one whole decoding of a file showed: its content's digest, its rate in Hz, channels and length."""

    digest: str
    sampling_rate: int
    num_channels: int
    num_frames: int


def decode_audio(audio: dict, max_seconds: float | None = None) -> tuple[np.ndarray, int]:
    """Decode one value of the `audio` column.

    Args:
        audio: `{"bytes", "path"}`, as a column with `Audio(decode=False)` gives it. Bytes win over the path.
        max_seconds: decode no more than the beginning; None decodes all.

    Returns:
        float32 samples of shape (channels, samples) and the sampling rate in Hz. Integer formats are scaled to ±1;
        float files are taken as they are.

    Raises:
        AudioError: the file is missing, empty, truncated, undecodable, or holds NaN or infinite samples.
    """
    with _opened(audio) as sound:
        wanted = sound.frames
        if max_seconds is not None:
            wanted = min(wanted, max(1, round(max_seconds * sound.samplerate)))
        samples = sound.read(wanted, dtype="float32", always_2d=True)
        if not np.isfinite(samples).all():
            raise ValueError("holds NaN or infinite samples")
        if len(samples) < wanted:
            raise ValueError(f"is truncated: {len(samples)} of {sound.frames} frames can be decoded")
        return np.ascontiguousarray(samples.T), sound.samplerate


def inspect_audio(path: str | os.PathLike) -> AudioFacts:
    """Decode a whole file once, block by block, so that an hour of sound takes no more memory than a second.

    Raises:
        AudioError: as `decode_audio`.
    """
    frames = 0
    with _opened({"bytes": None, "path": os.fspath(path)}) as sound:
        block = np.empty((max(1, min(sound.frames, _BLOCK // sound.channels)), sound.channels), np.float32)
        # Never asks for more than the file promises: libsndfile would fill the rest of the block with zeros each time.
        while len(part := sound.read(out=block[: sound.frames - frames])):
            if not np.isfinite(part).all():
                raise ValueError("holds NaN or infinite samples")
            frames += len(part)
            if frames == sound.frames:
                break
        if frames < sound.frames:
            raise ValueError(f"is truncated: {frames} of {sound.frames} frames can be decoded")
        rate, channels = sound.samplerate, sound.channels
    return AudioFacts(file_digest(path), rate, channels, frames)


@contextmanager
def _opened(audio: dict) -> Iterator[soundfile.SoundFile]:
    """Open a sound that is whole as far as its container tells; name the file in every error, the reading's too."""
    data, path = audio["bytes"], audio["path"]
    name = path or "embedded clip"
    try:
        if (len(data) if data is not None else os.path.getsize(path)) == 0:
            raise ValueError("is empty (0 bytes)")
        with soundfile.SoundFile(path if data is None else io.BytesIO(data)) as sound:
            _check_whole(sound, data, path)
            yield sound
    except FileNotFoundError:
        raise AudioError(f"{name}: the file does not exist (moved or deleted since the corpus was loaded?)") from None
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{name}: truncated, damaged, or not a sound file{_reason(error)}") from None
    except OSError as error:
        raise AudioError(f"{name}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise AudioError(f"{name}: {error}") from None


def _reason(error: soundfile.LibsndfileError) -> str:
    # Some codecs give no text; for a damaged MP3 the text is that the file does not exist, which was ruled out before.
    text = error.error_string.rstrip(".")
    return f" ({text})" if text and "does not exist" not in text else ""


def _check_whole(sound: soundfile.SoundFile, data: bytes | None, path: str | None) -> None:
    if sound.format == "OGG":
        _check_last_ogg_page(data[-_LONGEST_OGG_PAGE:] if data is not None else _tail(path))
    elif found := _SHORTENED.search(sound.extra_info):
        declared, present = int(found[1]), int(found[2])
        if present < declared < _LENGTH_NOT_KNOWN:
            raise ValueError(f"is truncated: its header promises {declared} bytes of sound, {present} are there")
    if sound.frames <= 0:
        raise ValueError("holds no samples")


def _tail(path: str) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - _LONGEST_OGG_PAGE))
        return file.read()


def _check_last_ogg_page(tail: bytes) -> None:
    # libsndfile plays an Ogg stream up to where it was cut off and calls that its length. A page's 27-byte header ends
    # in the number of segments, whose lengths follow (RFC 3533, section 6).
    start = tail.rfind(b"OggS")
    header_end = start + 27
    segments = tail[header_end : header_end + tail[header_end - 1]] if start >= 0 and header_end <= len(tail) else b""
    if not segments or header_end + len(segments) + sum(segments) > len(tail):
        raise ValueError("is truncated: its last Ogg page is not complete")
