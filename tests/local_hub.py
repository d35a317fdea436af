"""A Hub on 127.0.0.1 for tests: the standard library only, everything in memory.

It answers the requests by which huggingface_hub pushes, tags, lists and downloads models and data sets, and was
written from the behaviour of that client: a test that passes here does not prove that the real Hub accepts
the same. It knows no Xet storage, so clients need `HF_HUB_DISABLE_XET=1`.

    with LocalHub() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment})
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".npz", ".parquet", ".h5ad")
LFS_SIZE = 1_000_000
DATE = "2026-01-01T00:00:00.000Z"
USER = "tester"


@dataclass(frozen=True)
class Entry:
    """One file of one commit; `oid` is the git blob id, `sha256` is set for LFS files only."""

    oid: str
    size: int
    sha256: str | None = None


@dataclass
class Repository:
    """Commits are whole trees (path -> Entry); references are branch and tag names."""

    kind: str
    name: str
    private: bool = False
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, tree: dict[str, Entry]) -> str:
        seed = f"{self.kind}/{self.name}/{branch}/{len(self.commits)}"
        oid = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[oid] = tree
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        known = {**self.tags, **self.branches}
        return known.get(revision) or (revision if revision in self.commits else None)


class LocalHub:
    """The server and what it holds.

    Attributes:
        url: the endpoint, `http://127.0.0.1:<free port>`.
        repositories: `(kind, id)` -> Repository, kind being `models` or `datasets`.
        requests: `(method, path)` of every request so far.
        tokens: the bearer tokens that were sent.
    """

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.lock = threading.RLock()
        handler = type("Handler", (HubHandler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)

    @property
    def environment(self) -> dict[str, str]:
        """The variables that a client process needs; huggingface_hub reads them when it is imported."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "hf_local_token",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def files(self, name: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """The content of every file of a repository, for assertions."""
        repository = self.repositories[kind, name]
        tree = repository.commits[repository.resolve(revision)]
        return {path: self.blobs[entry.sha256 or entry.oid] for path, entry in tree.items()}


class HubError(Exception):
    """Becomes an answer with `X-Error-Code`, by which the client chooses its exception."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


ID = r"(?P<name>[^/]+/[^/]+)"
API = rf"/api/(?P<kind>models|datasets)/{ID}"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"{API}/tag/(?P<revision>[^/]+)", "tag"),
    ("POST", rf"{API}/branch/(?P<branch>[^/]+)", "branch"),
    ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("GET", rf"{API}/refs", "refs"),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", "tree"),
    ("GET", rf"{API}/revision/(?P<revision>[^/]+)", "info"),
    ("GET", API, "info"),
    ("POST", rf"/(?:(?P<kind>datasets)/)?{ID}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<sha256>[0-9a-f]{64})", "lfs_upload"),
    ("GET", rf"/(?:(?P<kind>datasets)/)?{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class HubHandler(BaseHTTPRequestHandler):
    """One method per route; each returns a JSON-ready value or answers by itself and returns None."""

    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        """Tests stay silent."""

    def do_GET(self):
        self.dispatch("GET")

    do_HEAD = do_GET

    def do_POST(self):
        self.dispatch("POST")

    def do_PUT(self):
        self.dispatch("PUT")

    def dispatch(self, method):
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.body = self.read_body()
        self.hub.requests.append((self.command, url.path))
        self.hub.tokens.add(self.headers.get("Authorization", "").removeprefix("Bearer "))
        try:
            with self.hub.lock:
                answer = self.call(method, url.path)
            if answer is not None:
                self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            self.send(error.status, json.dumps({"error": str(error)}).encode(), headers)

    def call(self, method, path):
        for wanted, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and wanted == method:
                # A branch such as `refs/pr/1` arrives as one escaped segment.
                parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                return getattr(self, name)(**parts)
        raise HubError(404, "RouteNotFound", f"the local hub has no {method} {path}")

    def read_body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, status, content, headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def repository(self, kind, name):
        found = self.hub.repositories.get((kind or "models", name))
        if found is None:
            raise HubError(404, "RepoNotFound", f"no repository {name}")
        return found

    def commit_of(self, repository, revision):
        oid = repository.resolve(revision)
        if oid is None:
            raise HubError(404, "RevisionNotFound", f"no revision {revision}")
        return oid

    # Account and repositories

    def whoami(self):
        token = {"displayName": "local", "role": "write", "createdAt": DATE}
        return {
            "type": "user",
            "name": USER,
            "orgs": [],
            "auth": {"type": "access_token", "accessToken": token},
        }

    def validate_yaml(self):
        return {"errors": [], "warnings": []}

    def create(self):
        wish = json.loads(self.body)
        kind = wish.get("type", "model") + "s"
        name = f"{wish.get('organization') or USER}/{wish['name']}"
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{name}"
        if (kind, name) in self.hub.repositories:
            # The client reads the address from this refusal too.
            body = json.dumps({"error": f"{name} exists already", "url": url}).encode()
            return self.send(409, body, {"X-Error-Message": f"{name} exists already"})
        private = bool(wish.get("private")) or wish.get("visibility") == "private"
        repository = self.hub.repositories[kind, name] = Repository(kind, name, private)
        repository.commit("main", {})
        return {"url": url, "name": name, "id": name}

    # Upload

    def preupload(self, kind, name, revision):
        repository = self.repository(kind, name)
        tree = repository.commits[self.commit_of(repository, revision)]
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if self.is_lfs(file) else "regular",
                "shouldIgnore": False,
                "oid": tree[file["path"]].oid if file["path"] in tree else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        return {"files": files}

    def is_lfs(self, file):
        return file["size"] > LFS_SIZE or file["path"].endswith(LFS_SUFFIXES)

    def lfs_batch(self, name, kind="models"):
        self.repository(kind, name)
        objects = []
        for item in json.loads(self.body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"], "authenticated": True}
            if item["oid"] not in self.hub.blobs:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}}
            objects.append(answer)
        content = json.dumps({"transfer": "basic", "objects": objects}).encode()
        self.send(200, content, {"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_upload(self, sha256):
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise HubError(400, "BadChecksum", "the content does not have the announced sha256")
        self.hub.blobs[sha256] = self.body
        self.send(200, b"", {})

    def commit(self, kind, name, revision):
        repository = self.repository(kind, name)
        tree = dict(repository.commits[self.commit_of(repository, revision)])
        for line in self.body.splitlines():
            operation = json.loads(line)
            self.apply(tree, operation["key"], operation["value"])
        oid = repository.commit(revision, tree)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"}

    def apply(self, tree, key, value):
        if key == "file":
            content = base64.b64decode(value["content"])
            self.hub.blobs[git_oid(content)] = content
            tree[value["path"]] = Entry(git_oid(content), len(content))
        elif key == "lfsFile":
            if value["oid"] not in self.hub.blobs:
                raise HubError(400, "LfsObjectNotFound", f"{value['path']} was not uploaded")
            size = len(self.hub.blobs[value["oid"]])
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {size}\n"
            tree[value["path"]] = Entry(git_oid(pointer.encode()), size, value["oid"])
        elif key == "deletedFile":
            del tree[value["path"]]
        elif key == "deletedFolder":
            for path in [path for path in tree if path.startswith(value["path"].rstrip("/") + "/")]:
                del tree[path]

    def tag(self, kind, name, revision):
        repository = self.repository(kind, name)
        wanted = json.loads(self.body)["tag"]
        if wanted in repository.tags:
            raise HubError(409, "TagExists", f"tag {wanted} exists already")
        repository.tags[wanted] = self.commit_of(repository, revision)
        return {}

    def branch(self, kind, name, branch):
        repository = self.repository(kind, name)
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        if branch in repository.branches:
            raise HubError(409, "BranchExists", f"branch {branch} exists already")
        repository.branches[branch] = self.commit_of(repository, start)
        return {}

    # Listing

    def info(self, kind, name, revision="main"):
        repository = self.repository(kind, name)
        oid = self.commit_of(repository, revision)
        tree = repository.commits[oid]
        return {
            "_id": oid[:24],
            "id": name,
            "modelId": name,
            "author": name.split("/")[0],
            "sha": oid,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "createdAt": DATE,
            "lastModified": DATE,
            "siblings": [{"rfilename": path, "size": entry.size} for path, entry in sorted(tree.items())],
        }

    def refs(self, kind, name):
        repository = self.repository(kind, name)
        return {
            "branches": self.references("heads", repository.branches),
            "tags": self.references("tags", repository.tags),
            "converts": [],
        }

    def references(self, place, table):
        return [{"name": n, "ref": f"refs/{place}/{n}", "targetCommit": oid} for n, oid in table.items()]

    def tree(self, kind, name, revision, path=""):
        repository = self.repository(kind, name)
        tree = repository.commits[self.commit_of(repository, revision)]
        prefix = f"{path.strip('/')}/" if path.strip("/") else ""
        if prefix and not any(known.startswith(prefix) for known in tree):
            raise HubError(404, "EntryNotFound", f"no folder {path}")
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        return [
            described
            for described in self.described(tree)
            if described["path"].startswith(prefix) and (recursive or "/" not in described["path"][len(prefix) :])
        ]

    def described(self, tree):
        """Files and the folders above them; load_dataset needs the folders."""
        folders = {"/".join(path.split("/")[:depth]) for path in tree for depth in range(1, path.count("/") + 1)}
        for folder in sorted(folders):
            yield {"type": "directory", "oid": git_oid(folder.encode()), "size": 0, "path": folder}
        for path, entry in sorted(tree.items()):
            described = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
            if entry.sha256:
                described["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 134}
            yield described

    def paths_info(self, kind, name, revision):
        repository = self.repository(kind, name)
        tree = repository.commits[self.commit_of(repository, revision)]
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode()).get("paths", [])
        wanted = {path.strip("/") for path in paths}
        return [described for described in self.described(tree) if described["path"] in wanted]

    # Download

    def resolve(self, name, revision, path, kind="models"):
        repository = self.repository(kind, name)
        oid = self.commit_of(repository, revision)
        entry = repository.commits[oid].get(path)
        if entry is None:
            raise HubError(404, "EntryNotFound", f"no file {path} in {name}")
        headers = {"X-Repo-Commit": oid, "ETag": f'"{entry.sha256 or entry.oid}"', "Accept-Ranges": "bytes"}
        if entry.sha256:
            headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
        content = self.hub.blobs[entry.sha256 or entry.oid]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self.send(200, content, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or entry.size), entry.size - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{entry.size}"
        return self.send(206, content[first : last + 1], headers)
