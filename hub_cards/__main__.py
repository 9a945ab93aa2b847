"""`python -m hub_cards publish|space …`: what a finished run becomes."""

import argparse
import logging
import sys
from pathlib import Path

from datasets_scripts.command_line import run_command
from datasets_scripts.errors import UserError
from datasets_scripts.options import named_source


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments; None: the process's own.

    Returns:
        Exit code: 0, or 2 for what a user can put right.
    """
    arguments = make_parser().parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("dls").setLevel(logging.INFO)
    return run_command(arguments.run, arguments)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hub_cards", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="publish|space")
    publish = commands.add_parser(
        "publish", help="upload a finished run to a model repository of the Hub, in one commit"
    )
    publish.add_argument(
        "--hub_model_id", required=True, metavar="NAME", help="NAMESPACE/NAME, or the NAME of your own"
    )
    publish.add_argument("--hub_private_repo", action="store_true", help="only for you and those whom you let in")
    publish.add_argument("--dry_run", action="store_true", help="print what would be sent, and change nothing")
    publish.set_defaults(run=publish_run)
    space = commands.add_parser("space", help="serve a page on this machine, to try a finished run")
    space.add_argument(
        "--corpus", action="append", default=[], type=named_source, metavar="NAME=DIR",
        help="where a corpus of the run is now (default: where it was)",
    )  # fmt: skip
    space.add_argument("--port", type=int, default=7860, help="of 127.0.0.1 (default: %(default)s)")
    space.set_defaults(run=run_space)
    for command in (publish, space):
        command.add_argument(
            "run_folder",
            type=Path,
            metavar="RUN_FOLDER",
            help="--output_dir of train_npid.py or train_classification.py",
        )
    return parser


def run_space(arguments: argparse.Namespace) -> int:
    """Serves the page until it is interrupted."""
    try:
        from .space.app import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("the page needs Gradio: pip install -e '.[space]'") from error
    return serve(arguments.run_folder, arguments.corpus, arguments.port)


def publish_run(arguments: argparse.Namespace) -> None:
    """Publishes, or prints what would be published."""
    from .publishing import publish

    if arguments.dry_run:
        print_plan(arguments.run_folder, arguments.hub_model_id, arguments.hub_private_repo)
    else:
        publish(arguments.run_folder, arguments.hub_model_id, arguments.hub_private_repo)


def print_plan(folder: Path, repo_id: str, private: bool) -> None:
    """Prints every file with its size, what it is, and what publishing would do with it."""
    from datasets_scripts.errors import HubUnreachable

    from .publishing import finished_run, open_repository, part_of

    files, results = finished_run(folder)
    fates = dict.fromkeys(files, "")
    try:
        repository = open_repository(repo_id, results["task"], private, "the same command")
        changes = repository.changes(files, part_of)
        fates = {name: "send" if name in changes.send else "is there already" for name in files}
        fates |= dict.fromkeys(changes.remove, "remove")
        state = "exists" if repository.commit else f"would be created{', private' if private else ''}"
        print(f"{repository.repo_id} {state}. A dry run: nothing was changed.")
    except HubUnreachable as error:
        print(f"{repo_id} was not looked at: {error}. A dry run: nothing was changed.")
    for name, fate in fates.items():
        size = f"{files[name].stat().st_size:,}" if name in files else ""
        print(f"{size:>14}  {name:<32}  {part_of(name):<17}  {fate}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
