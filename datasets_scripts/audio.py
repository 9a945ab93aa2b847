"""Sound files to samples, stretch by stretch, through soundfile. Nothing is believed on a header's word."""

import ctypes
import io
import math
import os
import platform
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from typing import NamedTuple

import numpy as np
import soundfile

from .containers import LONGEST_OGG_PAGE, Patched, ogg_pages, repair
from .errors import AudioError
from .files import file_digest
from .identity import WHOLE

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
_CAREFUL_FRAMES = 576  # a granule of MP3
_UNKNOWN = 1 << 40  # frames, a year of 35 kHz: libsndfile says 2 ** 63 - 1 where a container does not tell
# These decoders need what was before: MP3 the bits that earlier frames saved (at most 511 bytes, ten frames of the
# smallest size), Opus its filters' memory. Given this much, Opus is where it should be bit for bit, and MP3 but for
# the order in which libmpg123 adds (1e-7): so a place early in an MP3 is decoded up to from the beginning.
_PREROLL = 1 << 15
_EARLY = 1 << 20


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
        with _errors_that_name(self.name):
            self._file = self._opened()
            self.sampling_rate, self.num_channels = self._file.samplerate, self._file.channels
            self.num_frames = self._file.frames
            try:
                self._check_header()
                is_ogg = self._file.format == "OGG"
                self._last_pages = (
                    ogg_pages(self._bytes(-3 * LONGEST_OGG_PAGE, 3 * LONGEST_OGG_PAGE)) if is_ogg else []
                )
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
        is_stretch = 0 <= start < end  # not so with NaN
        first, last = (
            round(time * self.sampling_rate) if is_stretch and time < math.inf else sys.maxsize
            for time in (start, end)
        )
        if first >= last:
            raise AudioError(f"{self.name}: from {start:g} to {end:g} s is no stretch of sound")
        position, wanted = self._go_to_or_before(first), first
        block = np.empty((max(1, min(frames, _BLOCK_SAMPLES // self.num_channels)), self.num_channels), np.float32)
        error, count, found = 0, 1, position
        while position < last and count and not error:
            count, error = self._read(block[: (wanted if position < wanted else last) - position])
            position += count
            if count and position > wanted:
                yield self._checked(block[:count]).T.copy()
            if error and not count and len(block) > _CAREFUL_FRAMES:
                # Some decoders give nothing of a block in which they fail: what is before that, in small pieces.
                block, error, count, wanted = block[:_CAREFUL_FRAMES], 0, 1, max(position, first)
                position = self._go_to_or_before(wanted)
        if 0 < position == found:
            raise AudioError(f"{self.name}: nothing can be decoded after {position / self.sampling_rate:.3f} s")
        if position < last:
            self._judge_end(first, position, error)

    def close(self) -> None:
        self._file.close()

    def _opened(self) -> soundfile.SoundFile:
        data, path = self._audio["bytes"], self._audio["path"]
        # Opened by Python first: the operating system's errors are clearer than libsndfile's.
        if not self._bytes(0, 1):
            raise AudioError(f"{self.name}: is empty (0 bytes)")
        # As bytes: the names of files need not be text.
        source = io.BytesIO(data) if data is not None else path if os.name == "nt" else os.fsencode(path)
        with _NO_NOTES:
            sound = soundfile.SoundFile(source)
            if patch := repair(sound.format, sound.frames, sound.samplerate, self._bytes):
                sound.close()
                sound = soundfile.SoundFile(Patched(self._stream(), patch))
        return sound

    def _stream(self) -> io.BufferedIOBase:
        return open(self._audio["path"], "rb") if self._audio["bytes"] is None else io.BytesIO(self._audio["bytes"])

    def _bytes(self, start: int, size: int) -> bytes:
        """Of the file; a negative start counts from its end."""
        with self._stream() as file:
            file.seek(max(0, start + (file.seek(0, os.SEEK_END) if start < 0 else 0)))
            return file.read(size)

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
            cut = next((page for page in self._last_pages[-1:] if not page.is_whole), None)
            if cut and (cut.frames is None or cut.frames < 0):
                return self.num_frames + 1  # at least; it is not known how long the page would be
            # In a first page libsndfile takes missing frames for a beginning at a later time.
            is_first = all(page.frames == 0 for page in self._last_pages[:-1]) and self._file.subtype == "VORBIS"
            return max(self.num_frames, cut.frames) if cut and is_first else self.num_frames
        if found := _SHORTENED.search(self._file.extra_info):
            declared, present = int(found[1]), int(found[2])
            if 0 < present < declared and not _says_unknown(declared):
                return self.num_frames + (declared - present) * self.num_frames // present
        return self.num_frames if self.num_frames < _UNKNOWN else None

    def _go_to_or_before(self, first: int) -> int:
        """Makes decoding go on at frame `first` or somewhere before it; returns where."""
        if first >= self.num_frames:
            self._judge_end(first, self.num_frames, 0)
        target = first
        is_mpeg = self._file.subtype.startswith("MPEG")
        if is_mpeg:
            target = first - _PREROLL if first > _EARLY else 0
        elif self._file.subtype == "OPUS":
            target = max(0, first - _PREROLL)
        elif self._file.subtype == "VORBIS":
            # libsndfile misplaces what it seeks in the last page, which may be shortened; and an empty one may follow.
            ends = [frames for page in self._last_pages if (frames := page.frames or -1) >= 0]
            target = max(0, min(first, self.num_frames - (ends[-1] - ends[-3]))) if len(ends) > 2 else 0
        # Vorbis and some others are not exact in a file that was read before; opening MP3 anew would lose its index.
        if not self._is_fresh and not (is_mpeg and target):
            self._open_anew()
        self._is_fresh = False
        if target == 0:
            return 0
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
        with _errors_that_name(self.name):
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
            nothing = "holds no samples: its header gives a length of 0 (never written?)"
            was_cut = promised or self._file.format == "OGG"
            what = "is truncated or damaged: nothing can be decoded" if was_cut else nothing
            raise AudioError(f"{self.name}: {what}{reason}")
        if decoded <= first:
            raise AudioError(f"{self.name}: ends after {decoded / rate:.3f} s, before {first / rate:.3f} s")


@contextmanager
def _errors_that_name(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise AudioError(f"{name}: the file does not exist (moved or deleted since the corpus was loaded?)") from None
    except OSError as error:
        raise AudioError(f"{name}: cannot be read ({error.strerror or error})") from None
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{name}: truncated, damaged, or not a sound file{_reason(error)}") from None


def opened_sound(audio: dict) -> AbstractContextManager[Sound]:
    """Opens one value of the `audio` column for decoding stretch by stretch, in memory that is bounded.

    Args:
        audio: `{"bytes", "path"}`, as a column with `Audio(decode=False)` gives it. Bytes win over the path.

    Raises:
        AudioError: naming the file, if it is missing, empty, or no sound, or if its header gives a sampling rate
            outside `SAMPLING_RATES` or more than `MOST_CHANNELS` channels.
    """
    return closing(Sound(audio))


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
    name = os.fspath(path)
    with _errors_that_name(name):
        before = os.stat(path)
        with opened_sound({"bytes": None, "path": name}) as sound:
            frames = sum(block.shape[1] for block in sound.blocks())
        digest, after = file_digest(path), os.stat(path)
        if (before.st_size, before.st_mtime_ns, before.st_ino) != (after.st_size, after.st_mtime_ns, after.st_ino):
            raise AudioError(f"{name}: was changed while it was read")
        return AudioFacts(digest, sound.sampling_rate, sound.num_channels, frames, sound.missing)


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
        # A child has only the thread that forked: whatever others were doing is over, and their locks stay locked.
        self.inside, self.lock = 0, threading.Lock()
        soundfile.SoundFile._sf_error_lock = threading.Lock()
        self._exchange()


_NO_NOTES = _NoNotes()
