"""A Hub for the tests: a server in a thread that speaks as much of the Hub's protocol as sharing needs.

Repositories are made, files go up as part of a commit or by LFS, and come back by `resolve`, `tree` and `paths-info`.
Everything is in memory. Writing, and reading what is private, takes the token.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_SECRET"
REPO = r"(?:(?P<kind>models|datasets)/)?(?P<id>[\w.-]+/[\w.-]+)"


class Repository:
    def __init__(self, private: bool):
        self.private = private
        self.history: list[dict[str, bytes]] = [{}]
        self.messages = ["initial commit"]

    def sha(self, revision: str = "main") -> str:
        number = len(self.history) - 1 if revision == "main" else int(revision, 16)
        return f"{number:040x}"

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.history[int(self.sha(revision), 16)]


class LocalHub:
    """What the server holds: `repositories`, by (kind, id), and the lines of `requests`."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()  # one commit after the other
        self.url = ""

    def to_json(self) -> list:
        """The repositories, to be kept in a file."""
        return [
            {
                "kind": kind,
                "id": id,
                "private": each.private,
                "messages": each.messages,
                "history": [{k: base64.b64encode(v).decode() for k, v in files.items()} for files in each.history],
            }
            for (kind, id), each in self.repositories.items()
        ]

    @classmethod
    def from_json(cls, content: list) -> "LocalHub":
        hub = cls()
        for each in content:
            repository = hub.repositories[each["kind"], each["id"]] = Repository(each["private"])
            repository.messages = each["messages"]
            repository.history = [{k: base64.b64decode(v) for k, v in files.items()} for files in each["history"]]
        return hub

    def card(self, kind: str, repo_id: str) -> str:
        return self.repositories[kind, repo_id].files()["README.md"].decode()


class Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args):
        pass

    def answer(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        for pattern, respond in ROUTES.items():
            if match := re.fullmatch(pattern, path):
                return respond(self, **match.groupdict())
        self.send(404, {"error": f"no such page: {path}"})

    def send(self, status: int, content: dict | list | bytes = b"", **headers: str):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def find(self, kind: str | None, id: str) -> Repository | None:
        repository = self.hub.repositories.get((kind or "models", id))
        if repository is not None and (self.is_known or not repository.private and self.command in ("GET", "HEAD")):
            return repository
        self.send(404 if self.is_known else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return None

    def create(self):
        if not self.is_known:
            return self.send(401, {"error": "Invalid username or password."})
        asked = json.loads(self.body)
        kind = f"{asked.get('type') or 'model'}s"
        id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not id.startswith("me/"):
            return self.send(403, {"error": f'You don\'t have the rights to create "{id}"'})
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{id}"
        status = 409 if (kind, id) in self.hub.repositories else 200
        private = asked.get("private") or asked.get("visibility") == "private"  # as older and newer clients say it
        self.hub.repositories.setdefault((kind, id), Repository(bool(private)))
        self.send(status, {"url": url, "id": id, "name": id})

    def whoami(self):
        self.send(200, {"type": "user", "name": "me", "orgs": []}) if self.is_known else self.send(401, {})

    def validate(self):
        self.send(200, {"errors": [], "warnings": []})

    def info(self, kind: str, id: str, revision: str | None = None):
        if repository := self.find(kind, id):
            sha = repository.sha(revision or "main")
            siblings = [{"rfilename": path} for path in repository.files(sha)]
            self.send(200, {"id": id, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []})

    def preupload(self, kind: str, id: str, revision: str):
        if self.find(kind, id):
            # As on the Hub, text goes with the commit, and what looks binary goes by LFS
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if b"\0" in base64.b64decode(file["sample"]) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.body)["files"]
            ]
            self.send(200, {"files": files})

    def batch(self, kind: str, id: str):
        if self.find(kind, id):
            objects = json.loads(self.body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}
            self.send(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.objects[oid] = self.body
        self.send(200)

    def commit(self, kind: str, id: str, revision: str):
        if not (repository := self.find(kind, id)):
            return
        with self.hub.lock:
            files = dict(repository.files())
            for line in self.body.splitlines():
                operation = json.loads(line)
                value = operation["value"]
                if operation["key"] == "header":
                    repository.messages.append(value["summary"])
                elif operation["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
                elif operation["key"] == "deletedFile":
                    del files[value["path"]]
            repository.history.append(files)
            sha = repository.sha()
        self.send(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{id}/commit/{sha}"})

    def tree(self, kind: str, id: str, revision: str, folder: str | None = None):
        if repository := self.find(kind, id):
            files = repository.files(revision)
            folder = f"{folder.strip('/')}/" if folder else ""
            inside = [path for path in files if path.startswith(folder)]
            if folder and not inside:
                return self.send(404, {"error": "no such entry"}, X_Error_Code="EntryNotFound")
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
            entries = [entry(path, files[path]) for path in inside if recursive or "/" not in path[len(folder) :]]
            folders = {folder + path[len(folder) :].partition("/")[0] for path in inside if "/" in path[len(folder) :]}
            entries += [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)]
            self.send(200, entries)

    def paths_info(self, kind: str, id: str, revision: str):
        if repository := self.hub.repositories.get((kind, id)):
            text = self.body.decode()
            paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
            files = repository.files(revision)
            found = [entry(path, files[path]) for path in paths if path in files]
            found += [
                {"type": "directory", "path": path, "oid": "0" * 40}
                for path in paths
                if any(name.startswith(f"{path}/") for name in files)
            ]
            self.send(200, found)

    def resolve(self, kind: str | None, id: str, revision: str, path: str):
        if not (repository := self.find(kind, id)):
            return
        sha = repository.sha(revision)
        content = repository.files(sha).get(path)
        if content is None:
            return self.send(404, {"error": "no such file"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(span[1]), int(span[2] or len(content) - 1)
            headers["Content_Range"] = f"bytes {start}-{min(end, len(content) - 1)}/{len(content)}"
            return self.send(206, content[start : end + 1], **headers)
        self.send(200, content, **headers)


def entry(path: str, content: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


ROUTES = {
    r"/api/repos/create": Handler.create,
    r"/api/whoami-v2": Handler.whoami,
    r"/api/validate-yaml": Handler.validate,
    rf"/api/{REPO}": Handler.info,
    rf"/api/{REPO}/revision/(?P<revision>[^/]+)": Handler.info,
    rf"/api/{REPO}/preupload/(?P<revision>[^/]+)": Handler.preupload,
    rf"/api/{REPO}/commit/(?P<revision>[^/]+)": Handler.commit,
    rf"/api/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?": Handler.tree,
    rf"/api/{REPO}/paths-info/(?P<revision>[^/]+)": Handler.paths_info,
    rf"/{REPO}\.git/info/lfs/objects/batch": Handler.batch,
    r"/lfs/(?P<oid>\w+)": Handler.upload,
    rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": Handler.resolve,
}


@contextmanager
def local_hub():
    """A Hub that runs as long as the context."""
    hub = LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
