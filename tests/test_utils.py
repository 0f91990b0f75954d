"""utils.py: errors, statistics, safe writes."""

import errno
import json
import math
import os
import shutil
import stat
import subprocess

import pytest
from mini import ROOT

import utils
from experiment.statistics import estimate, percentile, wilson
from utils import (
    BadDataError,
    EnvironmentProblem,
    ManyProblems,
    OutputError,
    UsageError,
    atomic_write_json,
    differing_keys,
    output_problem,
    sample_seed,
)


def test_only_what_is_close_is_suggested():
    assert utils.nearest("--vresion", ["--partition"]) == ""
    assert utils.nearest("GSM8K", ["gsm8k"]) == "; did you mean 'gsm8k'?"


@pytest.mark.parametrize("n, text", [(0, "0 passes"), (1, "1 pass"), (2, "2 passes")])
def test_numbers_agree_with_their_nouns(n, text):
    assert utils.numbered(n, "pass") == text


def test_differing_keys_name_both_values():
    assert differing_keys({"a": 1, "f": {"x": 1}}, {"a": 2, "f": {"x": 1, "y": 3}}) == [
        "a: 1 -> 2",
        "f.y: null -> 3",
    ]


def test_long_values_are_shown_where_they_differ():
    """Two checksums behind one path were shown as the same forty characters."""
    old, new = ({"plugins": [{"path": "/home/me/my_rule.py", "sha256": c * 64}]} for c in "ab")
    [line] = differing_keys(old, new)
    shown = [f'...sha256": "{c * 24}...' for c in "ab"]
    assert line == f"plugins: {shown[0]} -> {shown[1]}"
    assert differing_keys({"a": "x" * 50}, {"a": "y"}) == [f'a: "{"x" * 36}... -> "y"']


def test_sample_seed_depends_on_content_only():
    seeds = {sample_seed(s, p, r) for s in (0, 1) for p in ("a", "b") for r in (0, 1)}
    assert len(seeds) == 8 and all(0 <= s < 2**63 for s in seeds)
    assert sample_seed(0, "a", 0) == sample_seed(0, "a", 0)


@pytest.mark.parametrize(
    "k, n, low, high",
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_wilson_interval(k, n, low, high):
    """Newcombe 1998, table I, for 81 of 263; closed forms at the ends."""
    assert wilson(k, n) == pytest.approx((low, high), abs=1e-4)


def test_estimate_of_a_proportion():
    e = estimate([1, 0, 1, 1])
    assert (e.value, e.n) == (0.75, 4)
    assert e.stderr == pytest.approx(0.25)  # sample standard deviation 0.5 over 2
    assert (e.low, e.high) == pytest.approx(wilson(3, 4))


def test_estimate_of_other_values_is_normal():
    e = estimate([1.0, 2.0, 3.0])
    half = 1.959963984540054 / math.sqrt(3)
    assert (e.value, e.low, e.high) == pytest.approx((2.0, 2 - half, 2 + half))


def test_one_value_has_no_error():
    e = estimate([7.0])
    assert (e.value, e.stderr, e.low, e.high, e.n) == (7.0, None, None, None, 1)


def test_estimate_refuses_nonsense():
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_percentile_interpolates():
    assert percentile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5
    assert percentile([1.0, 2.0], 0.95) == pytest.approx(1.95)
    assert percentile([], 0.5) is None


def test_many_problems_end_with_the_lowest_code():
    error = ManyProblems([BadDataError(["a", "b"]), EnvironmentProblem("c")])
    assert error.problems == ["a", "b", "c"] and error.exit_code == 3
    assert UsageError("x").exit_code == 2 and OutputError("x").exit_code == 74


def test_json_is_whole_and_readable(tmp_path):
    value = {"a": 1, "samples": [{"x": [1, 2]}, {"x": []}], "empty": [], "text": "\u00e9"}
    atomic_write_json(tmp_path / "deep" / "r.json", value)
    text = (tmp_path / "deep" / "r.json").read_text(encoding="ascii")
    assert json.loads(text) == value
    assert '\n  {"x": [1, 2]},\n' in text
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["r.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, call):
    """A full disk must not cost the result that was there, nor leave half a file beside it."""
    path = tmp_path / "r.json"
    atomic_write_json(path, {"a": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(utils.os, call, full)
    with pytest.raises(OutputError, match="No space left on device; free some space") as caught:
        atomic_write_json(path, {"a": 2})
    assert caught.value.exit_code == 74
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["r.json"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_cannot_sync_a_directory_is_no_error(tmp_path, monkeypatch, code):
    """The file is written by then; the run ended with "cannot write"."""
    fsync = os.fsync

    def no_directories(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(fd)

    monkeypatch.setattr(utils.os, "fsync", no_directories)
    atomic_write_json(tmp_path / "r.json", {"a": 1})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": 1}


def test_a_limit_on_file_sizes_is_named(tmp_path, monkeypatch):
    """The advice was to free some space."""

    def too_large(*_):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(utils.os, "fsync", too_large)
    with pytest.raises(OutputError, match=r"File too large; raise the limit .*\(ulimit -f\)"):
        atomic_write_json(tmp_path / "r.json", {"a": 1})


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_bytes(b"x")
    assert utils.file_bytes(tmp_path / "file") == b"x"
    for name in ("fifo", "", "missing"):
        with pytest.raises(OSError):
            utils.file_bytes(tmp_path / name)


def test_nan_is_never_written(tmp_path):
    with pytest.raises(ValueError):
        atomic_write_json(tmp_path / "r.json", {"a": float("nan")})
    assert os.listdir(tmp_path) == []


def test_output_problem(tmp_path):
    (tmp_path / "file").write_text("")
    assert output_problem(tmp_path / "new" / "results") is None
    assert os.listdir(tmp_path / "new" / "results") == []
    assert "cannot be written: Not a directory; give another --output_dir" in output_problem(
        tmp_path / "file" / "results"
    )


def test_environment_says_what_a_number_may_depend_on():
    stamp = utils.environment()
    assert stamp["packages"]["torch"] and stamp["python"].startswith("3.") and stamp["cpu"]
    assert stamp["git_dirty"] in (None, True, False)


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True)


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
def test_the_commit_is_known_in_a_repository_of_another_user(tmp_path, monkeypatch):
    """git refuses such a repository, and the result had no commit, without a note."""
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "one")
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(utils.environment()["git_commit"]) == 40


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
def test_a_clone_with_autocrlf_has_the_same_bytes(tmp_path):
    """Shell scripts with CRLF do not run, and data have other checksums."""
    for name in (".gitattributes", "scripts/exp.sh"):
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "a" / name)
    git(tmp_path / "a", "init")
    git(tmp_path / "a", "add", ".")
    git(tmp_path / "a", "commit", "-m", "one")
    git(tmp_path, "clone", "-c", "core.autocrlf=true", "a", "b")
    assert b"\r" not in (tmp_path / "b" / "scripts" / "exp.sh").read_bytes()
