"""Anyone's own sound files: any folder tree, with or without labels and folds."""

from pathlib import Path

from ..corpus import Clip, FolderCorpus, Listing
from ..errors import CorpusError
from ..labels import BACKGROUND, Files, FromNames, Said, from_file_names, from_folders, normal


class AudioFolder(FolderCorpus):
    name = "audiofolder"
    title = "A folder of sound files"
    licence = "that of the sound files it was made from"
    layout = (
        "sound files (wav, flac, ogg, mp3, aiff, …) at any depth, "
        "optionally with metadata.csv: file_name,label,fold,source_id"
    )
    marks = (".",)  # any folder
    options = ("label_pattern", "folder_labels")
    unique_content = True
    whole_files = False

    def read(self, root: Path, label_pattern: str | None = None, folder_labels: bool = True) -> Listing:
        files = Files(root)
        listed, stretches = files.read_tables()
        # In the tables' order: whoever wrote one may mean something by it.
        names = list(listed) or [*files.sounds, *files.unreadable]
        in_tables = bool(stretches) or any(said.label is not None for said in listed.values())
        by_name = _from_names(names, label_pattern, folder_labels, in_tables, root)
        whole = {name: _clip(root / name, name, listed.get(name), by_name) for name in names}
        clips = {name: clip for name, clip in whole.items() if name in files.readable}
        missing = [name for name in whole if name not in files.known]
        missing += [f"{name} ({where})" for name, where, _ in stretches if name not in files.known]
        parts = [
            clips[name]._replace(
                label=normal(said.label), start=said.start, end=said.end, present=said.present, where=where
            )
            for name, where, said in stretches
            if name in clips
        ]
        unlisted = [name for name in files.sounds if name not in whole]
        labels = {clip.label for clip in [*whole.values(), *parts]}
        classes = {label for label in labels if label is not None and label != BACKGROUND}
        findings = {
            "inferred": [*([f"labels from {', '.join(files.tables)}"] if in_tables else []), *by_name.inferred],
            "unsupported": [name for name in files.unreadable if name in whole],
            "strays": list(by_name.strays),
            "unmatched": list(by_name.unmatched),
        }
        return Listing([*clips.values(), *parts], missing, unlisted, classes=classes, findings=findings)


def _from_names(names: list[str], pattern: str | None, folders: bool, in_tables: bool, root: Path) -> FromNames:
    """What names say, as far as it is asked for; tables prevail over folders' names where labels are concerned."""
    found = from_folders(names) if folders else FromNames()
    if in_tables or pattern:
        ignored = ["the folders' names are no labels"] if len(set(found.labels.values())) > 1 else []
        found = found._replace(labels={}, strays=[], inferred=[*found.inferred, *ignored])
    elif found.labels:
        words = "labels from the folders' names (--no_folder_labels: there are none)"
        found = found._replace(inferred=[*found.inferred, words])
    if pattern is None:
        return found
    said = from_file_names(names, pattern)
    if names and len(said.unmatched) == len(names):
        raise CorpusError(f"{root}: label_pattern {pattern!r} is found in no file's name, such as {names[0]}")
    return said._replace(folds=found.folds, inferred=[*found.inferred, *said.inferred])


def _clip(path: Path, name: str, said: Said | None, by_name: FromNames) -> Clip:
    label, fold, source = (said.label, said.fold, said.source) if said else (None, None, None)
    fold = by_name.folds.get(name, 0) if fold is None else fold
    label = by_name.labels.get(name) if label is None else label
    return Clip(path, normal(label) or None, fold, None, source or by_name.sources.get(name, name))
