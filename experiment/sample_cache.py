"""Which samples are known already, which are this process's to decode, and where a finished one is kept.

Stands between the harness, which has prompts and tensors, and the store, which has keys and JSON. What is kept of a
sample is what the engine did - the canvas and which forward pass committed what - so that text, extraction and score
are made anew from it, and changing those decodes nothing again.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from experiment.briefs import Briefs
from experiment.store import Store, sample_key
from experiment.workers import WorkerInfo
from utils import canonical_json

J = TypeVar("J")
WAIT_S = 0.2  # between two looks at what other workers have written


class ShareDone(Exception):
    """A worker that is not the leader has decoded its share: there is nothing left for it to do."""


@dataclass
class SampleCache:
    """The samples of one run.

    store:      where they are kept; None keeps nothing (a run whose answers are given).
    place:      this process among the workers of the run.
    provenance: where samples are made now: host, device, versions, batch size. Kept with each, never in its key.
    alive:      whether workers that this process waits for may still deliver.
    sources:    provenance, as JSON -> samples made so; more than one means a run put together from several.
    """

    config_id: str
    store: Store | None = None
    place: WorkerInfo = WorkerInfo()
    provenance: dict[str, Any] = field(default_factory=dict)
    alive: Callable[[], bool] = lambda: True
    sources: Counter[str] = field(default_factory=Counter)
    briefs: Briefs = field(default_factory=Briefs)

    def key(self, prompt: str, repeat: int, stops: Sequence[str]) -> str:
        """Key of one sample: see store.sample_key. Order, batch, device and document number are not in it."""
        return sample_key(self.config_id, prompt, repeat, stops)

    def mine(self, key: str) -> bool:
        """Whether this process is to decode the sample. Goes by the key, so it is the same in every worker."""
        return int(key[:15], 16) % self.place.size == self.place.rank

    def recall(self, key: str) -> dict[str, Any] | None:
        """{"result": ..., "meta": ...} of a finished sample, or None."""
        kept = self.store.get(key) if self.store is not None else None
        if kept is not None:
            self._count(kept["meta"]["provenance"])
        return kept

    def remember(
        self, key: str, result: dict[str, Any], meta: dict[str, Any], score: float | None = None
    ) -> None:
        """Keep a finished sample; on return it survives the death of the process. Raises as Store.put.

        score: what it counts for in the headline metric, where that is known already; only shown.
        """
        self.place.check()
        self._count(self.provenance)
        if self.store is not None:
            self.store.put(
                key,
                {"status": "ok", "result": result, "meta": meta | {"provenance": self.provenance}},
            )
            told = (
                meta["doc_id"],
                meta["tokens_returned"],
                result["nfe"],
                meta["cost_seconds"],
                score,
            )
            self.briefs.add(self.store.shard, key, *told)

    def failed(self, key: str, error: str) -> None:
        """Note that a sample failed: seen by the leader of this run, tried again by the next one."""
        self.place.check()
        if self.store is not None:
            meta = {"error": error, "session": self.place.session, "provenance": self.provenance}
            self.store.put(key, {"status": "error", "result": {}, "meta": meta})
            self.briefs.add(self.store.shard, key)

    def share_done(self) -> None:
        """After the own share: a worker that does not lead leaves here. Raises ShareDone."""
        if self.store is not None:
            self.store.flush()
        if not self.place.leads:
            raise ShareDone

    def arriving(
        self, waiting: Sequence[tuple[str, J]]
    ) -> Iterator[tuple[J, dict[str, Any] | None]]:
        """(key, item) pairs that others decode -> (item, what was kept) as it arrives; None where it failed there.

        Ends when all have arrived, or when nobody is left to deliver the rest.
        """
        left: dict[str, list[J]] = {}
        for key, item in waiting:  # two documents may ask the same
            left.setdefault(key, []).append(item)
        while left:
            alive = (
                self.alive()
            )  # asked before looking: what a worker wrote before it ended is seen below
            self.store.refresh()
            errors = {r["key"]: r["meta"] for r in self.store.errors()}
            for key in list(left):
                kept = self.recall(key)
                if kept or errors.get(key, {}).get("session") == self.place.session:
                    yield from ((item, kept) for item in left.pop(key))
            if not alive:
                return
            if left:
                time.sleep(WAIT_S)

    def error_of(self, key: str) -> str:
        """The traceback of a sample that failed in another worker."""
        return next(r["meta"]["error"] for r in self.store.errors() if r["key"] == key)

    def _count(self, provenance: dict[str, Any]) -> None:
        self.sources[canonical_json(provenance)] += 1

    def provenances(self) -> list[dict[str, Any]]:
        """Where the samples were made, each with how many, most first."""
        return [json.loads(text) | {"samples": n} for text, n in self.sources.most_common()]
