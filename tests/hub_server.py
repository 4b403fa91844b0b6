"""A model hub on the loopback interface: what huggingface_hub's client asks of the real one, kept in memory."""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIX = ".safetensors"
NOT_FOUND = {"repo": "RepoNotFound", "revision": "RevisionNotFound", "entry": "EntryNotFound"}


@dataclass
class Repo:
    """Branches and pull requests are refs to commits; a commit is the whole tree, path -> content."""

    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, bytes], message: str = "") -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {ref} {message}".encode()).hexdigest()
        self.commits[sha], self.messages[sha], self.refs[ref] = files, message, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.resolve(revision)]


@dataclass
class Fault:
    """
    For the next `times` requests whose "METHOD /path" matches, or until one matches `until`: a status, or the line
    cut after `drop` bytes.
    """

    pattern: str
    status: int | None = None
    drop: int | None = None
    times: float = 1
    until: str | None = None


class HubServer:
    """`with HubServer({"token": "user"}) as hub:` serves at `hub.endpoint`; a user may write to `user/...` only."""

    def __init__(self, users: dict[str, str]):
        self.users, self.repos, self.objects = users, {}, {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str | None]] = []  # "METHOD /path?query", and the Range that was asked for
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def seen(self, pattern: str) -> list[tuple[str, str | None]]:
        return [entry for entry in self.log if re.search(pattern, entry[0])]

    def create(self, repo_id: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.commit("main", dict(files or {}), "initial commit")
        return repo


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def _handle(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = f"{self.command} {self.path}"
        with self.hub.lock:
            self.hub.log.append((request, self.headers.get("Range")))
            self.hub.faults[:] = [f for f in self.hub.faults if not (f.until and re.search(f.until, request))]
            fault = next((f for f in self.hub.faults if f.times and re.search(f.pattern, request)), None)
            if fault:
                fault.times -= 1
        self.drop_after = fault.drop if fault else None
        try:
            if fault and fault.status:
                raise _Refusal(fault.status, "injected")
            for method, pattern, route in _ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, url.path)):
                    with self.hub.lock:
                        status, headers, content = route(self, *(unquote(part) for part in match.groups()))
                    return self._send(status, headers, content)
            raise _Refusal(404, f"this hub has no {request}", NOT_FOUND["repo"])
        except _Refusal as refusal:
            code = {"X-Error-Code": refusal.code} if refusal.code else {}
            self._send(refusal.status, {**code, "X-Error-Message": refusal.message}, _json({"error": refusal.message}))

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD" and status != 204:
            if self.drop_after is not None:
                self.wfile.write(content[: self.drop_after])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.wfile.write(content)

    @property
    def user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.hub.users.get(token)

    def _repo(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.user != repo_id.split("/")[0]):
            # as the real one: whoever is not logged in cannot tell a missing repository from a private one
            raise _Refusal(404 if self.user else 401, "Repository not found", NOT_FOUND["repo"])
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> str:
        sha = repo.resolve(revision)
        if sha is None:
            raise _Refusal(404, f"Invalid rev id: {revision}", NOT_FOUND["revision"])
        return sha

    def _may_write(self, repo_id: str) -> None:
        if self.user is None:
            raise _Refusal(401, "Invalid username or password.")
        if self.user != repo_id.split("/")[0] and "create_pr" not in self.query:
            raise _Refusal(403, "You don't have the rights to write here.")

    def whoami(self):
        if self.user is None:
            raise _Refusal(401, "Invalid username or password.")
        return _ok({"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def validate_yaml(self):
        body = json.loads(self.body)
        front = re.match(r"---\n(.*?)\n---\n", body["content"], re.DOTALL)
        errors = _metadata_errors(yaml.safe_load(front[1]) if front else None)
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        return (400 if errors else 200), _JSON, _json(answer)

    def create_repo(self):
        body = json.loads(self.body)
        if self.user is None:
            raise _Refusal(401, "Invalid username or password.")
        repo_id = f"{body.get('organization') or self.user}/{body['name']}"
        self._may_write(repo_id)
        status = 409 if repo_id in self.hub.repos else 200
        if status == 200:
            self.hub.create(repo_id, private=body.get("visibility") == "private" or body.get("private") is True)
        url = f"{self.hub.endpoint}/{repo_id}"
        return status, _JSON, _json({"url": url, "name": repo_id, "id": repo_id})

    def create_branch(self, repo_id, branch):
        repo = self._repo(repo_id)
        self._may_write(repo_id)
        if branch in repo.refs:
            return 409, _JSON, _json({"error": "Reference already exists"})
        repo.refs[branch] = repo.refs["main"]
        return _ok({})

    def preupload(self, repo_id, revision):
        repo = self._repo(repo_id)
        self._may_write(repo_id)
        self._commit_of(repo, revision)
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIX) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        return _ok({"files": modes, "commitOid": repo.resolve(revision)})

    def lfs_batch(self, repo_id):
        self._repo(repo_id)
        answer = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                href = f"{self.hub.endpoint}/lfs/{wanted['oid']}"
                entry["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            answer.append(entry)
        return 200, {"Content-Type": "application/vnd.git-lfs+json"}, _json({"transfer": "basic", "objects": answer})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refusal(400, "the content is not that of its sha256")
        self.hub.objects[oid] = self.body
        return _ok({})

    def lfs_verify(self, oid):
        stored, said = self.hub.objects.get(oid), json.loads(self.body)
        if stored is None or len(stored) != said["size"]:
            raise _Refusal(422, "not uploaded")
        return _ok({})

    def commit(self, repo_id, revision):
        repo = self._repo(repo_id)
        self._may_write(repo_id)
        files, summary = dict(repo.commits[self._commit_of(repo, revision)]), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                summary = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise _Refusal(400, f"unknown operation {key}")
        answer = {"success": True}
        if "create_pr" in self.query:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo_id}/discussions/{number}"
        sha = repo.commit(revision, files, summary)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{sha}"
        return _ok({**answer, "commitOid": sha, "commitUrl": url})

    def model_info(self, repo_id, revision="main"):
        repo = self._repo(repo_id)
        sha = self._commit_of(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        return _ok({"id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.private, "siblings": siblings})

    def refs(self, repo_id):
        repo = self._repo(repo_id)
        branches = [
            {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": sha}
            for ref, sha in repo.refs.items()
            if not ref.startswith("refs/")
        ]
        return _ok({"branches": branches, "converts": [], "tags": []})

    def tree(self, repo_id, revision, folder=""):
        repo = self._repo(repo_id)
        files = repo.commits[self._commit_of(repo, revision)]
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        found = [_entry(path, content) for path, content in sorted(files.items()) if path.startswith(prefix)]
        if prefix and not found:
            raise _Refusal(404, f"{folder} does not exist", NOT_FOUND["entry"])
        if "recursive" not in self.query or self.query["recursive"][0].lower() in ("0", "false"):
            found = [entry for entry in found if "/" not in entry["path"].removeprefix(prefix)]
        return _ok(found)

    def resolve(self, repo_id, revision, path):
        repo = self._repo(repo_id)
        sha = self._commit_of(repo, revision)
        content = repo.commits[sha].get(path)
        if content is None:
            raise _Refusal(404, f"{path} does not exist", NOT_FOUND["entry"])
        entry = _entry(path, content)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(len(content))}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(asked[1]), int(asked[2] or len(content) - 1)
            if start >= len(content):
                return 416, {"Content-Range": f"bytes */{len(content)}"}, b""
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return 206, headers, content[start : end + 1]
        return 200, headers, content


_JSON = {"Content-Type": "application/json"}
_REPO = r"([^/]+/[^/]+)"
_ROUTES = (
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("POST", rf"/api/models/{_REPO}/branch/([^/]+)", _Handler.create_branch),
    ("POST", rf"/api/models/{_REPO}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/([^/]+)", _Handler.commit),
    ("GET", rf"/api/models/{_REPO}", _Handler.model_info),
    ("GET", rf"/api/models/{_REPO}/revision/([^/]+)", _Handler.model_info),
    ("GET", rf"/api/models/{_REPO}/refs", _Handler.refs),
    ("GET", rf"/api/models/{_REPO}/tree/([^/]+)(/.*|)", _Handler.tree),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/([0-9a-f]{64})", _Handler.lfs_put),
    ("POST", "/lfs/([0-9a-f]{64})/verify", _Handler.lfs_verify),
    ("GET", rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("HEAD", rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
)


def _json(value) -> bytes:
    return json.dumps(value).encode()


def _ok(value):
    return 200, _JSON, _json(value)


def _entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if path.endswith(LFS_SUFFIX):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def _metadata_errors(data) -> list[str]:
    """What the real hub refuses of a model card's metadata, as far as these cards go."""
    if not isinstance(data, dict):
        return ["no metadata"]
    kinds = {"license": str, "library_name": str, "pipeline_tag": str, "tags": list, "datasets": list}
    errors = [
        f'"{key}" must be a {kind}' for key, kind in kinds.items() if not isinstance(data.get(key, kind()), kind)
    ]
    if data.get("base_model_relation", "adapter") not in ("adapter", "finetune", "merge", "quantized"):
        errors.append('"base_model_relation" is unknown')
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(data.get("base_model", "a/b"))):
        errors.append('"base_model" is no model id')
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str) or not model.get("results"):
            errors.append('"model-index" needs a name and results')
        for result in model.get("results", []):
            if not result.get("task", {}).get("type"):
                errors.append('"model-index[0].results[0].task.type" is required')
            if not {"type", "name"} <= result.get("dataset", {}).keys():
                errors.append('"model-index[0].results[0].dataset" needs type and name')
            if not all({"type", "value"} <= metric.keys() for metric in result.get("metrics") or [{}]):
                errors.append('"model-index[0].results[0].metrics" need type and value')
    return errors
