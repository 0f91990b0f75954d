"""A hub on loopback: the part of the hub's HTTP interface that downloading a model needs.

Weights are served as LFS files are: by a redirect to a path named by their sha256, with ranges.
"""

import hashlib
import json
import os
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FakeHub:
    """Repositories and their commits. Faults are attributes that a test sets.

    commits: repository -> commit -> directory.
    refs:    repository -> the commits that `main` means at its 1st, 2nd, ... look-up; the last one
             holds ever after.
    corrupt: names of files whose bytes change on the way.
    asked:   (method, path) of every request.
    """

    def __init__(self):
        self.commits: dict[str, dict[str, Path]] = {}
        self.refs: dict[str, list[str]] = {}
        self.corrupt: set[str] = set()
        self.asked: list[tuple[str, str]] = []
        self._blobs: dict[str, Path] = {}

    def add(self, repo: str, commit: str, folder: Path) -> None:
        """Add a commit; `main` means the newest one."""
        self.commits.setdefault(repo, {})[commit] = folder
        self.refs[repo] = [commit]

    def lookups(self, ref: str = "main") -> int:
        """How often somebody asked for the commit of a ref."""
        return sum(path.endswith(f"/revision/{ref}") for _, path in self.asked)

    def environ(self, home: Path) -> dict[str, str]:
        """Variables of a process that uses this hub, with a cache of its own."""
        dropped = ("HF_HUB_CACHE", "HF_TOKEN", "DLLMEXP_HUB_COMMITS")
        env = {name: value for name, value in os.environ.items() if name not in dropped}
        return env | {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}

    # -- answers: (status, headers, body)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            return self._info(*found.groups())
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*found.groups())
        if path.startswith("/cdn/") and (file := self._blobs.get(path[5:])):
            data = bytearray(file.read_bytes())
            if file.name in self.corrupt:
                data[-1] ^= 1
            return 200, {"ETag": f'"{path[5:]}"'}, bytes(data)
        return 404, {}, b"{}"

    def _info(self, repo: str, ref: str) -> tuple[int, dict[str, str], bytes]:
        if repo not in self.commits:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        commit = ref
        if ref == "main":
            waiting = self.refs[repo]
            commit = waiting.pop(0) if len(waiting) > 1 else waiting[0]
        if commit not in self.commits[repo]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        names = sorted(file.name for file in self.commits[repo][commit].iterdir())
        info = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in names]}
        return 200, {}, json.dumps(info).encode()

    def _resolve(self, repo: str, commit: str, name: str) -> tuple[int, dict[str, str], bytes]:
        file = self.commits.get(repo, {}).get(commit, Path("/nowhere")) / name
        headers = {"X-Repo-Commit": commit}
        if not file.is_file():
            return 404, headers | {"X-Error-Code": "EntryNotFound"}, b""
        data = file.read_bytes()
        if file.suffix != ".safetensors":
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            return 200, headers | {"ETag": f'"{blob}"'}, data
        digest = hashlib.sha256(data).hexdigest()
        self._blobs[digest] = file
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{digest}"'}
        return 302, headers | {"Location": f"{self.url}/cdn/{digest}"}, b""


@contextmanager
def served():
    """A FakeHub that answers on a free port of loopback until the context is left."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = self.path.partition("?")[0]
            hub.asked.append((self.command, path))
            status, headers, body = hub.answer(path)
            span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if span and status == 200:
                status, begin = 206, int(span[1])
                headers["Content-Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
                body = body[begin:]
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
