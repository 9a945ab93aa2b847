"""Corpora of everyday sounds as `datasets.Dataset`s with one schema and official folds.

Example:

    >>> from datasets_scripts import decode_audio, load_corpus, train_test_folds
    >>> train, test = train_test_folds(load_corpus("esc10", "/data/ESC-10"), fold=1)
    >>> samples, sampling_rate = decode_audio(test[0]["audio"])  # float32, (channels, samples)
"""

from .audio import decode_audio, opened_sound
from .builder import corpus_report
from .combining import combine_corpora, train_test_folds
from .corpus import sound_files
from .errors import AudioError, CorpusError
from .identity import ClipIdentities, file_digest
from .loading import CORPUS_NAMES, corpus_facts, load_corpus
from .windows import cut_into_windows

__all__ = [
    "CORPUS_NAMES",
    "AudioError",
    "ClipIdentities",
    "CorpusError",
    "combine_corpora",
    "corpus_facts",
    "corpus_report",
    "cut_into_windows",
    "decode_audio",
    "file_digest",
    "load_corpus",
    "opened_sound",
    "sound_files",
    "train_test_folds",
]
