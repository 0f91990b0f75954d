"""A hub on loopback: the part of the hub's HTTP interface that downloads need.

Weights are served as LFS files are: by a redirect to a path named by their sha256, with ranges.
"""

import hashlib
import json
import os
import re
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Answer = tuple[int, dict[str, str], bytes]
PAGE: Answer = (200, {"Content-Type": "text/html"}, b"<!DOCTYPE html><title>Log in</title>" * 9)
NOTHING = "DLLMEXP_HUB_COMMITS HF_TOKEN HF_HUB_CACHE HTTP_PROXY HTTPS_PROXY http_proxy https_proxy"


class FakeHub:
    """Repositories and their commits. Faults are attributes that a test sets.

    commits: repository -> commit -> directory. A data set's name begins with datasets/.
    refs:    repository -> the commits that `main` means at its 1st, 2nd, ... look-up; the last one
             holds ever after.
    corrupt: names of files whose bytes change on the way.
    gated:   token -> whether its owner may read. Where it is not empty, all are gated.
    asked:   (method, path, range) of every request.
    """

    def __init__(self):
        self.commits: dict[str, dict[str, Path]] = {}
        self.refs: dict[str, list[str]] = {}
        self.corrupt: set[str] = set()
        self.gated: dict[str, bool] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        self.closing = threading.Event()
        self._faults: list[list] = []
        self._blobs: dict[str, Path] = {}

    def add(self, repo: str, commit: str, folder: Path) -> None:
        """Add a commit; `main` means the newest one."""
        self.commits.setdefault(repo, {})[commit] = folder
        self.refs[repo] = [commit]

    def fail(self, pattern: str, fault: str | Answer, times: int = 10**6) -> None:
        """Let requests whose path has `pattern` fail.

        fault: an answer, "hang", "drop", "cut" (half of the body) or "drip" (slowly).
        """
        self._faults.append([re.compile(pattern), fault, times])

    def heal(self) -> None:
        self._faults.clear()

    def fault(self, path: str) -> str | Answer | None:
        for found in self._faults:
            if found[2] and found[0].search(path):
                found[2] -= 1
                return found[1]
        return None

    def lookups(self, ref: str = "main") -> int:
        """How often somebody asked for the commit of a ref."""
        return sum(path.endswith(f"/revision/{ref}") for _, path, _ in self.asked)

    def environ(self, home: Path, **more: str) -> dict[str, str]:
        """Variables of a process that uses this hub, with a cache of its own."""
        env = {name: value for name, value in os.environ.items() if name not in NOTHING.split()}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        return env | own | {"NO_PROXY": ""} | more

    # -- answers: (status, headers, body)

    def answer(self, path: str, token: str | None) -> Answer:
        if path.startswith("/cdn/") and (file := self._blobs.get(path[5:])):
            data = bytearray(file.read_bytes())
            if file.name in self.corrupt:
                data[-1] ^= 1
            return 200, {"ETag": f'"{path[5:]}"'}, bytes(data)
        if self.gated:
            if token is not None and token not in self.gated:
                said = "Invalid credentials in Authorization header"
                return 401, {"X-Error-Message": said}, b"{}"
            if not self.gated.get(token):
                return 403 if token else 401, {"X-Error-Code": "GatedRepo"}, b"{}"
        if found := re.fullmatch(r"/api/(?:models/)?(.+)/revision/([^/]+)", path):
            return self._info(*found.groups())
        if found := re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*found.groups())
        return 404, {}, b"{}"

    def _info(self, repo: str, ref: str) -> Answer:
        if repo not in self.commits:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        commit = ref
        if ref == "main":
            waiting = self.refs[repo]
            commit = waiting.pop(0) if len(waiting) > 1 else waiting[0]
        if commit not in self.commits[repo]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        folder = self.commits[repo][commit]
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        info = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in names]}
        return 200, {}, json.dumps(info).encode()

    def _resolve(self, repo: str, commit: str, name: str) -> Answer:
        file = self.commits.get(repo, {}).get(commit, Path("/nowhere")) / name
        headers = {"X-Repo-Commit": commit}
        if not file.is_file():
            return 404, headers | {"X-Error-Code": "EntryNotFound"}, b""
        data = file.read_bytes()
        if file.suffix not in (".safetensors", ".parquet"):
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
            hub.asked.append((self.command, path, self.headers.get("Range")))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
            status, headers, body = hub.answer(path, token)
            fault = hub.fault(path)
            if fault == "hang":
                hub.closing.wait()
            if fault in ("hang", "drop"):
                self.close_connection = True
                return
            if isinstance(fault, tuple):
                status, headers, body = fault
            span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if span and status == 200 and headers.get("ETag"):
                status, begin = 206, int(span[1])
                extent = f"bytes {begin}-{len(body) - 1}/{len(body)}"
                headers, body = headers | {"Content-Range": extent}, body[begin:]
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.send_body(body, fault)

        def send_body(self, body: bytes, fault):
            half = len(body) // 2
            if fault in ("cut", "drip"):
                self.wfile.write(body[:half])
                self.close_connection, body = True, b"" if fault == "cut" else body[half:]
                if fault == "drip":
                    hub.closing.wait(4)
            with suppress(OSError):  # the client has gone
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # a client has gone
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
