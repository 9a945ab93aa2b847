"""An export's folder -> a dataset repository on the Hub, in one commit."""

from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from datasets_scripts.hub import HubRepository

from .corpus import Corpus
from .errors import UploadError
from .exporting import report_in_card


def is_part(path: str) -> bool:
    """Whether a path is part of a published export."""
    return path == "README.md" or fnmatchcase(path, "data/*.parquet")


def corpus_in_card(card: Path | None) -> str | None:
    """The corpus of which a dataset card describes an export; None if it is no such card."""
    try:
        report = report_in_card(card) if card else None
    except (ValueError, yaml.YAMLError):
        return None
    return report.get("corpus") if isinstance(report, dict) else None


def claim_repository(corpus: Corpus, repo_id: str, private: bool) -> HubRepository:
    """Makes sure, before hours of work, that an export can be published; creates the repository if there is none.

    Args:
        corpus: what is to be published there.
        repo_id: NAMESPACE/NAME, or the NAME of one of the user's own.
        private: whether it must not be public.

    Raises:
        UploadError: it holds anything but an earlier export of the corpus; or see `HubRepository`.
    """
    repository = HubRepository(repo_id, "dataset", private, "the same command")
    if not repository.is_empty:
        found = corpus_in_card(repository.fetch("README.md"))
        if found != corpus.name:
            raise UploadError(
                f"{repository.repo_id} holds something else: expected an export of {corpus.name}, found "
                f"{f'one of {found}' if found else 'none'}. Nothing was sent: choose another --hub_dataset_id, or "
                "delete that repository first"
            )
    repository.create_if_absent()
    return repository


def publish_export(folder: Path, repository: HubRepository, message: str) -> str:
    """Publishes an export in one commit, with what the repository lacks or has with other content.

    Args:
        folder: from `export_corpus`.
        repository: from `claim_repository`; must still be as it was then.
        message: of the commit.

    Returns:
        The URL of the published revision.

    Raises:
        UploadError: nothing was published; the message says why, and how to go on.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: path for name, path in paths.items() if is_part(name)}
    changes = repository.changes(files, is_part)
    return repository.commit_changes(files, changes, message) if any(changes) else repository.url
