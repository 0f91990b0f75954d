"""What every part leans on: errors and exit codes, the frozen run configuration, environment, safe writes.

No torch. Everything here is cheap to import, so that `--help` and bad input answer at once.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 2  # of the result file
ENGINE_VERSION = (
    2  # raised with a change of decoding that can change a token: kept samples are then made anew
)
SCORING_VERSION = (
    1  # raised with a change of scoring: results are then scored anew from the kept samples
)


# ---------------------------------------------------------------- errors and exit codes

EXIT_COMPLETE, EXIT_USAGE, EXIT_ENVIRONMENT, EXIT_DATA, EXIT_INCOMPLETE, EXIT_OUTPUT, EXIT_BUSY = (
    0,
    2,
    3,
    4,
    5,
    74,
    75,
)


class DllmexpError(Exception):
    """Something that the user can mend. `.problems`: one line each; `.exit_code`: what the process ends with."""

    exit_code = 1

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("; ".join(self.problems))


class UsageError(DllmexpError):
    """The command line or the configuration cannot be."""

    exit_code = EXIT_USAGE


class EnvironmentProblem(DllmexpError):
    """This machine lacks something: a GPU, a sandbox, a package."""

    exit_code = EXIT_ENVIRONMENT


class BadDataError(DllmexpError):
    """Benchmark files, predictions or a checkpoint are missing or malformed."""

    exit_code = EXIT_DATA


class OutputError(DllmexpError):
    """The result cannot be written: no permission, no space."""

    exit_code = EXIT_OUTPUT


class BusyError(DllmexpError):
    """Another process has the same job."""

    exit_code = EXIT_BUSY


class ManyProblems(DllmexpError):
    """Problems of several kinds found in one go; ends with the lowest of their exit codes."""

    def __init__(self, errors: Sequence[DllmexpError]):
        super().__init__(p for e in errors for p in e.problems)
        self.exit_code = min(e.exit_code for e in errors)


def nearest(value: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `allowed`, or an empty string where nothing is close."""
    close = difflib.get_close_matches(value, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


# ---------------------------------------------------------------- configuration


def out_of_memory(error: BaseException) -> bool:
    """By name, and by what the CPU's allocator, CUDA and cuBLAS say: no torch here."""
    words = (
        "can't allocate memory",
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
    )
    return (
        isinstance(error, MemoryError)
        or any(c.__name__ == "OutOfMemoryError" for c in type(error).__mro__)
        or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
    )


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def sha256(value: Any) -> str:
    """Hex sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sample_seed(seed: int, prompt: str, repeat: int) -> int:
    """Seed of one sample, 63 bits: a function of what is asked, not of order, batch, limit or process."""
    return int(sha256([seed, prompt, repeat])[:16], 16) >> 1


def differing_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key: old -> new` for each key on which two configurations differ, nested keys joined by dots."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += [f"{key}.{line}" for line in differing_keys(a, b)]
        elif a != b:
            lines.append(f"{key}: {_short(a)} -> {_short(b)}")
    return lines


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 40 else text[:37] + "..."


# ---------------------------------------------------------------- environment

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "lm-eval",
    "datasets",
    "numpy",
    "sacrebleu",
    "rouge-score",
)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of a git command on the directory of this file, or None where there is no git or no repository."""
    try:
        run = subprocess.run(
            ["git", "-C", str(Path(__file__).resolve().parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(
                (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
                platform.machine(),
            )
    except OSError:
        return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Package versions, git commit and dirt, CPU: what a number may depend on besides its configuration."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "platform": platform.platform(),
        "hostname": platform.node(),
        "cpu": _cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "command": list(sys.argv),
    }


# ---------------------------------------------------------------- files


def readable_json(value: dict[str, Any]) -> str:
    """JSON with one line per top-level key, and one per entry of a list of objects: readable, and still small."""

    def one(value: Any) -> str:
        return json.dumps(value, ensure_ascii=True, allow_nan=False)

    def entry(value: Any) -> str:
        rows = isinstance(value, list) and value and all(isinstance(v, dict) for v in value)
        return "[\n  " + ",\n  ".join(map(one, value)) + "\n ]" if rows else one(value)

    return "{\n" + ",\n".join(f" {one(key)}: {entry(v)}" for key, v in value.items()) + "\n}\n"


def atomic_write_json(path: str | Path, value: dict[str, Any]) -> None:
    """Write JSON so that `path` holds either what was there or all of `value`, whatever happens in between.

    A temporary file beside it, fsync, rename, fsync of the directory. Raises OutputError where that fails.
    """
    path, text = Path(path), readable_json(value)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w",
            encoding="ascii",
            dir=path.parent,
            prefix=f".{path.name}.",
            suffix=".tmp",
            delete=False,
        ) as out:
            temporary = Path(out.name)
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
        temporary = None
        _sync_directory(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; {_way_out(error)}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _way_out(error: OSError) -> str:
    import errno

    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "free some space or give another --output_dir" if full else "give another --output_dir"


def output_problem(directory: str | Path) -> str | None:
    """Why `directory` cannot be written to, or None. Makes it, and writes, syncs and removes a probe."""
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".probe.", suffix=".tmp") as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return f"--output_dir {directory} cannot be written: {error.strerror}; {_way_out(error)}"
    return None
