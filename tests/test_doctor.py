"""What a machine can run: the batch that fits, the doctor's findings, the smoke run."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint_files import SHARDS, edit_tensors
from fake_hub import served
from mini import LLADA, ROOT
from safetensors.torch import load_file

from decoding.config import DecodeConfig
from decoding.engine import probe
from decoding.schedule import make_schedule
from dev.bench import smoke
from dev.bench.presets import PRESETS
from eval import MODEL_DEFAULTS
from models import load_model
from models.cost import fitting_rows, row_bytes
from sandbox import tiers
from scripts import doctor as cli
from suite import doctor

GIB = 1 << 30


class Memory:
    """A stub of torch's memory statistics of a CUDA device: bytes of the weights, of each sample
    and of what all samples share.

    most: samples beyond which memory runs out.
    """

    def __init__(self, monkeypatch, free: int, each: int, shared: int = 0, most: int = 99):
        self.each, self.shared, self.most = each, shared, most
        self.weights, self.peak, self.probed = 16 * GIB, 0, []
        values = {
            "memory_allocated": lambda device: self.weights,
            "memory_reserved": lambda device: self.weights + GIB,
            "mem_get_info": lambda device: (free - GIB, 80 * GIB),
            "max_memory_allocated": lambda device: self.peak,
            "reset_peak_memory_stats": lambda device: setattr(self, "peak", self.weights),
            "synchronize": lambda device: None,
        }
        for name, function in values.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def probe(self, n: int) -> None:
        self.probed.append(n)
        if n > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        self.peak = self.weights + self.shared + n * self.each


@pytest.fixture
def model():
    config = PRESETS["llada-8b"].config
    plain = SimpleNamespace(graphs=None)
    return SimpleNamespace(
        config=config, device=torch.device("cuda:0"), dtype=torch.bfloat16, acceleration=plain
    )


@pytest.mark.parametrize(
    ("free", "each", "shared", "rows"),
    [
        (40, GIB, 0, 6),  # no more than helps
        (5, GIB, 0, 4),  # 0.8 x 5 GiB
        (5, GIB, GIB, 3),
        (5, 2 * GIB, 0, 2),
        (1, 4 * GIB, 0, 1),
    ],
)
def test_auto_takes_the_memory_that_two_samples_were_seen_to_take(
    monkeypatch, model, free, each, shared, rows
):
    """An algorithm that keeps scores of all rows took five times of what was reckoned."""
    memory = Memory(monkeypatch, free * GIB, each, shared)
    assert fitting_rows(model, 712, 32, False, probe=memory.probe) == rows
    assert memory.probed == [1, 2] and memory.peak == memory.weights


def test_auto_is_reckoned_where_nothing_is_probed(monkeypatch, model):
    memory = Memory(monkeypatch, 5 * GIB, 4 * GIB)
    reckoned = (int(5 * GIB * 0.8) - GIB) // row_bytes(model.config, 712, 32, 2)
    assert fitting_rows(model, 712, 32, False) == min(6, reckoned) and not memory.probed
    model.device = torch.device("cpu")
    assert fitting_rows(model, 712, 32, False, probe=memory.probe) == 8 and not memory.probed


def test_auto_is_one_where_two_samples_do_not_fit(monkeypatch, model):
    memory = Memory(monkeypatch, 40 * GIB, GIB, most=1)
    assert fitting_rows(model, 712, 32, False, probe=memory.probe) == 1
    with pytest.raises(ValueError, match="another fault"):
        fitting_rows(model, 712, 32, False, probe=lambda n: int("another fault"))


@pytest.mark.parametrize("algorithm", ["low_confidence", "klass"])
def test_a_probe_runs_two_passes_of_all_its_samples(algorithm, monkeypatch):
    tiny, seen = load_model(LLADA, device="cpu", dtype="float32")[0], []
    real = tiny.predict
    monkeypatch.setattr(
        tiny, "predict", lambda *args: seen.append((len(args[1]), args[3] is None)) or real(*args)
    )
    config = DecodeConfig(make_schedule(algorithm, 16, 8, 1), kv_cache="dual")
    probe(tiny, [7, 8, 9], config, 3)
    assert seen == [(3, False)] * 2


# ---- what fits, by an alias's configuration


@pytest.mark.parametrize(
    ("preset", "alias", "free", "text"),
    [
        ("llada-8b", "llada", 80, "weights 16 GB in bfloat16; auto on cuda: 3 samples, 16 with a"),
        ("llada-8b", "llada1.5", 20, "weights 16 GB in bfloat16; auto on cuda: 3 samples"),
        ("llada-8b", "llada", 18, "auto on cuda: 2 samples, 1 with a cache"),
        ("dream-7b", "dream", 80, "weights 15.2 GB in bfloat16; auto on cuda: 3 samples, 16 with"),
        ("llada-8b", "llada", 12, "weights 16 GB in bfloat16, 12 GB are free: does not fit"),
    ],
)
def test_what_fits_follows_from_the_configuration(preset, alias, free, text):
    machine = doctor.Machine(device="cuda", free=free * 10**9)
    found = doctor._fit(machine, alias, PRESETS[preset].config)
    assert text in found.text
    assert (found.state, found.more["auto"] > 0) == ("note" if free < 16 else "ok", free > 16)


# ---- the doctor


def lines_of(out: str) -> dict[str, str]:
    """name of a finding -> its state."""
    found = [line for line in out.splitlines() if re.match(r"(ok|note|skipped|broken) ", line)]
    return {line[8:20].strip(): line[:8].strip() for line in found}


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """The command line, with the checks that take no time."""

    def call(*words, checks=("device", "attention", "memory", "disk")):
        monkeypatch.setattr(doctor, "CHECKS", [getattr(doctor, name) for name in checks])
        return cli.main([*map(str, words), "--output_dir", str(tmp_path / "out")])

    return call


@pytest.mark.slow
def test_every_check_fits_eighty_columns_and_is_in_the_json(capsys, tmp_path):
    assert cli.main(["--json", str(tmp_path / "d.json"), "--output_dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if str(tmp_path.parent) not in line]
    assert max(map(len, lines)) <= 80 and out.endswith("\nnothing is broken\n")
    names = "packages device attention sandbox memory disk hub fits".split()
    assert [*lines_of(out)][: len(names)] == names and "HF_HUB_OFFLINE=1" in out
    kept = json.loads((tmp_path / "d.json").read_text())
    assert kept["exit_code"] == 0 and {f["name"] for f in kept["findings"]} == {*names}
    fits = [f for f in kept["findings"] if f["name"] == "fits"]
    assert len(fits) == len(MODEL_DEFAULTS)
    tiny = next(f for f in fits if f["more"].get("alias") == "tiny-llada")
    assert tiny["more"] == {
        "alias": "tiny-llada",
        "weights_bytes": tiny["more"]["weights_bytes"],
        "canvas": 24,
        "auto": 8,
        "auto_dual": 8,
    }


def test_what_is_broken_has_an_exit_code_and_does_not_hide_the_rest(quick, capsys, monkeypatch):
    assert quick("--device", "cuda") == 3
    out = capsys.readouterr().out
    assert lines_of(out) | {"device": "broken", "memory": "ok", "disk": "ok"} == lines_of(out)
    assert "--device cpu runs on the" in " ".join(out.split())  # its lines depend on the PyTorch
    assert out.endswith("\nbroken: device\n")
    monkeypatch.setattr(doctor, "visible_gpus", lambda: ["0", "1"])
    assert (
        quick() == 3 and "CUDA_VISIBLE_DEVICES or nvidia-smi list 2 GPUs" in capsys.readouterr().out
    )
    assert quick("--device", "cpu") == 0 and lines_of(capsys.readouterr().out)["device"] == "ok"

    def fails(machine):
        raise ZeroDivisionError("no kernel image")
        yield

    monkeypatch.setattr(doctor, "attention", fails)
    assert quick("--device", "cpu") == 3
    out = capsys.readouterr().out
    assert "ZeroDivisionError: no kernel image" in out and lines_of(out)["disk"] == "ok"


def test_a_directory_that_cannot_be_written_is_broken(quick, capsys, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert quick() == 74
    assert "cannot be written" in " ".join(capsys.readouterr().out.split())


def test_a_sandbox_that_is_not_accepted_is_broken(quick, capsys, monkeypatch):
    nothing = tiers.Mechanism(False, False)
    tier = tiers.Tier("C", nothing, ("read", "net"), ("bwrap: not installed",))
    monkeypatch.setattr(tiers, "find", lambda: tier)
    assert quick(checks=["sandbox"]) == 3
    out = " ".join(capsys.readouterr().out.split())
    assert "broken sandbox" in out and "--unsafe_exec all accepts that, --no_exec" in out


def test_bad_arguments_are_named(quick, capsys):
    assert quick("--smok") == 2
    assert "unknown argument '--smok'; did you mean '--smoke'?" in capsys.readouterr().err
    assert quick("--device", "gpu") == 2
    assert "--device 'gpu': allowed: cpu, cuda, cuda:0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "state", "text"),
    [
        ({"num_splits": 1}, "ok", "varlen kernel"),
        ({}, "ok", "varlen kernel, whose last bits may depend on the batch"),
        (None, "note", "no varlen kernel for llada and dream: one call for each sequence"),
    ],
)
def test_the_attention_kernel_is_named(monkeypatch, options, state, text):
    monkeypatch.setattr("models.attention.varlen_options", lambda *shape: options)
    [found] = doctor.attention(doctor.Machine(device="cuda"))
    assert found.state == state and found.text.startswith(text)


@pytest.mark.slow
def test_what_fits_is_reckoned_without_a_download_of_weights(conformance_dir, tmp_path):
    """A first user has no checkpoint yet and asks whether it would fit."""

    def findings(env: dict[str, str]) -> dict[str, dict]:
        words = ["--json", str(tmp_path / "d.json"), "--output_dir", str(tmp_path)]
        program = [sys.executable, str(ROOT / "scripts" / "doctor.py"), "--device", "cpu", *words]
        done = subprocess.run(program, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr + done.stdout
        found = json.loads((tmp_path / "d.json").read_text())["findings"]
        return {f["more"].get("alias", f["name"]): f for f in found}

    with served() as hub:
        for entry in MODEL_DEFAULTS.values():
            if not Path(entry["checkpoint"]).is_dir():
                hub.add(entry["checkpoint"], "a" * 40, conformance_dir / f"{entry['family']}-tiny")
        here = findings(hub.environ(tmp_path / "home"))
        assert not [path for _, path, _ in hub.asked if path.endswith(".safetensors")]
    assert here["hub"]["state"] == here["llada"]["state"] == "ok"
    assert "auto on cpu: 8 samples" in here["llada"]["text"] and here["llada"]["more"]["auto"] == 8
    gone = findings(hub.environ(tmp_path / "other", HF_ENDPOINT="http://127.0.0.1:9"))
    assert gone["hub"]["state"] == gone["llada"]["state"] == "note"
    assert "does not answer" in gone["hub"]["text"] and "--llada_ckpt DIR" in gone["llada"]["text"]


# ---- --checkpoint


def test_a_checkpoint_answers(quick, either, capsys):
    assert quick("--checkpoint", either, "--device", "cpu") == 0
    out = " ".join(capsys.readouterr().out.split())
    family = either.name.partition("-")[0]
    assert f"{family} family" in out and "tensors, all finite" in out
    assert "'Tom has 2 apples and buys 3. How many apples has he?' -> '" in out


def test_a_verifier_is_checked_and_writes_nothing(quick, capsys):
    assert quick("--checkpoint", "assets/tiny-qwen", "--device", "cpu") == 0
    assert lines_of(capsys.readouterr().out)["answer"] == "skipped"


@pytest.mark.parametrize(
    ("value", "fault"),
    [(float("nan"), "has 1 numbers that are not finite"), (0.0, "is all zeros; download it again")],
)
def test_a_checkpoint_with_faulty_weights_is_broken(quick, llada, capsys, value, fault):
    """A cut download that was allocated beforehand has its full size, and zeros at its end."""
    name = "model.transformer.blocks.1.ff_proj.weight"

    def spoil(tensors):
        if value:
            tensors[name][0, 0] = value
        else:
            tensors[name].zero_()

    [shard] = [s for s in SHARDS if name in load_file(llada / s)]
    edit_tensors(llada / shard, spoil)
    assert quick("--checkpoint", llada) == 4
    out = " ".join(capsys.readouterr().out.split())
    assert f"1 of 30 tensors are faulty; {shard}: {name} {fault}" in out


def test_a_checkpoint_that_is_not_whole_or_not_there_is_broken(quick, llada, capsys):
    (llada / SHARDS[1]).unlink()
    assert quick("--checkpoint", llada) == 4
    assert "but missing" in " ".join(capsys.readouterr().out.split())
    assert quick("--checkpoint", "no/such") == 4
    assert "neither a directory nor in the hub's cache" in " ".join(capsys.readouterr().out.split())


def test_weights_that_do_not_fit_are_not_loaded(llada, monkeypatch):
    monkeypatch.setattr("models.load_model", lambda *a, **k: pytest.fail("loaded"))
    machine = doctor.Machine(device="cpu", free=1000)
    found = [*doctor.checkpoint(machine, str(llada))]
    assert [f.state for f in found] == ["ok", "broken"] and "more than cpu has free" in found[
        1
    ].text


# ---- --smoke


@pytest.mark.slow
def test_the_smoke_run_does_on_a_cpu_what_a_cpu_can(quick, capsys, tmp_path):
    assert (
        quick("--smoke", "--json", tmp_path / "s.json", "--device", "cpu", checks=["device"]) == 0
    )
    out = capsys.readouterr().out
    steps = {name: state for name, state in lines_of(out).items() if name in smoke.STEPS}
    assert steps == {
        name: "skipped" if needs_gpu else "ok" for name, (_, needs_gpu) in smoke.STEPS.items()
    }
    kept = {f["name"]: f["more"] for f in json.loads((tmp_path / "s.json").read_text())["findings"]}
    assert kept["tokens"]["found"] == {"cases": kept["tokens"]["found"]["cases"], "differ": []}
    assert kept["tokens"]["found"]["cases"] > 100
    assert kept["batch bits"]["found"]["equal_in_16"] is True
    assert [run["rows"] for run in kept["speed"]["found"]["runs"]] == [1, 2, 2]


def test_a_step_that_fails_leaves_its_traceback_and_the_rest_runs(
    quick, capsys, tmp_path, monkeypatch
):
    def differs(device):
        raise smoke.Differs("2 cases differ", {"cases": 2, "gap": float("nan")})

    steps = {"first": (differs, False), "gpu": (differs, True), "sampler": (smoke.sampler, False)}
    monkeypatch.setattr(smoke, "STEPS", steps)
    path = tmp_path / "s.json"
    assert quick("--smoke", "--json", path, "--device", "cpu", checks=["device"]) == 3
    out = lines_of(capsys.readouterr().out)
    assert (out["first"], out["gpu"], out["sampler"]) == ("broken", "skipped", "ok")
    first = next(f for f in json.loads(path.read_text())["findings"] if f["name"] == "first")
    assert first["text"] == "Differs: 2 cases differ" and "in differs" in first["more"]["traceback"]
    assert first["more"]["found"] == {"cases": 2, "gap": "NaN"}


def test_a_path_that_gives_other_tokens_is_seen(monkeypatch):
    """Without this the step could pass by comparing nothing."""
    real = smoke.decode

    def other(model, prompts, *more, **options):
        found = real(model, prompts, *more, **options)
        return found[::-1] if len(prompts) == 3 else found

    schedule = make_schedule("leftright", 8, 4, 1)
    monkeypatch.setattr(smoke, "_cases", lambda config: [("leftright", DecodeConfig(schedule))])
    assert smoke.tokens(torch.device("cpu"))[1] == {"cases": 2, "differ": []}
    monkeypatch.setattr(smoke, "decode", other)
    with pytest.raises(smoke.Differs, match="2 of 2 cases differ: llada leftright, dream"):
        smoke.tokens(torch.device("cpu"))


def test_the_smoke_run_sees_a_batch_halved(monkeypatch):
    """With the lack of memory of a GPU, which this step provokes there."""
    limits = []
    values = {
        "empty_cache": lambda: None,
        "mem_get_info": lambda device: (0, GIB),
        "memory_reserved": lambda device: 0,
        "set_per_process_memory_fraction": lambda share, device: limits.append(share),
    }
    for name, function in values.items():
        monkeypatch.setattr(torch.cuda, name, function)
    real = smoke.decode_each

    def small(model, prompts, *more, batch_size):
        if batch_size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, [p[:9] for p in prompts], *more, batch_size=batch_size)

    monkeypatch.setattr(smoke, "decode_each", small)
    with torch.inference_mode():
        text, found = smoke.halving(torch.device("cpu"))
    assert found == {"halved": [16, 8], "samples": 16, "failed": 0} and "no sample failed" in text
    assert 0 < limits[0] < 1 and limits[1:] == [1.0]
