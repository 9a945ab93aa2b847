"""Corpora of everyday sounds as `datasets.Dataset`s with one schema and official folds.

Example:

    >>> from datasets_scripts import decode_audio, load_corpus, train_test_folds
    >>> train, test = train_test_folds(load_corpus("esc10", "/data/ESC-10"), fold=1)
    >>> samples, sampling_rate = decode_audio(test[0]["audio"])  # float32, (channels, samples)
"""

from importlib import import_module

# Imported on demand: command lines take errors and types from this package before anything heavy is loaded.
_HOMES = {
    "CORPUS_NAMES": "corpora",
    "AudioError": "errors",
    "ClipIdentities": "identity",
    "CorpusError": "errors",
    "combine_corpora": "combining",
    "corpus_facts": "loading",
    "corpus_report": "builder",
    "cut_into_windows": "windows",
    "decode_audio": "audio",
    "load_corpus": "loading",
    "loading_options": "loading",
    "opened_sound": "audio",
    "sound_files": "corpus",
    "train_test_folds": "combining",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
