"""ESC-50, and ESC-10 in either of its two layouts (K. J. Piczak, "ESC", 2015)."""

import os
import re
from pathlib import Path
from typing import ClassVar

from ..corpus import (
    Archive,
    Clip,
    FolderCorpus,
    Listing,
    listed_clips,
    read_table,
    relative_name,
    sound_files,
    whole_number,
)
from ..errors import CorpusError

# Position = the official target number.
# fmt: off
ESC50_CLASSES = [
    "dog", "rooster", "pig", "cow", "frog",
    "cat", "hen", "insects", "sheep", "crow",
    "rain", "sea_waves", "crackling_fire", "crickets", "chirping_birds",
    "water_drops", "wind", "pouring_water", "toilet_flush", "thunderstorm",
    "crying_baby", "sneezing", "clapping", "breathing", "coughing",
    "footsteps", "laughing", "brushing_teeth", "snoring", "drinking_sipping",
    "door_wood_knock", "mouse_click", "keyboard_typing", "door_wood_creaks", "can_opening",
    "washing_machine", "vacuum_cleaner", "clock_alarm", "clock_tick", "glass_breaking",
    "helicopter", "chainsaw", "siren", "car_horn", "engine",
    "train", "church_bells", "airplane", "fireworks", "hand_saw",
]
# fmt: on

# The older stand-alone ESC-10 numbers its folders in an order of its own.
ESC10_FOLDERS = {
    "001 - Dog bark": "dog",
    "002 - Rain": "rain",
    "003 - Sea waves": "sea_waves",
    "004 - Baby cry": "crying_baby",
    "005 - Clock tick": "clock_tick",
    "006 - Person sneeze": "sneezing",
    "007 - Helicopter": "helicopter",
    "008 - Chainsaw": "chainsaw",
    "009 - Rooster": "rooster",
    "010 - Fire crackling": "crackling_fire",
}
ESC10_CLASSES = sorted(ESC10_FOLDERS.values(), key=ESC50_CLASSES.index)

_ESC50_NAME = re.compile(r"(\d+)-(\d+)-([A-Z]+)-(\d+)\.\w+", re.IGNORECASE)
_ESC10_NAME = re.compile(r"([1-5])-(\d+)-([A-Z]+)\.\w+", re.IGNORECASE)
# Files of either, and of the older ESC-10 with their folders, wherever they lie: a file of anybody's own may be called
# 1-2-A.wav.
_PATH = re.compile(
    r"(?:.*/)?(?:([1-5]-\d{3,}-[A-Z])-[0-4]?\d|0(?:0[1-9]|10) - [A-Z][a-z ]+/([1-5]-\d{3,}-[A-Z]))\.\w+"
)
_TABLE = "meta/esc50.csv"
_TABLE_COLUMNS = ["filename", "fold", "target", "category", "esc10", "src_file", "take"]


class ESC50(FolderCorpus):
    name = "esc50"
    title = "ESC-50: Environmental Sound Classification, 50 classes"
    licence = "Creative Commons Attribution-NonCommercial 3.0 (CC BY-NC 3.0)"
    licence_id = "cc-by-nc-3.0"
    homepage = "https://github.com/karolpiczak/ESC-50"
    citation = """@inproceedings{piczak2015dataset,
  title = {{ESC}: {Dataset} for {Environmental Sound Classification}},
  author = {Piczak, Karol J.},
  booktitle = {Proceedings of the 23rd {Annual ACM Conference} on {Multimedia}},
  year = {2015},
  pages = {1015--1018},
  doi = {10.1145/2733373.2806390}
}"""
    columns = {"esc10": "bool", "take": "string"}
    fold_sizes = dict.fromkeys(range(1, 6), 400)
    class_sizes = dict.fromkeys(ESC50_CLASSES, 40)
    # The archive is made anew by its host from time to time: neither its size nor its digest can be relied on.
    archives = (Archive("https://github.com/karoldvl/ESC-50/archive/master.zip", "ESC-50-master.zip"),)
    layout = "meta/esc50.csv and audio/{fold}-{clip}-{take}-{target}.wav"
    marks: ClassVar[tuple[str, ...]] = (_TABLE,)

    def read(self, root: Path) -> Listing:
        clips = [self._clip(row, root) for row in read_table(root / _TABLE, _TABLE_COLUMNS)]
        return Listing(*listed_clips(root, root / _TABLE, clips, self._has), seconds=(4.95, 5.05))

    def _has(self, clip: Clip) -> bool:
        return True

    @staticmethod
    def published_identity(path: str, clip_id: str | None = None) -> str | None:
        if clip_id is None:
            name = _PATH.fullmatch(path.replace(os.sep, "/"))
            clip_id = name and (name[1] or name[2])
        return clip_id and f"esc/{clip_id.upper()}"

    @staticmethod
    def _clip(row: dict[str, str], root: Path) -> Clip:
        table = root / _TABLE
        name = _ESC50_NAME.fullmatch(row["filename"])
        if not name:
            raise CorpusError(f"{table}: {row['filename']} is not named {{fold}}-{{clip}}-{{take}}-{{target}}.wav")
        fold, target = whole_number(row, "fold", table), whole_number(row, "target", table)
        if (int(name[1]), name[2], name[3], int(name[4])) != (fold, row["src_file"], row["take"], target):
            raise CorpusError(
                f"{table}: {row['filename']} contradicts its row: fold {fold}, src_file {row['src_file']}, "
                f"take {row['take']}, target {target}"
            )
        if not 0 <= target < len(ESC50_CLASSES) or row["category"] != ESC50_CLASSES[target]:
            official = ESC50_CLASSES[target] if 0 <= target < len(ESC50_CLASSES) else "not a class (0 to 49)"
            raise CorpusError(
                f"{table}: {row['filename']} has category {row['category']!r}, but target {target} is {official}"
            )
        if row["esc10"].lower() not in ("true", "false"):
            raise CorpusError(f"{table}: {row['filename']} has esc10 {row['esc10']!r}; expected True or False")
        return Clip(
            path=root / "audio" / row["filename"],
            label=row["category"],
            fold=fold,
            clip_id=f"{fold}-{row['src_file']}-{row['take']}",
            source_id=row["src_file"],
            extra={"esc10": row["esc10"].lower() == "true", "take": row["take"]},
        )


class ESC10(ESC50):
    name = "esc10"
    title = "ESC-10: Environmental Sound Classification, 10 classes"
    licence = "Creative Commons Attribution 3.0 (CC BY 3.0)"
    licence_id = "cc-by-3.0"
    fold_sizes = dict.fromkeys(range(1, 6), 80)
    class_sizes = dict.fromkeys(ESC10_CLASSES, 40)
    layout = f"{ESC50.layout}, or the ten folders '001 - Dog bark' … '010 - Fire crackling'"

    marks = (_TABLE, *ESC10_FOLDERS)

    def _has(self, clip: Clip) -> bool:
        return clip.extra["esc10"]

    def read(self, root: Path) -> Listing:
        if (root / _TABLE).exists():
            return super().read(root)
        clips, unlisted = [], []
        for path in sound_files(root):
            name = _ESC10_NAME.fullmatch(path.name)
            label = ESC10_FOLDERS.get(path.relative_to(root).parts[0])
            if name and label and path.parent.parent == root:
                fold, source, take = int(name[1]), name[2], name[3]
                clips.append(Clip(path, label, fold, f"{fold}-{source}-{take}", source, {"esc10": True, "take": take}))
            else:
                unlisted.append(relative_name(path, root))
        # Lengths in this edition are looser: 3.6 s to 7.2 s in the published files.
        return Listing(clips, unlisted=unlisted, seconds=(3.5, 7.5))
