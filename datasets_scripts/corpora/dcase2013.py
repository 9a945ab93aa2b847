"""DCASE2013 acoustic scenes (D. Giannoulis et al., 2013)."""

import re
from pathlib import Path

from ..corpus import Archive, Clip, FolderCorpus, Listing, relative_name, sound_files

# Both parts use the same file names, so the part belongs to a clip's identity.
_PARTS = {"scenes_stereo": ("development", 1), "scenes_stereo_testset": ("evaluation", 2)}
_NAME = re.compile(r"([a-z]+)\d\d\.\w+", re.IGNORECASE)
_CLASSES = (
    "bus", "busystreet", "office", "openairmarket", "park", "quietstreet", "restaurant", "supermarket", "tube",
    "tubestation",
)  # fmt: skip


class DCASE2013(FolderCorpus):
    name = "dcase2013"
    title = "DCASE2013 acoustic scene classification, 10 classes"
    licence = "Creative Commons (check the terms at the publisher before you share the sound)"
    licence_id = "other"
    homepage = "https://dcase.community/challenge2013/task-acoustic-scene-classification"
    citation = """@inproceedings{giannoulis2013detection,
  title = {Detection and Classification of Acoustic Scenes and Events: An {IEEE AASP} Challenge},
  author = {Giannoulis, Dimitrios and Benetos, Emmanouil and Stowell, Dan and Rossignol, Mathias and
            Lagrange, Mathieu and Plumbley, Mark D.},
  booktitle = {{IEEE} Workshop on Applications of Signal Processing to Audio and Acoustics},
  year = {2013},
  doi = {10.1109/WASPAA.2013.6701819}
}"""
    columns = {"subset": "string"}
    fold_sizes = {1: 100, 2: 100}
    class_sizes = dict.fromkeys(_CLASSES, 20)
    archives = (
        Archive(
            "https://archive.org/download/dcase2013_scene_classification/scenes_stereo.zip",
            "scenes_stereo.zip",
            size=361_748_263,
            md5="abdefde136d84de33b0f20a0f13a6b97",
        ),
        Archive(
            "https://archive.org/download/dcase2013_scene_classification_testset/scenes_stereo_testset.zip",
            "scenes_stereo_testset.zip",
            size=371_994_727,
        ),
    )
    layout = "scenes_stereo/bus01.wav … (development) and scenes_stereo_testset/bus01.wav … (evaluation)"
    marks = tuple(_PARTS)

    def read(self, root: Path) -> Listing:
        clips, unlisted = [], []
        for path in sound_files(root):
            name, part = _NAME.fullmatch(path.name), _PARTS.get(path.parent.name)
            if not name or not part or name[1].lower() not in _CLASSES:
                unlisted.append(relative_name(path, root))
                continue
            subset, fold = part
            clip_id = f"{subset}/{path.stem}"
            clips.append(Clip(path, name[1].lower(), fold, clip_id, clip_id, {"subset": subset}))
        return Listing(clips, unlisted=unlisted, seconds=(29.5, 30.5))
