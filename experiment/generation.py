"""How the samples of a run come about: recalled, decoded here, or gathered from the other workers.

A `Generation` takes requests and a `decode` function. It halves the batch where memory runs out,
retries one by one what failed, measures time and memory, and keeps each sample as soon as it is
finished.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from decoding.likelihood import Likelihood
from decoding.row_state import Completion
from decoding.sampling import NoFiniteLogits
from experiment.progress import Progress
from experiment.result import profile
from experiment.sample import Request, Sample, completion_of, is_usable
from experiment.sample_cache import SampleCache
from utils import BadDataError, DllmexpError, EnvironmentProblem, numbered, out_of_memory

_log = logging.getLogger("dllmexp")


class LoadFailed(Exception):
    """The model cannot be loaded, for the reason in `__cause__`. It ends the run."""


@dataclass(frozen=True)
class Failure:
    """Why a batch failed, as text: an exception would keep its tensors."""

    traceback: str
    out_of_memory: bool
    nothing_finite: bool  # no logits of the whole batch were finite

    @classmethod
    def of(cls, error: Exception) -> Failure:
        return cls(
            "".join(traceback.format_exception(type(error), error, error.__traceback__)),
            out_of_memory(error),
            isinstance(error, NoFiniteLogits) and error.everywhere,
        )

    @property
    def reason(self) -> str:
        return self.traceback.splitlines()[-1]


class Clock:
    """Seconds of decoding: wall time with the device synchronised, without what is skipped."""

    def __init__(self, device: torch.device):
        self.device, self._skipped, self._last = device, 0.0, 0.0

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def lap(self) -> float:
        """Seconds since the lap before."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)
        now = time.perf_counter() - self._skipped
        seconds, self._last = now - self._last, now
        return seconds

    def skip(self, seconds: float) -> None:
        """Leave out seconds that belong to no sample."""
        self._skipped += seconds

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Leave out the time inside."""
        began = time.perf_counter()
        yield
        self.skip(time.perf_counter() - began)


@dataclass
class Generation:
    """The samples of one run.

    decode:     gives requests that share their stop strings, the longest prompt first, their
                completions, each as soon as it is finished, in any order. An exception out of it
                is the status of the samples that are missing, unless it is a DllmexpError or a
                LoadFailed: these end the run.
    read:       (request, completion, cost in seconds) -> sample.
    cache:      knows the kept samples, and which of the others this process decodes.
    batch_size: samples in flight; "auto" until `choose_batch_size`. Halved where memory runs out.
    halves:     False: a batch that does not fit into memory ends the run.
    score:      (doc, text) -> value in the headline metric, for progress; None where it is not
                known before the end.
    ahead:      is called with (doc, text) as soon as a sample is there, whoever decoded it.
    samples:    the sample of each request, in the order in which they arrived.
    halved:     batch sizes that did not fit into memory.
    peak_bytes: of the device, the largest over all sessions and workers; 0 on a CPU.
    """

    decode: Callable[[Sequence[Request]], Iterable[tuple[Request, Completion | Likelihood]]]
    read: Callable[[Request, Completion | Likelihood, float], Sample]
    clock: Clock
    cache: SampleCache = field(default_factory=lambda: SampleCache(generation_id=""))
    batch_size: int | str = 1
    halves: bool = True
    score: Callable[[Mapping[str, Any], str], float] | None = None
    ahead: Callable[[Mapping[str, Any], str], None] | None = None
    samples: dict[Request, Sample] = field(default_factory=dict)
    halved: list[int] = field(default_factory=list)
    peak_bytes: int = 0

    def run(self, requests: Sequence[Request], bar: tqdm) -> list[Sample]:
        """The samples of the requests, in their order; `bar` shows how many are there.

        Raises ShareDone in a worker that does not lead, once its share is decoded.
        """
        self._progress = Progress(bar)
        missing = [request for request in requests if not self._recall(request)]
        self._progress.start()
        self._decode_all([request for request in missing if self.cache.mine(request.share)])
        self.cache.share_done()
        self._gather([request for request in missing if request not in self.samples])
        return [self.samples[request] for request in requests]

    def choose_batch_size(self, n: int) -> None:
        """What --batch_size auto comes to."""
        self.batch_size = n
        self.cache.batches_of(n)
        _log.warning(f"--batch_size auto: {numbered(n, 'sample')} in flight")

    @property
    def first_batch_size(self) -> int | str:
        """The batch size before any was halved."""
        return self.halved[0] if self.halved else self.batch_size

    def profile(self) -> dict[str, Any]:
        """See experiment.result.profile for what the numbers mean."""
        import resource

        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak_bytes = {"device": self.peak_bytes or None, "host": host}
        return profile(self.samples.values(), peak_bytes=peak_bytes)

    # -- samples that are there already, or that others decode

    def _recall(self, request: Request) -> bool:
        """Whether the sample is kept already; then it is in `samples`."""
        kept = self.cache.recall(request.key)
        if kept is not None:
            self._take(request, kept)
        return kept is not None

    def _take(self, request: Request, kept: Mapping[str, Any]) -> None:
        """Add a kept sample, its text cut anew out of the canvas."""
        self.peak_bytes = max(self.peak_bytes, kept["meta"].get("peak_bytes") or 0)
        sample = self.read(request, completion_of(kept), kept["meta"]["cost_seconds"])
        self._add(sample, decoded_here=False)
        if self.ahead is not None:
            self.ahead(request.doc, sample.text)

    def _gather(self, requests: Sequence[Request]) -> None:
        """Wait for the samples of other workers; decode here what they leave undone."""
        for request, kept in self.cache.arriving([(r.key, r) for r in requests]):
            if kept is None:
                self._add(Sample(request, error=self.cache.error_of(request.key)))
            else:
                self._take(request, kept)
        left = [request for request in requests if request not in self.samples]
        if left:
            _log.warning(
                f"the other workers have ended and left {numbered(len(left), 'sample')} "
                "to be decoded here"
            )
            self._decode_all(left)

    def _add(self, sample: Sample, *, decoded_here: bool = True) -> None:
        self.samples[sample.request] = sample
        self._progress.add(sample, decoded_here=decoded_here)

    # -- samples that are decoded here

    def _decode_all(self, requests: Sequence[Request]) -> None:
        for stops in sorted({request.stops for request in requests}):
            # longest first: the batch that needs most memory is met at once, not after hours
            group = sorted(
                (request for request in requests if request.stops == stops),
                key=lambda r: (-len(r.prompt_ids), r.doc_id, r.repeat),
            )
            self._decode_group(group)

    def _decode_group(self, requests: Sequence[Request]) -> None:
        """Decode requests that share their stop strings, whatever happens to some of them.

        Where memory runs out the batch is halved for the rest of the run. Where the first batch
        has no finite logits at all, the run ends with BadDataError. Where anything else fails, the
        samples that were in flight - the first ones that are missing - are tried one by
        one, and the others go on.
        """
        while failure := self._attempt(requests):
            requests = [request for request in requests if request not in self.samples]
            n = len(requests) if self.batch_size == "auto" else self.batch_size
            if failure.out_of_memory and not self.halves:
                raise EnvironmentProblem(
                    f"--timed_batch {n}: out of memory; a smaller one or a free device helps"
                )
            if failure.out_of_memory and n > 1:
                self.halved.append(n)
                self.batch_size = n // 2
                _log.warning(
                    f"out of memory with {n} samples in flight; going on with {self.batch_size}"
                )
                continue
            if failure.nothing_finite and all(s.error for s in self.samples.values()):
                raise BadDataError(failure.reason.partition(": ")[2])
            suspects, requests = requests[:n], requests[n:]
            _log.warning(
                f"a batch of {numbered(len(suspects), 'sample')} failed ({failure.reason}); "
                "each is tried alone"
            )
            for request in suspects:
                if failure := self._attempt([request]):
                    self.cache.failed(request.key, failure.traceback)
                    self._add(Sample(request, error=failure.traceback))

    def _attempt(self, requests: Sequence[Request]) -> Failure | None:
        """Decode requests and keep their samples; why some are missing, or None where none is."""
        if not requests:
            return None
        waiting = set(requests)
        self.clock.lap()
        try:
            for request, completion in self.decode(requests):
                if request not in waiting:
                    raise ValueError("decode() answers a request that is not open")
                self._finish(request, completion)
                waiting.remove(request)
            if waiting:
                raise ValueError(f"decode() leaves {len(waiting)} of {len(requests)} requests open")
        except (DllmexpError, LoadFailed):
            raise  # a full disk, say: no fault of the samples
        except Exception as error:  # whatever it is, it is a status of these samples, no answer
            failure = Failure.of(error)
        else:
            return None
        if self.clock.on_cuda:
            try:
                torch.cuda.empty_cache()
            except RuntimeError:  # a CUDA context does not recover from some errors
                raise EnvironmentProblem(
                    f"the GPU takes no more work after {failure.reason}; the finished samples are "
                    "kept, and the same command goes on with the others"
                ) from None
        return failure

    def _finish(self, request: Request, completion: Completion | Likelihood) -> None:
        """Keep a sample the moment it leaves the engine."""
        sample = self.read(request, completion, self.clock.lap())
        if self.clock.on_cuda:
            peak = torch.cuda.max_memory_allocated(self.clock.device)
            self.peak_bytes = max(self.peak_bytes, peak)
        result, meta = sample.kept(self.peak_bytes or None)
        record = {"status": "ok", "result": result, "meta": meta | {"provenance": {}}}
        if not is_usable(record):  # it could be written, and never be read again
            raise ValueError(
                "decode() gives a Completion that cannot be kept: token_ids and committed_at must "
                "be equally many of Python's ints, counts ints of at least 0, seconds a number and "
                "finish_reason a text"
            )
        with self.clock.stopped():
            score = self.score(request.doc, sample.text) if self.score else None
        self.cache.remember(request.key, result, meta, score)
        self._add(sample)
        if self.ahead is not None:
            with self.clock.stopped():
                self.ahead(request.doc, sample.text)
