"""Sound files to samples, stretch by stretch, through soundfile. Nothing is believed on a header's word."""

import ctypes
import io
import math
import os
import platform
import re
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import soundfile

from .errors import AudioError
from .identity import WHOLE, file_digest

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

BLOCK_FRAMES = 1 << 16
_BLOCK_SAMPLES = 16 * BLOCK_FRAMES  # of all channels together: 4 MiB
# Below, not even a hum can be heard, and resampling to 44.1 kHz would make more than 441 samples of one.
# Above, no recorder exists: ultrasound is recorded at up to 500 kHz.
SAMPLING_RATES = (100, 1_000_000)
MOST_CHANNELS = 128  # arrays of microphones and seventh-order ambisonics (64) have fewer
# The largest sample of any integer format: a float file in integer units may reach it, and a power spectrogram of it
# is still finite in float32. Beyond, a file is damaged.
LARGEST_SAMPLE = 2.0**31
# Of the length that a file promises. Recorders lose the last buffer, encoders the last frame; a file that lost more
# was cut off, and is not what its name, its label or its table says.
LARGEST_LOSS = 0.1

# libsndfile shortens a cut-off file without an error, and only its log says so: "data : 88200 (should be 44078)".
# The RIFF line is left out on purpose: many programs write it wrong in files whose sound is whole.
_SHORTENED = re.compile(r"^\s*(?:data|SSND|riff|Riff size|Data Size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_LONGEST_OGG_PAGE = 65307
_UNKNOWN = 1 << 62  # libsndfile's number of frames where a container does not tell it is 2 ** 63 - 1
# These decoders need what was before: MP3 the bits that earlier frames saved (at most 511 bytes, ten frames of the
# smallest size), Opus its filters' memory. A decoder that has been given this much is bit for bit where it should be.
_PREROLL = {"MPEG_LAYER_I": 1 << 15, "MPEG_LAYER_II": 1 << 15, "MPEG_LAYER_III": 1 << 15, "OPUS": 1 << 15}


class AudioFacts(NamedTuple):
    """What one whole decoding of a file showed.

    Attributes:
        digest: of its content, see `file_digest`.
        sampling_rate: in Hz.
        num_channels: from 1.
        num_frames: how many decode.
        missing: share of the promised length that does not decode; 0 where nothing is missing, less than
            `LARGEST_LOSS`.
    """

    digest: str
    sampling_rate: int
    num_channels: int
    num_frames: int
    missing: float = 0.0


class Sound:
    """A sound file that is open for decoding; see `opened_sound`.

    Attributes:
        name: its path, for messages.
        sampling_rate: in Hz.
        num_channels: from 1.
        num_frames: as far as its container tells, at least as many as decode; huge where it is not known.
        missing: share of the promised length that does not decode, known once `blocks` came to the file's end.
    """

    def __init__(self, audio: dict):
        self.name = audio["path"] or "embedded clip"
        self.missing = 0.0
        self._audio = audio
        self._file = self._opened()
        try:
            self.sampling_rate, self.num_channels = self._file.samplerate, self._file.channels
            self.num_frames = self._file.frames
            self._check_header()
            self._promised = self._promised_frames()
        except BaseException:
            self.close()
            raise
        self._is_fresh = True

    def blocks(self, start: float = WHOLE[0], end: float = WHOLE[1], frames: int = BLOCK_FRAMES) -> Iterator:
        """Decodes a stretch, block by block. One iterator at a time.

        The stretch is that of the whole file's decoded samples from round(start * sampling_rate) up to, without,
        round(end * sampling_rate), sample by sample; so consecutive stretches neither overlap nor leave gaps.

        Args:
            start, end: in s. What lies beyond the end of what can be decoded is not part of the stretch.
            frames: length of a block, at most; less where there are many channels.

        Yields:
            float32 of shape (channels, frames of the block), each an array of its own.

        Raises:
            AudioError: naming the file, if it cannot be decoded, holds no sample of the stretch, or samples that are
                NaN, infinite or beyond `LARGEST_SAMPLE`; or if it turns out, at its end, that a share of
                `LARGEST_LOSS` or more of its promised length is missing.
        """
        first, last = (sys.maxsize if time == math.inf else round(time * self.sampling_rate) for time in (start, end))
        if not 0 <= first < last:
            raise AudioError(f"{self.name}: from {start:g} to {end:g} s is no stretch of sound")
        position = self._go_to_or_before(first)
        block = np.empty((max(1, min(frames, _BLOCK_SAMPLES // self.num_channels)), self.num_channels), np.float32)
        error, count = 0, 1
        while position < last and count and not error:
            count, error = self._read(block[: (first if position < first else last) - position])
            position += count
            if count and position > first:
                yield self._checked(block[:count]).T.copy()
        if position < last:
            self._judge_end(first, position, error)

    def close(self) -> None:
        self._file.close()

    def _opened(self) -> soundfile.SoundFile:
        data, path = self._audio["bytes"], self._audio["path"]
        try:
            # Opened by Python first: the operating system's errors are clearer than libsndfile's.
            with open(path, "rb") if data is None else io.BytesIO(data) as file:
                if not file.read(1):
                    raise AudioError(f"{self.name}: is empty (0 bytes)")
            if data is not None:
                source = io.BytesIO(data)
            else:  # as bytes: the names of files need not be text
                source = path if os.name == "nt" else os.fsencode(path)
            with _NO_NOTES:
                return soundfile.SoundFile(source)
        except FileNotFoundError:
            raise AudioError(
                f"{self.name}: the file does not exist (moved or deleted since the corpus was loaded?)"
            ) from None
        except OSError as error:
            raise AudioError(f"{self.name}: cannot be read ({error.strerror or error})") from None
        except soundfile.LibsndfileError as error:
            raise AudioError(f"{self.name}: truncated, damaged, or not a sound file{_reason(error)}") from None

    def _check_header(self) -> None:
        lowest, highest = SAMPLING_RATES
        if not lowest <= self.sampling_rate <= highest:
            raise AudioError(
                f"{self.name}: its header gives a sampling rate of {self.sampling_rate} Hz; expected {lowest} to "
                f"{highest} Hz"
            )
        if self.num_channels > MOST_CHANNELS:
            raise AudioError(f"{self.name}: its header gives {self.num_channels} channels, more than {MOST_CHANNELS}")

    def _promised_frames(self) -> int | None:
        """How long the file says it is; None if it does not."""
        if self._file.format == "OGG":
            return self.num_frames + self._frames_of_cut_page()
        if found := _SHORTENED.search(self._file.extra_info):
            declared, present = int(found[1]), int(found[2])
            if 0 < present < declared and not _says_unknown(declared):
                return self.num_frames + (declared - present) * self.num_frames // present
        return self.num_frames if self.num_frames < _UNKNOWN else None

    def _frames_of_cut_page(self) -> int:
        """Length of a last Ogg page that is not complete, which libsndfile takes for the end of the stream.

        A page's 27-byte header has its last sample's number at 6 and ends in the number of segments, whose lengths
        follow (RFC 3533, section 6). Where that number is lost, too, one frame stands for at most one page.
        """
        tail = self._tail(2 * _LONGEST_OGG_PAGE)
        start = tail.rfind(b"OggS")
        segments = tail[start + 27 : start + 27 + tail[start + 26]] if 0 <= start < len(tail) - 26 else None
        if (
            segments is not None
            and len(segments) == tail[start + 26]
            and start + 27 + len(segments) + sum(segments) <= len(tail)
        ):
            return 0
        before = tail.rfind(b"OggS", 0, max(start, 0))
        if segments is None or before < 0:
            return 1
        last, previous = (struct.unpack_from("<q", tail, place + 6)[0] for place in (start, before))
        rate = 48_000 if self._file.subtype == "OPUS" else self.sampling_rate
        return max(1, (last - previous) * self.sampling_rate // rate) if previous >= 0 else 1

    def _tail(self, size: int) -> bytes:
        if self._audio["bytes"] is not None:
            return self._audio["bytes"][-size:]
        with open(self._audio["path"], "rb") as file:
            file.seek(max(0, os.path.getsize(self._audio["path"]) - size))
            return file.read()

    def _go_to_or_before(self, first: int) -> int:
        """Makes decoding go on at frame `first` or somewhere before it; returns where."""
        if first >= self.num_frames:
            self._judge_end(first, self.num_frames, 0)
        # Vorbis and some others are not exact in a file that was read before; opening MP3 anew loses its index.
        if not self._is_fresh and self._file.subtype not in _PREROLL:
            self._open_anew()
        elif self._is_fresh and first == 0:
            self._is_fresh = False
            return 0
        self._is_fresh = False
        target = max(0, first - _PREROLL.get(self._file.subtype, 0))
        try:
            with _NO_NOTES:
                if self._file.seek(target) == target:
                    return target
        except soundfile.LibsndfileError:
            pass  # GSM, G.72x
        self._open_anew()
        return 0

    def _open_anew(self) -> None:
        self._file.close()
        self._file = self._opened()
        if (self._file.samplerate, self._file.channels) != (self.sampling_rate, self.num_channels):
            raise AudioError(f"{self.name}: was replaced by another file while it was read")

    def _read(self, block: np.ndarray) -> tuple[int, int]:
        """Fills (frames, channels) as far as decoding gets: how many frames, and libsndfile's error.

        Not SoundFile.read: that seeks after every block, which MP3 does not survive sample by sample, and tells
        nothing of the frames before an error.
        """
        pointer = soundfile._ffi.cast("float *", block.ctypes.data)
        with _NO_NOTES:
            count = soundfile._snd.sf_readf_float(self._file._file, pointer, len(block))
        return count, self._file._errorcode

    def _checked(self, block: np.ndarray) -> np.ndarray:
        largest = max(block.max(), -block.min())  # NaN if there is one
        if not largest <= LARGEST_SAMPLE:
            what = (
                f"a sample of {largest:.3g}: no sound has that" if np.isfinite(largest) else "NaN or infinite samples"
            )
            raise AudioError(f"{self.name}: holds {what}; the file is damaged")
        return block

    def _judge_end(self, first: int, decoded: int, error: int) -> None:
        """What it means that decoding ended after `decoded` frames."""
        reason = _reason(soundfile.LibsndfileError(error)) if error else ""
        promised = max(self._promised or 0, decoded + bool(error))
        self.missing = (promised - decoded) / max(1, promised)
        rate = self.sampling_rate
        if self.missing >= LARGEST_LOSS and decoded:
            raise AudioError(
                f"{self.name}: is truncated or damaged: {decoded / rate:.3f} of {promised / rate:.3f} s can be "
                f"decoded{reason}"
            )
        if not decoded:
            raise AudioError(f"{self.name}: holds no samples{reason or ' that can be decoded' * bool(promised)}")
        if decoded <= first:
            raise AudioError(f"{self.name}: ends after {decoded / rate:.3f} s, before {first / rate:.3f} s")


@contextmanager
def opened_sound(audio: dict) -> Iterator[Sound]:
    """Opens one value of the `audio` column for decoding stretch by stretch, in memory that is bounded.

    Args:
        audio: `{"bytes", "path"}`, as a column with `Audio(decode=False)` gives it. Bytes win over the path.

    Raises:
        AudioError: naming the file, if it is missing, empty, or no sound, or if its header gives a sampling rate
            outside `SAMPLING_RATES` or more than `MOST_CHANNELS` channels.
    """
    sound = Sound(audio)
    try:
        yield sound
    finally:
        sound.close()


def decode_audio(audio: dict, start: float = WHOLE[0], end: float = WHOLE[1]) -> tuple[np.ndarray, int]:
    """Decode one value of the `audio` column, or a stretch of it.

    Args:
        audio: `{"bytes", "path"}`, as a column with `Audio(decode=False)` gives it. Bytes win over the path.
        start, end: of the stretch, in s; see `Sound.blocks`.

    Returns:
        float32 samples of shape (channels, samples) and the sampling rate in Hz. Integer formats are scaled to ±1;
        float files are taken as they are. Of a file that lost less than `LARGEST_LOSS` of its length, what is left.

    Raises:
        AudioError: naming the file, as `opened_sound` and `Sound.blocks`.
    """
    with opened_sound(audio) as sound:
        return np.concatenate(list(sound.blocks(start, end)), axis=1), sound.sampling_rate


def inspect_audio(path: str | os.PathLike) -> AudioFacts:
    """Decode a whole file once, block by block, so that an hour of sound takes no more memory than a second.

    Raises:
        AudioError: as `decode_audio`; or the file was changed meanwhile.
    """
    with opened_sound({"bytes": None, "path": os.fspath(path)}) as sound:
        frames = sum(block.shape[1] for block in sound.blocks())
        return AudioFacts(file_digest(path), sound.sampling_rate, sound.num_channels, frames, sound.missing)


def _reason(error: soundfile.LibsndfileError) -> str:
    # Some codecs give no text; for a damaged MP3 the text is that the file does not exist, which was ruled out before.
    text = error.error_string.rstrip(".")
    return f" ({text})" if text and "does not exist" not in text else ""


def _says_unknown(size: int) -> bool:
    """Whether programs that write to a pipe put this in the place of a length: the largest number, or a bit less."""
    return 0x7FFFF000 <= size <= 0x7FFFFFFF or 0xFFFFF000 <= size <= 0xFFFFFFFF or size >= _UNKNOWN


class _NoNotes:
    """While any thread is inside, what C libraries print to `stderr` is dropped.

    libmpg123 complains there of what it then copes with, or of what an AudioError says by the file's name. Only C's
    variable is exchanged, not file descriptor 2: what Python and child processes print is not concerned, and no line
    of theirs can be lost.
    """

    def __init__(self):
        self.inside, self.lock = 0, threading.Lock()
        self.variable = self.shown = self.dropped = None
        name = {"linux": "stderr", "darwin": "__stderrp"}.get(sys.platform)
        if name and (sys.platform == "darwin" or platform.libc_ver()[0] == "glibc"):  # elsewhere it is a constant
            libc = ctypes.CDLL(None)
            libc.fopen.restype = ctypes.c_void_p
            self.variable = ctypes.c_void_p.in_dll(libc, name)
            self.shown, self.dropped = self.variable.value, libc.fopen(os.devnull.encode(), b"w")
            os.register_at_fork(after_in_child=self._begin_again)

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            self._exchange()

    def __exit__(self, *exception) -> None:
        with self.lock:
            self.inside -= 1
            self._exchange()

    def _exchange(self) -> None:
        if self.dropped:
            self.variable.value = self.dropped if self.inside else self.shown

    def _begin_again(self) -> None:
        # A child has only the thread that forked: whatever others were doing is over.
        self.inside, self.lock = 0, threading.Lock()
        self._exchange()


_NO_NOTES = _NoNotes()
