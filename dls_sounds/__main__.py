"""`dls COMMAND …` (= `python -m dls_sounds`): a trained network and a person's recordings."""

import argparse
import sys
from importlib import import_module

from datasets_scripts.command_line import Parser, run_command

from .settings import EmbedSettings, ExportSettings, LabelSettings, PredictSettings, SearchSettings

# {command: (its settings, the module whose `main` takes them)}; a module is imported when its options are known to be
# good, for `--help` should not wait for it.
COMMANDS = {
    "embed": (EmbedSettings, "embedding"),
    "search": (SearchSettings, "searching"),
    "predict": (PredictSettings, "predicting"),
    "label": (LabelSettings, "page"),
    "export": (ExportSettings, "exporting"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; see `run_command`.

    Args:
        argv: Its words; None: the process's own.
    """
    words = sys.argv[1:] if argv is None else argv
    settings_class, module = COMMANDS[make_parser().parse_args(words[:1]).command]
    settings = settings_class.parsed(words[1:])
    return run_command(import_module(f".{module}", __package__).main, settings)


def make_parser() -> argparse.ArgumentParser:
    """Of the command's name alone."""
    lines = "\n".join(f"  {name:8} {settings.__doc__.splitlines()[0]}" for name, (settings, _) in COMMANDS.items())
    parser = Parser(
        prog="dls",
        usage="dls COMMAND … (dls COMMAND --help tells its options)",
        description="A trained network and a person's recordings.",
        epilog=f"commands:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    return parser


if __name__ == "__main__":
    sys.exit(main())
