"""A loopback server with the part of the Hub's HTTP API that the real huggingface_hub client needs.

Tests compare the Hub's files after an upload or a download, and inject faults into chosen requests:

    with LoopbackHub() as hub:
        token = hub.add_user("ada")
        hub.fail("POST", "/commit/", status=503, times=1)
        subprocess.run(command, env=client_environment(hub, home, token))
        assert hub.files("model", "ada/name")["README.md"] == card

Differences from the Hub: everything is in memory, and there are no pull requests, tags, gated repositories, copies
within a commit, Xet storage, paginated results, redirects to other hosts or `.gitignore` rules. Cards are checked by
fewer rules, but the rule for the license is stricter.
"""

import base64
import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Self
from urllib.parse import parse_qs, parse_qsl, unquote, urlsplit

import yaml

LFS_PATTERNS = ("*.safetensors",)
LARGEST_REGULAR_FILE = 10_000
PIPELINE_TAGS = ("image-text-to-text", "image-to-text", "question-answering", "text-generation")


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class StoredFile:
    content: bytes
    in_lfs: bool = False

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @functools.cached_property
    def in_git(self) -> bytes:
        """The bytes in git: the content, or the LFS pointer to it."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return pointer.encode() if self.in_lfs else self.content

    @property
    def etag(self) -> str:
        return self.sha256 if self.in_lfs else git_blob_id(self.in_git)

    def as_tree_entry(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": git_blob_id(self.in_git)}
        if self.in_lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.in_git)}
        return entry

    def as_sibling(self, path: str) -> dict:
        entry = self.as_tree_entry(path)
        sibling = {"rfilename": path, "size": entry["size"], "blobId": entry["oid"]}
        return sibling | ({"lfs": {**entry["lfs"], "sha256": self.sha256}} if self.in_lfs else {})


@dataclass(frozen=True)
class Commit:
    parent: str | None
    title: str
    message: str
    author: str
    files: dict[str, StoredFile]
    date: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}")

    @functools.cached_property
    def id(self) -> str:
        tree = sorted((path, git_blob_id(file.in_git)) for path, file in self.files.items())
        return hashlib.sha1(repr((self.parent, self.title, self.message, self.date, tree)).encode()).hexdigest()

    def as_history_entry(self) -> dict:
        entry = {"id": self.id, "title": self.title, "message": self.message, "date": self.date}
        return entry | {"authors": [{"user": self.author}]}


@dataclass
class Repository:
    type: str
    name: str
    private: bool
    sdk: str | None
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    lfs_objects: dict[str, bytes] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"/{self.name}" if self.type == "model" else f"/{self.type}s/{self.name}"

    def add(self, commit: Commit, branch: str) -> None:
        self.commits[commit.id] = commit
        self.branches[branch] = commit.id

    def commit(self, revision: str) -> Commit:
        commit_id = self.branches.get(revision, revision)
        if commit_id not in self.commits:
            raise ErrorResponse(404, "Revision not found", "RevisionNotFound")
        return self.commits[commit_id]

    def history(self, revision: str) -> list[Commit]:
        history = [self.commit(revision)]
        while history[-1].parent is not None:
            history.append(self.commits[history[-1].parent])
        return history


class User(NamedTuple):
    name: str
    organizations: tuple[str, ...]

    def may_write(self, namespace: str) -> bool:
        return namespace in (self.name, *self.organizations)


class UploadGrant(NamedTuple):
    """Replaces the signed address of the Hub's storage, because the client sends no token there."""

    repository: Repository
    oid: str
    size: int


class Request(NamedTuple):
    method: str
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    body: bytes


class Answer(NamedTuple):
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = {}


class ErrorResponse(Exception):
    """An error response. The client chooses the class of a not-found error by `code`."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None):
        codes = {"X-Error-Code": code} if code else {}
        self.answer = as_json({"error": message}, status, {"X-Error-Message": message, **codes, **(headers or {})})


@dataclass
class Fault:
    """Replaces the normal answer of a request by another answer, or closes the connection during or after the body."""

    method: str
    path_pattern: str
    times: int | None
    answer: Answer | None = None
    cut_after: int | None = None
    loses_answer: bool = False


def as_json(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


class LoopbackHub:
    """Repositories, users and faults. The server runs inside a `with` block.

    `requests` lists the method, the path and the answer's status of each request. The status is None if the connection
    was closed without a whole answer.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, int | None]] = []
        self._users: dict[str, User] = {}
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._upload_grants: dict[str, UploadGrant] = {}
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_user(self, name: str, organizations: Sequence[str] = ()) -> str:
        """Add a user who may write in their own namespace and in those of `organizations`. Returns the user's token."""
        token = f"hf_{secrets.token_hex(17)}"
        self._users[token] = User(name, tuple(organizations))
        return token

    def fail(
        self,
        method: str,
        path_pattern: str,
        *,
        status: int = 500,
        times: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Answer the next `times` matching requests, or all, with an error and do not execute them.

        Args:
            path_pattern: a regular expression, searched in the path.
        """
        error = ErrorResponse(status, "A fault that the test requested", headers=headers)
        self._faults.append(Fault(method, path_pattern, times, answer=error.answer))

    def cut(self, method: str, path_pattern: str, *, after_bytes: int, times: int | None = 1) -> None:
        """Close the connection after `after_bytes` of the request's body or, if it has none, of the answer's body."""
        self._faults.append(Fault(method, path_pattern, times, cut_after=after_bytes))

    def lose_answer(self, method: str, path_pattern: str) -> None:
        """Execute the next matching request, and close the connection without an answer."""
        self._faults.append(Fault(method, path_pattern, 1, loses_answer=True))

    def clear_faults(self) -> None:
        self._faults.clear()

    def files(self, repo_type: str, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        commit = self._repositories[repo_type, repo_id].commit(revision)
        return {path: file.content for path, file in commit.files.items()}

    def commits(self, repo_type: str, repo_id: str, revision: str = "main") -> list[str]:
        """The ids of the commits, newest first."""
        return [commit.id for commit in self._repositories[repo_type, repo_id].history(revision)]

    def is_private(self, repo_type: str, repo_id: str) -> bool:
        return self._repositories[repo_type, repo_id].private

    def make_public(self, repo_type: str, repo_id: str) -> None:
        self._repositories[repo_type, repo_id].private = False

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.method == method and fault.times != 0 and re.search(fault.path_pattern, path):
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None

    def answer(self, request: Request) -> Answer:
        try:
            with self._lock:
                return self._route(request)
        except ErrorResponse as error:
            return error.answer

    def _route(self, request: Request) -> Answer:
        method = "GET" if request.method == "HEAD" else request.method
        for route in ROUTES:
            match = re.fullmatch(route.pattern, request.path)
            if match and route.method == method:
                arguments = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                if route.access:
                    repo_type = arguments.pop("types", "models").removesuffix("s")
                    repository = self._repository(request, repo_type, arguments.pop("name"), route.access)
                    return route.answer(self, request, repository, **arguments)
                return route.answer(self, request, **arguments)
        raise ErrorResponse(404, "The loopback Hub does not know this route")

    def _user(self, request: Request) -> User | None:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self._users:
            raise ErrorResponse(401, "Invalid credentials in Authorization header")
        return self._users.get(token)

    def _known_user(self, request: Request) -> User:
        user = self._user(request)
        if user is None:
            raise ErrorResponse(401, "Invalid username or password.")
        return user

    def _repository(self, request: Request, repo_type: str, name: str, access: str) -> Repository:
        user = self._user(request)
        repository = self._repositories.get((repo_type, name))
        is_writer = user is not None and user.may_write(name.split("/")[0])
        if repository is None or (repository.private and not is_writer):
            # The answer is the same for both, because an error must not reveal that a private repository exists.
            raise ErrorResponse(404 if user else 401, "Repository not found", "RepoNotFound")
        if access == "write" and not is_writer:
            self._known_user(request)
            raise ErrorResponse(403, "You don't have the rights to write in this namespace")
        return repository

    def _whoami(self, request: Request) -> Answer:
        user = self._known_user(request)
        organizations = [{"type": "org", "name": name} for name in user.organizations]
        return as_json({"type": "user", "name": user.name, "orgs": organizations})

    def _create_repository(self, request: Request) -> Answer:
        options = json.loads(request.body)
        user = self._known_user(request)
        namespace = options["organization"] or user.name
        if not user.may_write(namespace):
            raise ErrorResponse(403, "You don't have the rights to create a repository in this namespace")
        repo_type, name = options.get("type", "model"), f"{namespace}/{options['name']}"
        repository = Repository(repo_type, name, options.get("visibility") == "private", options.get("sdk"))
        address = {"url": f"{self.url}{repository.address}", "name": name}
        if (repo_type, name) in self._repositories:
            # The body contains the address too, because the client reads it from this error.
            return as_json({"error": f"You already created this {repo_type} repo", **address}, 409)
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        files = {".gitattributes": StoredFile(attributes.encode())}
        if repo_type == "space":
            files["README.md"] = StoredFile(f"---\ntitle: {options['name']}\nsdk: {options['sdk']}\n---\n".encode())
        repository.add(Commit(None, "initial commit", "", user.name, files), "main")
        self._repositories[repo_type, name] = repository
        return as_json(address)

    def _validate_card(self, request: Request) -> Answer:
        card = json.loads(request.body)
        errors = card_errors(card["content"], card["repoType"])
        found = {"errors": [{"message": error} for error in errors], "warnings": []}
        return as_json(found, 400 if errors else 200)

    def _info(self, request: Request, repository: Repository, revision: str = "main") -> Answer:
        commit = repository.commit(revision)
        siblings = [
            file.as_sibling(path) if "blobs" in request.query else {"rfilename": path}
            for path, file in sorted(commit.files.items())
        ]
        info = {"id": repository.name, "author": repository.name.split("/")[0], "sha": commit.id}
        info |= {"private": repository.private, "lastModified": commit.date, "tags": [], "siblings": siblings}
        return as_json(info | ({"sdk": repository.sdk} if repository.sdk else {}))

    def _references(self, request: Request, repository: Repository) -> Answer:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit_id}
            for name, commit_id in repository.branches.items()
        ]
        return as_json({"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    def _create_branch(self, request: Request, repository: Repository, branch: str) -> Answer:
        if branch in repository.branches:
            raise ErrorResponse(409, "This reference already exists")
        start = json.loads(request.body).get("startingPoint", "main")
        repository.branches[branch] = repository.commit(start).id
        return as_json({})

    def _history(self, request: Request, repository: Repository, revision: str) -> Answer:
        return as_json([commit.as_history_entry() for commit in repository.history(revision)])

    def _discussions(self, request: Request, repository: Repository) -> Answer:
        return as_json({"discussions": [], "count": 0, "start": 0})

    def _tree(self, request: Request, repository: Repository, revision: str, folder: str = "") -> Answer:
        entries = tree(repository.commit(revision).files)
        if folder and folder not in entries:
            raise ErrorResponse(404, "Entry not found", "EntryNotFound")
        levels = slice(None) if request.query.get("recursive") == "true" else slice(1)
        listed = [
            entry for path, entry in entries.items() if PurePosixPath(folder) in PurePosixPath(path).parents[levels]
        ]
        return as_json(listed)

    def _paths(self, request: Request, repository: Repository, revision: str) -> Answer:
        entries = tree(repository.commit(revision).files)
        requested = parse_qs(request.body.decode())["paths"]
        return as_json([entries[path] for path in requested if path in entries])

    def _resolve(self, request: Request, repository: Repository, revision: str, path: str) -> Answer:
        commit = repository.commit(revision)
        headers = {"X-Repo-Commit": commit.id}
        if path not in commit.files:
            raise ErrorResponse(404, "Entry not found", "EntryNotFound", headers)
        file = commit.files[path]
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if file.in_lfs:
            headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        return answer_range(file.content, request.headers.get("Range", ""), headers)

    def _preupload(self, request: Request, repository: Repository, revision: str) -> Answer:
        current = repository.commit(revision).files
        files = [
            {
                "path": file["path"],
                "uploadMode": upload_mode(file["path"], file["size"], base64.b64decode(file["sample"])),
                "shouldIgnore": False,
                # The client compares this id with its own and omits unchanged files from its commit.
                "oid": current[file["path"]].etag if file["path"] in current else None,
            }
            for file in json.loads(request.body)["files"]
        ]
        return as_json({"files": files})

    def _lfs_batch(self, request: Request, repository: Repository) -> Answer:
        objects = json.loads(request.body)["objects"]
        return as_json({"transfer": "basic", "objects": [self._offer_upload(repository, **each) for each in objects]})

    def _offer_upload(self, repository: Repository, oid: str, size: int) -> dict:
        if oid in repository.lfs_objects:
            return {"oid": oid, "size": size}
        grant = secrets.token_hex(16)
        self._upload_grants[grant] = UploadGrant(repository, oid, size)
        upload = {"href": f"{self.url}/storage/{oid}?grant={grant}"}
        verify = {"href": f"{self.url}{repository.address}.git/info/lfs/objects/verify"}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def _store_lfs_object(self, request: Request, oid: str) -> Answer:
        grant = self._upload_grants.get(request.query.get("grant", ""))
        if grant is None or grant.oid != oid:
            raise ErrorResponse(403, "No grant for this upload")
        if len(request.body) != grant.size or hashlib.sha256(request.body).hexdigest() != oid:
            raise ErrorResponse(400, "The body is not the object that was announced")
        grant.repository.lfs_objects[oid] = request.body
        return Answer(200)

    def _verify_lfs_object(self, request: Request, repository: Repository) -> Answer:
        announced = json.loads(request.body)
        find_lfs_object(repository, announced["oid"], announced["size"])
        return as_json({})

    def _commit(self, request: Request, repository: Repository, revision: str) -> Answer:
        if "create_pr" in request.query:
            raise ErrorResponse(400, "The loopback Hub has no pull requests")
        if revision not in repository.branches:
            raise ErrorResponse(404, "Revision not found", "RevisionNotFound")
        head = repository.commit(revision)
        header, *changes = [json.loads(line) for line in request.body.splitlines()]
        if header["key"] != "header":
            raise ErrorResponse(400, "A commit starts with its header")
        # The client may send an abbreviated id.
        if not head.id.startswith(header["value"].get("parentCommit", "")):
            raise ErrorResponse(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for change in changes:
            apply_change(repository, files, change["key"], change["value"])
        author = self._known_user(request).name
        commit = Commit(head.id, header["value"]["summary"], header["value"].get("description", ""), author, files)
        repository.add(commit, revision)
        commit_url = f"{self.url}{repository.address}/commit/{commit.id}"
        return as_json({"success": True, "commitOid": commit.id, "commitUrl": commit_url})


def card_errors(content: str, repo_type: str) -> list[str]:
    metadata = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
    try:
        card = yaml.safe_load(metadata[1]) if metadata else {}
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"]
    if not isinstance(card, dict):
        return ["The metadata must be a mapping"]
    errors = []
    license = card.get("license")
    names = license if isinstance(license, list) else [license]
    if repo_type != "space" and not (names and all(isinstance(name, str) for name in names)):
        errors.append('"license" must be a string or a list of strings')
    for result in (result for model in card.get("model-index", []) for result in model["results"]):
        if not re.fullmatch(r"([\w-]+/)?[\w.-]+", result["dataset"]["type"]):
            errors.append('"model-index[0].results[0].dataset.type" fails to match the required pattern')
    if "pipeline_tag" in card and card["pipeline_tag"] not in PIPELINE_TAGS:
        errors.append(f'"pipeline_tag" must be one of {", ".join(PIPELINE_TAGS)}')
    return errors


def tree(files: Mapping[str, StoredFile]) -> dict[str, dict]:
    """The entry of each path, including folders. A folder's id differs from git's."""
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
    entries = {folder: {"type": "directory", "path": folder, "oid": git_blob_id(folder.encode())} for folder in folders}
    return entries | {path: file.as_tree_entry(path) for path, file in files.items()}


def answer_range(content: bytes, requested: str, headers: Mapping[str, str]) -> Answer:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", requested)
    if match is None:
        return Answer(200, content, headers)
    first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
    if first > last:
        return Answer(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
    return Answer(206, content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"})


def upload_mode(path: str, size: int, sample: bytes) -> str:
    is_large = size > LARGEST_REGULAR_FILE or any(fnmatch(path, pattern) for pattern in LFS_PATTERNS)
    return "lfs" if is_large or b"\0" in sample else "regular"


def find_lfs_object(repository: Repository, oid: str, size: int) -> bytes:
    content = repository.lfs_objects.get(oid)
    if content is None or len(content) != size:
        raise ErrorResponse(400, "An LFS pointer points to an object that was not uploaded")
    return content


def apply_change(repository: Repository, files: dict[str, StoredFile], key: str, value: dict) -> None:
    path = value["path"]
    if key == "file":
        files[path] = StoredFile(base64.b64decode(value["content"], validate=True))
    elif key == "lfsFile":
        files[path] = StoredFile(find_lfs_object(repository, value["oid"], value["size"]), in_lfs=True)
    elif key in ("deletedFile", "deletedFolder"):
        folder = path.rstrip("/") + "/"
        deleted = [each for each in files if (each == path if key == "deletedFile" else each.startswith(folder))]
        if not deleted:
            raise ErrorResponse(404, "A file with this name doesn't exist", "EntryNotFound")
        for each in deleted:
            del files[each]
    else:
        raise ErrorResponse(400, "Unknown change in a commit")


class Route(NamedTuple):
    method: str
    pattern: str
    access: str | None  # the right that the user needs for the repository in the path: "read", "write" or none
    answer: Callable[..., Answer]


API = r"/api/(?P<types>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
PAGE = r"(?:/(?P<types>datasets|spaces))?/(?P<name>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = (
    Route("GET", "/api/whoami-v2", None, LoopbackHub._whoami),
    Route("POST", "/api/repos/create", None, LoopbackHub._create_repository),
    Route("POST", "/api/validate-yaml", None, LoopbackHub._validate_card),
    Route("PUT", "/storage/(?P<oid>[^/]+)", None, LoopbackHub._store_lfs_object),
    Route("GET", API, "read", LoopbackHub._info),
    Route("GET", f"{API}/revision/{REVISION}", "read", LoopbackHub._info),
    Route("GET", f"{API}/refs", "read", LoopbackHub._references),
    Route("GET", f"{API}/commits/{REVISION}", "read", LoopbackHub._history),
    Route("GET", f"{API}/discussions", "read", LoopbackHub._discussions),
    Route("GET", f"{API}/tree/{REVISION}(?:/(?P<folder>.+))?", "read", LoopbackHub._tree),
    Route("POST", f"{API}/paths-info/{REVISION}", "read", LoopbackHub._paths),
    Route("POST", f"{API}/branch/(?P<branch>[^/]+)", "write", LoopbackHub._create_branch),
    Route("POST", f"{API}/preupload/{REVISION}", "write", LoopbackHub._preupload),
    Route("POST", f"{API}/commit/{REVISION}", "write", LoopbackHub._commit),
    Route("POST", rf"{PAGE}\.git/info/lfs/objects/batch", "write", LoopbackHub._lfs_batch),
    Route("POST", rf"{PAGE}\.git/info/lfs/objects/verify", "write", LoopbackHub._verify_lfs_object),
    Route("GET", f"{PAGE}/resolve/{REVISION}/(?P<path>.+)", "read", LoopbackHub._resolve),
)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # because it keeps connections alive
    disable_nagle_algorithm = True  # because otherwise the body waits for the acknowledgement of the headers

    def __init__(self, hub: LoopbackHub, *arguments: object) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # because a killed client is not an error of the server
            super().handle()

    def log_message(self, *_: object) -> None:
        """Print nothing, because `LoopbackHub.requests` lists the requests."""

    def serve(self) -> None:
        address = urlsplit(self.path)
        fault = self.hub.take_fault(self.command, unquote(address.path))
        cut_after = fault.cut_after if fault else None
        length = int(self.headers.get("Content-Length", 0))
        is_upload_cut = length > 0 and cut_after is not None
        body = self.rfile.read(min(length, cut_after) if is_upload_cut else length)
        if is_upload_cut or len(body) < length:  # a truncated commit must never be applied
            self.record(None)
            self.hang_up()
            return
        request = Request(self.command, address.path, dict(parse_qsl(address.query)), self.headers, body)
        answer = fault.answer if fault and fault.answer else self.hub.answer(request)
        if fault and fault.loses_answer:
            self.record(None)
            self.hang_up()
            return
        # Recorded before the client receives its answer, because a test may read `requests` immediately after it.
        self.record(answer.status if cut_after is None else None)
        self.send(answer, cut_after)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def record(self, status: int | None) -> None:
        # The query is omitted, because it contains upload grants.
        self.hub.requests.append((self.command, unquote(urlsplit(self.path).path), status))

    def send(self, answer: Answer, cut_after: int | None) -> None:
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:cut_after])
        if cut_after is not None:
            self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client may have closed the connection already
            self.connection.shutdown(socket.SHUT_RDWR)


def client_environment(hub: LoopbackHub, home: str | Path, token: str | None = None) -> dict[str, str]:
    """The environment of a process whose huggingface_hub client talks to `hub` and caches under `home`."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGINGFACE", "HUGGING_FACE", "TRANSFORMERS_OFFLINE"))
    }
    return {
        **inherited,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        **({"HF_TOKEN": token} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}),
    }
