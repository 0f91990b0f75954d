"""eval.py: what the arguments mean, what is refused and how, what is written."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import edit
from mini import DREAM, LLADA, ROOT, gsm8k_dir, winogrande_dir, write_lines

import eval as cli
from experiment.result import DEPARTS, VOLATILE, load_result
from experiment.sample import DECODED
from utils import SCHEMA_VERSION, BadDataError, OutputError, sha256

README_EXAMPLE = """
  --model_alias llada --task humaneval --alg low_confidence --tokens_per_step 1 --num_steps 128
  --gen_length 512 --block_length 64 --temperature 0.0 --top_p 0.95 --max_new_tokens 512 \
--remasking low_confidence
  --limit 10 --output_dir results --tag debug_run --dtype bfloat16 --device cuda
  --dream_ckpt Dream-org/Dream-v0-Instruct-7B --llada_ckpt GSAI-ML/LLaDA-8B-Instruct
  --llada15_ckpt GSAI-ML/LLaDA-1.5 --diffucoder_ckpt apple/DiffuCoder-7B-cpGRPO
"""


@pytest.fixture
def mini(tmp_path):
    """Arguments of a small run on a tiny checkpoint and a benchmark of three documents."""
    data = gsm8k_dir(tmp_path / "data")
    return (
        f"--model_alias llada --task gsm8k --llada_ckpt {LLADA} --data_dir {data} "
        f"--output_dir {tmp_path / 'out'} "
        "--device cpu --dtype float32 --gen_length 8 --block_length 8"
    )


def result_in(folder: Path) -> dict:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


# ---------------------------------------------------------------- what the arguments mean


def test_readme_example_is_four_tokens_per_step(run):
    """512 tokens in 128 steps look like --tokens_per_step 1 and are 4: the run must say so."""
    code, out, _ = run(README_EXAMPLE, "--dry_run")
    assert code == 0
    assert "output: results/llada_humaneval_low_confidence_tps4_debug_run_limit10.json" in out
    assert (
        "128 steps in 8 blocks of 64, 4 tokens per step realised, at most 128 forward passes" in out
    )
    assert "num_steps 128 decides: 4 tokens per step, not tokens_per_step 1" in out
    assert "no effect at temperature 0, where nothing is drawn: top_p 0.95" in out
    assert "override: block_length 64 (protocol uniform: 32)" in out
    assert "override: top_p" not in out


@pytest.mark.parametrize("alias", ["llada", "dream"])
@pytest.mark.parametrize("more", ["", "--block_length 256", "--alg leftright"])
def test_more_steps_than_positions_are_refused_without_bad_advice(run, alias, more):
    """No other block length helps, and Dream must not run it in silence."""
    code, _, err = run(f"--model_alias {alias} --task gsm8k --num_steps 300 --dry_run {more}")
    assert code == 2 and err.startswith(
        "error: --num_steps 300 is more than the 256 positions of the canvas"
    )
    assert "block_length" not in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("more", "schedule"),
    [
        ("", "256 steps in 8 blocks of 32, 1 tokens per step"),
        ("--tokens_per_step 3", "88 steps in 8 blocks of 32"),
        ("--alg entropy --tokens_per_step 2", "128 steps in 8 blocks of 32"),
        ("--alg topk_margin", "256 steps in 8 blocks of 32"),
        ("--max_new_tokens 200", "200 steps in 7 blocks of 32, the last one of 8, 1 tokens"),
        ("--max_new_tokens 200 --num_steps 100", "100 steps in 7 blocks of 32, the last one of"),
        ("--max_new_tokens 20", "20 steps in 1 block of 20"),
        ("--block_length 256", "256 steps in 1 block of 256"),
        *((f"--alg {name}", "in 1 block of 256") for name in ("leftright", "origin", "apd")),
        ("--alg apd_released", "in 1 block of 256"),
        ("--alg klass", "klass decides, in 8 blocks of 32"),
        ("--protocol official", "256 steps in 1 block of 256"),
        ("--protocol official --alg maskgit_plus", "256 steps in 1 block of 256"),
    ],
)
@pytest.mark.parametrize("alias", ["dream", "diffucoder"])
def test_dream_and_diffucoder_go_in_blocks_of_32_under_uniform(run, alias, more, schedule):
    code, out, _ = run(f"--model_alias {alias} --task gsm8k --dry_run {more}")
    assert code == 0 and schedule in out


@pytest.mark.parametrize(
    ("more", "noted"),
    [
        ("dream --block_length 256", True),
        ("tiny-dream --block_length 24 --alg entropy", True),
        ("dream --protocol official --temperature 0", True),
        ("dream", False),
        ("dream --block_length 256 --temperature 0.1", False),
        ("dream --alg leftright", False),
        ("dream --alg origin", False),
        ("dream --protocol official", False),
        ("llada --block_length 256", False),
    ],
)
def test_dreams_family_over_one_whole_canvas_at_temperature_0_is_noted(run, more, noted):
    out = run(f"--task gsm8k --dry_run --model_alias {more}")[1]
    assert ("note: one block over the whole canvas at temperature 0" in out) == noted


def test_prompt_flags_override_the_protocol_and_are_listed(run, mini, tmp_path):
    train = [{"question": f"Question {i}?", "answer": f"#### {i}"} for i in range(3)]
    write_lines(tmp_path / "data" / "gsm8k" / "train.jsonl", train)
    flags = "--num_fewshot 2 --no_chat_template --system Think. --limit 1"
    assert run(mini, *flags.split(), "--num_steps", "2")[0] == 0
    result = result_in(tmp_path / "out")
    overrides, config = result["protocol"]["overrides"], result["config"]
    assert overrides["num_fewshot"] == {"protocol": 0, "run": 2}
    assert overrides["chat_template"] == {"protocol": True, "run": False}
    assert overrides["system"] == {"protocol": None, "run": "Think."}
    assert (config["num_fewshot"], config["chat_template"], config["system"]) == (
        2,
        False,
        "Think.",
    )
    assert result["protocol"]["revision"] == 2
    prompt = result["samples"][0]["prompt"]
    assert prompt.startswith("Think.\n\nQuestion: ") and prompt.count("Question: ") == 3
    assert "<|" not in prompt and prompt.endswith("Answer:")


def test_worked_examples_of_the_chat_form_of_mbpp_answer_as_it_asks(run):
    data = ROOT / "assets" / "benchmarks"
    arguments = f"--model_alias tiny-llada --task mbpp --data_dir {data} --num_fewshot 2"
    code, out, _ = run(arguments, "--show_prompt", "1")
    assert code == 0 and out.count("code block.\n\n```python\n") == 2 and "[DONE]" not in out


def test_prompt_flags_have_no_effect_on_given_texts_and_say_so(run, mini, tmp_path):
    texts = write_lines(tmp_path / "texts.jsonl", [{"doc_id": i, "text": "1"} for i in range(3)])
    more = ["--no_chat_template", "--num_fewshot", "1", "--seed", "3", "--compile"]
    code, _, err = run(mini, "--predictions", texts, *more)
    flags = "--num_fewshot, --no_chat_template, --llada_ckpt, --dtype, --seed, --compile"
    assert code == 0 and f"{flags} have no effect" in err


def test_given_texts_start_no_workers(run, mini, tmp_path, monkeypatch):
    """One was started and ended again, which printed that the run was ended by SIGTERM."""
    monkeypatch.setattr("experiment.run.WorkerPool", lambda *_: pytest.fail("a worker starts"))
    texts = write_lines(tmp_path / "texts.jsonl", [{"doc_id": i, "text": "1"} for i in range(3)])
    words = mini.replace("--device cpu", "--devices cpu,cpu")
    code, out, _ = run(words, "--predictions", texts)
    assert code == 0 and "complete, 3 samples" in out


def test_a_checkpoint_of_another_model_is_noted(run, mini):
    """It was ignored without a word."""
    code, out, err = run(mini, "--dream_ckpt", "/nowhere", "--dry_run")
    assert code == 0 and "note: --dream_ckpt: no effect, the model is llada" in out + err


def test_a_checkpoint_without_a_chat_template_runs_with_no_chat_template(run, mini, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(LLADA, folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["chat_template"]
    path.write_text(json.dumps(settings))
    base = f"{mini} --llada_ckpt {folder} --limit 1 --num_steps 2"
    code, _, err = run(base)
    assert code == 4 and "has no chat template" in err and "--no_chat_template" in err
    assert run(base, "--no_chat_template")[0] == 0
    assert result_in(tmp_path / "out")["samples"][0]["prompt"].startswith("Question: ")


def test_dry_run_and_bad_input_import_nothing_heavy():
    """They must be answered at once, not after seconds of imports."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import eval
assert eval.main({shlex.split(README_EXAMPLE)!r} + ["--dry_run"]) == 0
assert eval.main(["--model_alias", "x"]) == 2
assert eval.main("--model_alias llada --task gsm8k --data_dir /nowhere --llada_ckpt {LLADA}"\
.split()) == 4
heavy = {{"torch", "transformers", "lm_eval", "datasets"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_print_output_path_prints_nothing_else(run):
    assert run(
        "--model_alias dream --task mbpp --tokens_per_step 3 --tag a --print_output_path"
    ) == (
        0,
        "results/dream_mbpp_maskgit_plus_tps3_a.json\n",
        "",
    )


@pytest.mark.parametrize(
    "arguments, shown",
    [
        (
            "--task gsm8k",
            [
                "algorithm               low_confidence",
                "gen_length              256",
                "block_length            32",
            ],
        ),
        (
            "--task gsm8k --max_new_tokens 128",
            ["gen_length              128", "override: gen_length 128 (protocol uniform: 256)"],
        ),
        ("--task gsm8k --gen_length 128 --max_new_tokens 128", ["gen_length              128"]),
        (
            "--task gsm8k --remasking random",
            ["algorithm               random", "override: algorithm random"],
        ),
        ("--task gsm8k --alg leftright", ["block_length            256", "256 steps in 1 block"]),
        ("--task humaneval", ["logits_eos_inf          True"]),
        (
            "--task humaneval --logits_eos_inf false",
            ["override: logits_eos_inf False (protocol uniform: True)"],
        ),
        (
            "--task gsm8k --num_steps 64",
            ["llada_gsm8k_low_confidence_tps4.json", "override: tokens_per_step 4 "],
        ),
        (
            "--task gsm8k --tokens_per_step 3",
            ["tps3.json", "quotas                  3x10,2", "88 steps in 8 blocks"],
        ),
        (
            "--task gsm8k --protocol official",
            ["num_fewshot             5", "protocol                official"],
        ),
        (
            "--task gsm8k --temperature 0.5 --top_p 0.9 --top_k 5",
            ["top_p                   0.9", "top_k                   5", "override: top_p 0.9"],
        ),
        (
            "--task gsm8k --top_k 5 --top_p 0.9",
            ["nothing is drawn: top_p 0.9 and top_k 5", "tokens_per_step         1"],
        ),
        (
            "--task gsm8k --alg entropy_threshold --threshold 1.5",
            ["llada_gsm8k_entropy_threshold_threshold1.5_tps1.json"],
        ),
        ("--task gsm8k --no_early_exit", ["early_exit              False"]),
        ("--task mbpp", ["note: test_setup_code is run before the tests"]),
    ],
)
def test_flags_win_over_the_protocol(run, arguments, shown):
    code, out, err = run("--model_alias llada --dry_run", *shlex.split(arguments))
    assert (code, err) == (0, "")
    for text in shown:
        assert text in out


@pytest.mark.parametrize(
    "arguments, setting",
    [
        ("--task humaneval --logits_eos_inf false", "logits_eos_inf"),
        ("--task gsm8k --top_k 5 --top_p 0.9", "top_k"),
    ],
)
def test_an_option_that_is_off_is_not_listed(run, arguments, setting):
    _, out, _ = run("--model_alias llada --dry_run", *shlex.split(arguments))
    assert f"\n  {setting} " not in out


def test_dream_has_no_blocks_and_its_own_schedule(run):
    _, out, _ = run("--model_alias dream --task gsm8k --dry_run --protocol official")
    for text in (
        "algorithm               entropy",
        "temperature             0.1",
        "0,1x",
        "256 steps in 1 block of 256",
    ):
        assert text in out


def test_inactive_flags_do_not_make_another_experiment(run, mini):
    """top_p at temperature 0 changes no number, so it must not change the id."""
    ids = [
        run(mini, "--dry_run", *more)[1].split("id ")[-1].split()[0]
        for more in ([], ["--top_p", "0.9"], ["--batch_size", "7"])
    ]
    assert len(set(ids)) == 1 and len(ids[0]) == 16


def test_what_a_run_is_about_to_do_fits_a_terminal(run, mini):
    """Ids of 64 characters wrapped, and settings without a value hid the others."""
    out = run(mini, "--dry_run")[1]
    assert "None" not in out and "system" not in out
    assert all(len(line) < 80 for line in out.splitlines() if "  id " in line or "_id " in line)


def test_prompt_template_of_a_model_and_task():
    assert cli.get_prompt_template("llada", "humaneval").until == ()
    assert (
        cli.get_prompt_template("dream", "mbpp", "official").prefill
        == "Here is the completed function:\n```python\n"
    )


def test_help_has_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    for flag in [
        *(w for w in README_EXAMPLE.split() if w.startswith("--")),
        "--batch_size",
        "--seed",
        "--alg_temp",
        "--top_k",
        "--data_dir",
        "--protocol",
        "--confidence_dtype",
        "--no_early_exit",
        "--dry_run",
        "--print_output_path",
        "--predictions",
        "--overwrite",
    ]:
        assert f"  {flag}" in out


def test_version_names_what_a_number_may_depend_on(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert re.match(r"dllmexp .*; engine \d.*; torch \d.*, lm-eval 0", capsys.readouterr().out)


def test_paths_may_begin_with_the_home_directory(run, monkeypatch, tmp_path):
    """A directory with the name ~ was made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    code, out, _ = run("--model_alias llada --task gsm8k --print_output_path --output_dir '~/x'")
    assert code == 0 and out.startswith(f"{tmp_path}/x/")


@pytest.mark.parametrize(("given", "read"), [("4,2", "4"), (" 3 ", "3"), ("8", "8"), ("", "")])
def test_a_list_of_threads_is_read_as_its_first_number(run, monkeypatch, given, read):
    """numexpr, which lm-eval imports, takes nothing but one number."""
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert run("--model_alias llada --task gsm8k --print_output_path")[0] == 0
    assert os.environ["OMP_NUM_THREADS"] == read
    monkeypatch.setenv("OMP_NUM_THREADS", "abc")
    code, _, err = run("--model_alias llada --task gsm8k --print_output_path")
    assert code == 2 and "OMP_NUM_THREADS='abc': must be a whole number" in err


def test_python_without_docstrings_is_refused_with_a_reason(mini):
    """transformers fails without a word of its cause."""
    command = [sys.executable, "-OO", ROOT / "eval.py", *shlex.split(mini)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 3 and "PYTHONOPTIMIZE=2" in ended.stderr


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "arguments, fragments",
    [
        (
            "--task gsm8k",
            ["--model_alias is required; there are: llada, llada1.5, dream, diffucoder"],
        ),
        (
            "--model_alias llada --task gsm8k --show_prompt 3 --dry_run",
            ["--show_prompt and --dry_run: both print and exit; give one of them"],
        ),
        (
            "--model_alias lada --task gsm8k",
            ["--model_alias 'lada' is not known; did you mean 'llada'?"],
        ),
        (
            "--model_alias llada --task gsmk",
            [
                "--task 'gsmk' is not known; did you mean 'gsm8k'?; "
                "there are: humaneval, mbpp, gsm8k, truthfulqa, lines"
            ],
        ),
        (
            "--model_alias llada --task gsm8k --alg leftrigth",
            [
                "'leftrigth' is not an algorithm of llada; did you mean 'leftright'?; "
                "llada has: low_confidence, random, leftright"
            ],
        ),
        (
            "--model_alias dream --task gsm8k --alg low_confidence",
            ["'low_confidence' is not an algorithm of dream", "dream has: leftright, maskgit_plus"],
        ),
        (
            "--model_alias llada --task gsm8k --alg random --remasking leftright",
            ["--alg random and --remasking leftright are two names for one thing"],
        ),
        (
            "--model_alias llada --task gsm8k --gen_length 64 --max_new_tokens 32",
            ["--gen_length 64 and --max_new_tokens 32 are two names for one thing"],
        ),
        (
            "--model_alias llada --task gsm8k --gen_length 16 --block_length 32",
            ["--block_length 32 is more than the gen_length of 16"],
        ),
        *(
            (
                f"--model_alias {alias} --task gsm8k --num_steps 100",
                [
                    "--num_steps 100 does not divide over the 8 blocks of 32; nearest: 96, 104 "
                    "(block_length is the uniform protocol's; --block_length changes it)"
                ],
            )
            for alias in ("llada", "dream")
        ),
        (
            "--model_alias llada --task humaneval --num_fewshot 3",
            ["--num_fewshot 3: humaneval has no documents for worked examples, only those that"],
        ),
        (
            "--model_alias llada --task truthfulqa --num_fewshot 3",
            ["--num_fewshot 3: truthfulqa has no documents for worked examples"],
        ),
        (
            "--model_alias llada --task gsm8k --num_fewshot -1",
            ["--num_fewshot -1: must be a whole number of at least 0"],
        ),
        ("--model_alias llada --task gsm8k --system ''", ["--system '': must be a text that"]),
        (
            "--model_alias llada --task gsm8k --threshold 0.9",
            ["--threshold 0.9: low_confidence has no such option; these have: threshold"],
        ),
        (
            "--model_alias llada --task gsm8k --alg threshold --threshold 1.5",
            ["--threshold 1.5 must be at least 0 and at most 1"],
        ),
        (
            "--model_alias llada --task gsm8k --alg threshold --threshold x",
            ["--threshold x: must be a number of at least 0"],
        ),
        (
            "--model_alias llada --task gsm8k --alg threshold --num_steps 8",
            ["threshold decides the number of steps"],
        ),
        (
            "--model_alias llada --task gsm8k --alg confidence_threshold",
            ["'confidence_threshold' is not an algorithm of llada"],
        ),
        (
            "--model_alias llada --task gsm8k --alg origen --threshold 0.5",
            ["--alg 'origen' is not an algorithm of llada"],
        ),
        (
            "--model_alias llada --task gsm8k --kv_cache deal",
            ["--kv_cache deal: must be one of none, prefix, dual, window; did you mean 'dual'?"],
        ),
        (
            "--model_alias llada --task gsm8k --cache_refresh 4",
            ["--cache_refresh 4: there is no cache to refresh"],
        ),
        (
            "--model_alias dream --task gsm8k --logits_eos_inf",
            ["logits_eos_inf: the dream family has no such rule; leave it out"],
        ),
        (
            "--model_alias llada --task gsm8k --alg_temp 0.3",
            ["--alg_temp 0.3: low_confidence does not draw positions; these do: maskgit_plus"],
        ),
        (
            "--model_alias llada --task gsm8k --tokens_per_step 0",
            ["--tokens_per_step 0: must be a whole number of at least 1"],
        ),
        (
            "--model_alias llada --task gsm8k --limit -1",
            ["--limit -1: must be a whole number of at least 1"],
        ),
        ("--model_alias llada --task gsm8k --limit 0.5", ["--limit 0.5: must be a whole number"]),
        (
            "--model_alias llada --task gsm8k --temperature -1",
            ["--temperature -1: must be a number of at least 0"],
        ),
        (
            "--model_alias llada --task gsm8k --top_p 1.5",
            ["--top_p 1.5: must be a number above 0 and at most 1"],
        ),
        (
            "--model_alias llada --task gsm8k --protocol oficial",
            [
                "--protocol 'oficial' is not known; did you mean 'official'?; "
                "there are: uniform, official"
            ],
        ),
        ("--model_alias llada --task gsm8k --dtype int8", ["bfloat16, float16, float32"]),
        (
            "--model_alias llada --task gsm8k --confidence_dtype half",
            ["--confidence_dtype half: must be one of float64, float32, model"],
        ),
        ("--model_alias llada --task gsm8k --device gpu", ["--device 'gpu': allowed: cpu, cuda"]),
        (
            "--model_alias llada --task gsm8k --tag a/b",
            ["--tag 'a/b': allowed: 1 to 100 letters, digits"],
        ),
        (
            "--model_alias llada --task gsm8k --tag _a",
            ["--tag '_a'", "with a letter or digit first"],
        ),
        (
            "--model_alias llada --task gsm8k --tag my_limit2",
            ["--tag 'my_limit2'", "not ending in limit<N>"],
        ),
        ("--model_alias llada --task gsm8k --tag limit2", ["--tag 'limit2'"]),
        ("--model_alias llada --task gsm8k --output_dir ''", ["--output_dir ''"]),
        (
            "--model_alias LLaDA --task gsm8k",
            ["--model_alias 'LLaDA' is not known; did you mean 'llada'?"],
        ),
        (
            "--model_alias llada --task triviaqa",
            ["--task 'triviaqa' is not known; did you mean 'lm_eval:triviaqa'?"],
        ),
        (
            "--model_alias llada --task gsm8k --bach_size 2",
            ["unknown argument '--bach_size'; did you mean '--batch_size'?"],
        ),
        ("--model_alias llada --task gsm8k --seed", ["--seed: expected one argument"]),
        ("--model_alias llada --task gsm8k stray", ["unexpected argument 'stray'"]),
        ("--model_alias llada --task gsm8k -seed 1", ["'-seed'; did you mean '--seed'?"]),
        *(
            (f"--model_alias llada --task gsm8k {word} x", [f"{word!r}; did you mean {ours!r}?"])
            for word, ours in (
                ("--modle", "--model_alias"),
                ("--top-p", "--top_p"),
                ("--output_path", "--output_dir"),
                ("--n_samples", "--limit"),
            )
        ),
        *(
            (f"--model_alias llada --task gsm8k {word} x", [f"{word!r}; --help lists them all"])
            for word in ("--log_samples", "--trust_remote_code", "--gen_kwargs", "--cache_requests")
        ),
        (
            f"--model_alias llada --task gsm8k --limit {'9' * 5000}",
            [f"--limit {'9' * 60}...: must be a whole number of at least 1 and at most"],
        ),
        ("--model_alias llada --task gsm8k --system \udcff", ["'\\udcff' is not UTF-8"]),
        ("--model_alias llada --task \udcff", ["--task '\\udcff' is not known; there are"]),
        *(
            (
                f"--model_alias llada --task gsm8k --{flag} ''",
                [f"--{flag} '' is not an algorithm of llada; llada has: low_confidence"],
            )
            for flag in ("alg", "remasking")
        ),
    ],
)
def test_bad_arguments_are_one_clear_line(run, arguments, fragments):
    code, out, err = run(arguments, "--dry_run")
    assert code == 2 and out == ""
    assert len(err.splitlines()) == 1 and err.startswith("error: ")
    for fragment in fragments:
        assert fragment in err


def test_all_problems_are_reported_at_once(run):
    code, _, err = run(
        "--model_alias lada --task gsmk --limit -1 --dtype x --tag / --protocol y --bach_size 1 "
        "--tokens_per_step 0"
    )
    assert code == 2
    assert len(err.splitlines()) == 8 and all(
        line.startswith("error: ") for line in err.splitlines()
    )


def test_problems_with_files_are_reported_at_once_before_a_model_loads(run, tmp_path, monkeypatch):
    monkeypatch.setattr("experiment.run.execute", lambda *_: pytest.fail("went on"))
    (tmp_path / "file").write_text("")
    code, _, err = run(
        "--model_alias llada --task gsm8k --llada_ckpt /nowhere/x --data_dir /nowhere "
        f"--output_dir {tmp_path}/file/out --device cpu"
    )
    assert code == 4
    for text in (
        "data directory /nowhere does not exist",
        "--llada_ckpt: model path /nowhere/x does not exist",
        "--output_dir",
    ):
        assert text in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda_names_the_way_out(run, mini):
    code, _, err = run(mini.replace("--device cpu", "--device cuda"))
    assert code == 3 and "--device cpu" in err and len(err.splitlines()) == 1


def test_device_is_chosen_and_printed(run, mini):
    _, _, err = run(mini.replace("--device cpu", ""), "--limit", "1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert f"{LLADA}, float32) on {device} (default; --device chooses another)\n" in err


# ---------------------------------------------------------------- the lines before the bar


TINY_OVERRIDES = (
    f"checkpoint {LLADA} (protocol: GSAI-ML/LLaDA-8B-Instruct), dtype float32 (protocol: bfloat16)"
)


def before_the_bar(err: str) -> list[str]:
    return err.partition("\r")[0].splitlines()


def test_a_run_says_in_a_few_lines_what_it_does(run, mini, tmp_path):
    """No setting at its protocol's value; --dry_run has those, and nothing that is empty."""
    words = ["--tokens_per_step", "2", "--seed", "3"]
    code, _, err = run(mini, *words)
    assert code == 0, err
    [path] = (tmp_path / "out").glob("*.json")
    result = json.loads(path.read_text())
    assert before_the_bar(err) == [
        f"model: llada ({LLADA}, float32) on cpu",
        "task: gsm8k (uniform protocol, chat form, 0-shot)",
        "override: gen_length 8 (protocol: 256), block_length 8 (protocol: 32), "
        f"tokens_per_step 2 (protocol: 1), {TINY_OVERRIDES}",
        "schedule: low_confidence, 4 steps in 1 block of 8, 2 tokens per step realised, "
        "at most 4 forward passes",
        f"output: {path} (id {result['id'][:16]})",
    ]
    shown = run(mini, *words, "--dry_run")[1]
    whole = dict(line.split(maxsplit=1) for line in shown.splitlines() if line[:2] == "  ")
    settings = result["config"] | {n: result[n][:16] for n in ("id", "generation_id")}
    for name in ("fingerprint", "data"):
        settings.pop(name)
    assert whole == {name: str(value) for name, value in settings.items() if value is not None}


def test_the_lines_before_the_bar_are_at_most_ten(run, mini):
    """Programs, many notes and kept samples together; no note is left out."""
    data = ROOT / "assets" / "benchmarks"
    words = ["--task", "humaneval", "--data_dir", data, "--limit", "1"]
    assert run(mini, *words)[0] == 0
    more = ["--limit", "2", "--top_p", "0.9", "--dream_ckpt", "a/b", "--strict_exec", "--no_exec"]
    code, _, err = run(mini, *words, *more)
    lines = before_the_bar(err)
    assert code == 5 and len(lines) <= 10, err
    assert [line.partition(":")[0] for line in lines] == [
        *("code sandbox", "model", "task", "override", "schedule"),
        *("note", "note", "output", "resuming"),
    ]
    notes = run(mini, *words, *more, "--dry_run")[1].split("\nnote: ")[1:]
    assert len(notes) > 2 and all(note.splitlines()[0] in err for note in notes)


def test_a_run_by_likelihood_names_its_estimator(run, mini, tmp_path):
    words = mini.partition("--gen_length")[0]
    more = ["--task", "winogrande", "--data_dir", winogrande_dir(tmp_path / "sentences")]
    code, _, err = run(words, *more, *"--mc_num 4 --cfg_scale 0.5 --limit 1".split())
    assert code == 0, err
    result = result_in(tmp_path / "out")
    [path] = (tmp_path / "out").glob("*.json")
    assert before_the_bar(err) == [
        f"model: llada ({LLADA}, float32) on cpu",
        "task: winogrande (uniform protocol, lm_eval form, 0-shot), limit 1",
        f"override: mc_num 4 (protocol: 128), cfg_scale 0.5 (protocol: 0), {TINY_OVERRIDES}",
        "likelihood: llada_mc, mc_num 4, cfg_scale 0.5",
        f"output: {path} (id {result['id'][:16]})",
    ]


def test_a_run_of_given_texts_names_no_checkpoint(run, mini, tmp_path):
    texts = write_lines(tmp_path / "p.jsonl", [{"doc_id": 0, "text": "2"}])
    lines = before_the_bar(run(mini, "--predictions", texts, "--limit", "1")[2])
    assert lines[0] == f"model: llada, its texts are those of {texts}"
    assert not any(line.startswith("schedule") for line in lines)


def test_output_directory_that_cannot_be_written(run, mini, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = run(mini, "--output_dir", str(tmp_path / "file"))
    assert code == 74 and err.startswith(
        f"error: --output_dir {tmp_path / 'file'} cannot be written: "
    )


def test_a_path_that_is_too_long_is_the_outputs_fault(run, mini, tmp_path):
    """It was "is no result file, delete it"."""
    code, _, err = run(mini, "--output_dir", str(tmp_path / ("x" * 300)))
    assert code == 74 and err.count("error: ") == 1 and "File name too long" in err


def test_another_users_result_is_no_damaged_one(run, mini, tmp_path, monkeypatch):
    """The advice was to move it away."""
    path = Path(run(mini, "--print_output_path")[1].strip())
    path.parent.mkdir()
    path.write_text("{}")

    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("experiment.result.file_bytes", denied)
    code, _, err = run(mini)
    assert code == 74 and f"{path}: no permission to read it" in err and "delete" not in err


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("reference"),
        lambda r: r.update(headline=5),
        lambda r: r.update(metrics={"a": 5}),
        lambda r: r.update(samples=[5]),
        lambda r: r.update(config={}),
        lambda r: r["profile"].clear(),
    ],
)
def test_a_result_of_another_form_with_a_right_checksum_is_refused(change, tmp_path):
    """Its reader ended with a KeyError and exit code 1."""
    row = {"status": "ok", "key": "k", "doc_id": 0, "repeat": 0, "error": None}
    result = {
        "schema_version": SCHEMA_VERSION,
        **{"id": "i", "generation_id": "g", "status": "complete", "n_samples": 1, "n_failed": 0},
        "config": {"model_alias": "llada", "task": "gsm8k", "protocol": "uniform"},
        "protocol": {},
        "metrics": {},
        "score_on_completed": None,
        "headline": None,
        "reference": None,
        "diagnostics": {"warnings": []},
        "samples": [row | {n: 0 for n in (*DECODED, "prompt_tokens", "tokens_returned")}],
        "profile": {
            "sample_seconds": [{"doc_id": 0, "repeat": 0, "seconds": 1.0, "cost_seconds": 1.0}],
            "peak_memory_bytes": {"device": None},
        },
        "meta": {"samples_made": []},
    }
    path = tmp_path / "r.json"

    def write():
        covered = {name: v for name, v in result.items() if name not in VOLATILE}
        path.write_text(json.dumps(result | {"content_sha256": sha256(covered)}))

    write()
    assert load_result(path)
    change(result)
    write()
    with pytest.raises(BadDataError, match=r"is incomplete or damaged \(.*\)\. Delete it and run"):
        load_result(path)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "is incomplete or damaged (Expecting property name"),
        ("[" * 10**5, "is incomplete or damaged (nested too deeply). Delete it and run the same"),
        ("9" * 5000, "is incomplete or damaged (an integer has more than 4300 digits). Delete"),
        ("[]", "is not a result of this program. Delete it and run the same command: "),
        (None, "is not a regular file. Delete it and run the same command: the result is rebuilt"),
    ],
)
def test_what_is_in_the_place_of_a_result_is_named(tmp_path, text, fault):
    path = tmp_path / "r.json"
    path.mkdir() if text is None else path.write_text(text)
    with pytest.raises(BadDataError, match=re.escape(f"{path} {fault}")):
        load_result(path)


@pytest.mark.parametrize("template", ["{{ 'x' * 10 ** 30 }}", "{{ 1 // 0 }}", "{{ 1 + 'a' }}"])
def test_a_chat_template_that_fails_is_the_checkpoints_fault(run, mini, tmp_path, template):
    folder = damaged(tmp_path, lambda folder: None)
    edit(folder / "tokenizer_config.json", chat_template=template)
    code, _, err = run(mini, "--llada_ckpt", str(folder), "--show_prompt", "0")
    assert code == 4 and "the checkpoint's chat template cannot render this prompt: " in err


def damaged(tmp_path: Path, change) -> Path:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(LLADA, checkpoint)
    change(checkpoint)
    return checkpoint


SHARD = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    "change, fragment",
    [
        (
            lambda d: (d / SHARD).unlink(),
            f"{SHARD} is named in model.safetensors.index.json but missing",
        ),
        (
            lambda d: (d / SHARD).write_text("version https://git-lfs.github.com/spec/v1\n"),
            "git-lfs",
        ),
        (lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes()[:-100]), SHARD),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer files not found"),
        (lambda d: (d / "config.json").unlink(), "config.json not found"),
        (lambda d: (d / "config.json").write_text("{"), "config.json"),
    ],
)
def test_broken_checkpoint(run, mini, tmp_path, change, fragment):
    folder = damaged(tmp_path, change)
    code, _, err = run(mini, "--llada_ckpt", str(folder))
    [line] = (line for line in err.splitlines() if fragment in line)
    assert code == 4 and line.startswith("error: --llada_ckpt") and line.count(str(folder)) == 1


def test_hub_id_that_is_not_there_offline(run, mini):
    """The tests set HF_HUB_OFFLINE."""
    code, _, err = run(mini, "--llada_ckpt", "nobody/nothing")
    assert code == 4 and "nobody/nothing" in err and "HF_HUB_OFFLINE=1" in err


def test_checkpoint_of_another_family(run, mini):
    code, _, err = run(mini, "--llada_ckpt", str(DREAM))
    assert code == 2 and "dream family" in err


@pytest.mark.parametrize(
    "lines, fragment",
    [
        (['{"question": "q", "answer": "#### 1"}', "{oops"], "line 2"),
        (['{"question": "q"}'], "line 1: field 'answer'"),
        (['{"question": "q", "answer": "#### 1"}'], "1 rows, expected 3"),
        (['{"question": "q", "answer": "1"}'], "line 1: field 'answer' does not match ####"),
        (['{"question": "q", "answer": "#### one"}'], "line 1: field 'answer' does not match"),
        (['{"question": "\\ud800", "answer": "#### 1"}'], "line 1: not JSON: 'utf-8' codec"),
    ],
)
def test_malformed_data(run, mini, tmp_path, lines, fragment):
    write_lines(tmp_path / "data" / "gsm8k" / "test.jsonl", lines)
    code, _, err = run(mini)
    assert code == 4 and "test.jsonl" in err and fragment in err


@pytest.mark.parametrize(
    "rows, fragments",
    [
        (["{oops"], ["line 1: not JSON", "no text for 3 of 3 documents, doc_id 0, 1, 2"]),
        (
            [{"doc_id": 0, "text": "a"}, {"doc_id": 0, "text": "b"}, {"doc_id": 1, "text": ""}],
            [
                "line 2: document 0 has more than one answer (lines 1 and 2)",
                "no text for 1 of 3 documents, doc_id 2",
            ],
        ),
        ([{"doc_id": 3, "text": "a"}], ["line 1: doc_id 3 is not one of 0 to 2"]),
        (
            [{"doc_id": "0", "text": "a"}],
            ["line 1: field 'doc_id': expected a whole number, got '0'"],
        ),
        ([{"doc_id": True, "text": "a"}], ["line 1: field 'doc_id': expected a whole number"]),
        ([{"doc_id": 0}], ["line 1: field 'text' is missing"]),
        ([{"text": "a"}], ["line 1: field 'doc_id' is missing"]),
        ([{"doc_id": 0, "text": 5}], ["line 1: field 'text': expected text, got 5"]),
        ([[1]], ["line 1: not an object"]),
        (['{"doc_id": 0, "text": "\\ud800"}'], ["line 1: field 'text' is not Unicode"]),
        ([{"doc_id": 0, "text": "a"}, "9" * 5000], ["line 2: not JSON: an integer has more than"]),
        (["[" * 10**5], ["line 1: not JSON: nested too deeply"]),
    ],
)
def test_bad_predictions(run, mini, tmp_path, rows, fragments):
    code, _, err = run(mini, "--predictions", str(write_lines(tmp_path / "p.jsonl", rows)))
    assert code == 4 and all(line.startswith("error: ") for line in err.splitlines())
    for fragment in fragments:
        assert fragment in err


@pytest.mark.parametrize("bad", ['{"doc_id": 1, "text": "\\ud800"}', "{oops", "[1]"])
def test_a_text_that_is_lost_with_its_line_is_not_missed_too(run, mini, tmp_path, bad):
    rows = [{"doc_id": 0, "text": "a"}, bad, {"doc_id": 2, "text": "a"}]
    code, _, err = run(mini, "--predictions", str(write_lines(tmp_path / "p.jsonl", rows)))
    assert code == 4 and len(err.splitlines()) == 1 and "line 2: " in err


def test_predictions_file_that_is_not_there(run, mini, tmp_path):
    code, _, err = run(mini, "--predictions", "/nowhere.jsonl")
    assert code == 4
    assert "--predictions /nowhere.jsonl cannot be read: No such file or directory\n" in err
    os.mkfifo(tmp_path / "p.jsonl")
    code, _, err = run(mini, "--predictions", str(tmp_path / "p.jsonl"))
    assert code == 4 and err.endswith("p.jsonl cannot be read: not a regular file\n")


# ---------------------------------------------------------------- what a run does


def test_predictions_need_no_checkpoint(run, mini, tmp_path):
    """Scored as generated texts: lm-eval's metrics and the numeric one."""
    texts = ["so it is #### 2", "1 + 2 = 4", "4\nQuestion: is it 5?"]
    path = write_lines(
        tmp_path / "p.jsonl", [{"doc_id": i, "text": t} for i, t in enumerate(texts)]
    )
    code, out, err = run(
        mini,
        "--predictions",
        str(path),
        "--llada_ckpt",
        "/nowhere",
        "--output_dir",
        str(tmp_path / "out"),
    )
    assert code == 0 and "--gen_length, --block_length, --llada_ckpt, --dtype have no effect" in err
    result = result_in(tmp_path / "out")
    assert result["headline"] | {"ci95": None, "stderr": None} == {
        "metric": "exact_match,flexible-extract",
        "value": 1 / 3,
        "stderr": None,
        "ci95": None,
        "n": 3,
    }
    assert [s["extracted"]["flexible-extract"] for s in result["samples"]] == ["2", "4", "5"]
    assert [s["extracted"]["numeric"] for s in result["samples"]] == ["2", "4", "4"]
    assert result["diagnostics"]["right_otherwise"]["n"] == 1
    assert [s["cut"] for s in result["samples"]] == [None, None, None]
    assert result["metrics"]["exact_match,strict-match"]["value"] == pytest.approx(1 / 3)
    assert "fingerprint" not in result["config"] and len(result["config"]["predictions"]) == 64
    assert "llada_gsm8k_predictions_mini.json" in out


def test_predictions_with_a_limit_need_only_the_first(run, mini, tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"doc_id": 0, "text": "2"}])
    assert run(mini, "--predictions", str(path), "--limit", "1")[0] == 0


def test_finished_result_is_kept_and_another_ones_is_not_replaced(run, mini, tmp_path):
    assert run(mini, "--limit", "1")[0] == 0
    (path,) = (tmp_path / "out").glob("*.json")
    before = path.read_bytes()
    code, out, err = run(mini, "--limit", "1", "--batch_size", "4")
    assert code == 0 and "finished already" in err and str(path) in out
    other = ["--confidence_dtype", "float32"]
    code, _, err = run(mini, "--limit", "1", *other)
    assert code == 2 and 'confidence_dtype: "float64" -> "float32"' in err
    assert "--tag" in err and "--overwrite" in err
    assert path.read_bytes() == before
    assert run(mini, "--limit", "1", *other, "--overwrite")[0] == 0
    assert json.loads(path.read_text())["config"]["confidence_dtype"] == "float32"
    path.write_text("not a result")
    code, _, err = run(mini, "--limit", "1")
    assert code == 4 and "is incomplete or damaged" in err
    assert "Delete it" in err and "--overwrite" not in err
    path.unlink()
    assert run(mini, "--limit", "1", "--seed", "3")[0] == 0


def test_sample_that_fails_is_no_wrong_answer(run, mini, tmp_path, monkeypatch):
    """Out of memory or a crash lowers no score; the run is incomplete and counts its samples."""
    import harness

    real = harness.decode_each

    def failing(model, prompts, config, seeds, **options):
        if any(p == bad for p in prompts):
            raise RuntimeError("CUDA out of memory")
        return real(model, prompts, config, seeds, **options)

    run(mini, "--tag", "whole")
    whole = result_in(tmp_path / "out")
    import models

    prompt = whole["samples"][1]["prompt"]
    bad = tuple(models.load_tokenizer(LLADA).encode(prompt, add_special_tokens=False))
    monkeypatch.setattr(harness, "decode_each", failing)
    code, out, err = run(mini, "--output_dir", str(tmp_path / "part"))
    result = result_in(tmp_path / "part")
    assert code == 5 and result["status"] == "incomplete" and result["n_failed"] == 1
    assert result["headline"] is None and result["metrics"] == {}
    assert result["score_on_completed"]["exact_match,flexible-extract"]["n"] == 2
    failed = result["samples"][1]
    assert (
        failed["status"] == "error"
        and "CUDA out of memory" in failed["error"]
        and "Traceback" in failed["error"]
    )
    assert "metrics" not in failed and failed["text"] == ""
    assert [s["token_ids"] for s in result["samples"][::2]] == [
        s["token_ids"] for s in whole["samples"][::2]
    ]
    assert "1 sample failed" in out
    monkeypatch.setattr(harness, "decode_each", real)  # an incomplete result is no reason to stop
    assert run(mini, "--output_dir", str(tmp_path / "part"))[0] == 0
    assert result_in(tmp_path / "part")["status"] == "complete"


def test_full_disk_at_the_end(run, mini, monkeypatch):
    def full(*_):
        raise OutputError(
            "cannot write r.json: No space left on device; "
            "free some space or give another --output_dir"
        )

    monkeypatch.setattr("experiment.run.atomic_write_json", full)
    code, _, err = run(mini, "--limit", "1")
    assert code == 74 and "error: cannot write r.json: No space left on device" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_end_with_their_code(run, mini, monkeypatch, number):
    monkeypatch.setattr("experiment.run.execute", lambda *_: os.kill(os.getpid(), number))
    code, _, err = run(mini)
    assert code == 128 + number and "Traceback" not in err
    assert f"ended by {number.name}; run the same command again to go on" in err


def test_unexpected_failure_is_one_line_unless_debugged(run, mini, monkeypatch):
    def broken(*_):
        raise KeyError("what")

    monkeypatch.setattr("experiment.run.execute", broken)
    code, _, err = run(mini)
    assert (
        code == 1
        and "error: KeyError: 'what'; this should not happen, --debug shows where" in err
        and "Traceback" not in err
    )
    code, _, err = run(mini, "--debug")
    assert code == 1 and "Traceback" in err


def test_program_runs_as_a_command(tmp_path):
    run = subprocess.run(
        [sys.executable, "eval.py", "--model_alias", "x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 2 and run.stdout == "" and "Traceback" not in run.stderr
    assert run.stderr.count("error: ") == 2


def test_the_path_that_is_printed_is_the_path_that_is_written(run, mini, tmp_path):
    texts = write_lines(tmp_path / "texts.jsonl", [{"doc_id": i, "text": "1"} for i in range(3)])
    printed = run(mini, "--predictions", texts, "--print_output_path")[1].strip()
    assert run(mini, "--predictions", texts)[0] == 0 and Path(printed).is_file()


def test_departures_from_the_protocol_are_listed(run, mini, tmp_path):
    """A result of other weights or another precision must not pass for the model's own."""
    run(mini)
    overrides = result_in(tmp_path / "out")["protocol"]["overrides"]
    assert overrides["checkpoint"] == {"protocol": "GSAI-ML/LLaDA-8B-Instruct", "run": str(LLADA)}
    assert (
        overrides["dtype"] == {"protocol": "bfloat16", "run": "float32"}
        and "confidence_dtype" not in overrides
    )


def test_a_canvas_longer_than_the_model_is_refused_before_it_loads(run, mini):
    code, _, err = run(mini, "--gen_length", "8000", "--block_length", "8000")
    assert code == 2 and "--gen_length 8000: the checkpoint has 4096 positions, and prompt" in err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA driver error: out of memory"),
    ],
)
def test_no_memory_for_the_weights_is_the_environments_fault(run, mini, monkeypatch, error):
    import models

    def full(*_, **__):
        raise error

    monkeypatch.setattr(models, "load_model", full)
    code, _, err = run(mini)
    assert code == 3 and "out of memory" in err and "--batch_size" in err


def test_a_full_disk_behind_stdout_is_no_riddle(mini, tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "eval.py", *shlex.split(mini), "--dry_run"],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (
        done.returncode == 74 and "cannot write" in done.stderr and "Traceback" not in done.stderr
    )


@pytest.mark.slow
def test_a_closed_stdout_costs_no_result(mini, tmp_path):
    """The run ended with code 1 after its result was written; a file got what is printed."""
    words = [sys.executable, "eval.py", *shlex.split(mini), "--num_steps", "1"]
    closed = subprocess.run([*"bash -c".split(), '"$@" >&- 2>&-', "bash", *words], cwd=ROOT)
    assert closed.returncode == 0 and result_in(tmp_path / "out")["status"] == "complete"
    for path in (tmp_path / "out").glob("cache/*/*"):
        assert b"metric" not in path.read_bytes() and b"model: " not in path.read_bytes()


@pytest.mark.parametrize(
    "command",
    ["eval.py", "scripts/sweep.py", "scripts/report.py", "scripts/trace.py"]
    + [pytest.param("dev/train_tiny.py", marks=pytest.mark.slow)],
)
def test_a_safe_path_hides_no_module_of_ours(command):
    """PYTHONSAFEPATH=1 leaves the program's directory out of sys.path."""
    done = subprocess.run(
        [sys.executable, command, "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


def test_no_temporary_directory_is_the_machines_fault(run, mini, monkeypatch):
    def broken(*_):
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("experiment.run.execute", broken)
    code, _, err = run(mini)
    assert code == 3 and "set TMPDIR to a directory that can be written" in err


def test_data_of_the_right_size_and_other_content_is_not_the_published_set(
    run, benchmarks, tmp_path
):
    shutil.copy(benchmarks / "TruthfulQA.csv", tmp_path)
    texts = write_lines(tmp_path / "texts.jsonl", [{"doc_id": 0, "text": "No."}])
    arguments = (
        f"--model_alias llada --task truthfulqa --data_dir {tmp_path} --limit 1 "
        f"--predictions {texts}"
    )
    for change, name in (
        (str, "original"),
        (lambda text: text.replace(" you ", " You ", 1), "modified"),
    ):
        text = (tmp_path / "TruthfulQA.csv").read_bytes().decode()
        (tmp_path / "TruthfulQA.csv").write_bytes(change(text).encode())
        assert run(arguments, "--output_dir", tmp_path / name)[0] == 0
        result = result_in(tmp_path / name)
        assert result["data"]["name"] == name and len(result["data"]["rows_sha256"]) == 64
        assert any("other content" in note for note in result["notes"]) == (name == "modified")


def test_all_problems_are_said_at_once(run):
    """Not one a try, at midnight."""
    code, _, err = run("--model_alias lada --task gsm8k --top_p 2")
    assert code == 2 and "did you mean 'llada'" in err and "--top_p 2" in err
    code, _, err = run(
        "--model_alias llada --task gsm8k --limit -3 --llada_ckpt /nowhere/a --data_dir /nowhere/b"
    )
    assert code == 2 and len(err.splitlines()) == 3
    assert all(
        part in err
        for part in ("--limit -3", "/nowhere/a does not exist", "/nowhere/b does not exist")
    )


@pytest.mark.parametrize(
    ("alias", "task", "note"),
    [
        ("llada", "gsm8k", "differs from the protocol in checkpoint"),
        ("diffucoder", "gsm8k", "no score is published"),
    ],
)
def test_why_no_published_score_stands_beside_is_said(run, tmp_path, alias, task, note):
    gsm8k_dir(tmp_path / "data", n=8)
    checkpoint = f"--llada_ckpt {LLADA}" if alias == "llada" else f"--diffucoder_ckpt {DREAM}"
    arguments = (
        f"--model_alias {alias} {checkpoint} --task {task} --data_dir {tmp_path / 'data'} "
        "--device cpu"
    )
    code, out, _ = run(
        arguments,
        "--protocol",
        "official",
        "--output_dir",
        tmp_path / "o",
        "--tokens_per_step",
        64,
        "--limit",
        1,
    )
    assert (
        code == 0
        and f"published: {result_in(tmp_path / 'o')['reference_note']}" in out
        and note in out
    )
    assert (
        "warning: 1 of 1 answers fill the canvas without an end token" in out
        or "end_token"
        in json.dumps([s["finish_reason"] for s in result_in(tmp_path / "o")["samples"]])
    )


def test_fewer_worked_examples_than_the_protocol_needs_is_the_datas_fault(run, mini):
    code, _, err = run(mini, "--protocol", "official")
    assert code == 4 and "--num_fewshot 5: gsm8k has 3 worked examples; give at most 3" in err


LLADA_GSM8K = "--model_alias llada --task gsm8k --protocol official"
NO_SCORE = "published: no score is published for this protocol, model and task"
TWO_TOKENS = (
    "published: 74.8 % at 2 tokens per step (exact_match,flexible-extract, Fast-dLLM "
    "(arXiv:2505.22618) Table 1; above 1 token per step read from its Figure 5)"
)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (f"{LLADA_GSM8K} --tokens_per_step 2", TWO_TOKENS),
        ("--model_alias llada --task truthfulqa --protocol official", NO_SCORE),
        (f"{LLADA_GSM8K} --temperature 0.9", f"published: {DEPARTS}temperature"),
        (f"{LLADA_GSM8K} --llada_ckpt {LLADA}", f"published: {DEPARTS}checkpoint"),
        (
            f"{LLADA_GSM8K} --tokens_per_step 3",
            "published: no score is published for 3 tokens per step",
        ),
        (f"{LLADA_GSM8K} --limit 5", f"published: {DEPARTS}documents"),
        (f"{LLADA_GSM8K} --data_dir {ROOT}/assets/benchmarks", f"published: {DEPARTS}data"),
    ],
)
def test_a_dry_run_shows_the_published_score_where_a_run_does(run, words, line):
    out = run(f"{words} --dry_run")[1].splitlines()
    assert [text for text in out if text.startswith("published")] == [line]


def test_a_dry_run_of_the_uniform_protocol_shows_no_published_score(run):
    assert "published" not in run("--model_alias llada --task gsm8k --dry_run")[1]
