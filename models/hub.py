"""Find a checkpoint or a data set: in a local directory, in the hub's local cache, or on the hub.

A branch or a tag of the hub may move. The first look-up of a process decides which commit it
means, for this process and for all that it starts; `agree` extends that to further processes.

Requests run in threads that the main thread can leave behind: Ctrl-C, SIGTERM and a time limit act
at once, whatever the hub does. A cut download goes on where it ended.
"""

import errno
import hashlib
import json
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from http.client import responses
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple, TypeVar

from models.config import CheckpointError
from models.safetensors_header import not_the_file
from utils import OutputError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# the files that are read besides the weights and their index
SMALL = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# environment variable: JSON {hub id as given: commit}, from a process to those that it starts
COMMITS = "DLLMEXP_HUB_COMMITS"

WARM_S = 5  # for the look-up of what is cached already
COLD_S = 120  # for a look-up with its repetitions
REQUEST_S = 10  # for one of its requests
TRIES = 4
MOST_WAIT_S = 30  # between two tries, whatever Retry-After says
FILES_AT_ONCE = 4
LOG_S = 30  # between two lines about a download in a log
NOT_WRITABLE = {
    getattr(errno, name) for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO".split()
}

T = TypeVar("T")
_settled: dict[tuple[str, str | None], Path] = {}  # (name, revision) -> its snapshot, checked
_silent = threading.Event()  # a look-up has had no answer in its time


class HubId(NamedTuple):
    """A model on the hub. revision: a commit, tag or branch; None is the default branch."""

    repo: str
    revision: str | None


class Repo(NamedTuple):
    """A repository of the hub at a revision.

    name: as the user gave it; of a data set "datasets/" and its id. kind: "model" or "dataset".
    """

    name: str
    id: str
    revision: str | None
    kind: str = "model"

    @property
    def folder(self) -> Path:
        """Where the hub's cache has it."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE, f"{self.kind}s--{self.id.replace('/', '--')}")

    def cached(self) -> Path | None:
        """Its snapshot, whole or in part, None where the cache has none."""
        ref = self.folder / "refs" / (self.revision or "main")
        with suppress(OSError):
            if ref.is_file():
                commits = [ref.read_text().strip()]
            elif self.revision is None:  # downloaded by its commit
                commits = os.listdir(self.folder / "snapshots")
            else:
                commits = [self.revision]
            if len(commits) == 1 and (found := self.folder / "snapshots" / commits[0]).is_dir():
                return found
        return None


def hub_id(name: str) -> HubId | None:
    """The parts of owner/name or owner/name@REVISION; None where `name` is neither."""
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\w[\w./-]*))?", name)
    return HubId(*match.groups()) if match and ".." not in name else None


def resolve(path_or_repo: str | Path, *, weights: bool) -> Path:
    """The local directory of a checkpoint: `path_or_repo` itself, or the snapshot of a hub id.

    path_or_repo: a directory, or owner/name or owner/name@REVISION on the hub. A directory of that
    name comes first. Missing files of the snapshot are downloaded; its shards only with `weights`.
    Honours HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE. Raises CheckpointError where there is no such
    directory and the hub id is neither in the local cache nor on the hub, and OutputError where the
    cache cannot be written.
    """
    name, path = str(path_or_repo), Path(path_or_repo).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise CheckpointError(
            f"model path {name} is a file; give the directory that holds config.json"
        )
    hub = hub_id(name)
    if hub is None:
        raise CheckpointError(
            f"model path {name} does not exist; give a directory, or a hub id such as org/name"
        )
    repo = Repo(name, hub.repo, _commits().get(name, hub.revision))
    wanted = [INDEX, *reversed(SMALL)]  # config.json comes last
    folder = _snapshot(repo, lambda names: [name for name in wanted if name in names])
    if weights:
        _fetch(repo, folder, _shards(folder), _size(folder))
    return folder


def parquet_files(data_set: str, config: str | None) -> dict[str, list[Path]]:
    """Split -> files of a data set in the hub's usual layout, CONFIG/SPLIT-00000-of-00001.parquet.

    config: None takes the only one. {} where the data set has another layout, or is neither in the
    hub's cache nor can be downloaded with HF_HUB_OFFLINE=1. Missing files are downloaded. Raises
    CheckpointError and OutputError.
    """

    def splits(names: Iterable[str]) -> dict[str, list[str]]:
        form = re.compile(r"([^/]+)/([\w.]+)-\d{5}-of-\d{5}\.parquet")
        found = [match for name in sorted(names) if (match := form.fullmatch(name))]
        configs = {match[1] for match in found}
        if config is None and len(configs) > 1:
            return {}
        chosen: dict[str, list[str]] = {}
        for match in found:
            if config in (None, match[1]):
                chosen.setdefault(match[2], []).append(match[0])
        return chosen

    name = f"datasets/{data_set}"
    repo = Repo(name, data_set, _commits().get(name), "dataset")
    if offline() and not repo.cached():
        return {}
    folder = _snapshot(repo, lambda names: sum(splits(names).values(), []))
    found = splits(_names(folder)).items()
    return {split: [folder / name for name in names] for split, names in found}


def _shards(folder: Path) -> list[str]:
    """Names of the weight files of a snapshot, as its index has them."""
    try:
        names = json.loads((folder / INDEX).read_bytes())["weight_map"].values()
        return sorted({str(name) for name in names})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return [SINGLE]


def _size(folder: Path) -> int | None:
    """About how many bytes the shards have, by their index."""
    try:
        return int(json.loads((folder / INDEX).read_bytes())["metadata"]["total_size"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


# ---- the commit


def _commits() -> dict[str, str]:
    return json.loads(os.environ.get(COMMITS) or "{}")


def pin(name: str, commit: str) -> None:
    """Let a hub id mean `commit` for the rest of this process and for those that it starts."""
    os.environ[COMMITS] = json.dumps(_commits() | {name: commit})


def agree(path: Path, find: Callable[[], None]) -> None:
    """Let all processes that call this with the same path use the same commits.

    find: looks up the hub ids. The first process that has done so writes the commits to `path`.
    Raises OSError where that cannot be written.
    """
    if not path.exists():
        find()
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            own.write_text(json.dumps(_commits()))
            with suppress(FileExistsError):
                os.link(own, path)
        finally:
            own.unlink(missing_ok=True)
    os.environ[COMMITS] = json.dumps(_commits() | json.loads(path.read_text()))


def cached_revision(name: str) -> str | None:
    """The commit of a hub id in the local cache, None where it has none. Nothing is downloaded.

    name: owner/name or owner/name@REVISION. The commit is known as soon as one file of its
    snapshot is cached.
    """
    hub = hub_id(name)
    found = hub and Repo(name, hub.repo, _commits().get(name, hub.revision)).cached()
    return found.name if found else None


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids all connections to the hub."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _snapshot(repo: Repo, choose: Callable[[Iterable[str]], list[str]]) -> Path:
    """The directory of a snapshot with the files that `choose` takes of the repository's.

    Where the commit is known and its files are cached, nothing is asked. A hub that does not
    answer costs WARM_S, once for all that is cached.
    """
    key = repo.name, repo.revision
    if key not in _settled:
        folder = repo.cached()
        if folder and not offline() and not _has_files(repo, folder, choose):
            folder = None
        if folder is None or not (offline() or folder.name == repo.revision):
            folder = _looked_up(repo, folder, choose)
        for name in choose(_names(folder)):
            _check(folder / name)
        pin(repo.name, folder.name)
        _settled[key] = _settled[repo.name, folder.name] = folder
    return _settled[key]


def _has_files(repo: Repo, folder: Path, choose: Callable[[Iterable[str]], list[str]]) -> bool:
    names = choose(_names(folder))
    if repo.kind == "dataset":
        return bool(names)
    return {"config.json", "tokenizer_config.json"} <= {*names}


def _names(folder: Path) -> list[str]:
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]


def _looked_up(
    repo: Repo, cached: Path | None, choose: Callable[[Iterable[str]], list[str]]
) -> Path:
    """The snapshot of the commit that the hub names; `cached` where the hub does not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RevisionNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo.id)
    except HFValidationError as error:
        raise CheckpointError(
            f"{repo.name}: no such directory here and no name of a model on the hub: {error}"
        ) from None
    if offline():
        raise CheckpointError(
            f"{repo.name}: no such directory here, not in the local cache and HF_HUB_OFFLINE=1; "
            "download it first, or give a local directory"
        )

    def ask():
        revision = repo.revision or "main"
        return HfApi().repo_info(repo.id, repo_type=repo.kind, revision=revision, timeout=REQUEST_S)

    quiet()
    try:
        if cached:
            if _silent.is_set():
                raise TimeoutError
            [info] = beside([ask], WARM_S)
        else:
            [info] = beside([lambda: _persistent(ask, repo)], COLD_S)
    except RevisionNotFoundError:
        raise CheckpointError(
            f"{repo.name}: {repo.id} has no revision {repo.revision!r} on the hub"
        ) from None
    except Exception as error:
        reason = _reason(error, repo)
        if cached is None:
            if _may_pass(error) or isinstance(error, TimeoutError):
                reason += "; try again later, or give a local directory"
            raise CheckpointError(f"{repo.name}: {reason}") from error
        if isinstance(error, TimeoutError):
            _silent.set()
        _tell(f"{repo.name}: {reason}; using the cached commit {cached.name}")
        return cached
    folder = repo.folder / "snapshots" / info.sha
    names = choose([file.rfilename for file in info.siblings or ()])
    _fetch(repo, folder, names[:-1])
    _fetch(repo, folder, names[-1:])  # where it is, all are
    if info.sha != repo.revision:
        ref = repo.folder / "refs" / (repo.revision or "main")
        with suppress(OSError):
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(info.sha)
    return folder


def _check(path: Path) -> None:
    """Compare a file of the cache with the checksum that is the name of its blob.

    That is a sha256 or git's sha1, or a plain one on some mirrors. Raises CheckpointError.
    """
    blob = path.resolve()
    if blob.parent.name != "blobs" or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return
    try:
        data = blob.read_bytes()
    except OSError:  # whoever needs it reports it
        return
    if len(blob.name) == 64:
        sums = {hashlib.sha256(data).hexdigest()}
    else:
        heads = b"", b"blob %d\0" % len(data)
        sums = {hashlib.sha1(head + data, usedforsecurity=False).hexdigest() for head in heads}
    if blob.name not in sums:
        fault = not_the_file(data[:512]) or "has another checksum than its name"
        raise CheckpointError(
            f"{blob} ({path.name}) is damaged: it {fault.partition(';')[0]}; "
            "delete it, then the same command downloads it again"
        )


# ---- downloads


def _fetch(repo: Repo, folder: Path, names: list[str], size: int | None = None) -> None:
    """Download the files that a snapshot lacks, in the order of their names, with one bar.

    size: about how many bytes they have. Raises CheckpointError and OutputError.
    """
    from huggingface_hub import hf_hub_download

    missing = [name for name in names if not (folder / name).is_file()]
    if not missing or offline():
        return
    if size:
        size -= sum((folder / name).stat().st_size for name in set(names) - set(missing))

    def get(name: str) -> None:
        def download():
            hf_hub_download(repo.id, name, repo_type=repo.kind, revision=folder.name)

        try:
            _persistent(download, repo)
        except Exception as error:
            raise _Failed(name) from error

    quiet()
    _drop_pages(repo)
    try:
        with _Bytes(repo, size) as shown:
            beside([lambda name=name: get(name) for name in missing], tick=shown.update)
    except _Failed as failed:
        error = failed.__cause__
        if getattr(error, "errno", None) in NOT_WRITABLE:
            raise OutputError(
                f"{repo.name}: cannot write to {repo.folder}: {error.strerror}; free some space, "
                "or let HF_HOME name another directory"
            ) from error
        reason = _reason(error, repo)
        if _drop_pages(repo):
            reason = "an HTML page came in its place; is it a login page of the network?"
        raise CheckpointError(f"{repo.name}: {failed} cannot be downloaded: {reason}") from error


def _drop_pages(repo: Repo) -> bool:
    """Delete partial downloads that begin with a web page; whether there were any."""
    found = False
    for path in repo.folder.glob("blobs/*.incomplete"):
        with suppress(OSError), path.open("rb") as file:
            if path.is_file() and "HTML" in (not_the_file(file.read(512)) or ""):
                path.unlink()
                found = True
    return found


class _Failed(Exception):
    """A download has failed. The argument is the file's name, the cause says why."""


class _Bytes:
    """How many bytes of a repository have come: a bar on a terminal, lines in a log.

    Counted in the cache, so that a download by another process is seen, too.
    """

    def __init__(self, repo: Repo, size: int | None):
        from tqdm import tqdm

        self._repo, self._before, self._next = repo, self._count(repo), time.monotonic() + 2
        self._bar = tqdm(
            desc=repo.name,
            total=size,
            unit="B",
            unit_scale=True,
            dynamic_ncols=True,
            leave=False,
            delay=1,
            disable=not sys.stderr.isatty(),
        )
        self._size = f" of {tqdm.format_sizeof(size)}B" if size else ""

    @staticmethod
    def _count(repo: Repo) -> int:
        total = 0
        for path in repo.folder.glob("blobs/*"):
            with suppress(OSError):
                total += path.stat().st_size
        return total

    def update(self) -> None:
        n = self._count(self._repo) - self._before
        if not self._bar.disable:
            self._bar.update(n - self._bar.n)
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + LOG_S
            _tell(f"{self._repo.name}: {self._bar.format_sizeof(n)}B{self._size} downloaded")

    def __enter__(self) -> "_Bytes":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def beside(
    calls: Iterable[Callable[[], T]], seconds: float | None = None, tick: Callable = lambda: None
) -> list[T]:
    """The results of the calls, in threads that a signal or the end of the time leaves behind.

    tick: called twice a second. Raises what a call raises, and TimeoutError after `seconds`.
    """
    calls = list(calls)
    todo, done = SimpleQueue(), SimpleQueue()
    for job in enumerate(calls):
        todo.put(job)

    def work() -> None:
        with suppress(Empty):
            while True:
                i, call = todo.get_nowait()
                try:
                    done.put((i, call(), None))
                except BaseException as error:
                    done.put((i, None, error))

    for _ in range(min(FILES_AT_ONCE, len(calls))):
        threading.Thread(target=work, daemon=True).start()
    found, end = {}, seconds and time.monotonic() + seconds
    while len(found) < len(calls):
        try:
            i, found[i], error = done.get(timeout=0.5)
            if error is not None:
                raise error
        except Empty:
            if end and time.monotonic() > end:
                raise TimeoutError from None
            tick()
    return [found[i] for i in range(len(calls))]


def _persistent(call: Callable[[], T], repo: Repo) -> T:
    """`call()`, repeated where a failure may pass. Raises what it raises at last."""
    for i in range(TRIES):
        try:
            return call()
        except Exception as error:
            if i == TRIES - 1 or not _may_pass(error):
                raise
            asked = getattr(_origin(error), "response", None)
            after = asked.headers.get("Retry-After", "") if asked is not None else ""
            wait = min(int(after) if after.isdecimal() else 2**i, MOST_WAIT_S)
            _tell(f"{repo.name}: {_reason(error, repo)}; trying again in {wait} s")
            time.sleep(wait)
    raise AssertionError


# ---- errors, by the names of their classes: huggingface_hub has another HTTP library from 1.0 on

BROKEN = {"ConnectionError", "ChunkedEncodingError", "Timeout", "TransportError"}


def _kinds(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _origin(error: BaseException) -> BaseException:
    """The failed request behind huggingface_hub's "not in the cache either"."""
    wrapped = "LocalEntryNotFoundError" in _kinds(error) and error.__cause__
    return wrapped or error


def _status(error: BaseException) -> int:
    """The HTTP status of a failed request, 0 where there is none."""
    return getattr(getattr(_origin(error), "response", None), "status_code", 0)


def _may_pass(error: BaseException) -> bool:
    if _origin(error) is not error:  # huggingface_hub has repeated it for all but this status
        return _status(error) == 429
    if status := _status(error):
        return status == 429 or status >= 500
    return bool(_kinds(error) & BROKEN) and not _kinds(error) & {"ProxyError", "SSLError"}


def _reason(error: BaseException, repo: Repo) -> str:
    """Why a request failed, with its status and the way out."""
    from huggingface_hub import constants, get_token

    error, status = _origin(error), _status(error)
    kinds, has_token = _kinds(error), get_token() is not None
    if "GatedRepoError" in kinds:
        page = f"{constants.ENDPOINT}/{repo.name.partition('@')[0]}"
        who = "with the account of your token" if has_token else "and set HF_TOKEN"
        return f"the hub asks for permission (HTTP {status}); accept the terms at {page} {who}"
    if status == 401 and has_token:
        return "the hub refuses your token (HTTP 401); set a valid HF_TOKEN or run hf auth login"
    if "RepositoryNotFoundError" in kinds:
        private = "" if has_token else "; a private one needs HF_TOKEN"
        return f"no such directory here and no such {repo.kind} on the hub{private}"
    if status == 407 or "ProxyError" in kinds:
        if status == 407 or " 407 " in str(error):
            return "the proxy asks for a user and a password (HTTP 407); HTTPS_PROXY can have them"
        return "the proxy of HTTP_PROXY or HTTPS_PROXY cannot be reached, or refuses"
    if status:
        said = error.response.headers.get("X-Error-Message") or responses.get(status, "")
        return f"the hub answers HTTP {status} {said}"
    if kinds & {"Timeout", "TimeoutError", "TimeoutException"}:
        return "the hub does not answer"
    if "SSLError" in kinds:
        return "the hub's certificate is not trusted; REQUESTS_CA_BUNDLE can name others"
    if kinds & {"JSONDecodeError", "FileMetadataError"}:
        return "the answer is not the hub's; is it a login page of the network?"
    if kinds & BROKEN:
        why = re.search(r"\[Errno -?\d+\] ([\w ]+)", str(error))
        return f"the hub cannot be reached ({why[1] if why else 'the connection was dropped'})"
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def quiet() -> None:
    """No bars of huggingface_hub, and no lines unless HF_HUB_VERBOSITY asks for them."""
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()
    if "HF_HUB_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()


def _tell(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()
