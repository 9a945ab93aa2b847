"""`python -m datasets_scripts export|describe NAME …`: publish a corpus, or look at it."""

import argparse
import shlex
import sys
from pathlib import Path

from .command_line import Parser, run_parsed
from .corpora import CORPORA, CORPUS_NAMES
from .errors import UserError
from .options import argument, label_pattern, path, text

TEXT = argument(text)
HUB_OPTIONS = CORPORA["hub"].options


def main(argv: list[str] | None = None) -> int:
    """Runs one command; see `run_parsed`."""
    return run_parsed(make_parser(), argv)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m datasets_scripts", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="export|describe")
    export = commands.add_parser("export", help="write Parquet shards and a dataset card, ready to upload")
    export.add_argument(
        "--output_dir",
        required=True,
        type=TEXT,
        help="new or empty folder; with --push_to_hub also one that holds this export",
    )
    export.add_argument("--push_to_hub", action="store_true", help="publish it; checked before the corpus is read")
    export.add_argument(
        "--hub_dataset_id",
        type=TEXT,
        metavar="NAME",
        help="NAMESPACE/NAME, or NAME of your own (default: the output folder's)",
    )
    export.add_argument("--hub_private_repo", action="store_true", help="only for you and those whom you let in")
    export.set_defaults(run=_export)
    describe = commands.add_parser("describe", help="print counts, lengths and licence, and draw a clip of each class")
    describe.add_argument(
        "--picture",
        type=argument(path),
        metavar="FILE",
        help="where to write the picture (default: ./NAME-classes.png)",
    )
    describe.set_defaults(run=_describe)
    for command in (export, describe):
        command.add_argument("name", type=TEXT, help=", ".join(CORPUS_NAMES))
        command.add_argument(
            "--data_dir",
            type=TEXT,
            help="folder, archive, export or Hub id; without it the corpus is downloaded",
        )
        command.add_argument("--allow_partial", action="store_true", help="accept a copy that is not complete")
        command.add_argument("--skip_unreadable", action="store_true", help="leave out files that cannot be decoded")
        command.add_argument(
            "--label_pattern",
            type=argument(label_pattern),
            metavar="PATTERN",
            help="of an audiofolder: regular expression with (?P<label>…), perhaps (?P<source>…), in files' names",
        )
        command.add_argument(
            "--no_folder_labels", action="store_true", help="of an audiofolder: folders are neither classes nor folds"
        )
        for option in HUB_OPTIONS:
            command.add_argument(f"--{option}", type=TEXT, metavar="NAME", help="of a dataset of the Hub's")
    return parser


# What follows imports when the arguments are known to be good: `--help` should not wait for it.


def _load(arguments: argparse.Namespace):
    """The corpus and what it is."""
    from .loading import load_corpus, loading_options

    dataset = load_corpus(arguments.name, arguments.data_dir, **loading_options(arguments.name, vars(arguments)))
    return dataset, CORPORA[arguments.name]


def _export(arguments: argparse.Namespace) -> None:
    from .exporting import export_corpus, is_export_of

    repository, target = _claim_repository(arguments), arguments.output_dir
    dataset, corpus = _load(arguments)
    # Without the folders: whoever reads the card has others, and should not learn ours.
    flags = ("allow_partial", "skip_unreadable", "no_folder_labels")
    options = [f"--{option}" for option in flags if getattr(arguments, option)]
    for option in ("label_pattern", *HUB_OPTIONS):
        options += [f"--{option}", getattr(arguments, option)] if getattr(arguments, option) else []
    command = shlex.join(["python", "-m", "datasets_scripts", "export", arguments.name, *options])
    folder = Path(target).expanduser()
    if repository and is_export_of(folder, dataset):
        print(f"{target} holds this export already")
    else:
        export_corpus(dataset, corpus, target, command)
        print(f"{len(dataset)} clips written to {target}; it loads with load_dataset({target!r})")
    if repository:
        repository.publish(repository.publication.files(folder), f"{corpus.title}: {len(dataset)} clips")


def _claim_repository(arguments: argparse.Namespace):
    """Finds out before hours of work whether the export can be published, and creates the repository if there is none.

    Raises:
        UploadError: see `HubRepository`.
    """
    if not arguments.push_to_hub:
        if arguments.hub_dataset_id or arguments.hub_private_repo:
            raise UserError("--hub_dataset_id and --hub_private_repo say how --push_to_hub publishes: add that")
        return None
    from .hub import HubRepository
    from .publishing import export_of

    if arguments.name not in CORPORA:  # which has its own message
        return None
    repo_id = arguments.hub_dataset_id or Path(arguments.output_dir).absolute().name
    return HubRepository(export_of(CORPORA[arguments.name]), repo_id, arguments.hub_private_repo).create_if_absent()


def _describe(arguments: argparse.Namespace) -> None:
    from .describing import class_table, draw_classes, measures, state

    dataset, corpus = _load(arguments)
    print(f"{corpus.title}\nlicence: {corpus.licence}\n")
    print(measures(dataset), state(dataset, str), class_table(dataset, str), sep="\n\n")
    picture = arguments.picture or Path(f"{arguments.name}-classes.png")
    draw_classes(dataset, picture)
    print(f"\npicture: {picture}")


if __name__ == "__main__":
    sys.exit(main())
