"""The header of a safetensors file, read and checked by hand: no torch, no tensor data.

Source: the format's description, https://github.com/huggingface/safetensors#format: 8 bytes
little-endian length N, N bytes of JSON, then the data, which the offsets cover without a hole.
"""

import hashlib
import json
from math import prod
from pathlib import Path
from typing import NamedTuple

from models.config import CheckpointError

DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
}
_MAX_HEADER = 100_000_000  # bytes; the safetensors library refuses more


class TensorEntry(NamedTuple):
    dtype: str  # as torch spells it
    shape: tuple[int, ...]


def not_the_file(head: bytes) -> str | None:
    """What a file that begins with `head` is, where a download left something else in its place."""
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

    Raises CheckpointError with one sentence where the file is not whole, valid safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            head = start + file.read(min(length, 512) if length <= _MAX_HEADER else 512)
            if what := not_the_file(head):
                raise CheckpointError([f"{path.name}: {what}"])
            if size < 8 or length > _MAX_HEADER:
                raise CheckpointError(
                    [f"{path.name}: not a safetensors file: {size} bytes, header length {length}"]
                )
            text = head[8:] + file.read(length - len(head) + 8)
    except OSError as error:
        raise CheckpointError([f"{path.name}: cannot be read: {error.strerror}"]) from None
    if len(text) < length:
        raise CheckpointError(
            [f"{path.name}: truncated: {_of(size, 8 + length)} of the header alone"]
        )
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        spans = sorted((*entry["data_offsets"], name) for name, entry in header.items())
        entries = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            [f"{path.name}: bad safetensors header: {type(error).__name__}: {error}"]
        ) from None
    return _checked(path.name, size - 8 - length, entries, spans)


def content_digest(path: Path, n_bytes: int = 4096) -> str:
    """sha256 of a shard's size, its header, and the first and the middle n_bytes of every tensor.

    Tells checkpoints apart in a second where hashing 16 GB takes twenty: training moves every tensor. It is no check
    that the rest arrived whole.
    """
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        digest.update(header)
        for name, entry in sorted(json.loads(header).items()):
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                for at in (begin, (begin + end) // 2):
                    file.seek(8 + length + at)
                    digest.update(file.read(min(n_bytes, end - at)))
    return digest.hexdigest()


def _checked(file: str, n_bytes: int, entries: dict, spans: list) -> dict[str, TensorEntry]:
    """The entries, once every tensor's bytes are known to be there and to follow one another."""
    result, end = {}, 0
    for begin, stop, name in spans:
        dtype, shape = entries[name]
        if dtype not in DTYPES:
            raise CheckpointError(
                [f"{file}: tensor {name} has dtype {dtype}; supported: {', '.join(DTYPES)}"]
            )
        if not all(type(n) is int and n >= 0 for n in shape):
            raise CheckpointError(
                [f"{file}: bad safetensors header: tensor {name} has shape {list(shape)}"]
            )
        if begin != end or stop - begin != prod(shape) * DTYPES[dtype][1]:
            raise CheckpointError(
                [
                    f"{file}: bad safetensors header: tensor {name}, {dtype} {list(shape)}, lies at bytes {begin}-{stop}"
                ]
            )
        result[name] = TensorEntry(DTYPES[dtype][0], shape)
        end = stop
    if n_bytes < end:
        raise CheckpointError(
            [f"{file}: truncated: {_of(n_bytes, end)} of tensor data; download it again"]
        )
    if n_bytes > end:
        raise CheckpointError(
            [f"{file}: {n_bytes - end} bytes more than its header describes; download it again"]
        )
    return result


def _of(have: int, want: int) -> str:
    """ "4.1 of 4.9 GB" """
    unit, name = next(
        (u, n)
        for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
        if want >= u or u == 1
    )
    digits = 0 if unit == 1 else 2
    return f"{have / unit:.{digits}f} of {want / unit:.{digits}f} {name}"
