"""Any other generation task that lm-eval has installed, by its name: `--task lm_eval:<name>`.

Its prompts, filters and metrics are lm-eval's own; its data come from the hub. Nothing official is
known of how the models here are evaluated on it. The installed YAML files are searched for the
name, because lm-eval's own index imports torch and takes longer than many a run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tasks.base import PromptForm, TaskSpec, read_definition, tasks_dir
from tasks.data import Data, DataError
from tasks.protocols import PREFIX
from utils import UsageError, nearest

FORM = "lm_eval"
NOTE = (
    "nothing official is known of how these models are evaluated on this task: "
    "prompts and metrics are lm-eval's"
)


def definitions(word: str = "") -> Iterator[tuple[Path, dict]]:
    """The installed definitions of tasks and groups whose text has a word."""
    import yaml

    for folder, _, files in os.walk(tasks_dir()):
        for file in files:
            path = Path(folder, file)
            if path.suffix != ".yaml" or word.encode() not in (text := path.read_bytes()):
                continue
            try:
                config = read_definition(text)
            except yaml.YAMLError:  # a file of the user's own
                continue
            if isinstance(config, dict):
                yield path, config


def is_installed(name: str) -> bool:
    """Whether lm-eval has a task of this name."""
    return bool(name) and any(config.get("task") == name for _, config in definitions(name))


@cache
def definition_of(name: str) -> tuple[Path, dict]:
    """The file that defines a task, and what it says together with the files that it includes.

    Raises UsageError where lm-eval has no such task, or a group of this name.
    """
    members: list[str] = []
    for path, config in definitions(name):
        if config.get("task") == name:
            return path, _with_included(path, config)
        if config.get("group") == name:
            for one in config.get("task") or ():
                members.append(one if isinstance(one, str) else one.get("task") or one.get("group"))
        elif name in _list(config.get("tag")):
            members.append(config.get("task"))
    listed = [one for one in dict.fromkeys(members) if isinstance(one, str)]
    if listed:
        shown = ", ".join(listed[:5]) + (", ..." if len(listed) > 5 else "")
        raise UsageError(
            f"--task {PREFIX}{name}: a group of {len(listed)} of lm-eval's tasks; "
            f"give one of them: {shown}"
        )
    names = [config.get("task") for _, config in definitions()]
    raise UsageError(
        f"--task {PREFIX}{name:.60}: the installed lm-eval has no such task"
        f"{nearest(name, [one for one in names if isinstance(one, str)])}"
    )


def _with_included(path: Path, config: Mapping[str, Any]) -> dict:
    whole: dict[str, Any] = {}
    for name in _list(config.get("include")):
        file = path.parent / name
        whole |= _with_included(file, read_definition(file.read_bytes()))
    return whole | config


def _list(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _problem(name: str, config: Mapping[str, Any]) -> str | None:
    """Why a task cannot be run here, or None."""
    asks = config.get("output_type", "generate_until")
    if "class" in config:
        return f"lm-eval's task {name} is a class in Python; only those in YAML can be run"
    if asks != "generate_until":
        return f"lm-eval's task {name} asks for {asks}; only generation tasks can be run"
    if config.get("unsafe_code"):  # loading alone asks the hub for a scorer and tries it out
        return (
            f"lm-eval's {name} runs generated code without a sandbox; "
            f"use --task {'mbpp' if 'mbpp' in name else 'humaneval'}"
        )
    metrics = config.get("metric_list")
    if metrics and len(_other_scores(metrics)) == len(metrics):
        return (
            f"lm-eval's task {name} has no score that is a mean over the answers: "
            f"{', '.join(_other_scores(metrics))}; only such scores are computed here"
        )
    return None


def _other_scores(metrics: list[dict]) -> list[str]:
    """Metrics that are computed from all answers at once, such as BLEU of a corpus."""
    usual = ("exact_match", "acc", "acc_norm")  # whose aggregation is the mean where none is given
    return [
        str(m["metric"])
        for m in metrics
        if m.get("aggregation", "mean" if m["metric"] in usual else "") != "mean"
    ]


def is_mean(aggregation: Mapping[str, Callable], metric: str) -> bool:
    """Whether lm-eval's value of a metric is the mean of its values for the answers.

    aggregation: of a task, metric -> function.
    """
    from lm_eval.api.metrics import mean

    return aggregation.get(metric, mean) is mean


def spec_of(task: str) -> TaskSpec:
    """The benchmark behind `lm_eval:<name>`. Raises UsageError where it cannot be run."""
    name = task.removeprefix(PREFIX)
    path, config = definition_of(name)
    if problem := _problem(name, config):
        raise UsageError(f"--task {task}: {problem}")
    notes = [NOTE]
    if left_out := _other_scores(config.get("metric_list") or []):
        notes.append(f"{', '.join(left_out)}: left out, no mean over the answers")
    if "n_shot" in name and not config.get("num_fewshot"):
        notes.append("it has 0 worked examples unless --num_fewshot gives another number")

    def build(data: Data | None, form: str):
        return _load(name, path)

    form = PromptForm(
        source=f"lm-eval's {name}",
        yaml=str(path.relative_to(tasks_dir())),
        num_fewshot=int(config.get("num_fewshot") or 0),
    )
    return TaskSpec(
        name=task,
        build=build,
        n_docs=0,
        sources=(),
        hub=(f"lm-eval {name}", None),
        splits=dict,
        eval_split="",
        forms={FORM: form},
        headline="",
        kind="other",
        foreign=True,
        note="; ".join(notes),
    )


def _load(name: str, path: Path):
    """lm-eval's task object, with what the others carry. Raises DataError."""
    from lm_eval.tasks import TaskManager

    from models.hub import beside, quiet

    def load():
        manager = TaskManager(include_path=str(path.parent), include_defaults=False)
        # load_task_or_group is all that 0.4.8 has, and deprecated since load came
        new = hasattr(manager, "load")
        return (manager.load(name)["tasks"] if new else manager.load_task_or_group(name))[name]

    quiet()
    try:
        [task] = beside([load])
    except Exception as error:  # whatever the network, the cache or the task's own code raises
        raise DataError(
            [f"lm-eval's task {name} cannot be loaded: {type(error).__name__}: {error}"]
        ) from error
    config = task.config
    rows = {"": [dict(doc) for doc in task.eval_docs]}
    task.data = Data("hub", f"lm-eval {name}: {config.dataset_path}", rows)
    task.prefill = lambda doc: ""
    return task


def headline_of(task) -> str:
    """lm-eval's key of the first metric of the first filter that is a mean over the answers."""
    aggregation, filters = task.aggregation(), task.config.filter_list
    metric = next((name for name in aggregation if is_mean(aggregation, name)), "none")
    return f"{metric},{filters[0]['name'] if filters else 'none'}"
