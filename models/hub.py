"""Where a checkpoint is: a local directory, or a hub id whose files are in the cache or to be downloaded."""

import re
from pathlib import Path

from models.config import CheckpointError

SMALL = ("*.json", "*.txt", "*.jinja", "*.model")  # all but the weights


def resolve(path_or_repo: str | Path, revision: str | None = None, *, weights: bool) -> Path:
    """The checkpoint's local directory; a hub id is downloaded (its shards only with `weights`).

    Honours HF_HOME and HF_HUB_OFFLINE. Raises CheckpointError where there is no such directory
    and the hub id is neither in the local cache nor to be had.
    """
    name, path = str(path_or_repo), Path(path_or_repo).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(
                [f"{name}: revision {revision!r} given, but a local directory has none"]
            )
        return path.resolve()
    if path.exists():
        raise CheckpointError(
            [f"model path {name} is a file; give the directory that holds config.json"]
        )
    if not is_repo_id(name):
        raise CheckpointError([f"model path {name} does not exist"])
    return _download(name, revision, weights)


def is_repo_id(name: str) -> bool:
    """Whether `name` can be a hub id, owner/name."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def cached_revision(repo: str, revision: str | None = None) -> str | None:
    """The commit of a hub id that lies in the local cache, None where none does. Nothing is fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True)).name
    except LocalEntryNotFoundError:
        return None


def offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _download(repo: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [*SMALL, *(["*.safetensors"] if weights else [])]
    try:
        found = snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
        )
        return Path(found)
    except GatedRepoError:
        problem = f"{repo}: the hub asks for permission; accept its terms there and set HF_TOKEN"
    except RepositoryNotFoundError:
        problem = f"{repo}: no such directory here and no such model on the hub"
    except RevisionNotFoundError:
        problem = f"{repo}: the hub has no revision {revision!r} of it"
    except LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE=1" if offline() else "the hub cannot be reached"
        problem = (
            f"{repo}: no such directory here, not in the local cache and {why}; "
            "download it first, or give a local directory"
        )
    except OSError as error:  # network and disk; huggingface_hub's HTTP errors are OSErrors too
        problem = f"{repo}: cannot be downloaded: {str(error).splitlines()[0]}"
    raise CheckpointError([problem])
