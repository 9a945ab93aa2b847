"""`python -m hub_cards publish|space …`: what a finished run becomes."""

import argparse
import sys

from datasets_scripts.command_line import Parser, run_parsed
from datasets_scripts.errors import UserError
from datasets_scripts.options import argument, named_source, path, text, whole

NAME, PORT = argument(text), argument(whole(1, 65535))


def main(argv: list[str] | None = None) -> int:
    """Runs one command; see `run_parsed`."""
    return run_parsed(make_parser(), argv)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m hub_cards", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="publish|space")
    publish = commands.add_parser(
        "publish", help="upload a finished run to a model repository of the Hub, in one commit"
    )
    publish.add_argument(
        "--hub_model_id",
        required=True,
        type=NAME,
        metavar="NAME",
        help="NAMESPACE/NAME, or the NAME of your own",
    )
    publish.add_argument("--hub_private_repo", action="store_true", help="only for you and those whom you let in")
    publish.add_argument("--dry_run", action="store_true", help="print what would be sent, and change nothing")
    publish.set_defaults(run=publish_run)
    space = commands.add_parser("space", help="a page to try a finished run: served on this machine, or as a folder")
    space.add_argument(
        "--corpus", action="append", default=[], type=argument(named_source), metavar="NAME=DIR",
        help="where a corpus of the run is now (default: where it was)",
    )  # fmt: skip
    where = space.add_mutually_exclusive_group()
    where.add_argument("--port", type=PORT, default=7860, help="of 127.0.0.1 (default: %(default)s)")
    where.add_argument(
        "--output_dir", type=argument(path), metavar="FOLDER",
        help="write a Space of the Hub there (app.py, requirements.txt, README.md, the model, no clips) instead",
    )  # fmt: skip
    space.set_defaults(run=run_space)
    for command in (publish, space):
        command.add_argument(
            "run_folder", type=argument(path), metavar="RUN_FOLDER",
            help="--output_dir of train_npid.py or train_classification.py",
        )  # fmt: skip
    return parser


def publish_run(arguments: argparse.Namespace) -> None:
    from .publishing import print_plan, publish

    do = print_plan if arguments.dry_run else publish
    do(arguments.run_folder, arguments.hub_model_id, arguments.hub_private_repo)


def run_space(arguments: argparse.Namespace) -> None:
    """Serves the page until it is interrupted; or writes it as a folder."""
    from dls_sounds.page import load_app

    if arguments.output_dir:
        from .space import write_space

        if arguments.corpus:
            raise UserError("--corpus: no clips go into the folder that --output_dir names: leave it out")
        return write_space(arguments.run_folder, arguments.output_dir)
    load_app().serve(arguments.run_folder, arguments.corpus, arguments.port)


if __name__ == "__main__":
    sys.exit(main())
