"""Official archives: downloaded with resumption, verified, and unpacked so that nothing escapes."""

import collections
import contextlib
import hashlib
import http.client
import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import datasets
from datasets.utils import tqdm
from filelock import FileLock

from .corpus import Archive, FolderCorpus
from .errors import CorpusError, printable

RETRY_DELAYS = (1, 2, 4, 8)  # seconds before each further try, counted anew whenever some bytes arrived
TIMEOUT = 60  # seconds without a byte, and between looks at the rate
LEAST_RATE = 1000  # bytes a second: below it, a download would never end
MOST_FOLDERS = 50  # around a file
_BLOCK = 1 << 18
_TAR_METADATA = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
_MOST_METADATA = 1 << 20  # bytes of one member's name and attributes, which are held in memory
# What readers and decompressors raise for bytes that are no archive; a damaged gzip stream is an OSError beside these.
_DAMAGE = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError, LookupError,
    RuntimeError, ArithmeticError,
)  # fmt: skip


def unpacked_official(corpus: FolderCorpus, cache: Path) -> Path:
    """The folder of a corpus's official archives, downloaded and unpacked in `cache` the first time.

    Raises:
        CorpusError: no network is allowed, the download failed, or the archive is not the publisher's.
    """
    place = _place(cache, corpus.archives[0].filename, corpus.archives)
    with _locked(place):
        if not place.exists():
            files = [download(archive, cache / "dls_downloads") for archive in corpus.archives]
            try:
                _unpack_all(files, place)
            except CorpusError as error:
                raise CorpusError(f"{error}. It was downloaded: delete it to download it again") from None
            for file in files:  # as big as what was unpacked, and no longer needed
                file.unlink()
    return place


def unpacked(files: list[Path], cache: Path) -> Path:
    """The folder of archives that are already on disk, unpacked in `cache` once for each state of the files.

    Raises:
        CorpusError: an archive is damaged, or holds a link or a path that leads out of it.
    """
    state = [(os.fspath(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    place = _place(cache, files[0].name, state)
    with _locked(place):
        if not place.exists():
            _unpack_all(files, place)
    return place


def _place(cache: Path, filename: str, state) -> Path:
    key = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
    return cache / "dls_corpora" / f"{filename.split('.')[0]}-{key}"


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        yield


def download(archive: Archive, folder: Path) -> Path:
    """Fetch an archive, going on where an earlier call stopped.

    Args:
        archive: what to fetch, and what is known about it.
        folder: where it is kept, beside a `.part` file while it is not complete.

    Returns:
        Path of the complete, verified file.

    Raises:
        CorpusError: offline mode is on, the server refused or kept failing, or size or digest is not the publisher's.
    """
    target = folder / archive.filename
    with _locked(target):
        if target.exists():
            return target
        if datasets.config.HF_HUB_OFFLINE:
            raise CorpusError(
                f"{archive.filename} is not here and HF_HUB_OFFLINE is set: unset it, or give data_dir "
                f"(the archive from {archive.url}, or the folder unpacked from it)"
            )
        part = target.with_name(target.name + ".part")
        _transfer_with_retries(archive, part)
        _verify(archive, part)
        os.replace(part, target)
        _validator_file(part).unlink(missing_ok=True)
    return target


def _transfer_with_retries(archive: Archive, part: Path) -> None:
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            return _transfer(archive, part)
        except urllib.error.HTTPError as error:
            reason, final = f"HTTP {error.code} {error.reason}", error.code < 500 and error.code not in (408, 429)
        except (OSError, http.client.HTTPException) as error:
            reason, final = str(getattr(error, "reason", error)) or type(error).__name__, False
        if part.exists() and part.stat().st_size > before + LEAST_RATE * TIMEOUT:
            failures = 0
        if final or failures == len(RETRY_DELAYS):
            raise CorpusError(
                f"{archive.url} could not be downloaded ({reason}). Run the same again to go on from there, or fetch "
                f"{archive.filename} by other means and give it as data_dir"
            )
        time.sleep(RETRY_DELAYS[failures])
        failures += 1


def _transfer(archive: Archive, part: Path) -> None:
    """One request for what is still lacking. Raises OSError if the connection ends before the file does."""
    have = part.stat().st_size if part.exists() else 0
    validator = _validator_file(part)
    request = urllib.request.Request(archive.url, headers={"User-Agent": "dls-sounds"})
    # Without a validator or a digest, bytes of a file that changed meanwhile would go unnoticed: begin again.
    if have and (validator.exists() or archive.md5):
        request.add_header("Range", f"bytes={have}-")
        if validator.exists():
            request.add_header("If-Range", validator.read_text())
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return
        part.unlink()
        raise OSError("the server's file is shorter than what was downloaded before; begun again") from None
    with response:
        resumed = response.status == 206
        if resumed and not (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
            part.unlink()
            raise OSError("the server resumed at another place; begun again")
        have = have if resumed else 0
        if response.headers.get_content_type() == "text/html":
            raise CorpusError(
                f"{archive.url}: the server answers with a page instead of the file; see in a browser what it says, "
                f"or fetch {archive.filename} by other means and give it as data_dir"
            )
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() and len(length) < 20 else None
        if tag := response.headers.get("ETag") or response.headers.get("Last-Modified"):
            validator.write_text(tag)
        with (
            open(part, "ab" if resumed else "wb") as file,
            tqdm(desc=archive.filename, total=total, initial=have, unit="B", unit_scale=True) as progress,
        ):
            looked, since = time.monotonic(), 0
            while block := response.read1(_BLOCK):
                file.write(block)
                progress.update(len(block))
                since += len(block)
                if (seconds := time.monotonic() - looked) > TIMEOUT:
                    if since < LEAST_RATE * seconds:
                        raise OSError(f"the server sends {since / seconds:.0f} bytes a second")
                    looked, since = time.monotonic(), 0
    if total is not None and part.stat().st_size < total:
        raise OSError(f"the connection ended after {part.stat().st_size} of {total} bytes")


def _validator_file(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _verify(archive: Archive, part: Path) -> None:
    size = part.stat().st_size
    problem = f"has {size} bytes instead of {archive.size}" if archive.size not in (None, size) else None
    if archive.md5 and not problem:
        digest = hashlib.md5(usedforsecurity=False)
        with open(part, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        if digest.hexdigest() != archive.md5:
            problem = f"has md5 {digest.hexdigest()} instead of {archive.md5}"
    if not (archive.md5 or problem):  # nothing else may have told that its end is missing
        try:
            with contextlib.ExitStack() as stack:
                collections.deque(_members(part, stack), maxlen=0)
        except (CorpusError, OSError, *_DAMAGE):
            problem = "is no archive, or one whose end is missing"
    if problem:
        part.unlink()
        _validator_file(part).unlink(missing_ok=True)
        raise CorpusError(f"{archive.url}: the downloaded file {problem}. It was deleted; try again later")


class _Member(NamedTuple):
    name: str
    size: int
    kind: str  # "file", "folder", or what is refused: "link", "device", "encrypted file"
    open: Callable[[], IO[bytes]]  # of a file


def _unpack_all(files: list[Path], place: Path) -> None:
    unfinished = place.with_name(place.name + ".incomplete")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for file in files:
            unpack(file, unfinished)
        os.replace(unfinished, place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def unpack(file: Path, place: Path) -> None:
    """Unpack a zip or tar archive into a folder, files and folders only, none outside it.

    Raises:
        CorpusError: not an archive, damaged, encrypted, too big for the disk, or with a member that is a link or a
            device or whose path leads out of the archive.
    """
    place.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(place).free
    try:
        with contextlib.ExitStack() as stack:
            for member in tqdm(_members(file, stack), desc=f"Unpacking {file.name}", unit=" files"):
                if problem := _refused(member):
                    name = printable(member.name)
                    raise CorpusError(f"{file}: refused, it holds {problem}: {name}. Get the official archive")
                room -= member.size
                if room < 0:
                    raise CorpusError(f"{file}: needs more room than is left in {place.parent}")
                _write(member, place.joinpath(*_parts(member.name)))
    except CorpusError:
        raise
    except (OSError, *_DAMAGE) as error:
        if not isinstance(error, OSError) or error.errno is None:
            said = printable(str(error) or type(error).__name__)
            raise CorpusError(f"{file}: the archive is damaged or incomplete ({said}). Get it again") from None
        raise CorpusError(f"{file}: cannot be unpacked into {place.parent} ({error.strerror})") from None


def _refused(member: _Member) -> str | None:
    """What of a member is never written, in words."""
    if member.kind not in ("file", "folder"):
        return f"a {member.kind}"
    parts = re.split(r"[/\\]", member.name)
    if member.name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
        return "a path that leads out of it"
    if len(parts) > MOST_FOLDERS:
        return f"more than {MOST_FOLDERS} folders in one another"
    return "a file without a name" if member.kind == "file" and not _parts(member.name) else None


def _parts(name: str) -> list[str]:
    return [part for part in name.split("/") if part not in ("", ".")]


def _write(member: _Member, target: Path) -> None:
    """A member with the usual mode, whatever the archive says, and no longer than the archive says."""
    if member.kind == "folder":
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    left = member.size
    with member.open() as source, target.open("wb") as file:
        while left and (block := source.read(min(left, _BLOCK))):
            file.write(block)
            left -= len(block)
        if left or source.read(1):
            raise EOFError(f"{member.name} is not as long as the archive says")


def _members(file: Path, stack: contextlib.ExitStack) -> Iterator[_Member]:
    if zipfile.is_zipfile(file):
        archive = stack.enter_context(zipfile.ZipFile(file))
        for entry in archive.infolist():
            yield _Member(entry.filename, entry.file_size, _zip_kind(entry), partial(archive.open, entry))
    elif tarfile.is_tarfile(file):
        # Of any type: what it has beyond what is documented has none.
        tar: Any = stack.enter_context(contextlib.closing(tarfile.open(file, tarinfo=_TarMember)))  # noqa: SIM115
        for info in iter(tar.next, None):
            tar.members.clear()  # all would stay in memory
            is_link = info.issym() or info.islnk()
            kind = "file" if info.isreg() else "folder" if info.isdir() else "link" if is_link else "device"
            yield _Member(info.name, info.size, kind, partial(tar.extractfile, info))
        while tar.fileobj.read(_BLOCK):  # behind the last member is the checksum of all that was compressed
            pass
            tar.members = []  # which it would all hold
    else:
        raise CorpusError(f"{file}: neither a zip nor a tar archive, or one whose end is missing")


class _TarMember(tarfile.TarInfo):
    """As tarfile reads it, which takes a damaged member for the archive's end, and one of any size into memory."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_TarMember":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the end; not documented
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        """For subclasses to override, says tarfile's source."""
        if self.type == tarfile.GNUTYPE_SPARSE or self.size < 0:
            raise tarfile.ReadError("a file with holes")
        if self.type in _TAR_METADATA and self.size > _MOST_METADATA:
            raise tarfile.ReadError(f"a name or attributes of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]  # not documented


def _zip_kind(info: zipfile.ZipInfo) -> str:
    mode = info.external_attr >> 16
    if stat.S_ISLNK(mode):
        return "link"
    if info.flag_bits & 1:
        return "encrypted file"
    return "folder" if info.is_dir() else "file"
