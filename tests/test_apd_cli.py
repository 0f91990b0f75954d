"""APD on the command line: the verifier's checkpoint and identity, refused flags, the result."""

import json
import os
import shlex

import pytest
from causal import verifier_checkpoint
from mini import DREAM, LLADA, gsm8k_dir

import eval as cli
from decoding.algorithms import ALGORITHMS
from models import fingerprint
from scripts import trace
from suite.matrix import experiments
from suite.state import Watcher


@pytest.fixture
def verifier(tmp_path):
    return verifier_checkpoint(tmp_path / "verifier")


@pytest.fixture
def mini(tmp_path):
    """Arguments of a small run with apd, but for the verifier."""
    return (
        f"--model_alias dream --task gsm8k --dream_ckpt {DREAM} "
        f"--data_dir {gsm8k_dir(tmp_path / 'data')} --output_dir {tmp_path / 'out'} "
        "--device cpu --dtype float32 --gen_length 12 --alg apd"
    )


def results(tmp_path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("*.json"))]


def test_a_run_with_a_verifier(run, mini, verifier, tmp_path):
    assert (
        run(
            mini,
            "--verifier_ckpt",
            verifier,
            "--batch_size",
            "2",
            "--kv_window",
            "4",
            "--max_lookahead",
            "6",
        )[0]
        == 0
    )
    [path] = (tmp_path / "out").glob("*.json")
    assert (
        path.name
        == "dream_gsm8k_apd_apd_mixture_weight0.7_window4_lookahead6_tps1_float32_mini.json"
    )
    [result] = results(tmp_path)
    config, profile = result["config"], result["profile"]
    assert config["verifier"] == str(verifier) and config["verifier_fingerprint"]["shards"]
    assert (config["kv_cache"], config["kv_window"], config["max_lookahead"]) == ("window", 4, 6)
    assert profile["verifier_passes"] == sum(s["nfe_verifier"] for s in result["samples"]) > 0
    assert profile["forward_passes"]["partial"] > 0
    assert profile["tpf"] == profile["tokens_returned"] / sum(s["nfe"] for s in result["samples"])
    overrides = result["protocol"]["overrides"]
    assert (
        overrides["max_lookahead"] == {"protocol": None, "run": 6}
        and overrides["algorithm"]["run"] == "apd"
    )
    assert overrides["verifier"] == {"protocol": "Qwen/Qwen2.5-0.5B", "run": str(verifier)}
    # all samples are kept: no model is loaded for the same run again
    path.unlink()
    code, _, err = run(
        mini, "--verifier_ckpt", verifier, "--kv_window", "4", "--max_lookahead", "6"
    )
    assert code == 0 and "resuming: 3 finished samples" in err
    assert results(tmp_path)[0]["content_sha256"] == result["content_sha256"]


def test_a_verifier_is_part_of_the_identity(run, mini, verifier, tmp_path):
    shown = []

    def show(path):
        fingerprint(path)  # a dry run hashes no weights
        shown.append(run(mini, "--dry_run", "--verifier_ckpt", path)[1])

    show(verifier)
    renamed = verifier.rename(tmp_path / "elsewhere")
    show(renamed)
    weights = next(renamed.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\x80?")
    show(renamed)
    ids = [text.split("  id ")[1].split()[0] for text in shown]
    assert ids[0] == ids[1] != ids[2]


def test_a_suite_knows_a_finished_result_with_a_verifier(run, mini, verifier):
    """A suite computes the id without eval.py; the id has to cover the verifier's files."""
    words = shlex.split(f"{mini} --verifier_ckpt {verifier}")
    [experiment] = experiments([words])
    assert Watcher(experiment).status().state == "waiting"
    assert run(mini, "--verifier_ckpt", verifier)[0] == 0
    found = Watcher(experiment).status()
    assert (found.state, found.n) == ("done", 3), found.note
    [absent] = experiments([[*words[:-1], "not/here"]])
    assert absent.id is None


def test_a_dry_run_names_no_id_before_the_verifier_is_here(run, mini, verifier):
    code, out, _ = run(mini, "--dry_run", "--verifier_ckpt", "not/here")
    assert code == 0 and "unknown until the first run has read the inputs" in out
    fingerprint(verifier)
    out = run(mini, "--dry_run", "--verifier_ckpt", verifier)[1]
    assert "known once" not in out and "fingerprint" not in out


@pytest.mark.parametrize(
    ("more", "fragment"),
    [
        (
            "--alg entropy --verifier_ckpt x",
            "--verifier_ckpt x: entropy drafts nothing; these do: apd, apd_released",
        ),
        (
            "--alg entropy --kv_window 4",
            "--kv_cache window: entropy may commit anywhere; "
            "left-to-right algorithms: leftright, apd, apd_released",
        ),
        (
            "--alg apd --kv_cache dual --kv_window 4",
            "--kv_window 4 needs kv_cache window, not dual",
        ),
        (
            "--alg apd --kv_cache prefix --max_lookahead 4",
            "--max_lookahead 4: kv_cache prefix reuses columns beyond the lookahead",
        ),
        (
            "--alg apd --apd_mixture_weight 2",
            "--apd_mixture_weight 2: must be a number of at least 0 and at most 1",
        ),
        (
            "--alg apd --verifier_ckpt ''",
            "--verifier_ckpt '': a directory or a hub id is needed; "
            "leave it out for Qwen/Qwen2.5-0.5B",
        ),
        (
            "--alg apd --dream_ckpt ''",
            "--dream_ckpt '': a directory or a hub id is needed; leave it out for Dream-org/",
        ),
        ("--alg apd --kv_window 0", "--kv_window 0: must be a whole number of at least 1"),
        (
            "--alg low_confidence --model_alias llada --verifier_ckpt x",
            "low_confidence drafts nothing",
        ),
        ("--alg apd --model_alias llada", "--alg 'apd' is not an algorithm of llada"),
        (
            "--alg threshold --apd_mixture_weight 0.5",
            "threshold has no such option; these have: apd, apd_released",
        ),
    ],
)
def test_what_cannot_be_is_one_clear_line(run, more, fragment):
    words = ("" if "--model_alias" in more else "--model_alias dream ") + more
    code, _, err = run(words, "--task", "gsm8k", "--dry_run")
    assert code == 2 and fragment in err, err


def test_a_checkpoint_that_cannot_verify_is_refused_before_anything_loads(
    run, mini, verifier, monkeypatch
):
    monkeypatch.setattr("models.load_model", lambda *_: pytest.fail("loaded"))
    for checkpoint, fragment in [
        (DREAM, "is of the dream family; a verifier is autoregressive"),
        (LLADA, "is of the llada family"),
        (verifier / "nowhere", "does not exist"),
    ]:
        code, _, err = run(mini, "--verifier_ckpt", checkpoint)
        assert (
            code == 4
            and err.splitlines()[-1].startswith("error: --verifier_ckpt")
            and fragment in err
        ), err
    vocabulary = json.loads((verifier / "vocab.json").read_text(encoding="utf-8"))
    a, b = list(vocabulary)[40:42]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (verifier / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    code, _, err = run(mini, "--verifier_ckpt", verifier)
    assert code == 4 and "error: --verifier_ckpt" in err and "2 " in err.splitlines()[-1], err


def test_a_verifier_with_fewer_positions_than_are_needed_is_refused_at_once(run, mini, verifier):
    """Not sample by sample, with a traceback each."""
    config = json.loads((verifier / "config.json").read_text())
    for room, fragment in [
        (8, f"error: --gen_length 12: the verifier {verifier} has 8 positions"),
        (
            24,
            "3 prompts too long: with a canvas of 12 more than the model's or its verifier's "
            "24 positions",
        ),
    ]:
        (verifier / "config.json").write_text(
            json.dumps(config | {"max_position_embeddings": room})
        )
        code, _, err = run(mini, "--verifier_ckpt", verifier)
        assert code == 2 and fragment in err, err


def test_a_window_has_a_default_and_names_its_cache(run):
    shown = run(
        "--model_alias dream --task gsm8k --alg leftright --kv_cache window --tokens_per_step 2 "
        "--dry_run"
    )[1]
    assert "kv_window               16" in shown and "dream_gsm8k_leftright_window16_tps2" in shown
    assert (
        run(
            "--model_alias dream --task gsm8k --alg leftright --kv_window 16 --tokens_per_step 2 "
            "--dry_run"
        )[1]
        == shown
    )


def test_the_verifier_of_an_alias_is_no_override(run):
    assert (
        "override: verifier" not in run("--model_alias dream --task gsm8k --alg apd --dry_run")[1]
    )
    assert "override: verifier" not in run("--model_alias dream --task gsm8k --dry_run")[1]


def test_the_help_says_what_ends_at_the_end_token_and_what_has_blocks(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    ending = [name for name, a in ALGORITHMS.items() if a.ends_at_eos]
    assert f"{', '.join(ending)} end at the end token in any case" in out
    whole = ", ".join(name for name, a in ALGORITHMS.items() if not a.blocks)
    assert f"Default: the whole canvas for {whole}; the protocol's for the others." in out
    assert "adaptive algorithms still have blocks of 32" in out


def test_every_model_of_the_dream_family_has_a_verifier():
    for alias, entry in cli.MODEL_DEFAULTS.items():
        assert ("verifier" in entry) == (entry["family"] == "dream"), alias


def test_traces_of_drafts_need_a_verifier(verifier, tmp_path, capsys):
    params = {
        "gen_length": 8,
        "apd_mixture_weight": 0.5,
        "max_lookahead": 5,
        "kv_window": 2,
        "kv_cache": "window",
    }
    case = {"id": "mine", "algorithm": "apd", "prompt_ids": [5, 6, 7], "params": params}
    plain = {
        "id": "other",
        "algorithm": "leftright",
        "prompt_ids": [5, 6, 7],
        "params": {"gen_length": 8},
    }
    cases, out = tmp_path / "cases.jsonl", tmp_path / "out.jsonl"
    words = ["--checkpoint", str(DREAM), "--cases", str(cases), "--out", str(out)]
    cases.write_text(f"{json.dumps(case)}\n{json.dumps(plain)}\n")
    assert trace.main([*words, "--verifier_ckpt", str(verifier)]) == 0
    first, second = map(json.loads, out.read_text().splitlines())
    assert 0 < first["forward_passes"] < second["forward_passes"] == 8
    capsys.readouterr()
    for more, fragment in [
        ([], "error: case mine: apd needs a verifier; give --verifier_ckpt"),
        (["--verifier_ckpt", str(LLADA)], "error: --verifier_ckpt"),
    ]:
        assert trace.main([*words, *more]) == 2 and fragment in capsys.readouterr().err
    cases.write_text(json.dumps(plain))
    assert trace.main([*words, "--verifier_ckpt", str(verifier)]) == 2
    assert "no case drafts anything" in capsys.readouterr().err
    cases.unlink()
    os.mkfifo(cases)
    assert trace.main(words) == 2
    assert f"--cases {cases} cannot be read: not a regular file" in capsys.readouterr().err
