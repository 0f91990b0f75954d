"""A group of lm-eval's tasks as one task: a score of each member, and the group's own mean.

A document of the group has the name of its member as field MEMBER. Prompts, worked examples,
filters and scores are the member's own. The members take turns: the first N documents are of N
members, so that --limit gives each about as many.

The scores of a document are its member's, and the same once more for each name that it counts
under: "acc", and "acc/mmlu_anatomy", "acc/mmlu_stem". Their means are the group's, the member's and
the part's. The group's mean is that over all documents, as lm-eval's with weight_by_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import zip_longest
from typing import Any

from tasks.base import PromptForm
from tasks.data import Data, Rows

MEMBER = "lm_eval_task"


def by_field(data: Data, field: str) -> dict[str, dict[str, Rows]]:
    """value of a field -> split -> rows, for the values that the data have, sorted."""
    found: dict[str, dict[str, Rows]] = {}
    for split, rows in data.splits.items():
        for row in rows:
            found.setdefault(row[field], {}).setdefault(split, []).append(row)
    return dict(sorted(found.items()))


def group_task(
    name: str,
    data: Data,
    form: PromptForm,
    members: Mapping[str, Any],
    parts: Mapping[str, Sequence[str]] | None = None,
):
    """The lm-eval task of a group.

    members: name -> lm-eval task; all ask for the same and have filters of the same names.
    parts:   member -> other names under which its scores count, see above.
    """
    return _group_class()(name, data, form, dict(members), parts or {})


@cache
def _group_class():
    from lm_eval.api.task import ConfigurableTask

    class GroupTask(ConfigurableTask):
        def __init__(self, name, data, form, members, parts):
            # not super().__init__: the members have a configuration, rows and filters of their own
            first = next(iter(members.values()))
            self.data, self.form, self.judging = data, form, None
            self.members = members
            self._labels = {member: (member, *parts.get(member, ())) for member in members}
            self._config = type(first.config)(
                task=name,
                output_type=first.OUTPUT_TYPE,
                num_fewshot=first.config.num_fewshot,
                repeats=first.config.repeats,
                filter_list=first.config.filter_list,
                metadata={"version": first.VERSION},
            )
            self.OUTPUT_TYPE, self.VERSION = first.OUTPUT_TYPE, first.VERSION
            self._instances = None
            self._filters = [_Filter(filters.name, members) for filters in first._filters]
            turns = zip_longest(
                *([doc | {MEMBER: m} for doc in task.eval_docs] for m, task in members.items())
            )
            self._docs = [doc for turn in turns for doc in turn if doc is not None]

        @property
        def eval_docs(self) -> Rows:
            return self._docs

        def _asked(self, doc: dict) -> tuple[Any, dict]:
            """The member of a document, and the document as the member has it."""
            return self.members[doc[MEMBER]], {k: v for k, v in doc.items() if k != MEMBER}

        def n_examples(self) -> int:
            return min(task.n_examples() for task in self.members.values())

        def prefill(self, doc: dict) -> str:
            task, own = self._asked(doc)
            return task.prefill(own)

        def fewshot_context(self, doc, num_fewshot, *args, **options):
            task, own = self._asked(doc)  # lm-eval passes the group's number, its first task's
            return task.fewshot_context(own, task.config.num_fewshot or 0, *args, **options)

        def construct_requests(self, doc, ctx, **options):
            task, own = self._asked(doc)
            made = task.construct_requests(own, ctx, **options)
            for request in made if isinstance(made, list) else [made]:
                request.doc = doc
            return made

        def process_results(self, doc: dict, results: list) -> dict[str, Any]:
            task, own = self._asked(doc)
            scores = task.process_results(own, results)
            names = self._labels[doc[MEMBER]]
            return scores | {f"{k}/{name}": v for k, v in scores.items() for name in names}

        def aggregation(self) -> dict[str, Callable]:
            return self._of_metrics(lambda task: task.aggregation())

        def higher_is_better(self) -> dict[str, bool]:
            return self._of_metrics(lambda task: task.higher_is_better())

        def _of_metrics(self, table: Callable[[Any], Mapping]) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for member, task in self.members.items():
                for metric, value in table(task).items():
                    found.setdefault(metric, value)
                    found |= {f"{metric}/{name}": value for name in self._labels[member]}
            return found

        def set_fewshot_seed(self, seed: int | None = None) -> None:
            for task in self.members.values():
                task.set_fewshot_seed(seed)

        def set_config(self, key: str, value: Any, update: bool = False) -> None:
            for task in (super(), *self.members.values()):
                task.set_config(key, value, update)

    # what else lm-eval asks of a document
    for method in ("doc_to_text", "doc_to_target", "doc_to_choice", "doc_to_prefix"):
        setattr(GroupTask, method, _delegated(method))
    return GroupTask


def _delegated(method: str) -> Callable:
    def ask(self, doc: dict, *args: Any):
        task, own = self._asked(doc)
        return getattr(task, method)(own, *args)

    return ask


class _Filter:
    """A filter chain of the group: that of the same name of each document's member."""

    def __init__(self, name: str, members: Mapping[str, Any]):
        self.name = name
        self._chains = {
            member: next(filters for filters in task._filters if filters.name == name)
            for member, task in members.items()
        }

    def apply(self, instances: Iterable[Any]) -> None:
        by_member: dict[str, list] = {}
        for instance in instances:
            by_member.setdefault(instance.doc[MEMBER], []).append(instance)
        for member, own in by_member.items():
            self._chains[member].apply(own)
