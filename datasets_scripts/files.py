"""Files that others rely on: written whole or not at all, known by their digest, read without trust."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash
from safetensors import SafetensorError

from .errors import UserError

REPLACED = "replaced"
# On a full disk safetensors raises an error of its own.
WRITE_ERRORS = (OSError, SafetensorError)
_BLOCK = 1 << 20


@contextmanager
def folder_moved_into_place(final: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `final`, and renames it to `final` when everything in it was written.

    Raises:
        UserError: naming the folder, if it cannot be written.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}.") as folder:
            unfinished = Path(folder) / final.name
            unfinished.mkdir()
            yield unfinished
            grant_usual_modes(unfinished)
            if final.exists():
                final.rename(Path(folder) / REPLACED)
            unfinished.rename(final)
    except WRITE_ERRORS as error:
        raise UserError(f"{final} cannot be written ({reason(error)}); what was saved before is intact") from error


@contextmanager
def files_moved_into_place(folder: Path, last: str | None = None, by_way_of: Path | None = None) -> Iterator[Path]:
    """Like `folder_moved_into_place`, for files that join what `folder` already holds.

    Args:
        folder: Where they go.
        last: A file that is there only while the others belong to it: it goes first and comes last.
        by_way_of: A folder in the same file system, where they are written: whoever clears it after a kill clears
            them, too. None: `folder`.

    Raises:
        UserError: naming the folder, if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=by_way_of or folder, prefix=".unfinished.") as temporary:
            yield Path(temporary)
            grant_usual_modes(Path(temporary))
            if last is not None:
                (folder / last).unlink(missing_ok=True)
            for path in sorted(Path(temporary).iterdir(), key=lambda path: (path.name == last, path.name)):
                os.replace(path, folder / path.name)
    except WRITE_ERRORS as error:
        raise UserError(f"{folder} cannot be written ({reason(error)})") from error


def grant_usual_modes(folder: Path) -> None:
    """Lets others read files as the umask says: safetensors writes its own for the owner alone."""
    os.umask(umask := os.umask(0o077))
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def reason(error: Exception) -> str:
    """What the system says, without the path that the message names already; or all that the error says."""
    return getattr(error, "strerror", None) or str(error)


def write_json(path: Path, content: dict) -> None:
    """Writes JSON with a newline at its end."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def json_digest(content) -> str:
    """Of what JSON makes of it, whatever the order of keys; hexadecimal."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def read_object(path: Path | None) -> dict | None:
    """A JSON object, or None if the file is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def file_digest(path: str | os.PathLike) -> str:
    """XXH3 with 128 bits of a file's bytes, hexadecimal.

    It tells files apart as surely as SHA-256 as long as nobody makes two collide on purpose, and costs a hundredth.
    """
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while part := file.read(_BLOCK):
            digest.update(part)
    return digest.hexdigest()
