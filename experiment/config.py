"""One experiment, normalised: what decides its numbers (RunConfig) and how it is run (Settings).

Each field that is a flag carries its Option: the flag's help, range and default, and whether it is
part of a result's file name. experiment/arguments.py makes the command line from them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from decoding.config import DecodeConfig, name_parts
from decoding.likelihood import LikelihoodConfig
from decoding.option import Option, option, options_in
from utils import ENGINE_VERSION, SCHEMA_VERSION, SCORING_VERSION, sha256

DTYPES = ("bfloat16", "float16", "float32")
PRECISION, RUNNING, OUTPUT = "precision and seed", "running", "output"
EVALUATED = "what is evaluated"

STRICT = Option(
    False,
    "Run each passed program again, in a process that cannot reach its tests, and also report "
    "pass@1_strict. A finished result is judged again without decoding.",
    switch=True,
    group=RUNNING,
)

REPEATS = Option(
    1,
    "Samples per document, at a temperature above 0; each has random numbers of its own. Metrics "
    "are means over the samples; code also has pass@k for k = 2, 4, ... and N. Samples of a "
    "smaller N are reused.",
    whole=True,
    low=1,
    high=10**4,
    group=RUNNING,
)

# what a field of RunConfig is for; a field without a role is part of both ids
NAME = {"role": "name"}  # a name for what other fields state exactly: part of no id
SCORING = {"role": "scoring"}  # part of the result id alone


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the numbers of an experiment, with all defaults resolved.

    num_fewshot, chat_template, system, start_token: how prompts are made, see
                 tasks.protocols.Protocol.
    decode:      how answers are generated; None where none are.
    likelihood:  how log-likelihoods are computed; None where answers are generated or given.
    fingerprint: of the checkpoint, see models.fingerprint; None where it is not known or not used.
    data:        sha256 of each benchmark file, or name and sha256 of the rows of the hub's data;
                 None where not known.
    predictions: sha256 of the file of answers that are scored instead of generated ones, else None.
    verifier, verifier_fingerprint: as checkpoint and fingerprint, of the model that checks drafts.
    extraction:  the authors' own way to find the program in an answer, a key of
                 tasks.code.EXTRACTIONS; None: ours.
    plugins:     {"path", "sha256"} of each plugin that one of the names above comes from.
    harness:     {"name", "sha256"} of a harness that is not the family's own, and of its file.
    """

    model_alias: str = field(metadata=NAME)
    family: str
    checkpoint: str | None = field(metadata=NAME)
    task: str
    protocol: str
    prompt_form: str
    num_fewshot: int = option(
        MISSING,
        "Worked examples in the prompt, drawn by lm-eval from the benchmark's own.",
        whole=True,
        protocol=True,
        group=EVALUATED,
    )
    chat_template: bool = option(
        MISSING,
        "Ask without the checkpoint's chat template: the plain text of the prompt form.",
        switch=True,
        negated=True,
        protocol=True,
        group=EVALUATED,
    )
    system: str | None = option(
        MISSING,
        "System prompt. Without it the chat template may insert one of its own. With "
        "--no_chat_template it precedes the prompt as it is.",
        type=str,
        metavar="TEXT",
        protocol=True,
        group=EVALUATED,
    )
    decode: DecodeConfig | None
    dtype: str = option(
        "bfloat16",
        "Precision of the weights and of the forward pass; tiny models have float32 as their "
        "default.",
        choices=DTYPES,
        group=PRECISION,
    )
    seed: int = option(
        0,
        "Seed of all randomness. A sample's generator is seeded from this, its prompt and its "
        "repeat.",
        whole=True,
        group=PRECISION,
    )
    compile: bool = option(
        False,
        "Compile the model's layers with torch.compile, for speed on a GPU. It changes the "
        "rounding, so tokens may change and the result belongs to another configuration. If it "
        "does not work, a note says so and the run goes on without it.",
        switch=True,
        group=PRECISION,
    )
    timed_batch: int | None = option(
        None,
        "Measure the speed with N samples in flight: as --batch_size, but N is part of the "
        "result's name and id, no sample of another N is reused, and a batch that does not fit "
        "into memory ends the run instead of being halved.",
        whole=True,
        low=1,
        group=RUNNING,
    )
    fingerprint: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    predictions: str | None = None
    verifier: str | None = field(default=None, metadata=NAME)
    verifier_fingerprint: dict[str, Any] | None = None
    plugins: tuple[dict[str, str], ...] = ()
    harness: dict[str, str] | None = None
    likelihood: LikelihoodConfig | None = None
    start_token: bool = False
    extraction: str | None = field(default=None, metadata=SCORING)
    strict_exec: bool = field(default=False, metadata=SCORING | {"option": STRICT})
    repeats: int = field(default=1, metadata=SCORING | {"option": REPEATS})

    def as_dict(self) -> dict[str, Any]:
        """The settings, flat, ready for JSON, without those at an empty default."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if not _is_silent(f, self)}
        decode, likelihood = values.pop("decode", None), values.pop("likelihood", None)
        if likelihood is not None:
            return values | {k: v for k, v in vars(likelihood).items() if v or k == "estimator"}
        if decode is None:
            # nothing is generated
            for name in ("dtype", "seed", "compile", "checkpoint", "timed_batch"):
                values.pop(name, None)
            return values
        return values | decode_settings(decode)

    def identity(self) -> dict[str, Any]:
        """The settings that can change a token: not the scoring, batch size, limit or device."""
        return identity_of(self.as_dict()) | {"engine_version": ENGINE_VERSION}

    @cached_property
    def generation_id(self) -> str:
        """sha256 of everything that can change a token: the key of the kept samples."""
        return sha256(self.identity())

    @cached_property
    def result_id(self) -> str:
        """sha256 of the generation id and of everything that scoring reads."""
        return ids_of(self.as_dict())[1]


def ids_of(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Generation id and result id of a flat configuration, by this version of the program."""
    generation = sha256(identity_of(settings) | {"engine_version": ENGINE_VERSION})
    scoring = {
        f.name: settings.get(f.name, f.default)
        for f in fields(RunConfig)
        if f.metadata.get("role") == "scoring"
    }
    if scoring["repeats"] == 1:  # a result without the flag has the id that it always had
        del scoring["repeats"]
    if "rows" in (data := settings.get("data") or {}):
        scoring["rows"] = data["rows"]
    versions = {"scoring_version": SCORING_VERSION, "schema_version": SCHEMA_VERSION}
    return generation, sha256({"generation_id": generation} | scoring | versions)


def _is_silent(setting, config: RunConfig) -> bool:
    empty = _is_empty(setting.default) or setting.metadata.get("role") == "scoring"
    return empty and getattr(config, setting.name) == setting.default


def _is_empty(default: Any) -> bool:
    """Whether a default says nothing: an option that is off or not set."""
    return default is None or default is False or default in ((), "none")


def identity_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a flat configuration that can change a token."""
    without = {f.name for f in fields(RunConfig) if "role" in f.metadata} | {"tokens_per_step"}
    kept = {name: value for name, value in settings.items() if name not in without}
    for name in ("fingerprint", "verifier_fingerprint"):
        if name in kept:
            kept[name] = _content(kept[name])
    if "data" in kept:  # the rows reach a token through the prompt alone, which keys each sample
        kept["data"] = {name: value for name, value in kept["data"].items() if name != "rows"}
    if "plugins" in kept:
        kept["plugins"] = sorted(plugin["sha256"] for plugin in kept["plugins"])
    return kept


def _content(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """A commit identifies a checkpoint of the hub, its contents identify a directory."""
    if fingerprint["revision"]:
        return {"revision": fingerprint["revision"]}
    return {name: fingerprint[name] for name in ("files", "shards")}


def decode_settings(decode: DecodeConfig) -> dict[str, Any]:
    """A decoding configuration, flat: schedule, options of the loop, options of the algorithm."""
    schedule = decode.schedule
    quotas = run_lengths(schedule.quotas)
    if schedule.last_length < schedule.block_length:
        quotas += f"; last block {run_lengths(schedule.last_quotas)}"
    settings = {
        "algorithm": schedule.algorithm,
        "gen_length": schedule.gen_length,
        "block_length": schedule.block_length,
        "num_steps": schedule.num_steps,
        "tokens_per_step": schedule.tokens_per_step,
        "quotas": quotas,
    }
    for name, known in options_in(DecodeConfig).items():
        value = getattr(decode, name)
        if value != known.default or not _is_empty(known.default):
            settings[name] = value
    return settings | ({"options": decode.options} if decode.options else {})


def run_lengths(values: Sequence[int]) -> str:
    """(0, 1, 1, 1, 2) -> "0,1x3,2": a schedule short enough to read and to compare."""
    runs = ((value, sum(1 for _ in run)) for value, run in groupby(values))
    return ",".join(f"{value}x{n}" if n > 1 else str(value) for value, n in runs)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How an experiment is run. Nothing here can change a number; flags in the order of --help."""

    predictions: Path | None = option(
        None,
        'Score texts that were made elsewhere instead of generating: one line {"doc_id": n, '
        '"text": "..."} for each document, n counting from 0 in '
        "the benchmark's order, or a result file. Texts are cut at the task's stop strings. No "
        "checkpoint is needed, and decoding flags have no effect.",
        type=Path,
        metavar="FILE.jsonl",
        group=EVALUATED,
    )
    limit: int | None = option(
        None,
        "Only the first N documents, for a trial. Default: all.",
        whole=True,
        low=1,
        high=10**9,
        group=RUNNING,
    )
    batch_size: int | str | None = option(
        None,
        "Samples that are decoded at a time. auto takes as many as fit into the free memory of a "
        "GPU and make it faster; on a CPU it is the default. At float32 no token depends on it. "
        "Default: 1 on a GPU, 8 on a CPU. For likelihoods: rows per forward pass; default: auto on "
        "a GPU, 32 on a CPU.",
        whole=True,
        low=1,
        words=("auto",),
        group=RUNNING,
    )
    device: str | None = option(
        None,
        "cuda, cuda:1, ... or cpu. Default: cuda where there is one, else cpu.",
        type=str,
        metavar="NAME",
        group=RUNNING,
    )
    devices: str | None = option(
        None,
        "Share the samples among processes on this node, one for each device of a list such as "
        "0,1,2,3 or cpu,cpu. The result is that of one process. Not together with torchrun or "
        "accelerate launch, which start the processes themselves.",
        type=str,
        metavar="LIST",
        group=RUNNING,
    )
    cuda_graphs: bool = option(
        False,
        "Replay forward passes of up to 1024 columns as CUDA graphs, which saves kernel launches. "
        "Each graph is compared with the plain path when it is captured; tokens stay the same.",
        switch=True,
        group=RUNNING,
    )
    unsafe_exec: str | None = option(
        None,
        "Run generated code although it cannot be confined: 'fs' accepts that it can read and "
        "write your files, 'all' that it can do anything that you can do. Not needed where the "
        "sandbox works; the run prints what it found.",
        choices=("fs", "all"),
        group=RUNNING,
    )
    no_exec: bool = option(
        False,
        "Run no generated code: the result keeps the programs and is not complete. Score it on "
        "another machine with --predictions RESULT.json, or here by the same command without "
        "--no_exec.",
        switch=True,
        group=RUNNING,
    )
    data_dir: Path | None = option(
        None,
        "Directory with the benchmarks' original files, to run without a network; docs/slurm.md "
        "says where to get them. Default: the environment variable DLLMEXP_DATA_DIR; without it, "
        "data comes from the hub.",
        type=Path,
        metavar="DIR",
        group=RUNNING,
    )
    output_dir: Path = option(
        Path("results"), "Where results go.", type=Path, metavar="DIR", group=OUTPUT
    )
    tag: str | None = option(
        None,
        "Becomes part of the result's file name, to keep variants apart. Default: none.",
        type=str,
        metavar="NAME",
        group=OUTPUT,
    )
    export: str | None = option(
        None,
        "Write lm-eval's own files, too: results_DATE.json and samples_TASK_DATE.jsonl, in a "
        "folder with the result's name. A finished result is scored again for them from its kept "
        "samples.",
        choices=("lm_eval",),
        group=OUTPUT,
    )
    overwrite: bool = option(
        False,
        "Run again although a finished result is there, and replace it. Without it a finished "
        "result of the same configuration is printed and kept, and one of another configuration is "
        "an error.",
        switch=True,
        group=OUTPUT,
    )


def result_name(
    config: RunConfig,
    *,
    overrides: Collection[str] = (),
    dtype: str = DTYPES[0],
    protocol: str = "uniform",
    data: str | None = None,
    tag: str | None = None,
    limit: int | None = None,
) -> str:
    """File name of a result, a function of its configuration alone.

    `<alias>_<task>_<alg>[_<method>...]_tps<K>[_temperature<T>][_seed<N>][_<dtype>][_batch<N>]
    [_repeats<N>][_<protocol>][_<plugin>...][_<data>][_<tag>][_limit<N>].json`

    <method> is what decoding.config.name_parts gives. K is the requested tokens per step where the
    schedule has it, else the realised one. Scored predictions have `predictions` in the place of
    <alg>, and no part that is about generating. Likelihoods have `<estimator>[_mc<N>][_cfg<W>]` in
    the place of <alg> to <K>.

    overrides:       the protocol's settings that the run changed; of these temperature is named.
    dtype, protocol: the defaults, which are not part of a name.
    data:            name of a data set that is not the original one, as its manifest has it.
    """
    parts = [config.model_alias, config.task]
    if config.likelihood is not None:
        asked = config.likelihood
        parts += [asked.estimator] + [f"mc{asked.mc_num}"] * (asked.mc_num is not None)
        parts += [f"cfg{asked.cfg_scale:g}"] * (asked.cfg_scale != 0)
    elif config.decode is None:
        parts.append("predictions")
    else:
        schedule = config.decode.schedule
        k = schedule.tokens_per_step
        tps = f"{schedule.gen_length / schedule.num_steps:g}" if k is None else str(k)
        parts += [schedule.algorithm, *name_parts(config.decode), f"tps{tps}"]
        parts += [f"temperature{config.decode.temperature:g}"] * ("temperature" in overrides)
    if config.likelihood is not None or config.decode is not None:
        parts += [f"seed{config.seed}"] * (config.seed != 0)
        parts += [config.dtype] if config.dtype != dtype else []
        parts += [f"batch{config.timed_batch}"] if config.timed_batch else []
        parts += [f"repeats{config.repeats}"] * (config.repeats > 1)
    parts += [config.protocol] if config.protocol != protocol else []
    parts += [Path(plugin["path"]).stem for plugin in config.plugins]
    parts += [data] if data else []
    parts += ([tag] if tag else []) + ([f"limit{limit}"] if limit is not None else [])
    return "_".join(re.sub(r"[^A-Za-z0-9._-]+", "-", part) for part in parts) + ".json"
