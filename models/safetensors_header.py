"""Read and check the headers of safetensors files: no torch, no tensor data."""

from pathlib import Path
from typing import NamedTuple

from models.config import CheckpointError

# The format's names of the dtypes that a checkpoint may have, and torch's.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class TensorEntry(NamedTuple):
    dtype: str  # as torch spells it
    shape: tuple[int, ...]


def not_the_file(head: bytes) -> str | None:
    """Why a file that begins with `head` is not the file that was downloaded, or None.

    It may be empty, a git-LFS pointer or an HTML page.
    """
    if not head:
        return "is empty (0 bytes); download it again"
    if head.startswith(b"version https://git-lfs"):
        return 'is a git-LFS pointer (it starts with "version https://git-lfs"); run git lfs pull'
    start = head.lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            "is an HTML page, not the file (a failed download or a login page); download it again"
        )
    return None


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Name -> dtype and shape of every tensor in the file.

    The safetensors library checks the header against the size of the file: every byte of data
    belongs to one tensor. Raises CheckpointError with one sentence where the file is not whole or
    holds a dtype other than DTYPES.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as file:
            if fault := not_the_file(file.read(512)):
                raise CheckpointError(f"{path.name}: {fault}")
        with safe_open(path, framework="np") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}
            found = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise CheckpointError(
            f"{path.name}: its {path.stat().st_size} bytes are not a whole safetensors file: "
            f"{reason}; download it again"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error.strerror or error}") from None
    for name, (dtype, _) in found.items():
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{path.name}: tensor {name} has dtype {dtype}; supported: {', '.join(DTYPES)}"
            )
    return {name: TensorEntry(DTYPES[dtype], shape) for name, (dtype, shape) in found.items()}
