"""Find a checkpoint: in a local directory, in the hub's local cache, or on the hub."""

import re
from pathlib import Path
from typing import NamedTuple

from models.config import CheckpointError

SMALL = ("*.json", "*.txt", "*.jinja", "*.model")  # all files but the weights


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
    return _download(name, hub, weights)


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
        found = snapshot_download(hub.repo, revision=hub.revision, local_files_only=True)
        return Path(found).name
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids all connections to the hub."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _download(name: str, hub: HubId, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [*SMALL, *(["*.safetensors"] if weights else [])]
    try:
        found = snapshot_download(
            hub.repo,
            revision=hub.revision,
            allow_patterns=patterns,
            ignore_patterns=["*/*"],
        )
        return Path(found)
    except GatedRepoError:
        problem = "the hub asks for permission; accept its terms there and set HF_TOKEN"
    except RepositoryNotFoundError:
        problem = "no such directory here and no such model on the hub"
    except RevisionNotFoundError:
        problem = f"{hub.repo} has no revision {hub.revision!r} on the hub"
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
