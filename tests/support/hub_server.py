"""Run a small Hub of models on 127.0.0.1, for the real `huggingface_hub` client.

It has what pushing and pulling models needs: public and private repositories, commits, branches, small files in the
commit and large ones beside it. A second port serves the large files, as another host does for the real Hub; it
refuses requests that carry a token. `Hub.drop` cuts connections in the middle:

    with Hub({"hf_ann": "ann"}) as hub:
        hub.drop["upload"] = 1  # the next upload of a large file
        ...  # a process with HF_ENDPOINT=hub.url and HF_HUB_DISABLE_XET=1
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

LARGE_FILES = (".safetensors", ".pth", ".bin", ".png")
NAME = r"([\w.-]+/[\w.-]+)"
MODEL = f"/api/models/{NAME}"
NO_HEADERS: Mapping[str, str] = {}


class Refusal(Exception):
    """Answers a request with an error; by `code` the client tells errors of the same status apart."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class File(NamedTuple):
    """Describes a file of a commit, whose content is in `Hub.blobs`."""

    sha256: str
    git_id: str
    size: int
    is_large: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_large else self.git_id


Tree = dict[str, File]


@dataclass
class Repo:
    """Holds a repository, in which every commit is the whole tree of its files."""

    private: bool
    commits: dict[str, Tree] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, tree: Tree) -> str:
        listing = [len(self.commits), *sorted((path, file.sha256) for path, file in tree.items())]
        sha = hashlib.sha1(json.dumps(listing).encode()).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha
        return sha

    def sha(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def files(self, revision: str = "main") -> Tree:
        return self.commits[self.sha(revision)]


class Server(ThreadingHTTPServer):
    """Serves one port of the Hub by a table of routes."""

    daemon_threads = True

    def __init__(self, hub: "Hub", routes: list):
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub, self.routes = hub, routes

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Hub:
    """Holds the repositories and their files, and serves them on two ports.

    Args:
        tokens: maps a token to the name of its user, who may write below that name and read private repositories there.
    """

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.drop: Counter[str] = Counter()
        """How many of the next "upload", "download" or "commit" requests lose their connection."""
        self.requests: list[str] = []
        """Method and path of every request, so that tests can check what was not requested."""
        self.ranges: list[int] = []
        """The byte at which each download of a part of a large file began."""
        self.sent = 0
        """How many bytes of large files were requested; a cut download counts in full."""
        self.lock = threading.RLock()
        self.api, self.store = Server(self, API), Server(self, STORE)

    @property
    def url(self) -> str:
        return self.api.url

    def __enter__(self) -> "Hub":
        for server in (self.api, self.store):
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in (self.api, self.store):
            server.shutdown()
            server.server_close()

    def is_dropped(self, kind: str) -> bool:
        with self.lock:
            dropped = self.drop[kind] > 0
            self.drop[kind] -= dropped
            return dropped

    def keep(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        self.blobs[sha256] = content
        return sha256

    def small_file(self, content: bytes) -> File:
        git_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return File(self.keep(content), git_id, len(content), is_large=False)

    def large_file(self, sha256: str) -> File:
        if sha256 not in self.blobs:
            raise Refusal(400, f"LFS object not found: {sha256}")
        pointer_id = hashlib.sha1(sha256.encode()).hexdigest()
        return File(sha256, pointer_id, len(self.blobs[sha256]), is_large=True)

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> None:
        """Add a repository with these files, without a client."""
        repo = self.repos.setdefault(name, Repo(private))
        tree = {
            path: self.large_file(self.keep(content))
            if path.endswith(LARGE_FILES)
            else self.small_file(content)
            for path, content in files.items()
        }
        repo.commit("main", tree)


class Handler(BaseHTTPRequestHandler):
    """Reads a request, finds its route, and writes what the route's function answers."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        """Print nothing: a failing test should show the client's own words."""

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def answer_request(self) -> None:
        path = urlsplit(self.path).path
        self.read_body: bytes | None = None
        self.hub.requests.append(f"{self.command} {path}")
        try:
            for methods, pattern, answer in self.server.routes:
                if self.command in methods and (found := re.fullmatch(pattern, path)):
                    return answer(self, *(unquote(group or "") for group in found.groups()))
            raise Refusal(404, f"No such endpoint: {self.command} {path}")
        except Refusal as refusal:
            self.body()  # an unread body would be taken for the next request on this connection
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.send_json({"error": refusal.message}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer_request

    def send(self, body: bytes, status: int, headers: dict[str, Any], drop: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) * 3 // 4] if drop else body)
        if drop:
            self.cut()

    def send_json(self, content: Any, status: int = 200, headers: Mapping[str, str] = NO_HEADERS) -> None:
        body = json.dumps(content).encode()
        self.send(body, status, {"Content-Type": "application/json", **headers})

    def cut(self) -> None:
        """Close the connection at once, even in the middle of an answer."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def body(self) -> bytes:
        if self.read_body is None:
            self.read_body = self.receive_body()
        return self.read_body

    def receive_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def user(self) -> str | None:
        """Return the name of the user who asks, None without a token. An unknown token is refused."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def readable(self, name: str) -> Repo:
        user, repo = self.user(), self.hub.repos.get(name)
        if repo is None or (repo.private and user != name.split("/")[0]):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, name: str) -> Repo:
        repo = self.readable(name)
        self.refuse_stranger(name)
        return repo

    def refuse_stranger(self, name: str) -> None:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if user != name.split("/")[0]:
            raise Refusal(403, f"You don't have the rights to write below {name.split('/')[0]}")


# The API: each function serves one endpoint.


def who_am_i(request: Handler) -> None:
    user = request.user()
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    request.send_json(
        {"type": "user", "id": user, "name": user, "orgs": [], "auth": {"type": "access_token"}}
    )


def create_repo(request: Handler) -> None:
    asked = json.loads(request.body())
    name = f"{asked.get('organization') or request.user()}/{asked['name']}"
    request.refuse_stranger(name)
    url = f"{request.hub.url}/{name}"
    if name in request.hub.repos:
        return request.send_json({"error": "You already created this model repo", "url": url}, 409)
    repo = request.hub.repos[name] = Repo(bool(asked.get("private")) or asked.get("visibility") == "private")
    repo.commit("main", {".gitattributes": request.hub.small_file(b"*.safetensors filter=lfs -text\n")})
    request.send_json({"url": url, "id": name, "name": name})


def create_branch(request: Handler, name: str, branch: str) -> None:
    repo = request.writable(name)
    asked = json.loads(request.body() or b"{}")
    if branch in repo.branches:
        raise Refusal(409, f"Reference already exists: {branch}")
    repo.branches[branch] = repo.sha(asked.get("startingPoint", "main"))
    request.send_json({})


def check_card(request: Handler) -> None:
    request.body()
    request.send_json({"errors": [], "warnings": []})


def choose_upload_modes(request: Handler, name: str, revision: str) -> None:
    request.writable(name).sha(revision)
    asked = json.loads(request.body())["files"]
    modes = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if file["path"].endswith(LARGE_FILES) else "regular",
            "shouldIgnore": False,
        }
        for file in asked
    ]
    request.send_json({"files": modes})


def offer_uploads(request: Handler, name: str) -> None:
    request.writable(name)
    objects = json.loads(request.body())["objects"]
    for entry in objects:
        if entry["oid"] not in request.hub.blobs:
            entry["actions"] = {"upload": {"href": f"{request.hub.store.url}/{entry['oid']}"}}
    request.send_json({"transfer": "basic", "objects": objects})


def commit(request: Handler, name: str, branch: str) -> None:
    repo = request.writable(name)
    if request.hub.is_dropped("commit"):
        return request.cut()
    with request.hub.lock:
        tree = dict(repo.files(branch))
        for line in request.body().splitlines():
            change = json.loads(line)
            apply_change(request.hub, tree, change["key"], change["value"])
        sha = repo.commit(branch, tree)
    url = f"{request.hub.url}/{name}/commit/{sha}"
    request.send_json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


def apply_change(hub: Hub, tree: Tree, kind: str, value: dict) -> None:
    """Apply one line of a commit to `tree`; refuse a line of an unknown kind."""
    match kind:
        case "header":
            pass
        case "file":
            tree[value["path"]] = hub.small_file(base64.b64decode(value["content"]))
        case "lfsFile":
            tree[value["path"]] = hub.large_file(value["oid"])
        case "deletedFile":
            tree.pop(value["path"])
        case _:
            raise Refusal(400, f"Unknown operation: {kind}")


def model_info(request: Handler, name: str, revision: str = "main") -> None:
    repo = request.readable(name)
    files = repo.files(revision)
    info = {
        "_id": name,
        "id": name,
        "sha": repo.sha(revision),
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": [{"rfilename": path} for path in sorted(files)],
    }
    request.send_json(info)


def list_refs(request: Handler, name: str) -> None:
    branches = request.readable(name).branches.items()
    entries = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": sha} for b, sha in branches]
    request.send_json({"branches": entries, "tags": [], "converts": []})


def list_tree(request: Handler, name: str, revision: str, folder: str) -> None:
    files = request.readable(name).files(revision)
    prefix = f"{folder}/" if folder else ""
    listed = {path: file for path, file in sorted(files.items()) if path.startswith(prefix)}
    if prefix and not listed:
        raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
    request.send_json([tree_entry(path, file) for path, file in listed.items()])


def tree_entry(path: str, file: File) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "oid": file.git_id, "size": file.size}
    if file.is_large:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
    return entry


def resolve(request: Handler, name: str, revision: str, path: str) -> None:
    repo = request.readable(name)
    headers = {"X-Repo-Commit": repo.sha(revision)}
    file = repo.files(revision).get(path)
    if file is None:
        headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        return request.send_json({"error": "Entry not found"}, 404, headers)
    headers["ETag"] = f'"{file.etag}"'
    if not file.is_large:
        return request.send(request.hub.blobs[file.sha256], 200, headers)
    headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(file.size)}
    headers["Location"] = f"{request.hub.store.url}/{file.sha256}"
    request.send(b"", 302, headers)


# The storage, which serves the large files.


def refuse_token(request: Handler) -> None:
    if "Authorization" in request.headers:
        raise Refusal(400, "A token was sent to the storage")


def store(request: Handler, sha256: str) -> None:
    refuse_token(request)
    if request.hub.is_dropped("upload"):
        request.rfile.read(int(request.headers.get("Content-Length", 0)) // 2)
        return request.cut()
    content = request.body()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise Refusal(400, "The content does not have the sha256 under which it came")
    request.hub.keep(content)
    request.send(b"", 200, {})


def fetch(request: Handler, sha256: str) -> None:
    refuse_token(request)
    content = request.hub.blobs[sha256]
    status, headers = 200, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}
    if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")):
        status, start = 206, int(asked[1])
        stop = min(int(asked[2] or len(content)) + 1, len(content))
        request.hub.ranges.append(start)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        content = content[start:stop]
    request.hub.sent += len(content)
    request.send(content, status, headers, drop=request.hub.is_dropped("download"))


API = [
    (("GET",), "/api/whoami-v2", who_am_i),
    (("POST",), "/api/repos/create", create_repo),
    (("POST",), "/api/validate-yaml", check_card),
    (("POST",), f"{MODEL}/branch/([^/]+)", create_branch),
    (("POST",), f"{MODEL}/preupload/([^/]+)", choose_upload_modes),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/batch", offer_uploads),
    (("POST",), f"{MODEL}/commit/([^/]+)", commit),
    (("GET",), MODEL, model_info),
    (("GET",), f"{MODEL}/revision/([^/]+)", model_info),
    (("GET",), f"{MODEL}/refs", list_refs),
    (("GET",), f"{MODEL}/tree/([^/]+)(?:/(.+))?", list_tree),
    (("GET", "HEAD"), f"/{NAME}/resolve/([^/]+)/(.+)", resolve),
]
STORE = [
    (("PUT",), "/([0-9a-f]{64})", store),
    (("GET", "HEAD"), "/([0-9a-f]{64})", fetch),
]
"""Both tables list methods, path and function. The function receives the request and the path's groups, unquoted."""
