"""Runs against a hub: which commit a result is of, and what becomes of a hub that fails."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pytest
from checkpoint_files import SHARDS, edit_tensors
from fake_hub import PAGE, served
from mini import ROOT, gsm8k_dir
from pyarrow import parquet

import sandbox
from models.hub import COMMITS, agree, pin

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


def run(hub, tmp_path, *words, script: str = "eval.py", **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, words)],
        env=hub.environ(tmp_path / "home", **more),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )


def evaluated(hub, tmp_path, *more, **env) -> subprocess.CompletedProcess:
    out = ("--device", "cpu", "--output_dir", tmp_path / "out")
    return run(hub, tmp_path, *settings(tmp_path, *more), *out, **env)


FETCH = """
import sys
sys.path.insert(0, {root!r})
from functools import partial
from huggingface_hub import constants, file_download
constants.DOWNLOAD_CHUNK_SIZE = 1000
file_download.http_backoff = partial(file_download.http_backoff, base_wait_time=0.1)
from models.hub import parquet_files, resolve
from utils import DllmexpError
try:
    {call}
except DllmexpError as error:
    print("error:", error)
    sys.exit(error.exit_code)
"""
MODEL = "print(resolve('owner/tiny', weights=True))"
CHECKED = "from models.files import download; print(download('owner/tiny'))"
ROWS = (
    "from tasks import gsm8k, load_data\n    found = load_data(gsm8k.SPEC, None)\n"
    "    print(found.origin, len(found.splits['test']), found.splits['train'][5])"
)


def fetched(hub, tmp_path, call: str = MODEL, **env) -> subprocess.CompletedProcess:
    """Only what a run does to have its files; the output has the error, too."""
    return subprocess.run(
        [sys.executable, "-c", FETCH.format(root=str(ROOT), call=call)],
        env=hub.environ(tmp_path / "home", **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )


def ok(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout
    return done.stdout


def refused(done: subprocess.CompletedProcess, code: int = 4) -> str:
    """The one line of the error."""
    assert done.returncode == code, done.stdout
    assert len(done.stdout) < 600 and "Traceback" not in done.stdout
    return done.stdout.splitlines()[-1].removeprefix("error: ")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def results(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def commits_served(hub) -> set[str]:
    paths = [path for _, path, _ in hub.asked if "/resolve/" in path]
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
    """All experiments of a suite have one commit, and the model that its worker keeps is of it."""
    hub.refs["owner/tiny"] = [OLD, NEW]
    words = " ".join(settings(tmp_path))
    lines = [f"- {words} --tokens_per_step {k}" for k in (4, 8)]
    (tmp_path / "suite.yaml").write_text("\n".join(lines))
    out = tmp_path / "out"
    flags = ("run", "--file", tmp_path / "suite.yaml", "--output_dir", out, "--workers", "1")
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
    # also where nothing is downloaded
    assert refused(fetched(hub, tmp_path, CHECKED)).startswith(f"{blob} is damaged")
    hub.corrupt.clear()
    blob.unlink()
    ok(fetched(hub, tmp_path, CHECKED))
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)  # and where it is damaged later
    assert refused(fetched(hub, tmp_path, CHECKED)).startswith(f"{blob} is damaged")


@pytest.mark.slow
def test_only_the_files_that_are_read_are_downloaded_and_a_token_appears_nowhere(
    hub, llada, tmp_path, monkeypatch
):
    for name in ("consolidated.safetensors", "notes.txt"):
        (llada / name).write_bytes(b"x")
    hub.fail(CDN, "drip", times=2)
    hub.gated = {"hf_very_secret": True}
    done = evaluated(hub, tmp_path, HF_TOKEN="hf_very_secret")
    assert done.returncode == 0, done.stderr
    assert "downloaded" not in done.stderr.partition("llada samples:")[2]  # not inside that bar
    assert " of 833kB downloaded" in done.stderr
    names = {path.rpartition("/")[2] for _, path, _ in hub.asked if "/resolve/" in path}
    assert set(SHARDS) < names and not names & {"consolidated.safetensors", "notes.txt"}
    files = [p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert b"very_secret" not in b"".join([*files, (done.stdout + done.stderr).encode()])
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    seen = "import os\nassert not any('secret' in value for value in os.environ.values())"
    assert sandbox.judge("x = 1", seen).passed


# ---- a hub that fails

INFO, CDN = "/revision/", "/cdn/"
BUSY = (429, {"Retry-After": "1"}, b"")
DOWN = (500, {}, b"")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("hang", "the hub does not answer"),
        ("drop", "the hub cannot be reached (the connection was dropped)"),
        (DOWN, "the hub answers HTTP 500 Internal Server Error"),
        (BUSY, "the hub answers HTTP 429 Too Many Requests"),
        ((407, {}, b""), "the proxy asks for a user and a password (HTTP 407)"),
        (PAGE, "the answer is not the hub's; is it a login page"),
    ],
)
def test_a_warm_cache_does_not_wait_for_the_hub(hub, tmp_path, fault, why):
    folder = ok(fetched(hub, tmp_path))
    hub.fail("", fault)
    began = time.monotonic()
    told, found = ok(fetched(hub, tmp_path)).splitlines()
    assert time.monotonic() - began < 10 and found == folder.strip()
    assert told.startswith(f"owner/tiny: {why}") and told.endswith(f"using the cached commit {OLD}")


def test_a_cached_commit_asks_nothing(hub, tmp_path):
    call = f"print(resolve('owner/tiny@{OLD}', weights=True))"
    folder = ok(fetched(hub, tmp_path, call))
    hub.asked.clear()
    assert ok(fetched(hub, tmp_path, call)) == folder and hub.asked == []
    files = sorted((p, p.lstat().st_mtime_ns) for p in (tmp_path / "home").rglob("*"))
    # by its id alone, without refs/main, and nothing is written: HF_HOME may be read-only
    assert ok(fetched(hub, tmp_path, HF_HUB_OFFLINE="1")) == folder and hub.asked == []
    assert files == sorted((p, p.lstat().st_mtime_ns) for p in (tmp_path / "home").rglob("*"))


@pytest.mark.slow
def test_a_failure_that_passes_is_waited_for(hub, tmp_path):
    """Without a cache: a status, a Retry-After and a dropped connection; a shard that is cut."""
    for fault in (BUSY, DOWN, "drop"):
        hub.fail(INFO, fault, times=1)
    hub.fail(CDN, "cut", times=1)
    hub.fail(SHARDS[0], BUSY, times=1)
    told = ok(fetched(hub, tmp_path))
    assert "owner/tiny: the hub answers HTTP 429 Too Many Requests; trying again in 1 s" in told
    assert "HTTP 500" in told and "the connection was dropped" in told
    assert len(told.splitlines()) == 6
    resumed = [span for _, path, span in hub.asked if CDN in path and span]
    assert len(resumed) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (DOWN, "the hub answers HTTP 500 Internal Server Error"),
        ((403, {"X-Error-Message": "not here"}, b""), "the hub answers HTTP 403 not here"),
        ((407, {}, b""), "the proxy asks for a user and a password (HTTP 407)"),
        (PAGE, "the answer is not the hub's; is it a login page"),
    ],
)
def test_a_failure_that_does_not_pass(hub, tmp_path, fault, why):
    hub.fail(INFO, fault)
    assert refused(fetched(hub, tmp_path)).startswith(f"owner/tiny: {why}")


@pytest.mark.slow
def test_a_hub_that_fails_in_the_shards_is_named(hub, tmp_path):
    """The small files are cached."""
    hub.fail(CDN, (403, {}, b""))
    assert "model-0000" in refused(fetched(hub, tmp_path))
    hub.fail("", "drop")
    error = refused(fetched(hub, tmp_path))
    assert "cannot be downloaded: the hub cannot be reached (the connection was dropped)" in error


@pytest.mark.slow
def test_a_dead_proxy_and_a_dead_hub(hub, tmp_path):
    dead = "http://user:secret@127.0.0.1:9"
    error = refused(fetched(hub, tmp_path, HTTP_PROXY=dead))
    assert "the proxy of HTTP_PROXY or HTTPS_PROXY cannot be reached" in error
    done = fetched(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert "owner/tiny: the hub cannot be reached (Connection refused); try" in refused(done)
    assert len(done.stdout.splitlines()) == 4 and "secret" not in done.stdout + error


@pytest.mark.slow
def test_permission(hub, tmp_path):
    hub.gated = {"hf_good": True, "hf_other": False}
    page = f"accept the terms at {hub.url}/owner/tiny "
    assert page + "and set HF_TOKEN" in refused(fetched(hub, tmp_path))
    error = refused(fetched(hub, tmp_path, HF_TOKEN="hf_other"))
    assert "(HTTP 403)" in error and page + "with the account of your token" in error
    error = refused(fetched(hub, tmp_path, HF_TOKEN="hf_bad"))
    assert "the hub refuses your token (HTTP 401)" in error
    ok(fetched(hub, tmp_path, HF_TOKEN="hf_good"))
    told = ok(fetched(hub, tmp_path))  # what is cached stays usable
    assert "asks for permission (HTTP 401)" in told and f"using the cached commit {OLD}" in told
    error = refused(fetched(hub, tmp_path, MODEL.replace("tiny", "nosuch"), HF_TOKEN="hf_good"))
    assert error == "owner/nosuch: no such directory here and no such model on the hub"


@pytest.mark.slow
def test_a_page_in_place_of_a_shard(hub, tmp_path):
    """Nothing of it is kept: the next run does not go on behind it."""
    hub.fail(CDN, PAGE, times=2)
    assert "an HTML page came in its place" in refused(fetched(hub, tmp_path))
    folder = Path(ok(fetched(hub, tmp_path)).strip())
    for name in SHARDS:
        assert digest(folder / name) == (folder / name).resolve().name


def test_a_damaged_small_file_is_refused_with_its_path(hub, tmp_path):
    folder = Path(ok(fetched(hub, tmp_path)).splitlines()[-1])
    blob = (folder / "tokenizer.json").resolve()
    blob.write_bytes(b"<html>" + blob.read_bytes())
    error = refused(fetched(hub, tmp_path))
    assert error.startswith(f"{blob} (tokenizer.json) is damaged: it is an HTML page")
    assert "delete it" in error
    blob.unlink()
    ok(fetched(hub, tmp_path))


@pytest.mark.slow
def test_a_full_disk(hub, llada, tmp_path):
    blobs = tmp_path / "home" / "hub" / "models--owner--tiny" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{digest(llada / SHARDS[0])}.incomplete").symlink_to("/dev/full")
    error = refused(fetched(hub, tmp_path), 74)
    assert f"cannot write to {blobs.parent}: No space left" in error
    assert "HF_HOME" in error


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_download(hub, tmp_path, number):
    """Within seconds; the log has a line with bytes; the next run goes on where it ended."""
    hub.fail(CDN, "drip", times=2)
    log = tmp_path / "log"
    with log.open("wb") as file:
        call = f"from experiment.signals import signals_raise\n    with signals_raise(): {MODEL}"
        process = subprocess.Popen(
            [sys.executable, "-c", FETCH.format(root=str(ROOT), call=call)],
            env=hub.environ(tmp_path / "home"),
            stderr=file,
            stdout=file,
        )
        while b"downloaded" not in log.read_bytes() and process.poll() is None:
            time.sleep(0.1)
        began = time.monotonic()
        process.send_signal(number)
        process.wait(60)
    assert time.monotonic() - began < 2 and process.returncode != 0
    assert b"owner/tiny: " in log.read_bytes() and b"B downloaded" in log.read_bytes()
    hub.asked.clear()
    ok(fetched(hub, tmp_path))
    assert any(span for _, path, span in hub.asked if CDN in path)


# ---- data sets


def serve_rows(hub, tmp_path) -> list[dict]:
    """Put the data set of gsm8k on the hub; its rows, which all splits have."""
    rows = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(1319)]
    for name in ("main/test", "main/train", "socratic/test"):
        path = tmp_path / "rows" / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    hub.add("datasets/openai/gsm8k", OLD, tmp_path / "rows")
    return rows


@pytest.mark.slow
def test_rows_of_the_hub(hub, tmp_path):
    """Only the configuration is downloaded; a hub that hangs, offline, a damaged file."""
    rows = serve_rows(hub, tmp_path)
    expected = f"openai/gsm8k@{OLD} 1319 {rows[5]}"
    assert ok(fetched(hub, tmp_path, ROWS)).strip() == expected
    assert not any("socratic" in path for _, path, _ in hub.asked)
    hub.fail("", "hang")
    told, found = ok(fetched(hub, tmp_path, ROWS)).splitlines()
    assert "datasets/openai/gsm8k: the hub does not answer; using the cached" in told
    assert found == expected
    assert ok(fetched(hub, tmp_path, ROWS, HF_HUB_OFFLINE="1")).strip() == expected
    [path, *_] = (tmp_path / "home").rglob("test-*.parquet")
    path.resolve().write_bytes(b"PAR1")
    error = refused(fetched(hub, tmp_path, ROWS, HF_HUB_OFFLINE="1"))
    assert error.startswith(f"{path.resolve()} (test-00000-of-00001.parquet) is damaged")


@pytest.mark.slow
def test_a_silent_hub_is_waited_for_once(hub, llada, tmp_path):
    """Model, verifier and data set took the time of three look-ups, and nothing started."""
    serve_rows(hub, tmp_path)
    hub.add("owner/verifier", OLD, llada)
    call = f"{MODEL}\n    {MODEL.replace('tiny', 'verifier')}\n    {ROWS}"
    found = ok(fetched(hub, tmp_path, call)).splitlines()
    hub.fail("", "hang")
    began = time.monotonic()
    told = ok(fetched(hub, tmp_path, call)).splitlines()
    assert time.monotonic() - began < 10
    assert [line for line in told if "the hub does not answer" not in line] == found
    assert len(told) == 6 and len([path for _, path, _ in hub.asked if INFO in path]) == 4


# ---- one commit for many processes


@pytest.mark.slow
def test_ranks_of_a_launcher_have_one_commit(hub, tmp_path):
    hub.refs["owner/tiny"] = [OLD, NEW]
    words = [*settings(tmp_path), "--device", "cpu", "--output_dir", tmp_path / "out"]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "eval.py"), *map(str, words)],
            env=hub.environ(
                tmp_path / "home", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", MASTER_PORT="1"
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        ended = [process.communicate(timeout=300)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], ended
    [result] = results(tmp_path / "out")
    [commit] = commits_served(hub) & {result["config"]["fingerprint"]["revision"]}
    stores = [p.name for p in (tmp_path / "out" / "cache").iterdir()]
    assert stores == [result["generation_id"][:16]]


@pytest.mark.slow
def test_tasks_of_an_array_have_one_commit(hub, tmp_path):
    hub.refs["owner/tiny"] = [OLD, NEW]
    out, plan = tmp_path / "out", tmp_path / "plan-1.json"
    words = settings(tmp_path, "--limit", "1", "--output_dir", str(out), "--tokens_per_step")
    common = {"run": "1", "output_dir": str(out), "workers": 1, "gpus": 0, "plugins": {}}
    plan.write_text(json.dumps(common | {"shares": [[[*words, k]] for k in ("4", "8")]}))
    for task in ("0", "1"):
        variables = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": task}
        command = ("share", "--plan", plan)
        done = run(hub, tmp_path, *command, script="scripts/sweep.py", **variables)
        assert done.returncode == 0, done.stdout + done.stderr
    assert [r["config"]["fingerprint"] for r in results(out)] == [{"revision": OLD}] * 2
    assert hub.lookups() == 1


def test_the_first_process_decides(tmp_path, monkeypatch):
    monkeypatch.setenv(COMMITS, "")
    path = tmp_path / "cache" / "plan.commits"
    agree(path, lambda: pin("owner/tiny", OLD))
    monkeypatch.setenv(COMMITS, "")
    agree(path, lambda: pytest.fail("looked up again"))
    assert json.loads(os.environ[COMMITS]) == {"owner/tiny": OLD}
    path.unlink()

    def late() -> None:  # another process has written it in the meantime
        pin("owner/tiny", NEW)
        path.write_text(json.dumps({"owner/tiny": OLD}))

    agree(path, late)
    assert json.loads(os.environ[COMMITS]) == {"owner/tiny": OLD}
    assert list(path.parent.iterdir()) == [path]
