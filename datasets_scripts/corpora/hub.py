"""Any audio dataset of the Hub's, or of a folder that `datasets` can load, as a corpus."""

from pathlib import Path

from ..corpus import FolderCorpus, Listing
from .audiofolder import AudioFolder


class HubDataset(FolderCorpus):
    name = "hub"
    title = "A dataset of the Hub's"
    licence = "that of the dataset, see its card"
    layout = "a dataset's Hub id, or a folder that load_dataset can load"
    # Named as in transformers' example scripts.
    options = ("audio_column_name", "label_column_name", "fold_column_name", "dataset_config_name")
    marks = AudioFolder.marks
    unique_content = AudioFolder.unique_content
    whole_files = AudioFolder.whole_files

    def read(self, root: Path) -> Listing:
        """Of the folder of sound files that `unpacked_dataset` makes."""
        return AudioFolder().read(root, folder_labels=False)
