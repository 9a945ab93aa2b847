"""Containers whose own words keep libsndfile from sound that is there: what it is given in their place."""

import io
import os
import re
from collections.abc import Callable
from typing import NamedTuple

LONGEST_OGG_PAGE = 65307
LONGEST_HEADER = 1 << 20


class Patch(NamedTuple):
    """Bytes to read instead of the first `skipped` ones of a file, and instead of its last `cut` ones."""

    head: bytes = b""
    skipped: int = 0
    tail: bytes = b""
    cut: int = 0


class Patched(io.RawIOBase):
    """A file with other bytes at its beginning or end."""

    def __init__(self, file: io.BufferedIOBase, patch: Patch):
        self._file, self._patch, self._position = file, patch, 0
        self._moved = len(patch.head) - patch.skipped

    @property
    def _end(self) -> int:
        """Where the tail begins."""
        return self._file.seek(0, os.SEEK_END) - self._patch.cut + self._moved

    def readinto(self, buffer) -> int:
        # Whole: libsndfile takes less than it asked for as the end.
        wanted, end = len(buffer), self._end
        part = self._patch.head[self._position : self._position + wanted]
        place = self._position + len(part)
        if (count := min(wanted - len(part), end - place)) > 0:
            self._file.seek(place - self._moved)
            part += self._file.read(count)
            place = self._position + len(part)
        if place >= end:
            part += self._patch.tail[place - end :][: wanted - len(part)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._end + len(self._patch.tail)}
        self._position = offset + base[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        self._file.close()
        super().close()


class OggPage(NamedTuple):
    """A page as its header describes it (RFC 3533, section 6).

    Attributes:
        start: where it begins.
        frames: how many there are up to its end, -1 where no packet ends in it; None where its header is not complete.
        segments: their lengths; those of a packet are all 255 but the last.
        is_whole: whether all of it is there.
    """

    start: int
    frames: int | None
    segments: bytes
    is_whole: bool


def ogg_pages(data: bytes) -> list[OggPage]:
    pages = []
    for start in (found.start() for found in re.finditer(b"OggS", data)):
        header = data[start : start + 27 + 255]
        segments = header[27 : 27 + header[26]] if len(header) > 26 else b""
        is_complete = len(header) > 26 and len(segments) == header[26]
        frames = int.from_bytes(header[6:14], "little", signed=True) if is_complete else None
        is_whole = is_complete and start + 27 + len(segments) + sum(segments) <= len(data)
        pages.append(OggPage(start, frames, segments, is_whole))
    return pages


def _ogg_with_complete_page(tail: bytes) -> Patch | None:
    """For a file that ends within a page: that page with the packets that are whole, as the last."""
    page = next(reversed(ogg_pages(tail)), None)
    if page is None or page.is_whole or page.frames is None or page.frames < 0:
        return None
    body = tail[page.start + 27 + len(page.segments) :]
    count = length = whole = 0
    for number, segment in enumerate(page.segments, 1):
        length += segment
        if segment < 255 and length <= len(body):
            count, whole = number, length
    last = 4  # among a page's flags
    header = bytearray(tail[page.start : page.start + 27] + page.segments[:count])
    header[5] |= last
    header[22:26], header[26] = bytes(4), count
    header[22:26] = _ogg_checksum(bytes(header) + body[:whole]).to_bytes(4, "little")
    return Patch(tail=bytes(header) + body[:whole], cut=len(tail) - page.start)


def _ogg_checksum(page: bytes) -> int:
    checksum = 0
    for byte in page:
        checksum ^= byte << 24
        for _ in range(8):
            checksum = checksum << 1 ^ (0x104C11DB7 if checksum & 0x80000000 else 0)
    return checksum


def _wav_of_unknown_length(start: bytes) -> Patch | None:
    """A WAV's header with its length given as unknown, where it is 0 before sound: it was never written."""
    place = 12
    while place + 8 <= len(start) and start[place : place + 4] != b"data":
        place += 8 + int.from_bytes(start[place + 4 : place + 8], "little") + 1 & ~1
    behind = start[place + 8 : place + 16]
    if start[place : place + 8] != b"data\0\0\0\0" or not behind or behind[:4] in (b"LIST", b"id3 ", b"bext", b"cue "):
        return None
    return Patch(start[: place + 4] + b"\xff" * 4, place + 8)


def _mp3_of_unknown_length(read: Callable[[int, int], bytes], rate: int) -> Patch | None:
    """A frame that counts more frames than any file has, for an MP3 of layer III without such a frame."""
    place = 0
    while (start := read(place, 512))[:3] == b"ID3":
        place += 10 + sum((byte & 127) << shift for byte, shift in zip(start[6:10], (21, 14, 7, 0), strict=False))
    if (
        len(start) < 4
        or start[0] != 0xFF
        or start[1] & 0xE6 != 0xE2
        or any(mark in start[:200] for mark in (b"Xing", b"Info", b"VBRI"))
    ):
        return None
    mpeg1, mono = start[1] & 0x18 == 0x18, start[3] >> 6 == 3
    # Without a checksum, at 128 (MPEG-1) or 80 kbit/s: long enough for what goes into it behind the side information.
    header = bytes([0xFF, start[1] | 1, 0x90 | start[2] & 0x0C, start[3]])
    side = (17 if mono else 32) if mpeg1 else (9 if mono else 17)
    size = 144 * 128_000 // rate if mpeg1 else 72 * 80_000 // rate
    frame = header + bytes(side) + b"Xing" + (1).to_bytes(4, "big") + b"\x7f\xff\xff\xff"
    return Patch(frame.ljust(size, b"\0"), place)  # without the tags


def repair(container: str, frames: int, rate: int, read: Callable[[int, int], bytes]) -> Patch | None:
    """What to read instead of a few bytes of a file, where they keep sound from being decoded.

    libsndfile decodes no further than a header says, or than it guesses from the first frame of an MP3 without a table
    of contents, whose bit rate may be another one later; and nothing of an Ogg page that is not complete.

    Args:
        container: what libsndfile calls it.
        frames, rate: as libsndfile found them.
        read: a place (from the file's end if negative) and a number of bytes -> these bytes, as far as there are any.
    """
    if container in ("WAV", "WAVEX") and frames == 0:
        return _wav_of_unknown_length(read(0, LONGEST_HEADER))
    if container == "MP3":
        return _mp3_of_unknown_length(read, rate)
    return _ogg_with_complete_page(read(-LONGEST_OGG_PAGE, LONGEST_OGG_PAGE)) if container == "OGG" else None
