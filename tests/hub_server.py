"""A small Hub on 127.0.0.1: what the real huggingface_hub client needs to publish, list and load, and ways to fail.

Models and datasets live in memory. A commit is parsed and checked as a whole before it becomes a revision.
"""

import base64
import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_thetokenthatnobodymaysee"
READ_TOKEN = "hf_onlyforreading"
LARGE = re.compile(r"\.(safetensors|parquet|png|bin)$")  # what the Hub's own .gitattributes hands to LFS
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass
class Repository:
    """Attributes: revisions: [(commit, {path: content})], the newest last."""

    private: bool
    revisions: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def add_revision(self, files: dict[str, bytes], title: str) -> str:
        parent = self.revisions[-1][0] if self.revisions else ""
        listing = json.dumps([parent, title, sorted((path, git_oid(content)) for path, content in files.items())])
        self.revisions.append((hashlib.sha1(listing.encode()).hexdigest(), files))
        return self.revisions[-1][0]

    def at(self, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        if revision in (None, "main"):
            return self.revisions[-1]
        return next((entry for entry in self.revisions if entry[0] == revision), None)


@dataclass
class Failure:
    """What happens to requests that match, instead of an answer.

    Attributes:
        status: To answer with; None cuts the connection, in the middle of a body that is sent.
        times: How often.
        message: Of the answer.
        after: Whether the request is obeyed first.
    """

    request: re.Pattern
    status: int | None
    times: float
    message: str
    after: bool


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def file_entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
    if LARGE.search(path):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{hashlib.sha256(content).hexdigest()}\n"
        pointer += f"size {len(content)}\n"
        lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": len(pointer)}
        entry |= {"oid": git_oid(pointer.encode()), "lfs": lfs}
    return entry


class HubServer(ThreadingHTTPServer):
    """Use as a context manager.

    Attributes:
        repositories: {"models/you/name": Repository}
        uploads: LFS contents that were received completely, {sha256: content}.
        requests: "METHOD path status" of everything that was asked, in order; "cut" for a status where that was done.
        failures: See `fail`.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failures: list[Failure] = []
        self.interruptions: list[tuple[re.Pattern, Callable[[], None]]] = []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, *arguments):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # which some tests are about
            super().handle_error(*arguments)

    def fail(self, request: str, status: int | None, times=float("inf"), message="on purpose", after=False) -> None:
        """From now on, requests whose "METHOD path" contains a match fail; see `Failure`."""
        self.failures.append(Failure(re.compile(request), status, times, message, after))

    def meanwhile(self, request: str, action: Callable[[], None]) -> None:
        """Does something once, just before the next request that matches is obeyed."""
        self.interruptions.append((re.compile(request), action))

    def mend(self) -> None:
        self.failures.clear()

    def files(self, name: str) -> dict[str, bytes]:
        """The published files of "models/you/name"."""
        return self.repositories[name].at("main")[1]

    def asked(self, request: str) -> list[str]:
        """The recorded requests that contain a match."""
        return [entry for entry in self.requests if re.search(request, entry)]


class Answer(Exception):
    """Ends a request."""

    def __init__(self, status: int, content=None, headers=None, code: str | None = None):
        self.status, self.headers = status, dict(headers or {})
        if status >= 400:
            message = content or "no"
            self.headers |= {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
            content = {"error": message}
        self.body = content if isinstance(content, bytes) else json.dumps(content).encode()


REPOSITORY = r"(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
ROUTES = [
    (method, re.compile(f"^{pattern}$"), action)
    for method, pattern, action in [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", rf"/api/{REPOSITORY}(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", rf"/api/{REPOSITORY}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
        ("POST", rf"/api/{REPOSITORY}/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("POST", rf"/api/{REPOSITORY}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"/api/{REPOSITORY}/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/((?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/upload/(?P<oid>\w+)", "upload"),
        ("POST", r"/verify", "verify"),
        ("GET", r"/((?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("HEAD", r"/((?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ]
]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do(self) -> None:
        place = urlsplit(self.path)
        self.place, self.query = unquote(place.path), parse_qs(place.query)
        self.recorded = f"{self.command} {self.place}"
        failure = self.failure_for(self.recorded)
        if failure and not failure.after:
            return self.break_off(failure)
        self.body = self.read_body()
        for interruption in [entry for entry in self.server.interruptions if entry[0].search(self.recorded)]:
            self.server.interruptions.remove(interruption)
            interruption[1]()
        try:
            self.obey()
        except Answer as answer:
            return self.break_off(failure) if failure else self.send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do

    def log_message(self, *_):
        pass

    def failure_for(self, request: str) -> Failure | None:
        with self.server.lock:
            for failure in self.server.failures:
                if failure.times > 0 and failure.request.search(request):
                    failure.times -= 1
                    return failure
        return None

    def break_off(self, failure: Failure) -> None:
        if failure.status:
            if not failure.after:
                self.read_body()
            return self.send(Answer(failure.status, failure.message))
        self.server.requests.append(f"{self.recorded} cut")
        length = 0 if failure.after else int(self.headers.get("Content-Length", 0))
        self.rfile.read(length // 2)
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, answer: Answer) -> None:
        self.server.requests.append(f"{self.recorded} {answer.status}")
        self.send_response(answer.status)
        for name, value in {"Content-Length": len(answer.body), **answer.headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def obey(self) -> None:
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.token not in ("", TOKEN, READ_TOKEN):
            raise Answer(401, "Invalid credentials in Authorization header")
        for method, pattern, action in ROUTES:
            if method == self.command and (match := pattern.match(self.place)):
                with self.server.lock:
                    getattr(self, action)(**match.groupdict())
        raise Answer(404, "Not found")

    def must_write(self) -> None:
        if self.token != TOKEN:
            raise Answer(403 if self.token else 401, "You must have write access")

    def repository(self, kind: str | None, name: str) -> Repository:
        found = self.server.repositories.get(f"{kind or 'models'}/{name}")
        if found is None or (found.private and not self.token):
            raise Answer(404 if self.token else 401, "Repository not found", code="RepoNotFound")
        return found

    def revision(self, kind: str | None, name: str, revision: str | None) -> tuple[str, dict[str, bytes]]:
        found = self.repository(kind, name).at(revision)
        if found is None:
            raise Answer(404, "Invalid rev id", code="RevisionNotFound")
        return found

    def whoami(self) -> None:
        if not self.token:
            raise Answer(401, "Invalid username or password.")
        role = "write" if self.token == TOKEN else "read"
        raise Answer(200, {"type": "user", "name": "you", "orgs": [], "auth": {"accessToken": {"role": role}}})

    def create(self) -> None:
        self.must_write()
        asked = json.loads(self.body)
        kind, owner = f"{asked.get('type', 'model')}s", asked.get("organization") or "you"
        name = f"{owner}/{asked['name']}"
        if owner != "you":
            raise Answer(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{owner}"')
        if f"{kind}/{name}" in self.server.repositories:
            raise Answer(409, "You already created this repo")
        is_private = asked.get("visibility") == "private" or bool(asked.get("private"))  # as older clients ask
        repository = Repository(private=is_private)
        repository.add_revision({".gitattributes": ATTRIBUTES}, "initial commit")
        self.server.repositories[f"{kind}/{name}"] = repository
        raise Answer(200, {"url": f"{self.server.url}/{'' if kind == 'models' else kind + '/'}{name}"})

    def validate(self) -> None:
        header = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], flags=re.DOTALL)
        try:
            yaml.safe_load(header[1] if header else "")
        except yaml.YAMLError as error:
            raise Answer(400, str(error).splitlines()[0]) from None
        raise Answer(200, {"errors": [], "warnings": []})

    def info(self, kind: str, name: str, revision: str | None = None) -> None:
        commit, files = self.revision(kind, name, revision)
        private = self.repository(kind, name).private
        siblings = [{"rfilename": path} for path in files]
        raise Answer(200, {"id": name, "sha": commit, "private": private, "tags": [], "siblings": siblings})

    def tree(self, kind: str, name: str, revision: str, path: str | None = None) -> None:
        _, files = self.revision(kind, name, revision)
        below = f"{path}/" if path else ""
        inside = {file: content for file, content in files.items() if file.startswith(below)}
        if not inside:
            raise Answer(404, f"{path} does not exist", code="EntryNotFound")
        whole = self.query.get("recursive", ["False"])[0].lower() == "true"
        entries = [
            file_entry(file, content)
            for file, content in sorted(inside.items())
            if whole or "/" not in file.removeprefix(below)
        ]
        folders = {file[: place.start()] for file in inside for place in re.finditer("/", file)}
        entries += [
            {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40}
            for folder in sorted(folders)
            if folder.startswith(below) and (whole or "/" not in folder.removeprefix(below))
        ]
        raise Answer(200, entries)

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        _, files = self.revision(kind, name, revision)
        text = self.body.decode()
        asked = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
        folders = [path for path in asked if any(file.startswith(f"{path}/") for file in files)]
        entries = [file_entry(path, files[path]) for path in asked if path in files]
        entries += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders]
        raise Answer(200, entries)

    def preupload(self, kind: str, name: str, revision: str) -> None:
        self.must_write()
        _, files = self.revision(kind, name, revision)
        answers = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            mode = "lfs" if LARGE.search(path) else "regular"
            entry = file_entry(path, files[path]) if path in files else {}
            oid = entry.get("lfs", entry).get("oid")
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        raise Answer(200, {"files": answers})

    def batch(self, kind: str | None, name: str) -> None:
        self.must_write()
        self.repository(kind, name)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            if asked["oid"] not in self.server.uploads:
                places = {"upload": f"/upload/{asked['oid']}", "verify": "/verify"}
                asked["actions"] = {what: {"href": self.server.url + place} for what, place in places.items()}
            objects.append(asked)
        raise Answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Answer(400, "Not the announced content")
        self.server.uploads[oid] = self.body
        raise Answer(200, b"")

    def verify(self) -> None:
        self.must_write()
        asked = json.loads(self.body)
        if len(self.server.uploads.get(asked["oid"], b"")) != asked["size"]:
            raise Answer(404, "Not received")
        raise Answer(200, {})

    def commit(self, kind: str, name: str, revision: str) -> None:
        self.must_write()
        head, files = self.revision(kind, name, revision)
        files, lines = dict(files), [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", head) != head:
            raise Answer(412, "A commit has happened since. Please refresh and try again.")
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.uploads:
                    raise Answer(400, "An LFS file was not uploaded")
                files[value["path"]] = self.server.uploads[value["oid"]]
            elif line["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                raise Answer(404, "A file with this name doesn't exist", code="EntryNotFound")
        commit = self.repository(kind, name).add_revision(files, header["summary"])
        url = f"{self.server.url}/{'' if kind == 'models' else kind + '/'}{name}/commit/{commit}"
        raise Answer(200, {"success": True, "commitOid": commit, "commitUrl": url, "pullRequestUrl": ""})

    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> None:
        commit, files = self.revision(kind, name, revision)
        if path not in files:
            raise Answer(404, "Entry not found", {"X-Repo-Commit": commit}, code="EntryNotFound")
        content, entry = files[path], file_entry(path, files[path])
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry.get("lfs", entry)["oid"]}"', "Accept-Ranges": "bytes"}
        if wanted := re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            raise Answer(206, content[first : last + 1], headers)
        raise Answer(200, content, headers)
