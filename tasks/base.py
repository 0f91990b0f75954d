"""A benchmark: its data, its prompt forms, and the lm-eval task made from both.

A benchmark is one file in this folder that exports `SPEC: TaskSpec`. `build_task(SPEC, data_dir,
form)` gives lm-eval 0.4.8 a `ConfigurableTask` that reads local files, or with data_dir None the
hub's data set. So the index of all tasks is never built and `evaluate.load` is never called.
Prompts, few-shot examples, filters and metrics come from lm-eval's installed YAML files wherever it
has them.

The task object has these attributes in addition to lm-eval's:
    task.form           the PromptForm
    task.data           the Data: its name, where it was read, its rows
    task.prefill(doc)   -> str, the beginning of the answer that the prompt form gives the model
                        ("" for most). It is NOT in lm-eval's prompt. The generating code appends it
                        to the rendered prompt by string concatenation, and returns only the text
                        after it. (lm-eval itself lets the chat template render it, and LLaDA's
                        template trims its last newline.) Scoring puts it back in front of the
                        answer.
    task.judging        how the answers of a code benchmark are judged (code.Judging), else None

Only the standard library is imported at the top: checking data must not wait for lm-eval.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from tasks.data import Data, DataError, Rows, Source, load_data, missing_extra
from utils import DllmexpError, EnvironmentProblem, UsageError


@dataclass(frozen=True)
class PromptForm:
    """One way to ask a benchmark's questions.

    source:       where the wording comes from.
    yaml:         lm-eval's installed definition it builds on, e.g. "gsm8k/gsm8k-cot.yaml"; "" for
                  none.
    doc_to_text:  None: the installed one; a template; or a function installed template -> template.
    doc_to_target: as doc_to_text; it is only read for few-shot examples.
    num_fewshot:  default number of worked examples.
    multiturn:    examples are chat turns of their own, not text in the one user turn.
    prefill:      template of the beginning of the answer, see task.prefill above.
    until:        stop strings; None: the installed ones.
    clean:        the answer is cleaned before it is scored (code: always; see truthfulqa).
    """

    source: str
    yaml: str = ""
    doc_to_text: str | Callable[[str], str] | None = None
    doc_to_target: str | Callable[[str], str] | None = None
    num_fewshot: int = 0
    multiturn: bool = False
    prefill: str = ""
    until: tuple[str, ...] | None = None
    clean: bool = True


@dataclass(frozen=True)
class TaskSpec:
    """A benchmark.

    build:    (data, form) -> the lm-eval task. Call build_task, which also reads the data.
    n_docs:   documents of the original test set.
    gen_length: the canvas under the uniform protocol, in tokens.
    sources:  the original files below data_dir; `files` is their paths.
    hub:      (data set, configuration), read where there is no data_dir; None: there is none.
    splits:   rows by file -> rows by split, in the hub's naming; None: the one file is the
              eval_split.
    eval_split: the split with the questions.
    headline: lm-eval's key of the metric that stands for the benchmark.
    kind:     "code" runs the answers as programs; "choice" compares likelihoods; any other word:
              "math", "qa".
    extra:    the extra of lm-eval that scoring needs, a name of tasks.data.EXTRAS.
    subsets:  configurations of the hub's data set that are read together, in place of one; each row
              has the name of its own as field "subset".
    foreign:  lm-eval reads its data by itself, see tasks/installed.py.
    target:   doc -> the expected answer, ready for JSON; None: lm-eval's doc_to_target.
    note:     where the scoring knowingly departs from lm-eval's; stored with every result.
    """

    name: str
    build: Callable[[Data, str], object]
    n_docs: int
    sources: tuple[Source, ...]
    forms: Mapping[str, PromptForm]
    headline: str
    hub: tuple[str, str | None] | None = None
    subsets: tuple[str, ...] = ()
    splits: Callable[[dict[str, Rows]], dict[str, Rows]] | None = None
    eval_split: str = "test"
    kind: str = "qa"
    foreign: bool = False
    gen_length: int = 256
    target: Callable[[dict], object] | None = None
    note: str | None = None
    extra: str | None = None

    @property
    def scores_alone(self) -> bool:
        """Whether an answer can be scored at once, without the others: no program is run for it."""
        return self.kind not in ("code", "choice") and not self.foreign

    @property
    def default_form(self) -> str:
        """The prompt form of the uniform protocol."""
        return "chat" if "chat" in self.forms else next(iter(self.forms))

    @property
    def has_examples(self) -> bool:
        """Whether there are worked examples apart from the document that is asked."""
        of_forms = any(form.num_fewshot for form in self.forms.values())
        return self.foreign or of_forms or bool(set(self.split_names) - {self.eval_split})

    @property
    def split_names(self) -> tuple[str, ...]:
        """The splits that are read, in the hub's naming."""
        return tuple(self.split({path: [] for path in self.files})) if self.files else ()

    def split(self, rows: dict[str, Rows]) -> dict[str, Rows]:
        """Rows by file -> rows by split."""
        return self.splits(rows) if self.splits else {self.eval_split: rows[self.sources[0].path]}

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(s.path for s in self.sources)


def build_task(
    spec: TaskSpec, data_dir: str | os.PathLike | None, form: str, num_fewshot: int | None = None
):
    """The lm-eval ConfigurableTask of one benchmark, prompt form and number of examples.

    num_fewshot: None means the form's number. Pass the task as `simple_evaluate(tasks=[task],
    num_fewshot=None, task_manager=TaskManager(include_defaults=False))`. Few-shot examples become
    turns or text as the form says, whatever `fewshot_as_multiturn` is.
    Raises DataError, and ValueError for an unknown form or a negative num_fewshot.
    """
    if form not in spec.forms:
        raise ValueError(f"unknown prompt form {form!r}; {spec.name} has: {', '.join(spec.forms)}")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"num_fewshot is {num_fewshot}, it must be 0 or more")
    if missing := missing_extra(spec.extra):
        raise EnvironmentProblem(missing)
    if spec.foreign:
        task = spec.build(None, form)
        if num_fewshot not in (None, spec.forms[form].num_fewshot):  # a group's may differ
            task.set_config("num_fewshot", num_fewshot)
        return task
    data = load_data(spec, data_dir)
    try:
        task = spec.build(data, form)
    except DllmexpError:
        raise
    except Exception as error:  # of a new benchmark's own code or of lm-eval's checks
        raise UsageError(
            f"TASKS[{spec.name!r}]: no lm-eval task: {type(error).__name__}: {error}; "
            f"the data have the splits {', '.join(data.splits)}"
        ) from error
    if fault := _fault(spec, task):
        raise UsageError(f"TASKS[{spec.name!r}]: {fault}")
    keys = [f"{metric},{chain.name}" for chain in task._filters for metric in task.aggregation()]
    if spec.headline not in keys:
        raise UsageError(
            f"TASKS[{spec.name!r}]: no headline {spec.headline!r}; there are: {', '.join(keys)}"
        )
    if num_fewshot is not None:
        available = task.n_examples()
        if num_fewshot > available:
            absent = [s.path for s in spec.sources if s.optional and data_dir is not None]
            way_out = f"give at most {available}"
            if absent and not available:
                way_out = f"they come from {data_dir}/{absent[0]}, which does not exist"
            raise DataError(
                f"--num_fewshot {num_fewshot}: {spec.name} has {available} worked examples; "
                f"{way_out}"
            )
        task.set_config("num_fewshot", num_fewshot)
    return task


def _fault(spec: TaskSpec, task) -> str | None:
    """Why what `build` returned cannot be run as the kind that the benchmark says it is."""
    asks = getattr(task, "OUTPUT_TYPE", None)
    if asks is None:
        return f"build must return a task of make_task, not {task!r:.60}"
    if (spec.kind == "choice") == (asks == "generate_until"):
        return f"kind {spec.kind!r} does not go with the output_type {asks!r}"
    if spec.kind == "code" and getattr(task, "judging", None) is None:
        return "kind 'code' needs a judging, make_task(..., judging); tasks/mbpp.py has one"
    return None


def make_task(data: Data, form: PromptForm, config: dict, judging: object = None):
    """The task object from an lm-eval configuration, the form's texts and the rows of `data`.

    `process_docs` is applied once. Splits that the data lack are left out of the configuration.
    """
    if isinstance(form.doc_to_text, str):
        config["doc_to_text"] = form.doc_to_text
    elif form.doc_to_text is not None:
        config["doc_to_text"] = form.doc_to_text(config["doc_to_text"])
    if isinstance(form.doc_to_target, str):
        config["doc_to_target"] = form.doc_to_target
    elif form.doc_to_target is not None:
        config["doc_to_target"] = form.doc_to_target(config["doc_to_target"])
    config["num_fewshot"] = form.num_fewshot
    if config["output_type"] == "generate_until":
        # only stop strings are the task's: canvas, temperature and sampler belong to the protocol
        until = (
            form.until
            if form.until is not None
            else (config.get("generation_kwargs") or {}).get("until", ["\n\n"])
        )
        config["generation_kwargs"] = {"until": list(until), "do_sample": False}
    for key in ("tag", "dataset_path", "dataset_name", "dataset_kwargs"):
        config.pop(key, None)
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if not data.splits.get(config.get(key)):
            config.pop(key, None)
    return task_class()(data, form, config, judging)


@cache
def task_class():
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.utils import apply_template

    class LocalTask(ConfigurableTask):
        """lm-eval's task on rows that are already here."""

        def __init__(self, data: Data, form: PromptForm, config: dict, judging: object):
            # download() runs inside super()
            self.data, self.form, self.judging = data, form, judging
            self.process_docs = config.pop("process_docs", None) or (lambda docs: docs)
            super().__init__(config=config)

        def download(self, *_args, **_kwargs) -> None:
            self.dataset = datasets.DatasetDict(
                {
                    name: self.process_docs(datasets.Dataset.from_list(rows))
                    for name, rows in self.data.splits.items()
                    if rows
                }
            )

        def n_examples(self) -> int:
            """How many worked examples a prompt can have."""
            config = self.config
            if config.fewshot_config and config.fewshot_config.get("samples"):
                return len(self.fewshot_docs())
            split = config.fewshot_split or config.training_split
            asked = config.test_split or config.validation_split
            return len(self.fewshot_docs()) - (split == asked) if split else 0

        def prefill(self, doc: dict) -> str:
            return apply_template(self.form.prefill, doc) if self.form.prefill else ""

        def fewshot_context(
            self,
            doc,
            num_fewshot,
            system_instruction=None,
            apply_chat_template=False,
            fewshot_as_multiturn=False,
            chat_template=None,
            gen_prefix=None,
        ):
            multiturn = self.form.multiturn and apply_chat_template
            if (
                apply_chat_template
                and num_fewshot
                and not multiturn
                and not hasattr(self.sampler, "get_chat_context")
            ):
                # 0.4.8 draws twice and shows the second: later versions get the same prompts so
                self.sampler.sample(num_fewshot)
            return super().fewshot_context(
                doc,
                num_fewshot,
                system_instruction,
                apply_chat_template,
                multiturn,
                chat_template,
                gen_prefix,
            )

    return LocalTask


def installed_config(yaml_path: str, functions: bool = False) -> dict:
    """lm-eval's definition, e.g. "gsm8k/gsm8k.yaml", and what it includes, as a dict.

    functions: see read_definition.
    """
    return with_included(tasks_dir() / yaml_path, functions)


def with_included(path: Path, functions: bool = False) -> dict:
    """The definition in a file of lm-eval's, together with the files that it includes."""
    config = read_definition(path.read_bytes(), path.parent if functions else None)
    names = config.pop("include", ())
    whole: dict[str, Any] = {}
    for name in [names] if isinstance(names, str) else names:
        whole |= with_included(path.parent / name, functions)
    return whole | config


def read_definition(text: bytes, folder: Path | None = None) -> dict:
    """A definition of lm-eval's as a dict. Raises yaml.YAMLError.

    folder: of the file; `!function utils.f` is imported from there. None: it stays the string
            "utils.f", because those of humaneval and mbpp ask the hub and run code when imported.
    """
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        pass

    def function(loader, node):
        name = loader.construct_scalar(node)
        return name if folder is None else installed_function(folder, name)

    Loader.add_constructor("!function", function)
    return yaml.load(text, Loader=Loader)


def installed_function(folder: Path, name: str):
    """A function of lm-eval's task definitions, e.g. "utils.process_docs" in their folder."""
    module, _, function = name.rpartition(".")
    return getattr(_module(folder / f"{module}.py"), function)


@cache
def _module(path: Path):
    spec = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def installed_constant(module_path: str, function: str):
    """The value of a function of lm-eval's that only returns a literal, without importing it."""
    tree = ast.parse((tasks_dir() / module_path).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return ast.literal_eval(node.body[-1].value)
    raise AssertionError(f"{module_path} has no function {function}: not lm-eval 0.4.8?")


def tasks_dir() -> Path:
    """The folder of lm-eval's installed task definitions."""
    return Path(find_spec("lm_eval").submodule_search_locations[0]) / "tasks"
