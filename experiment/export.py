"""`--export lm_eval`: the files of lm-eval's command line, written by its own EvaluationTracker.

They lie in RESULT/MODEL/, where RESULT is the path of the result without .json and MODEL the
checkpoint as lm-eval writes it: results_DATE.json and samples_TASK_DATE.jsonl. lm-eval's
`make_table` and other people's tools read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiment.resolve import Job
from utils import OutputError

# settings that lm-eval's users expect among the arguments of a model
SHOWN = ("protocol", "dtype", "algorithm", "gen_length", "block_length", "num_steps")
SHOWN += ("temperature", "estimator", "mc_num", "cfg_scale", "seed")


def export(job: Job, result: Mapping[str, Any], found: dict[str, Any], lm, task) -> str:
    """Write the files of a complete result; a line that says where, or why there are none.

    result: ours, with the status. found: all that lm-eval's simple_evaluate has returned; changed.
    Raises OutputError where they cannot be written: the tracker itself only warns.
    """
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.loggers.utils import add_env_info

    if result["status"] != "complete":
        return (
            f"--export {job.export}: nothing is written, the result is {result['status']} and "
            "lm-eval's files have no status"
        )
    samples, arguments = found.pop("samples"), model_args(job)
    for name, scores in found["results"].items():
        scores |= _standard_errors(samples[name])
    found["config"] |= {"model": "dllmexp", "model_args": arguments, "limit": job.limit}
    found["config"] |= {"batch_size": job.batch_size, "device": str(getattr(lm, "device", "cpu"))}
    add_env_info(found)
    folder = job.path.with_suffix("")
    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.log_experiment_args(
        model_source="dllmexp",
        model_args=arguments,
        system_instruction=job.config.system,
        chat_template=_template(job, lm),
        fewshot_as_multiturn=task.form.multiturn if hasattr(task, "form") else False,
    )
    tracker.save_results_aggregated(found, samples)
    for name, logged in samples.items():
        tracker.save_results_samples(name, logged)
    written = folder / tracker.general_config_tracker.model_name_sanitized
    date = getattr(tracker, "date_id", None)
    for name in (f"results_{date}.json", *(f"samples_{name}_{date}.jsonl" for name in samples)):
        if not (written / name).is_file():
            raise OutputError(f"--export {job.export}: lm-eval could not write to {written}")
    return f"lm-eval's files: {written}/*_{date}.*"


def model_args(job: Job) -> str:
    """The model as lm-eval's --model_args would name it."""
    settings = job.config.as_dict()
    shown = {name: settings[name] for name in SHOWN if settings.get(name) is not None}
    # lm-eval names its folder after `pretrained`
    named = {"pretrained": _name(job.config.checkpoint), "alias": job.config.model_alias}
    return ",".join(f"{name}={value}" for name, value in (named | shown).items())


def _template(job: Job, lm) -> str | None:
    """The chat template of the prompts; given answers have none."""
    tokenizer = getattr(lm, "tokenizer", None)
    return tokenizer.chat_template if tokenizer is not None and job.config.chat_template else None


def _name(checkpoint: str) -> str:
    """A hub id as it is; of a directory the last part."""
    return Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint


def _standard_errors(samples: list[dict[str, Any]]) -> dict[str, float]:
    """lm-eval's standard errors of the means, which `evaluate` leaves out."""
    from lm_eval.api.metrics import mean_stderr

    values: dict[tuple[str, str], list[float]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            values.setdefault((metric, sample["filter"]), []).append(float(sample[metric]))
    return {
        f"{metric}_stderr,{chain}": mean_stderr(found)
        for (metric, chain), found in values.items()
        if len(found) > 1
    }
