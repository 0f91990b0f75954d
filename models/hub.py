"""Find a checkpoint: in a local directory, in the hub's local cache, or on the hub.

A branch or a tag of the hub may move. The first look-up of a process decides which commit it
means, for this process and for all that it starts.
"""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from models.config import CheckpointError

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


class HubId(NamedTuple):
    """A model on the hub. revision: a commit, tag or branch; None is the default branch."""

    repo: str
    revision: str | None


def hub_id(name: str) -> HubId | None:
    """The parts of owner/name or owner/name@REVISION; None where `name` is neither."""
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\w[\w./-]*))?", name)
    return HubId(*match.groups()) if match and ".." not in name else None


def resolve(path_or_repo: str | Path, *, weights: bool) -> Path:
    """The local directory of a checkpoint: `path_or_repo` itself, or the snapshot of a hub id.

    path_or_repo: a directory, or owner/name or owner/name@REVISION on the hub. A directory of that
    name comes first. Missing files of the snapshot are downloaded; its shards only with `weights`.
    Honours HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE. Raises CheckpointError where there is no such
    directory and the hub id is neither in the local cache nor on the hub.
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
        raise CheckpointError(f"model path {name} does not exist")
    commit = _commits().get(name)
    folder = _download(name, hub.repo, commit or hub.revision, [*SMALL, INDEX], cached=commit)
    pin(name, folder.name)
    if weights and not all((folder / shard).is_file() for shard in _shards(folder)):
        _download(name, hub.repo, folder.name, _shards(folder))
    return folder


def _shards(folder: Path) -> list[str]:
    """Names of the weight files of a snapshot, as its index has them."""
    try:
        names = json.loads((folder / INDEX).read_bytes())["weight_map"].values()
        return sorted({str(name) for name in names})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return [SINGLE]


def _commits() -> dict[str, str]:
    return json.loads(os.environ.get(COMMITS) or "{}")


def pin(name: str, commit: str) -> None:
    """Let a hub id mean `commit` for the rest of this process and for those that it starts."""
    os.environ[COMMITS] = json.dumps(_commits() | {name: commit})


def cached_revision(name: str) -> str | None:
    """The commit of a hub id in the local cache, None where it has none. Nothing is downloaded.

    name: owner/name or owner/name@REVISION. The commit is known as soon as one file of its
    snapshot is cached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    hub = hub_id(name)
    if hub is None:
        return None
    try:
        revision = _commits().get(name, hub.revision)
        found = snapshot_download(hub.repo, revision=revision, local_files_only=True)
        return Path(found).name
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids all connections to the hub."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _download(
    name: str, repo: str, revision: str | None, files: list[str], *, cached: str | None = None
) -> Path:
    """The snapshot's directory with these files, as far as the hub has them.

    cached: the commit where its files have been downloaded before; nothing is asked then.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        found = snapshot_download(
            repo, revision=revision, allow_patterns=files, local_files_only=cached is not None
        )
        return Path(found)
    except GatedRepoError:
        problem = "the hub asks for permission; accept its terms there and set HF_TOKEN"
    except RepositoryNotFoundError:
        problem = "no such directory here and no such model on the hub"
    except RevisionNotFoundError:
        problem = f"{repo} has no revision {revision!r} on the hub"
    except LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE=1" if offline() else "the hub cannot be reached"
        problem = (
            f"no such directory here, not in the local cache and {why}; "
            "download it first, or give a local directory"
        )
    except HFValidationError as error:
        problem = f"no such directory here and no name of a model on the hub: {error}"
    except OSError as error:  # network and disk; huggingface_hub's HTTP errors are OSErrors too
        problem = f"cannot be downloaded: {str(error).splitlines()[0]}"
    raise CheckpointError(f"{name}: {problem}")
