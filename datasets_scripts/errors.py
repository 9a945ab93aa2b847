"""What ends a command in words: each of these is one line for the user, and an exit code."""

import signal

LONGEST = 4000  # characters of a message


def printable(text: str) -> str:
    """A name or a message on one line: line breaks, and bytes that are not UTF-8, are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UserError(Exception):
    """Something that the user can mend: the message names the file or option, what was expected, and what to do.

    It is one line, and not endless, whatever of a stranger's file it repeats.
    """

    exit_code = 2

    def __str__(self) -> str:
        text = printable(super().__str__())
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


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
