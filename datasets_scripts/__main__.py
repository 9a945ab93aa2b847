"""`python -m datasets_scripts export|describe NAME …`: publish a corpus, or look at it."""

import argparse
import logging
import sys
from pathlib import Path

from .command_line import run_command
from .corpora import CORPUS_NAMES
from .errors import CorpusError


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; None: the process's own.

    Returns:
        Exit code: 0, or 2 for what a user can put right.
    """
    arguments = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s")

    return run_command(_run, arguments)


def _run(arguments: argparse.Namespace) -> None:
    from . import load_corpus  # after the arguments are known to be good: `--help` should not wait for it

    arguments.prepare(arguments)
    dataset = load_corpus(
        arguments.name,
        arguments.data_dir,
        allow_partial=arguments.allow_partial,
        skip_unreadable=arguments.skip_unreadable,
    )
    arguments.run(dataset, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m datasets_scripts", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="export|describe")
    export = commands.add_parser("export", help="write Parquet shards and a dataset card, ready to upload")
    export.add_argument(
        "--output_dir", required=True, help="new or empty folder; with --push_to_hub also one that holds this export"
    )
    export.add_argument("--push_to_hub", action="store_true", help="publish it; checked before the corpus is read")
    export.add_argument(
        "--hub_dataset_id", metavar="NAME", help="NAMESPACE/NAME, or NAME of your own (default: the output folder's)"
    )
    export.add_argument("--hub_private_repo", action="store_true", help="only for you and those whom you let in")
    export.set_defaults(prepare=_prepare_export, run=_export, repository=None)
    describe = commands.add_parser("describe", help="print counts, lengths and licence, and draw a clip of each class")
    describe.add_argument("--picture", type=Path, help="where to write the picture (default: ./NAME-classes.png)")
    describe.set_defaults(prepare=lambda arguments: None, run=_describe)
    for command in (export, describe):
        command.add_argument("name", help=", ".join(CORPUS_NAMES))
        command.add_argument(
            "--data_dir", help="folder, archive, export or Hub id; without it the corpus is downloaded"
        )
        command.add_argument("--allow_partial", action="store_true", help="accept a copy that is not complete")
        command.add_argument("--skip_unreadable", action="store_true", help="leave out files that cannot be decoded")
    return parser


def _prepare_export(arguments: argparse.Namespace) -> None:
    """Finds out before hours of work whether the export can be published."""
    from .loading import CORPORA
    from .publishing import claim_repository

    if (arguments.hub_dataset_id or arguments.hub_private_repo) and not arguments.push_to_hub:
        raise CorpusError("--hub_dataset_id and --hub_private_repo say how --push_to_hub publishes: add that")
    if arguments.push_to_hub and arguments.name in CORPORA:  # an unknown name has its own message
        repo_id = arguments.hub_dataset_id or Path(arguments.output_dir).absolute().name
        arguments.repository = claim_repository(CORPORA[arguments.name], repo_id, arguments.hub_private_repo)


def _export(dataset, arguments: argparse.Namespace) -> None:
    from .exporting import export_corpus, is_export_of
    from .loading import CORPORA
    from .publishing import publish_export

    # Without the folders: whoever reads the card has others, and should not learn ours.
    options = [f"--{option}" for option in ("allow_partial", "skip_unreadable") if getattr(arguments, option)]
    command = " ".join(["python -m datasets_scripts export", arguments.name, *options])
    target = arguments.output_dir
    if arguments.repository and is_export_of(Path(target).expanduser(), dataset):
        print(f"{target} holds this export already")
    else:
        export_corpus(dataset, CORPORA[arguments.name], target, command)
        print(f"{len(dataset)} clips written to {target}; it loads with load_dataset({target!r})")
    if arguments.repository:
        message = f"{CORPORA[arguments.name].title}: {len(dataset)} clips"
        url = publish_export(Path(target).expanduser(), arguments.repository, message)
        print(f"published: {url}")


def _describe(dataset, arguments: argparse.Namespace) -> None:
    from .describing import class_table, draw_classes, measures, state, summarise
    from .loading import CORPORA

    corpus, summary = CORPORA[arguments.name], summarise(dataset)
    print(f"{corpus.title}\nlicence: {corpus.licence}\n")
    print(measures(summary), state(dataset), class_table(summary), sep="\n\n")
    picture = arguments.picture or Path(f"{arguments.name}-classes.png")
    draw_classes(dataset, picture)
    print(f"\npicture: {picture}")


if __name__ == "__main__":
    sys.exit(main())
