"""The two errors that a user's folder, file or option can cause."""


class CorpusError(ValueError):
    """A corpus cannot be used as it is; the message names the file, folder or option and says what to do."""


class AudioError(CorpusError):
    """One sound file cannot be read; the message names it and says what is wrong with it."""
