"""Any other generation task that lm-eval has installed, by its name: `--task lm_eval:<name>`.

Its prompts, filters and metrics are lm-eval's own; its data come from the hub. Nothing official is
known of how the models here are evaluated on it. The definition is found by searching the installed
files for the name, because building the index of all tasks takes longer than many a run.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from tasks.base import PromptForm, TaskSpec, tasks_dir
from tasks.data import Data, DataError
from tasks.protocols import PREFIX

FORM = "lm_eval"
NOTE = (
    "nothing official is known of how these models are evaluated on this task: "
    "prompts and metrics are lm-eval's"
)


def definition_of(name: str) -> Path | None:
    """The installed YAML file that defines the task, or None."""
    line = re.compile(
        rb"^task:\s*[\"']?" + re.escape(name.encode()) + rb"[\"']?\s*(#.*)?$", re.MULTILINE
    )
    for folder, _, files in os.walk(tasks_dir()):
        for file in files:
            if file.endswith(".yaml"):
                path = Path(folder, file)
                text = path.read_bytes()
                if name.encode() in text and line.search(text):
                    return path
    return None


def runs_code(path: Path) -> bool:
    """Whether a definition, or one that it includes, has lm-eval execute what a model wrote."""
    text = path.read_bytes()
    if re.search(rb"^unsafe_code:\s*true\b", text, re.MULTILINE | re.IGNORECASE):
        return True
    include = re.search(rb"^include:\s*[\"']?([^\s\"'#]+)", text, re.MULTILINE)
    included = path.parent / include[1].decode() if include else None
    return included is not None and included.is_file() and runs_code(included)


def fewshot_of(path: Path) -> int:
    """Number of worked examples by a definition, or by one that it includes."""
    text = path.read_bytes()
    found = re.search(rb"^num_fewshot:\s*(\d+)", text, re.MULTILINE)
    if found:
        return int(found[1])
    include = re.search(rb"^include:\s*[\"']?([^\s\"'#]+)", text, re.MULTILINE)
    included = path.parent / include[1].decode() if include else None
    return fewshot_of(included) if included is not None and included.is_file() else 0


def spec_of(task: str) -> TaskSpec:
    """The benchmark behind `lm_eval:<name>`. Raises DataError where lm-eval has no such task."""
    name = task.removeprefix(PREFIX)
    path = definition_of(name)
    if path is None:
        raise DataError(
            [f"--task {task}: the installed lm-eval defines no task {name!r} in a file of its own"]
        )
    # before it is loaded: loading alone asks the hub for a scorer and tries it out
    if runs_code(path):
        raise DataError(
            [
                f"lm-eval's task {name} runs generated code in this process; "
                "--task humaneval and mbpp run it apart"
            ]
        )

    def build(data: Data | None, form: str):
        return _load(name, path)

    form = PromptForm(
        source=f"lm-eval's {name}",
        yaml=str(path.relative_to(tasks_dir())),
        num_fewshot=fewshot_of(path),
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
        note=NOTE,
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
    if task.OUTPUT_TYPE != "generate_until":
        raise DataError(
            [f"lm-eval's task {name} asks for {task.OUTPUT_TYPE}; only generation tasks can be run"]
        )
    rows = {"": [dict(doc) for doc in task.eval_docs]}
    task.data = Data("hub", f"lm-eval {name}: {config.dataset_path}", rows)
    task.prefill = lambda doc: ""
    return task


def headline_of(task) -> str:
    """lm-eval's key of the first metric of the first filter."""
    filters = task.config.filter_list
    return f"{task.config.metric_list[0]['metric']},{filters[0]['name'] if filters else 'none'}"
