"""The samples of one run: which are known, which this process decodes, where they are kept.

It stands between the harness, which has prompts and tensors, and the store, which has keys and
JSON. It keeps what the engine did: the canvas, and which forward pass committed which position.
Text, extraction and score are derived from that again, so a change of scoring decodes nothing.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from experiment.status import StatusFile
from experiment.store import Store, sample_key
from experiment.workers import WorkerInfo
from utils import SCORING_VERSION, canonical_json

J = TypeVar("J")
WAIT_S = 0.2  # between two reads of the samples of other workers


class ShareDone(Exception):
    """A worker other than the leader has decoded its share and can end."""


@dataclass
class SampleCache:
    """The samples of one run.

    store:      keeps the samples; None keeps nothing (a run that scores given answers).
    worker:      this process among the workers of the run.
    provenance: host, device, versions and batch size of samples made now. Kept with each sample,
                not part of its key.
    alive:      whether a worker that this process waits for may still deliver; None: the status
                files say it.
    sources:    provenance, as JSON -> number of samples made with it.
    status:     shows the progress of this process to others; None shows nothing.
    """

    generation_id: str
    store: Store | None = None
    worker: WorkerInfo = WorkerInfo()
    provenance: dict[str, Any] = field(default_factory=dict)
    alive: Callable[[], bool] | None = None
    sources: Counter[str] = field(default_factory=Counter)
    status: StatusFile | None = None

    def key(self, prompt: str, repeat: int, stops: Sequence[str]) -> str:
        """Key of one sample: see store.sample_key. Independent of order, batch and device."""
        return sample_key(self.generation_id, prompt, repeat, stops)

    def mine(self, key: str) -> bool:
        """Whether this process decodes the sample: a function of the key, alike in every worker.

        key: of the sample; of a likelihood that of its context, as its options share rows.
        """
        return int(key[:15], 16) % self.worker.size == self.worker.rank

    def recall(self, key: str) -> dict[str, Any] | None:
        """{"result": ..., "meta": ...} of a finished sample, or None."""
        kept = self.store.get(key) if self.store is not None else None
        if kept is not None:
            self._count(kept["meta"]["provenance"])
        return kept

    def remember(
        self, key: str, result: dict[str, Any], meta: dict[str, Any], score: float | None = None
    ) -> None:
        """Keep a finished sample; on return it survives the death of the process.

        score: its value in the headline metric, if that is known already; only progress shows it,
               until SCORING_VERSION changes.
        Raises as Store.put.
        """
        self.worker.check()
        self._count(self.provenance)
        meta = meta | {"provenance": self.provenance}
        if score is not None:
            meta["score"] = {"value": score, "version": SCORING_VERSION}
        if self.store is not None:
            self.store.put(key, {"status": "ok", "result": result, "meta": meta})
        if self.status is not None:
            self.status.sample(result, meta)

    def batches_of(self, n: int) -> None:
        """Samples are made in batches of n from now on."""
        self.provenance["batch_size"] = n

    def failed(self, key: str, error: str) -> None:
        """Note that a sample failed: the leader of this run sees it, the next run tries again."""
        self.worker.check()
        if self.store is not None:
            meta = {"error": error, "session": self.worker.session, "provenance": self.provenance}
            self.store.put(key, {"status": "error", "result": {}, "meta": meta})
        if self.status is not None:
            self.status.failed()

    def share_done(self) -> None:
        """Call after the share of this process is decoded. Raises ShareDone unless it leads."""
        if self.store is not None:
            self.store.flush()
        if not self.worker.leads:
            self.leave()
        if self.status is not None:
            self.status.say("scoring")

    def leave(self) -> None:
        """End this process before there is a result. Raises ShareDone."""
        if self.status is not None:
            self.status.say("stopped" if self.worker.leads else "done")
        raise ShareDone

    def arriving(
        self, waiting: Sequence[tuple[str, J]]
    ) -> Iterator[tuple[J, dict[str, Any] | None]]:
        """(key, item) pairs of other workers -> (item, record) as it arrives; None if it failed.

        Ends when all have arrived, or when no worker is left to deliver the rest.
        """
        left: dict[str, list[J]] = {}
        for key, item in waiting:  # two documents may have the same prompt
            left.setdefault(key, []).append(item)
        while left:
            # asked before the store is read, which then has all that a worker wrote before it ended
            alive = (self.alive or self.status.awaits_ranks)()
            self.store.refresh()
            errors = {r["key"]: r["meta"] for r in self.store.errors()}
            for key in list(left):
                kept = self.recall(key)
                if kept or errors.get(key, {}).get("session") == self.worker.session:
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
        """Every provenance with its number of samples, the most frequent first."""
        return [json.loads(text) | {"samples": n} for text, n in self.sources.most_common()]
