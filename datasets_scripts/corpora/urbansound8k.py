"""UrbanSound8K (J. Salamon, C. Jacoby, J. P. Bello, "A Dataset and Taxonomy for Urban Sound Research", 2014)."""

import re
from pathlib import Path

from ..corpus import Archive, Clip, FolderCorpus, Listing, listed_clips, read_table, whole_number
from ..errors import CorpusError

_TABLE = "metadata/UrbanSound8K.csv"
_TABLE_COLUMNS = ["slice_file_name", "fsID", "start", "end", "salience", "fold", "classID", "class"]
_NAME = re.compile(r"(\d+)-(\d+)-(\d+)-(\d+)\.\w+")


class UrbanSound8K(FolderCorpus):
    name = "urbansound8k"
    title = "UrbanSound8K: urban sounds, 10 classes"
    licence = "Creative Commons Attribution-NonCommercial (CC BY-NC; 3.0 or 4.0, the publisher's pages disagree)"
    licence_id = "cc-by-nc-4.0"
    homepage = "https://urbansounddataset.weebly.com/urbansound8k.html"
    citation = """@inproceedings{salamon2014dataset,
  title = {A Dataset and Taxonomy for Urban Sound Research},
  author = {Salamon, Justin and Jacoby, Christopher and Bello, Juan Pablo},
  booktitle = {22nd {ACM} International Conference on Multimedia},
  year = {2014},
  pages = {1041--1044},
  doi = {10.1145/2647868.2655045}
}"""
    columns = {"salience": "int64", "start": "float64", "end": "float64"}
    fold_sizes = dict(enumerate([873, 888, 925, 990, 936, 823, 838, 806, 816, 837], 1))
    class_sizes = {
        "air_conditioner": 1000,
        "car_horn": 429,
        "children_playing": 1000,
        "dog_bark": 1000,
        "drilling": 1000,
        "engine_idling": 1000,
        "gun_shot": 374,
        "jackhammer": 1000,
        "siren": 929,
        "street_music": 1000,
    }
    # Five recordings have slices in two folds in the publisher's own split.
    known_crossings = {(1, 4): 2, (1, 8): 1, (1, 9): 1, (2, 7): 1}
    archives = (
        Archive(
            "https://zenodo.org/record/1203745/files/UrbanSound8K.tar.gz",
            "UrbanSound8K.tar.gz",
            md5="9aa69802bbf37fb986f71ec1483a196e",
        ),
    )
    layout = f"{_TABLE} and audio/fold1 … fold10/{{fsID}}-{{classID}}-{{occurrence}}-{{slice}}.wav"
    marks = (_TABLE,)

    def read(self, root: Path) -> Listing:
        clips = [self._clip(row, root) for row in read_table(root / _TABLE, _TABLE_COLUMNS)]
        # Slices are at most 4 s; a little more is rounding at the recordings' own rates.
        return Listing(*listed_clips(root, root / _TABLE, clips), seconds=(0.0, 4.05))

    def _clip(self, row: dict[str, str], root: Path) -> Clip:
        table, file = root / _TABLE, row["slice_file_name"]
        names = list(self.class_sizes)
        name = _NAME.fullmatch(file)
        if not name:
            raise CorpusError(f"{table}: {file} is not named {{fsID}}-{{classID}}-{{occurrence}}-{{slice}}.wav")
        class_id, fold = whole_number(row, "classID", table), whole_number(row, "fold", table)
        if (name[1], int(name[2])) != (row["fsID"], class_id):
            raise CorpusError(f"{table}: {file} contradicts its row: fsID {row['fsID']}, classID {class_id}")
        if not 0 <= class_id < len(names) or names[class_id] != row["class"]:
            official = names[class_id] if 0 <= class_id < len(names) else "not a class (0 to 9)"
            raise CorpusError(f"{table}: {file} has class {row['class']!r}, but classID {class_id} is {official}")
        try:
            start, end = float(row["start"]), float(row["end"])
        except ValueError:
            raise CorpusError(
                f"{table}: {file} has start {row['start']!r} and end {row['end']!r}, not seconds"
            ) from None
        return Clip(
            path=root / "audio" / f"fold{fold}" / file,
            label=row["class"],
            fold=fold,
            clip_id=Path(file).stem,
            source_id=row["fsID"],
            extra={"salience": whole_number(row, "salience", table), "start": start, "end": end},
        )
