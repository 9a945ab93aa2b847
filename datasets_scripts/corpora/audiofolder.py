"""Anyone's own sound files: any folder tree, with or without labels and folds."""

from pathlib import Path

from ..corpus import Clip, FolderCorpus, Listing, listed_clips, read_table, relative_name, sound_files, whole_number
from ..errors import CorpusError


class AudioFolder(FolderCorpus):
    name = "audiofolder"
    title = "A folder of sound files"
    licence = "that of the sound files it was made from"
    layout = (
        "sound files (wav, flac, ogg, mp3, aiff, …) at any depth, "
        "optionally with metadata.csv: file_name,label,fold,source_id"
    )
    marks = (".",)  # any folder
    unique_content = True
    whole_files = False

    def read(self, root: Path) -> Listing:
        table = root / "metadata.csv"
        if table.exists():
            rows = read_table(table, ["file_name"])
            # In the table's order: whoever wrote one may mean something by it.
            clips, missing, unlisted = listed_clips(root, table, [_clip(row, root, table) for row in rows])
        else:
            rows = [{"file_name": relative_name(path, root)} for path in sound_files(root)]
            clips, missing, unlisted = [_clip(row, root, table) for row in rows], [], []
        names = [relative_name(clip.path, root) for clip in clips]
        if not any("label" in row for row in rows) and all("/" in name for name in names):
            clips = [c._replace(label=name.split("/")[0]) for c, name in zip(clips, names, strict=True)]
        return Listing(clips, missing, unlisted)


def _clip(row: dict[str, str], root: Path, table: Path) -> Clip:
    path = root / row["file_name"]
    fold = whole_number(row, "fold", table) if row.get("fold") else None
    if fold is not None and fold < 1:
        raise CorpusError(f"{table}: folds are numbered from 1, found {fold} for {row['file_name']}")
    return Clip(path, row.get("label") or None, fold or 0, None, row.get("source_id") or relative_name(path, root))
