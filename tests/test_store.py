"""The promises of the store: no acknowledged sample is lost, no damaged or foreign one is used,
one process runs at a time.
"""

import errno
import fcntl
import functools
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path
from unittest.mock import Mock

import pytest

from decoding.row_state import Completion
from experiment import store as store_module
from experiment.sample import Request, Sample, is_usable
from experiment.store import Store, StoreBusy, StoreError, StoreFull, sample_key
from utils import OutputError

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {"task": "gsm8k", "seed": 1}
ID = "0123456789abcdef" * 4

# Puts the missing samples of first..last, prints the number of each one after it is put, and waits
# for the end of its input.
WORKER = """
import fcntl, os, sys
from experiment.store import Store, StoreBusy, sample_key
root, config_id, first, last, size, *flags = sys.argv[1:]
def no_flock(*_): raise OSError(37, "No locks available")
if "no_flock" in flags: fcntl.flock = no_flock
try:
    store = Store.open(root, {"task": "gsm8k", "seed": 1}, config_id, alone="join" not in flags)
except StoreBusy as busy:
    print(busy)
    sys.exit(busy.exit_code)
os.write(1, b"open\\n")
for i in range(int(first), int(last)):
    key = sample_key(config_id, f"prompt {i}", 0)
    if store.get(key) is None:
        text = f'{i} "\\n\\u00e9' + "x" * (5 if i % 10 else int(size))
        result = {"text": text, "token_ids": [i, i + 1]}
        store.put(key, {"status": "ok", "result": result, "meta": {"pid": os.getpid()}})
        os.write(1, b"%d\\n" % i)
sys.stdin.read()
store.close()
"""


def worker(root: Path, first: int, last: int, *flags: str, size: int = 5) -> subprocess.Popen:
    arguments = map(str, (root, ID, first, last, size, *flags))
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,  # communicate() would lose what readline() has read ahead
    )


@functools.cache
def key(i: int) -> str:
    return sample_key(ID, f"prompt {i}", 0)


def result(i: int, size: int = 5) -> dict:
    return {"text": f'{i} "\n\u00e9' + "x" * size, "token_ids": [i, i + 1]}


def ok(i: int, size: int = 5) -> dict:
    return {"status": "ok", "result": result(i, size), "meta": {"pid": os.getpid()}}


def opened(root: Path, config: dict = CONFIG, **options: bool) -> Store:
    return Store.open(root, config, ID, **options)


def filled(root: Path, samples) -> Path:
    """The shard of a closed store that holds `samples`."""
    with opened(root) as store:
        for i in samples:
            store.put(key(i), ok(i))
    return store.shard


def found(root: Path) -> set[int]:
    """Samples below 10 that a new reader gets; every one must be right."""
    store = opened(root, alone=False)
    present = {i for i in range(10) if store.get(key(i))}
    assert set(store) == {key(i) for i in present} and all(
        store.get(key(i))["result"] == result(i) for i in present
    )
    return present


def refuse(code: int) -> Mock:
    """A system call that fails."""
    return Mock(side_effect=OSError(code, os.strerror(code)))


def test_what_was_put_is_there_now_and_in_a_later_run_alike(tmp_path):
    """Otherwise the result of a resumed run would differ from that of an uninterrupted one."""
    with opened(tmp_path) as store:
        store.put(key(1), {"status": "ok", "result": {"ids": (1, 2), "by_step": {3: "\ud800"}}})
        now = store.get(key(1))
        assert now == {
            "key": key(1),
            "status": "ok",
            "result": {"ids": [1, 2], "by_step": {"3": "\ud800"}},
            "meta": {},
        }
        store.get(key(1))["result"].clear()
        assert store.get(key(1)) == now
        assert store.get(key(2)) is None and len(store) == 1 and list(store) == [key(1)]
    with opened(tmp_path) as store:
        assert (store.get(key(1)), store.report.loaded, str(store.report)) == (now, 1, "1 loaded")
    assert len(list(tmp_path.glob("*/shard-*"))) == 1, "reading leaves no file behind"


def test_the_key_tells_configuration_prompt_and_repeat_apart():
    asked = [
        ("a", "b", 0),
        ("a", "b", 0, ("x",)),
        ("a", "b", 1),
        ("a", "", 0),
        ("ab", "", 0),
        ("", "ab", 0),
        ("a", "b\n", 0),
    ]
    assert len({sample_key(*a) for a in asked}) == len(asked)
    assert (
        sample_key("a", "b", 0)
        == "a294a01d0a1a185f9db4d1267dd8689e6865d0d540ebfb10acecd716ae02f6cd"
    )


def test_one_write_for_each_line_and_a_sync_once_a_second_and_at_the_end(tmp_path, monkeypatch):
    writes, syncs, clock, write, sync = [], [], [0.0], os.write, os.fdatasync
    monkeypatch.setattr(os, "write", lambda fd, data: writes.append(data) or write(fd, data))
    monkeypatch.setattr(os, "fdatasync", lambda fd: syncs.append(clock[0]) or sync(fd))
    with opened(tmp_path) as store:
        monkeypatch.setattr(store_module.time, "monotonic", lambda: clock[0])
        for i in range(30):
            clock[0] = i / 10
            store.put(key(i), ok(i))
    assert len(writes) == 31 and all(
        data.endswith(b"\n") and data.count(b"\n") == 1 for data in writes
    )
    assert syncs == [1.0, 2.0, 2.9]


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"status": "done"},
        {"status": "ok", "result": []},
        {"status": "ok", "score": 1},
        {"status": "ok", "key": key(2)},
        {"status": "ok", "result": {"x": float("nan")}},
    ],
)
def test_a_record_of_another_form_is_refused_and_nothing_is_written(tmp_path, record):
    with opened(tmp_path) as store, pytest.raises(ValueError):
        store.put(key(1), record)
    assert not list(tmp_path.glob("*/shard-*"))


def test_an_ok_record_supersedes_an_error_and_never_the_other_way_round(tmp_path):
    """Otherwise a sample that failed once would stay failed, or a late failure lose a good one."""
    with opened(tmp_path) as store:
        for i, why in ((1, "out of memory"), (2, "first"), (2, "second")):
            store.put(key(i), {"status": "error", "result": {"error": why}})
        assert store.get(key(1)) is None and len(store) == 0
        assert sorted(r["result"]["error"] for r in store.errors()) == ["out of memory", "second"]
        store.put(key(1), ok(1))
        store.put(key(1), {"status": "error", "result": {"error": "later"}})
    for reader in (store, opened(tmp_path, alone=False)):
        assert reader.get(key(1))["result"] == result(1)
        assert [r["result"]["error"] for r in reader.errors()] == ["second"]


@pytest.mark.slow
def test_a_file_cut_at_any_byte_keeps_every_whole_line_and_goes_on(tmp_path):
    shard = filled(tmp_path, range(4))
    data = shard.read_bytes()
    for cut in reversed(range(len(data))):
        os.truncate(shard, cut)
        whole = set(range(data[:cut].count(b"\n") - 1))
        assert found(tmp_path) == whole, cut
        if len(whole) == 3:
            with opened(tmp_path) as store:
                assert store.report.torn == (data[cut - 1] != 10)
                store.put(key(3), ok(3))
            assert found(tmp_path) == {0, 1, 2, 3}, cut
            next(p for p in shard.parent.glob("shard-*") if p != shard).unlink()


def test_lines_that_have_lost_their_newlines_are_read(tmp_path):
    """A shard without its newlines was one torn line: 30 whole samples gave none."""
    shard = filled(tmp_path, range(4))
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b"\n", b""))
    assert found(tmp_path) == {0, 1, 2, 3}
    shard.write_bytes(data.replace(b"\n", b"")[:-1])
    view = opened(tmp_path, alone=False)
    assert len(view) == 3 and view.report.torn == 1
    with open(shard, "ab") as file:
        file.write(data[-2:])
    assert view.refresh() == 1 and (view.report.torn, view.report.corrupt) == (0, 0)


@pytest.mark.parametrize(
    "content",
    [
        *([1], 5, None, {}, {"record": None}, {"record": [1]}, {"record": {"key": 5}}),
        *({"record": ok(1) | {"key": key(1), part: 5}} for part in ("status", "result", "meta")),
        *({"shard": None}, {"shard": {"created": "x"}}, {"shard": [1.5]}),
    ],
)
def test_a_right_checksum_around_a_wrong_shape_costs_one_line(tmp_path, content):
    """It ended the run with AttributeError and others."""
    shard = filled(tmp_path, range(3))
    ours = {"config_id": ID, "version": 1}
    text = json.dumps(ours | content if isinstance(content, dict) else content).encode()
    with open(shard, "ab") as file:
        file.write(b"%08x %b\n" % (zlib.crc32(text), text))
    assert found(tmp_path) == {0, 1, 2}
    report = opened(tmp_path).report
    assert report.corrupt == 1


def test_a_sample_that_its_reader_cannot_use_is_not_there(tmp_path):
    filled(tmp_path, range(3))
    usable = Store.open(tmp_path, CONFIG, ID, usable=lambda record: record["key"] != key(1))
    assert set(usable) == {key(0), key(2)} and usable.report.corrupt == 1
    usable.put(key(1), ok(1))
    assert usable.get(key(1))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        *(("result", {"token_ids": ids}) for ids in ("ab", [None, 1], [10**30, 1], [-5, 1], [1])),
        *(("result", {"committed_at": at}) for at in (None, [-2, 0], [0.5, 1])),
        *(("result", change) for change in ({"nfe": "x"}, {"finish_reason": 5})),
        *(("meta", {name: "x"}) for name in ("seconds", "cost_seconds", "provenance", "score")),
        ("meta", {"score": {"value": "x", "version": 1}}),
    ],
)
def test_a_sample_of_another_form_is_made_again(part, change):
    """A right checksum does not help where another program wrote it."""
    completion = Completion((1, 2), (0, 1), 2, 0, 4, 0.5, "length")
    kept, meta = Sample(Request({}, 0), completion).kept(None)
    good = {"key": key(1), "status": "ok", "result": kept, "meta": meta | {"provenance": {}}}
    good = json.loads(json.dumps(good))
    assert is_usable(good)
    assert not is_usable(good | {part: good[part] | change})


@pytest.mark.slow
def test_any_flipped_bit_costs_at_most_the_sample_that_it_hit(tmp_path):
    """Plain JSON lines read back a wrong value for every fourth such bit."""
    shard, lost = filled(tmp_path, range(3)), 0
    data = shard.read_bytes()
    with open(shard, "r+b") as file:
        for at, bit in itertools.product(range(len(data)), range(8)):
            os.pwrite(file.fileno(), bytes([data[at] ^ 1 << bit]), at)
            present = found(tmp_path)
            os.pwrite(file.fileno(), data[at : at + 1], at)
            hit = data[:at].count(b"\n") - 1  # -1: the first line, which is no sample
            assert present >= {0, 1, 2} - {hit}, (at, bit)
            lost += len(present) < 3
    assert lost > 0.6 * 8 * len(data)
    shard.write_bytes(data.replace(b'"1 ', b'"7 '))
    with opened(tmp_path) as store:
        assert (store.report.loaded, store.report.corrupt) == (2, 1) and store.get(key(1)) is None
        store.put(key(1), ok(1))
    assert found(tmp_path) == {0, 1, 2}


@pytest.mark.parametrize("n", [2, 4])
def test_of_several_processes_one_runs_and_the_others_exit_75_and_name_it(tmp_path, n):
    lines = {w: w.stdout.readline().decode() for w in [worker(tmp_path, 0, 0) for _ in range(n)]}
    (holder,) = (w for w in lines if lines[w] == "open\n")
    assert all(w.wait(10) == 75 and "is in use by" in lines[w] for w in lines if w != holder)
    with pytest.raises(StoreBusy, match=f"in use by pid {holder.pid} on .* since 20") as busy:
        opened(tmp_path)
    assert busy.value.exit_code == 75 and busy.value.holder.startswith(f"pid {holder.pid} on ")
    holder.kill()
    holder.wait()
    opened(tmp_path).close()  # free at once


def test_four_writers_without_a_lock_never_mix_their_lines(tmp_path):
    view, new = opened(tmp_path), []
    workers = [worker(tmp_path, 40 * i, 40 * i + 60, "join", size=200_000) for i in range(4)]
    for w in workers:
        w.stdin.close()
    while any(w.poll() is None for w in workers):
        new.append(view.refresh())
        time.sleep(0.002)
    new.append(view.refresh())
    assert [w.returncode for w in workers] == [0] * 4 and len(list(tmp_path.glob("*/shard-*"))) == 4
    assert sum(new) == len(view) == 180
    r = view.report
    assert (r.loaded - r.duplicates, r.torn, r.corrupt, r.conflicts) == (180, 0, 0, set())
    assert all(
        view.get(key(i))["result"] == result(i, 5 if i % 10 else 200_000) for i in range(180)
    )


def test_a_line_that_is_just_being_written_is_read_when_it_is_whole(tmp_path):
    shard = filled(tmp_path, range(2))
    end = shard.read_bytes()[-30:]
    os.truncate(shard, shard.stat().st_size - 30)
    view = opened(tmp_path, alone=False)
    assert (len(view), view.report.torn, view.refresh()) == (1, 1, 0)
    with open(shard, "ab") as file:
        file.write(end)
    assert (view.refresh(), view.report.torn, view.report.corrupt, view.report.loaded) == (
        1,
        0,
        0,
        2,
    )


def test_two_values_for_a_sample_are_a_failure_of_determinism_and_the_older_one_counts_for_all(
    tmp_path,
):
    a, b = opened(tmp_path), opened(tmp_path, alone=False)
    a.put(key(1), ok(1))
    a.put(key(2), ok(2))
    b.put(key(2), ok(2) | {"meta": {"seconds": 3}})  # only meta differs: a duplicate
    b.put(key(1), ok(9))
    a.refresh(), b.refresh()
    for reader in (a, b, opened(tmp_path, alone=False)):
        assert reader.get(key(1))["result"] == result(1)
        assert reader.report.conflicts == {key(1)} and reader.report.duplicates == 1
        assert "not deterministic" in reader.report.notes[-1]


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_nothing_that_was_acknowledged(tmp_path):
    """15 kills, while it starts and while it writes.

    The kernel can stop within the lines of 100 kB.
    """
    rng, n, size, acknowledged = random.Random(7), 2000, 100_000, set()
    for kill in range(1, 16):
        child = worker(tmp_path, 0, n, size=size)
        if kill % 4:
            assert child.stdout.readline() == b"open\n"
        time.sleep(rng.uniform(0, 0.02 if kill % 4 else 0.15))
        child.kill()
        acknowledged |= {int(i) for i in child.communicate()[0].split() if i != b"open"}
        with opened(tmp_path) as store:
            assert {i for i in acknowledged if store.get(key(i)) is None} == set()
            assert len(acknowledged) <= len(store) <= len(acknowledged) + kill
            assert store.report.corrupt == store.report.duplicates == 0
    assert 20 < len(acknowledged) < n, "kills fell where there was work"
    worker(tmp_path, 0, n, size=size).communicate()
    store = opened(tmp_path)
    assert len(store) == store.report.loaded == n, "every sample once"
    assert all(store.get(key(i))["result"] == result(i, 5 if i % 10 else size) for i in range(n))


def fill_up(store: Store, first: int) -> int:
    """The number of samples, from the first one on, that found room."""
    with pytest.raises(
        StoreFull, match="No space left on device; what is there stays good"
    ) as full:
        for i in itertools.count(first):
            store.put(key(i), ok(i, 3000))
    assert isinstance(full.value, OSError) and (full.value.errno, full.value.exit_code) == (
        errno.ENOSPC,
        74,
    )
    return i


def check_with_space_again(root: Path, store: Store, n: int) -> None:
    """The same store goes on, and so does a later run: a torn line is not in their way."""
    store.put(key(n), ok(n, 3000))
    store.close()
    with opened(root) as store:
        assert {k: store.get(k)["result"] for k in store} == {
            key(i): result(i, 3000) for i in range(n + 1)
        }


@pytest.mark.parametrize("room", [0, 1, 9, 700, 3000])
@pytest.mark.parametrize("room_for_newline", [True, False])
def test_a_full_disk_is_reported_and_what_was_written_stays_good(
    tmp_path, monkeypatch, room, room_for_newline
):
    """Injected: `room` bytes of the line are written, then no space is left, or one byte."""
    store, write, room_left = opened(tmp_path), os.write, iter([room, room_for_newline])
    for i in range(4):
        store.put(key(i), ok(i, 3000))
    monkeypatch.setattr(
        os,
        "write",
        lambda fd, data: write(fd, data[:n]) if (n := next(room_left)) else refuse(errno.ENOSPC)(),
    )
    assert fill_up(store, 4) == 4 == len(store)
    monkeypatch.undo()
    check_with_space_again(tmp_path, store, 4)


@pytest.mark.parametrize("filler", [0, 1000, 5000])
def test_a_disk_that_is_really_full(tmp_path, filler):
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path]
    if (
        os.geteuid()
        or not shutil.which("mount")
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("no right to mount a tmpfs")
    try:
        (tmp_path / "filler").write_bytes(b"x" * filler)
        store = opened(tmp_path)
        n = fill_up(store, 0)
        assert n == len(opened(tmp_path, alone=False)) > 50, "reading needs no space"
        subprocess.run(["mount", "-o", "remount,size=512k", tmp_path], check=True)
        check_with_space_again(tmp_path, store, n)
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_directory_that_cannot_be_written_is_no_full_disk(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Not a directory") as error:
        opened(tmp_path / "file" / "cache")
    assert error.value.exit_code == 74 and not isinstance(error.value, StoreFull)
    (tmp_path / "closed").mkdir(mode=0o555)
    user = os.geteuid()
    try:
        os.seteuid(user or 65534)  # root may write anywhere
        with pytest.raises(OutputError, match="Permission denied"):
            opened(tmp_path / "closed")
    finally:
        os.seteuid(user)
    store = opened(tmp_path)
    monkeypatch.setattr(os, "write", refuse(errno.EIO))
    with pytest.raises(OutputError, match="Input/output error; give another --output_dir"):
        store.put(key(1), ok(1))


def test_a_store_deleted_between_runs_begins_anew_and_during_a_run_it_is_an_error(tmp_path):
    filled(tmp_path, range(3))
    shutil.rmtree(tmp_path)
    assert found(tmp_path) == set()
    store = opened(tmp_path)
    store.put(key(1), ok(1))
    shutil.rmtree(tmp_path)
    with pytest.raises(OutputError, match="was deleted while this run was writing to it"):
        store.close()
    filled(tmp_path, range(2))  # and the lock is free


def test_a_store_of_another_configuration_or_version_is_never_used_and_the_difference_is_named(
    tmp_path,
):
    config = filled(tmp_path, range(3)).with_name("config.json")
    text = config.read_text()
    assert json.loads(text) == CONFIG | {"config_id": ID, "store_version": 1}
    with pytest.raises(StoreError, match=r"another configuration \(seed: 1 -> 2\)") as error:
        opened(tmp_path, {"task": "gsm8k", "seed": 2})
    assert error.value.exit_code == 4
    with pytest.raises(
        StoreError, match=r"config_id: .*0123456789abcdef0.* -> .*, extra: null -> true"
    ):
        Store.open(tmp_path, CONFIG | {"extra": True}, ID[:16] + "f" * 48)
    for damaged, message in (
        (text.replace('ion": 1', 'ion": 7'), "store_version: 7 -> 1"),
        (text[:20], "damaged. Delete it; no sample is lost"),
        ("[[1, 2]]", "damaged. Delete it; no sample is lost"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "damaged. Delete it; no sample is lost"),
    ):
        config.write_text(damaged)
        with pytest.raises(StoreError, match=message):
            opened(tmp_path)
    config.unlink()
    os.mkfifo(config)  # reading it would never end
    with pytest.raises(StoreError, match="damaged. Delete it; no sample is lost"):
        opened(tmp_path)
    config.unlink()
    assert found(tmp_path) == {0, 1, 2}


def test_lines_of_another_configuration_or_version_are_counted_and_not_used(tmp_path, monkeypatch):
    mine = filled(tmp_path, range(2))
    with Store.open(tmp_path, CONFIG, "f" * 64) as other:
        other.put(key(2), ok(2))
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "VERSION", 2)
        newer = filled(tmp_path / "newer", [3])
    shutil.copy(next(other.directory.glob("shard-*")), mine.with_name("shard-other-1-0.jsonl"))
    mine.write_bytes(newer.read_bytes() + mine.read_bytes())
    assert found(tmp_path) == {0, 1} and opened(tmp_path).report.foreign == 4


def test_fresh_sets_what_is_there_aside_and_says_so(tmp_path):
    content = (old := filled(tmp_path, range(3))).read_bytes()
    for n in (1, 2):
        with opened(tmp_path, {"another": n}, fresh=True) as store:
            assert (
                len(store) == 0
                and "1 shards of earlier samples are set aside in" in store.report.notes[0]
            )
            store.put(key(n), ok(n))
        assert list(opened(tmp_path, {"another": n}, alone=False)) == [key(n)]
    assert (old.parent / "aside-1" / old.name).read_bytes() == content
    with pytest.raises(ValueError, match="alone"):
        opened(tmp_path, fresh=True, alone=False)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EBADF, errno.EINVAL, 524])
def test_without_flock_a_file_is_the_lock_and_is_taken_over_from_the_dead_of_this_host_only(
    tmp_path, monkeypatch, code
):
    """524 is the kernel's ENOTSUPP, which network file systems pass on."""
    monkeypatch.setattr(fcntl, "flock", refuse(code))
    child = worker(tmp_path, 0, 3, "no_flock")
    assert child.stdout.readline() == b"open\n"
    with pytest.raises(
        StoreBusy,
        match=f"in use by pid {child.pid} on .*if that process is gone, delete .*LOCK.owner",
    ):
        opened(tmp_path)
    child.kill()
    child.wait()
    with opened(tmp_path) as store:
        assert (
            "has no flock" in store.report.notes[0]
            and f"taken over from pid {child.pid} on" in store.report.notes[0]
        )
        with pytest.raises(StoreBusy, match=f"in use by pid {os.getpid()} on"):
            opened(tmp_path)
    owner = store.directory / "LOCK.owner"
    assert not owner.exists(), "free once closed"
    ended = (
        f"pid {os.getpid()} on {store_module.HOST} since 2025-01-01T00:00:00+0000 (process start 1)"
    )
    owner.write_text(ended)  # another process has its pid by now
    opened(tmp_path).close()
    for text in (ended.replace(store_module.HOST, "elsewhere"), ""):
        owner.write_text(text)
        with pytest.raises(StoreBusy, match=text[:20] or "a process that has just started"):
            opened(tmp_path)
        assert owner.read_text() == text
