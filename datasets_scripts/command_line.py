"""The shell around every command: how it ends, in words and as an exit code. Imports nothing heavy."""

import argparse
import contextlib
import logging
import signal
import sys
from collections.abc import Callable

from .errors import Interrupted, UserError, printable

logger = logging.getLogger("dls")


class Parser(argparse.ArgumentParser):
    """Whose messages are one line, whatever was typed."""

    def error(self, message: str):
        super().error(printable(message))


def run_command(main: Callable[..., int | None], *arguments) -> int:
    """Runs a command and turns what a user can cause into one line on standard error.

    Args:
        main: The command; returns its exit code, or None for 0.
        *arguments: What it is called with.

    Returns:
        `main`'s exit code; 2 for a `UserError` or a file that cannot be written; 3 if another process of the run is
        lost; 128 + signal after an interruption.
    """
    try:
        return main(*arguments) or 0
    except Interrupted as interruption:
        logger.info(f"{interruption}: saved; --resume_from_checkpoint latest goes on from here")
        return interruption.exit_code
    except KeyboardInterrupt:  # before anything watches for signals, or a second time
        print("interrupted; the same command starts anew, or goes on where it can", file=sys.stderr)
        return 128 + signal.SIGINT
    except (UserError, OSError) as error:
        message = str(error)
        if "Original Traceback" in message:  # from a decoding process: the error's own words are in the last line
            message = Exception.__str__(error).strip().splitlines()[-1].partition(": ")[2]
        print(f"error: {printable(message)}", file=sys.stderr)
        return getattr(error, "exit_code", UserError.exit_code)


def run_parsed(parser: argparse.ArgumentParser, argv: list[str] | None) -> int:
    """Runs what a command line names: `run`, a default that its parser sets, with the arguments.

    Args:
        parser: Of the command line.
        argv: The arguments; None: the process's own.

    Returns:
        Exit code, see `run_command`; the process ends in argparse's own way where the arguments are wrong.
    """
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    return run_command(arguments.run, arguments)


class SignalWatch(contextlib.AbstractContextManager):
    """Notes SIGINT and SIGTERM instead of dying of them, so that the loop can save first; a second one kills at once.

    Attributes:
        received: The signal's number, or 0.
    """

    def __init__(self):
        self.received = 0

    def __enter__(self):
        self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        self.received = number
        for watched, handler in self.previous.items():
            signal.signal(watched, handler)
