"""`python -m hub_cards space RUN_FOLDER`: show a trained folder."""

import argparse
import sys
from pathlib import Path

from dls_training.arguments import UserError, corpus_and_source


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m hub_cards", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="space")
    space = commands.add_parser("space", help="a page on this machine, to try a trained folder")
    space.add_argument("run_folder", type=Path, metavar="RUN_FOLDER", help="output of a train script")
    space.add_argument(
        "--corpus", action="append", default=[], type=corpus_and_source, metavar="NAME=DIR",
        help="where a corpus of the run is now (default: where it was)",
    )  # fmt: skip
    space.add_argument("--port", type=int, default=7860, help="of 127.0.0.1 (default: %(default)s)")
    space.set_defaults(run=run_space)
    return parser.parse_args(argv)


def run_space(args: argparse.Namespace) -> None:
    try:
        from .space.app import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("the page needs Gradio: pip install -e '.[space]'") from error
    serve(args.run_folder, args.corpus, args.port)


def main() -> int:
    args = parse_args()
    from dls_training.runtime import run_script  # imports torch: --help should not wait for it

    return run_script(lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
