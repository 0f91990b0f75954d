"""Any other task or group that lm-eval has installed, by its name: `--task lm_eval:<name>`.

Its prompts, filters and metrics are lm-eval's own; its data come from the hub. Nothing official is
known of how the models here are evaluated on it. The installed YAML files are searched for the
name, because lm-eval's own index imports torch and takes longer than many a run. A group, or a tag,
is one run with a score of each of its tasks, see tasks/group.py.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tasks.base import PromptForm, TaskSpec, read_definition, tasks_dir, with_included
from tasks.data import Data, DataError
from tasks.group import group_task
from tasks.protocols import PREFIX
from utils import UsageError, file_sha256, nearest

FORM = "lm_eval"
NOTE = (
    "nothing official is known of how these models are evaluated on this task: "
    "prompts and metrics are lm-eval's"
)
CHOICE = ("multiple_choice", "loglikelihood")  # what is asked of a likelihood benchmark
IN_SANDBOX = ("humaneval_plus", "humaneval", "mbpp_plus", "mbpp")  # of TASKS


@dataclass(frozen=True)
class Member:
    """A task of lm-eval's: the file that defines it, and what a group changes in it.

    groups: those within the one that is run that it belongs to.
    """

    name: str
    path: Path
    changes: Mapping[str, Any]
    groups: tuple[str, ...] = ()

    @property
    def config(self) -> dict:
        """What the file says, together with the files that it includes; no function is imported."""
        return with_included(self.path) | self.changes


def definitions(word: str = "") -> Iterator[tuple[Path, dict]]:
    """The installed definitions of tasks and groups whose text has a word."""
    import yaml

    for folder, _, files in os.walk(tasks_dir()):
        for file in files:
            path = Path(folder, file)
            if path.suffix != ".yaml" or word.encode(errors="replace") not in (
                text := path.read_bytes()
            ):
                continue
            try:
                config = read_definition(text)
            except yaml.YAMLError:  # a file of the user's own
                continue
            if isinstance(config, dict):
                yield path, config


def is_installed(name: str) -> bool:
    """Whether lm-eval has a task or a group of this name."""
    return bool(name) and any(
        name in (config.get("task"), *_list(config.get("group")), *_list(config.get("tag")))
        for _, config in definitions(name)
    )


@cache
def _index() -> tuple[dict[str, Path], dict[str, dict], dict[str, list[str]]]:
    """Task -> file, group -> definition, tag -> tasks."""
    tasks: dict[str, Path] = {}
    groups: dict[str, dict] = {}
    tags: dict[str, list[str]] = {}
    for path, config in sorted(definitions(), key=lambda found: found[0]):
        name = config.get("task")
        if isinstance(name, str):
            tasks[name] = path
            files = [path.parent / file for file in _list(config.get("include"))]
            inherited = [tag for file in files for tag in _list(_included(file).get("tag"))]
            for tag in _list(config.get("tag", inherited)):
                tags.setdefault(tag, []).append(name)
        elif isinstance(name, list) and isinstance(config.get("group"), str):
            groups[config["group"]] = config
    return tasks, groups, tags


_included = cache(with_included)


@cache
def members_of(name: str) -> tuple[Member, ...]:
    """The tasks behind a name: one, or those of a group or a tag in lm-eval's order.

    Raises UsageError where lm-eval has no such name.
    """
    for path, config in definitions(name):  # one task needs no index
        if config.get("task") == name:
            return (Member(name, path, {}),)
    tasks, groups, tags = _index()

    def find(entry: Any, changes: dict, within: tuple[str, ...]) -> Iterator[Member]:
        if isinstance(entry, Mapping):
            own = {k: v for k, v in entry.items() if k not in GROUP_KEYS}
            inside = entry.get("task")
            if isinstance(inside, list):
                label = entry.get("group")
                for one in inside:
                    yield from find(one, changes | own, (*within, label) if label else within)
                return
            entry, changes = inside, changes | own
        if entry in tasks:
            yield Member(entry, tasks[entry], changes, within)
        elif entry in groups:
            yield from find(groups[entry], changes, within)
        elif entry in tags:
            for one in tags[entry]:
                yield from find(one, changes, within)
        else:
            raise UsageError(
                f"--task {PREFIX}{name:.60}: a group with a task that has no definition of its "
                f"own: {entry!r:.60}"
            )

    if name in groups or name in tags:
        found = {one.name: one for one in find(name, {}, ())}
        return tuple(found.values())
    raise UsageError(
        f"--task {PREFIX}{name:.60}: the installed lm-eval has no such task"
        f"{nearest(name, [*tasks, *groups, *tags])}"
    )


def definition_of(task: str) -> dict[str, Any]:
    """What decides how `lm_eval:<name>` asks and scores, ready for JSON; no function is imported.

    The files that define its tasks, the functions beside them, a group's changes, and lm-eval's
    version, which stands for its filters and metrics.
    """
    members = members_of(task.removeprefix(PREFIX))
    files = {file for one in members for file in _files_of(one.path)}
    return {
        "lm_eval": version("lm_eval"),
        "files": {os.path.relpath(f, tasks_dir()): file_sha256(f) for f in sorted(files)},
        "changes": {one.name: json.dumps(dict(one.changes), default=str) for one in members},
    }


def _files_of(path: Path) -> Iterator[Path]:
    """A definition, those that it includes, and the modules beside them."""
    yield from (path, *path.parent.glob("*.py"))
    for name in _list(read_definition(path.read_bytes()).get("include")):
        yield from _files_of(Path(os.path.normpath(path.parent / name)))


# of a group's definition; what else it says is for each of its tasks
GROUP_KEYS = ("group", "group_alias", "task", "tag", "aggregate_metric_list", "metadata")


def _list(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _problem(name: str, config: Mapping[str, Any]) -> str | None:
    """Why a task cannot be run here, or None."""
    asks = config.get("output_type", "generate_until")
    if "class" in config:
        return f"lm-eval's task {name} is a class in Python; only those in YAML can be run"
    if asks not in ("generate_until", *CHOICE):
        return (
            f"lm-eval's task {name} asks for {asks}, the likelihood of whole documents, which is "
            "not supported; generation and multiple choice can be run"
        )
    if config.get("unsafe_code"):  # loading alone asks the hub for a scorer and tries it out
        ours = next((one for one in IN_SANDBOX if name.startswith(one)), "humaneval")
        return f"lm-eval's {name} runs generated code without a sandbox; use --task {ours}"
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
    members = members_of(name)
    configs = {one.name: one.config for one in members}
    for one, config in configs.items():
        if problem := _problem(one, config):
            raise UsageError(f"--task {task}: {problem}")
    first, *others = configs.values()
    asks = first.get("output_type", "generate_until")
    notes, shots = [NOTE], int(first.get("num_fewshot") or 0)
    if left_out := _other_scores(first.get("metric_list") or []):
        notes.append(f"{', '.join(left_out)}: left out, no mean over the answers")
    if "n_shot" in name and not shots:
        notes.append("it has 0 worked examples unless --num_fewshot gives another number")
    if members[0].name != name:
        notes += _group_notes(task, name, configs)
    if any(int(one.get("num_fewshot") or 0) != shots for one in others):
        notes.append("its tasks have different numbers of worked examples, each its own")

    def build(data: Data | None, form_name: str):
        loaded = {one.name: _load(one) for one in members}
        if members[0].name == name:
            return loaded[name]
        rows = [dict(doc) for one in loaded.values() for doc in one.eval_docs]
        data = Data("hub", f"lm-eval {name}: {len(loaded)} tasks", {"": rows})
        parts = {one.name: [g for g in one.groups if g != name] for one in members}
        return group_task(name, data, form, loaded, parts)

    form = PromptForm(
        source=f"lm-eval's {name}",
        yaml=str(members[0].path.relative_to(tasks_dir())),
        num_fewshot=shots,
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
        kind="choice" if asks in CHOICE else "other",
        foreign=True,
        note="; ".join(notes),
    )


def _group_notes(task: str, name: str, configs: Mapping[str, dict]) -> list[str]:
    """What is to be said of a group's mean. Raises UsageError where its tasks share no score."""
    (first, one), *others = configs.items()
    for other, config in others:
        for key in ("output_type", "filter_list"):
            if _kind(one, key) != _kind(config, key):
                raise UsageError(
                    f"--task {task}: its tasks {first} and {other} differ in {key}, so that they "
                    "have no score in common; give its tasks one by one"
                )
    means = _index()[1].get(name, {}).get("aggregate_metric_list")
    if not means:
        return ["lm-eval has no mean of this group; the one here is over all documents"]
    if not all(m.get("weight_by_size", True) for m in _list(means)):
        return ["the mean is over all documents; lm-eval's gives each task the same weight"]
    return []


def _kind(config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    return [chain["name"] for chain in value] if isinstance(value, list) else value


def _load(member: Member):
    """lm-eval's task object, with what the others carry. Raises DataError."""
    from models.hub import beside, quiet

    def load():
        from lm_eval.api.task import ConfigurableTask

        config = with_included(member.path, functions=True) | member.changes
        if process := config.get("process_docs"):
            config["process_docs"] = _once(process)
        return ConfigurableTask(config=config)

    quiet()
    try:
        [task] = beside([load])
    except Exception as error:  # whatever the network, the cache or the task's own code raises
        raise DataError(
            f"lm-eval's task {member.name} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    config = task.config
    rows = {"": [dict(doc) for doc in task.eval_docs]}
    task.data = Data("hub", f"lm-eval {member.name}: {config.dataset_path}", rows)
    task.prefill = lambda doc: ""
    return task


def _once(process: Callable) -> Callable:
    """A task's `process_docs`, called once for each set of rows, with a seed of its own.

    lm-eval calls it whenever the documents are looked at, and some shuffle options with the global
    generator.
    """
    done: dict[int, tuple] = {}

    def docs(rows):
        if id(rows) not in done:
            state = random.getstate()
            random.seed(0)
            try:
                done[id(rows)] = rows, process(rows)
            finally:
                random.setstate(state)
        return done[id(rows)][1]

    return docs


def headline_of(task) -> str:
    """lm-eval's key of the first metric of the first filter that is a mean over the answers."""
    aggregation, filters = task.aggregation(), task.config.filter_list
    metric = next((name for name in aggregation if is_mean(aggregation, name)), "none")
    return f"{metric},{filters[0]['name'] if filters else 'none'}"
