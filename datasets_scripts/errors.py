"""What ends a command in words: each of these is one line for the user, and an exit code."""

import signal


class UserError(Exception):
    """Something that the user can mend: the message names the file or option, what was expected, and what to do."""

    exit_code = 2


class CorpusError(UserError, ValueError):
    """A corpus cannot be used as it is; the message names the file, folder or option and says what to do."""


class AudioError(CorpusError):
    """One sound file cannot be read; the message names it and says what is wrong with it."""


class UploadError(UserError):
    """Nothing was published; the message says why and what to do, and never holds the token."""


class HubUnreachable(UploadError):
    """The Hub was not even asked: offline, no token, no connection."""


class LostProcess(UserError):
    """Another process of this run has died, or does not answer."""

    exit_code = 3


class Interrupted(Exception):
    """SIGINT or SIGTERM was obeyed: everything is saved."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number
