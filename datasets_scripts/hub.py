"""A folder's files -> one commit of a Hub repository, or nothing at all. What models and datasets have in common."""

import contextlib
import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from .errors import HubUnreachable, UploadError

logger = logging.getLogger("dls")

# Whatever the client raises: the Hub's refusals, a lost connection, an unreadable answer, a thread's failure.
CLIENT_ERRORS = (HTTPError, OSError, RuntimeError, ValueError)
# The Hub puts this one into every new repository by itself.
OF_THE_HUB = {".gitattributes"}
ADVICE = {
    401: "log in again with `hf auth login`, or set another HF_TOKEN",
    403: "the token must be allowed to write there",
    412: "somebody else changed it meanwhile",
}


@dataclass(frozen=True)
class Publication:
    """What is published, and what it may replace.

    Attributes:
        kind: Of the repository: "model" or "dataset".
        parts: {pattern of a path: what it is}. Everything else stays at home, and is left alone in the repository.
        expected: What a repository that is not empty must hold, in words.
        found_instead: What such a repository holds instead, in words; None: an earlier publication.
    """

    kind: str
    parts: dict[str, str]
    expected: str
    found_instead: Callable[["HubRepository"], str | None]

    def part_of(self, path: str) -> str | None:
        """What a path is in a publication; None if it is no part of it."""
        fitting = (pattern for pattern in self.parts if pattern.count("/") == path.count("/"))
        return next((self.parts[pattern] for pattern in fitting if fnmatchcase(path, pattern)), None)

    def files(self, folder: Path) -> dict[str, Path]:
        """{path in the repository: file} of what a folder has to publish; no links, which may lead anywhere."""
        found = {path.relative_to(folder): path for pattern in self.parts for path in folder.glob(pattern)}
        inside = (name for name in sorted(found) if found[name].resolve() == folder.resolve() / name)
        return {name.as_posix(): found[name] for name in inside if found[name].is_file()}


class Changes(NamedTuple):
    """What a commit would do.

    Attributes:
        send: Paths that the repository lacks, or has with other content.
        remove: Paths that an earlier publication left and that are gone.
    """

    send: list[str]
    remove: list[str]


class HubRepository:
    """A repository of the Hub as it was looked at. What is committed later must still find it like that.

    Attributes:
        publication: What it is for.
        repo_id: With its namespace.
        commit: The published revision; None where there is no such repository yet.
        files: {path: what the Hub says of it}, of that revision.
    """

    def __init__(self, publication: Publication, repo_id: str, private: bool, again: str = "the same command"):
        """Looks at the repository; changes nothing.

        Args:
            publication: What is to be published there.
            repo_id: NAMESPACE/NAME, or the NAME of one of the user's own.
            private: Whether it must not be public.
            again: What the user can run to go on after a failure, for messages.

        Raises:
            UploadError: a name that is none, a token that may not write, a public repository that must be private, one
                that holds anything but an earlier publication, or a Hub that cannot be asked.
        """
        self.kind = kind = publication.kind
        try:
            validate_repo_id(repo_id)
        except HFValidationError:
            raise UploadError(
                f"--hub_{kind}_id {repo_id}: expected NAME or NAMESPACE/NAME, of letters, digits, '-', '_' and '.'"
            ) from None
        self.publication, self.again, self.private = publication, again, private
        self.token = usable_token()
        self.api = HfApi(token=self.token)
        account = self._ask(f"{repo_id} is left as it is", self.api.whoami)
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UploadError("the token can only read: make one that can write, for `hf auth login` or HF_TOKEN")
        self.repo_id = repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"
        self._ask(f"{self.repo_id} is left as it is", self._look)
        if private and self.commit and not self.is_private:
            raise UploadError(
                f"{self.repo_id} is public: make it private in its settings, or leave --hub_private_repo out"
            )
        if set(self.files) - OF_THE_HUB and (found := publication.found_instead(self)):
            raise UploadError(
                f"{self.repo_id} holds something else: expected {publication.expected}, found {found}. Nothing was "
                f"sent: choose another --hub_{kind}_id, or delete that repository first"
            )

    def _look(self) -> None:
        self.commit, self.files, self.is_private = None, {}, None
        with contextlib.suppress(RepositoryNotFoundError):
            info = self.api.repo_info(self.repo_id, repo_type=self.kind)
            tree = self.api.list_repo_tree(self.repo_id, recursive=True, revision=info.sha, repo_type=self.kind)
            self.files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
            self.commit, self.is_private = info.sha, info.private

    def _ask(self, state: str, request: Callable, *arguments, **options):
        """Calls the client. What it raises becomes an `UploadError` that also says in which state things are."""
        try:
            return request(*arguments, **options)
        except CLIENT_ERRORS as error:
            failure = self._failure(error, state)
        # The client leaves progress bars to the garbage collector: they would be drawn once more, after the message.
        gc.collect()
        raise failure

    def _failure(self, error: Exception, state: str) -> UploadError:
        error = root_cause(error)
        message = f"{reason(error)}; {state}, and {self.again} goes on".replace(self.token, "***")
        return HubUnreachable(message) if is_lost_connection(error) else UploadError(message)

    @property
    def url(self) -> str:
        """Of the published revision."""
        prefix = constants.REPO_TYPES_URL_PREFIXES.get(self.kind, "")
        return f"{self.api.endpoint}/{prefix}{self.repo_id}/commit/{self.commit}"

    def fetch(self, path: str) -> Path | None:
        """One of the published files, in the user's cache; None where there is none of that name."""
        if path not in self.files:
            return None
        where = {"repo_type": self.kind, "revision": self.commit}
        return Path(
            self._ask(f"{self.repo_id} is left as it is", self.api.hf_hub_download, self.repo_id, path, **where)
        )

    def create_if_absent(self) -> "HubRepository":
        """Makes the repository, private if it must be, and returns it."""
        if self.commit is None:
            # None leaves it to the namespace's own settings.
            how = {"repo_type": self.kind, "private": self.private or None}
            self._ask(f"{self.repo_id} was not created", self.api.create_repo, self.repo_id, **how)
            self._ask(f"nothing was sent to {self.repo_id}", self._look)
        return self

    def changes(self, files: dict[str, Path]) -> Changes:
        """What must be done so that the repository holds `files`, {path in the repository: file}."""
        return Changes(
            [path for path, file in files.items() if not self._holds(path, file)],
            [path for path in self.files if path not in files and self.publication.part_of(path)],
        )

    def _holds(self, path: str, file: Path) -> bool:
        published = self.files.get(path)
        if published is None or published.size != file.stat().st_size:
            return False
        with file.open("rb") as stream:
            if published.lfs:
                return sha_fileobj(stream).hex() == published.lfs.sha256
            return git_hash(stream.read()) == published.blob_id

    def publish(self, files: dict[str, Path], title: str) -> str:
        """Publishes in one commit, with what the repository lacks or has with other content.

        Args:
            files: {path in the repository: file}.
            title: Of the commit.

        Returns:
            The URL of the published revision.

        Raises:
            UploadError: saying whether the published revision has changed, and how to go on.
        """
        changes = self.changes(files)
        if not any(changes):
            logger.info(f"nothing to send: {self.url} holds exactly this")
            return self.url
        logger.info(f"{self.repo_id}: {len(changes.send)} of {len(files)} files to send")
        url = self._commit(files, changes, title)
        logger.info(f"published: {url}")
        return url

    def _commit(self, files: dict[str, Path], changes: Changes, title: str) -> str:
        """Uploads, and then makes everything visible at once. Returns the commit's URL."""
        additions = [CommitOperationAdd(path, files[path]) for path in changes.send]
        unchanged = f"the published revision of {self.repo_id} is unchanged"
        # Large files first, which no revision shows yet. What the Hub received before is not sent again.
        self._ask(unchanged, self.api.preupload_lfs_files, self.repo_id, additions, repo_type=self.kind)
        deletions = [CommitOperationDelete(path) for path in changes.remove]
        try:
            return self.api.create_commit(
                self.repo_id, [*additions, *deletions], commit_message=title, repo_type=self.kind,
                parent_commit=self.commit,
            ).commit_url  # fmt: skip
        except CLIENT_ERRORS as error:
            return self._after_failed_commit(error, files, changes)

    def _after_failed_commit(self, error: Exception, files: dict[str, Path], changes: Changes) -> str:
        """A commit can have arrived although its answer was lost: only another look tells."""
        before = self.commit
        try:
            self._look()
        except CLIENT_ERRORS:
            state = f"whether {self.repo_id} has changed cannot be seen"
            raise self._failure(error, state) from None
        if self.commit == before:
            raise self._failure(error, f"the published revision of {self.repo_id} is unchanged") from None
        if all(self._holds(path, files[path]) for path in changes.send) and not set(changes.remove) & set(self.files):
            return self.url
        raise self._failure(error, f"{self.repo_id} holds what somebody else published meanwhile") from None


def usable_token() -> str:
    """The user's token, from where every Hugging Face tool looks for it.

    Raises:
        HubUnreachable: without a token, or offline.
    """
    if constants.HF_HUB_OFFLINE:
        raise HubUnreachable("HF_HUB_OFFLINE is set, which forbids to reach the Hub: unset it to publish")
    token = get_token()
    if not token:
        raise HubUnreachable(
            "no token for the Hub: run `hf auth login` once, or set the environment variable HF_TOKEN"
        )
    return token


def root_cause(error: Exception) -> Exception:
    """Of an uploading thread's failure, or of a file that could not be fetched."""
    while isinstance(error, (RuntimeError, LocalEntryNotFoundError)) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def is_lost_connection(error: Exception) -> bool:
    return isinstance(error, (HTTPError, ConnectionError)) and getattr(error, "response", None) is None


def reason(error: Exception) -> str:
    """What went wrong, on one line."""
    response = getattr(error, "response", None)
    said = " ".join((getattr(error, "server_message", None) or str(error)).split())
    if response is None:
        lost = "the connection to the Hub failed: " if is_lost_connection(error) else ""
        return f"{lost}{type(error).__name__}: {said}"
    advice = f": {ADVICE[response.status_code]}" if response.status_code in ADVICE else ""
    return f"the Hub answered {response.status_code} ({said}){advice}"
