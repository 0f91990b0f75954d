"""Runs against a hub: which commit a result is of, and what becomes of damaged downloads."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_files import SHARDS, edit_tensors
from fake_hub import served
from mini import ROOT, gsm8k_dir

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def hub(llada, tmp_path):
    """A hub with two commits of owner/tiny, of other weights; main is the old one."""
    newer = Path(shutil.copytree(llada, tmp_path / "newer"))

    def flip(tensors):
        for name in tensors:
            tensors[name] = -tensors[name]

    edit_tensors(newer / SHARDS[0], flip)
    with served() as found:
        found.add("owner/tiny", NEW, newer)
        found.add("owner/tiny", OLD, llada)
        yield found


def settings(tmp_path, *more: str) -> list[str]:
    data = tmp_path / "data"
    if not data.is_dir():
        gsm8k_dir(data)
    words = "--model_alias llada --task gsm8k --llada_ckpt owner/tiny --gen_length 8"
    words += f" --block_length 8 --dtype float32 --data_dir {data}"
    return [*words.split(), *more]


def run(hub, tmp_path, *words, script: str = "eval.py") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, words)],
        env=hub.environ(tmp_path / "home"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )


def evaluated(hub, tmp_path, *more) -> subprocess.CompletedProcess:
    out = tmp_path / "out"
    return run(hub, tmp_path, *settings(tmp_path, *more), "--device", "cpu", "--output_dir", out)


def results(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def commits_served(hub) -> set[str]:
    paths = [path for _, path in hub.asked if "/resolve/" in path]
    return {path.split("/resolve/")[1].partition("/")[0] for path in paths}


@pytest.mark.slow
def test_a_ref_that_moves_within_a_run(hub, tmp_path):
    """The commit is looked up once: the result names the one whose files were used."""
    hub.refs["owner/tiny"] = [OLD, NEW]
    done = evaluated(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    [result] = results(tmp_path / "out")
    assert result["config"]["fingerprint"] == {"revision": OLD}
    assert commits_served(hub) == {OLD} and hub.lookups() == 1
    again = evaluated(hub, tmp_path)
    assert again.returncode == 2 and "fingerprint.revision" in again.stderr
    texts = [sample["text"] for sample in result["samples"]]
    assert evaluated(hub, tmp_path, "--tag", "new").returncode == 0
    [newer] = results_named(tmp_path / "out", "new")
    assert newer["config"]["fingerprint"] == {"revision": NEW}
    assert [sample["text"] for sample in newer["samples"]] != texts


def results_named(folder: Path, tag: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in folder.glob(f"*_{tag}.json")]


@pytest.mark.slow
def test_a_ref_that_moves_within_a_suite(hub, tmp_path):
    """All experiments of a suite have one commit, and the model that a worker keeps is of it."""
    hub.refs["owner/tiny"] = [OLD, NEW]
    words = " ".join(settings(tmp_path))
    lines = [f"- {words} --tokens_per_step {k}" for k in (4, 8)]
    (tmp_path / "suite.yaml").write_text("\n".join(lines))
    out = tmp_path / "out"
    flags = ("run", "--file", tmp_path / "suite.yaml", "--output_dir", out, "--workers", "2")
    done = run(hub, tmp_path, *flags, script="scripts/sweep.py")
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(out)
    assert [r["config"]["fingerprint"] for r in found] == [{"revision": OLD}] * 2
    assert commits_served(hub) == {OLD} and hub.lookups() == 1


@pytest.mark.slow
def test_a_damaged_download_is_refused_with_its_path(hub, tmp_path):
    """huggingface_hub compares the size alone; the blob's name is the sha256 that it must have."""
    hub.corrupt.add(SHARDS[1])
    done = evaluated(hub, tmp_path)
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 4 and " is damaged: " in error and "delete it" in error
    blob = Path(error.removeprefix("error: ").partition(" is damaged")[0])
    assert blob.is_file() and blob.parent.name == "blobs"
    assert evaluated(hub, tmp_path).returncode == 4  # also where nothing is downloaded
    hub.corrupt.clear()
    blob.unlink()
    done = evaluated(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)  # and where it is damaged later
    done = evaluated(hub, tmp_path, "--tag", "later", "--seed", "1")
    assert done.returncode == 4 and f"{blob} is damaged" in done.stderr


@pytest.mark.slow
def test_only_the_files_that_are_read_are_downloaded(hub, llada, tmp_path):
    for name in ("consolidated.safetensors", "notes.txt"):
        (llada / name).write_bytes(b"x")
    assert evaluated(hub, tmp_path).returncode == 0
    names = {path.rpartition("/")[2] for _, path in hub.asked if "/resolve/" in path}
    assert set(SHARDS) < names and not names & {"consolidated.safetensors", "notes.txt"}
