"""Anyone's own sound files: any folder tree, with or without labels and folds."""

from pathlib import Path

from .corpus import Clip, FolderCorpus, Listing, read_table, sound_files, whole_number
from .errors import CorpusError

_TABLE = "metadata.csv"


class AudioFolder(FolderCorpus):
    name = "audiofolder"
    title = "A folder of sound files"
    licence = "that of the sound files it was made from"
    layout = (
        "sound files (wav, flac, ogg, mp3, aiff, …) at any depth, "
        "optionally with metadata.csv: file_name,label,fold,source_id"
    )
    unique_content = True
    whole_files = False

    def find_root(self, folder: Path) -> Path | None:
        return folder

    def read(self, root: Path) -> Listing:
        on_disk = {path.relative_to(root).as_posix(): path for path in sound_files(root)}
        rows, missing, unlisted = {}, [], []
        if (root / _TABLE).exists():
            rows = _rows(root / _TABLE)
            missing = [name for name in rows if name not in on_disk]
            unlisted = [name for name in on_disk if name not in rows]
            # In the table's order: whoever wrote one may mean something by it.
            on_disk = {name: on_disk[name] for name in rows if name in on_disk}
        labels = {name: row["label"] or None for name, row in rows.items() if "label" in row}
        if not labels and all("/" in name for name in on_disk):
            labels = {name: name.split("/")[0] for name in on_disk}
        clips = [
            Clip(
                path=path,
                label=labels.get(name),
                fold=_fold(rows.get(name, {}), root / _TABLE),
                clip_id=None,
                source_id=rows.get(name, {}).get("source_id") or name,
            )
            for name, path in on_disk.items()
        ]
        class_names = sorted({clip.label for clip in clips if clip.label is not None})
        return Listing(clips, class_names, missing, unlisted)


def _rows(table: Path) -> dict[str, dict[str, str]]:
    rows = {}
    for row in read_table(table, ["file_name"]):
        name = row["file_name"].removeprefix("./")
        if name in rows:
            raise CorpusError(f"{table}: {name} is listed twice")
        rows[name] = row
    return rows


def _fold(row: dict[str, str], table: Path) -> int:
    if not row.get("fold"):
        return 0
    fold = whole_number(row, "fold", table)
    if fold < 1:
        raise CorpusError(f"{table}: folds are numbered from 1, found {fold} for {row['file_name']}")
    return fold
