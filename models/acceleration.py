"""Optional accelerations: CUDA graphs, which keep the bits, and torch.compile, which may not.

Neither has been measured on a GPU. Where one does not work, a note says so and the plain path runs.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from models.attention import Packed, Sizes
from models.config import ModelConfig
from models.layers import Parts, parts_of
from models.packing import COLUMNS, Inputs, Plan, to_device, up_to

# Above this many columns a forward pass takes longer than its launches, and a graph gains nothing.
MOST_COLUMNS = 1024
MOST_GRAPHS = 64

# Captures a function without arguments: (replay, result), and each replay overwrites the result.
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


class Model(Protocol):
    """The parts of a Transformer that are used here."""

    config: ModelConfig
    device: torch.device
    layers: Iterable[Any]
    varlen: dict[str, int] | None
    acceleration: Acceleration

    def predict(self, tokens: Tensor, spans: Any, rows: Tensor) -> Tensor: ...

    def answer(self, inputs: Inputs, packed: Packed, last: Packed, cache: Any) -> Tensor: ...

    def prepared(
        self, tokens: np.ndarray, plan: Plan, cache: Any
    ) -> tuple[Inputs, Packed, Packed]: ...

    def rope_table(self, end: int) -> tuple[Tensor, Tensor]: ...


@dataclass
class Acceleration:
    """The accelerations of a model. settled: notes on the requests whose outcome cannot change."""

    graphs: Graphs | None = None
    settled: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, model: Model, compile: bool, cuda_graphs: bool, tell: Callable[[str], None]
    ) -> Acceleration:
        """Set up what is requested; the time for it counts as loading, not as decoding."""
        notes, graphs, parts = [], None, parts_of(model.config)

        def fail(note: str) -> None:
            notes.append(note)
            tell(f"note: {note}")

        _use(model, parts)
        model.acceleration = cls()
        if compile:
            try:
                _use(model, Parts(*(torch.compile(part, dynamic=True) for part in parts)))
                _warm_up(model)
                notes.append("compiled")
            # compilers fail in many ways, each of which leaves the plain path
            except Exception as error:
                _use(model, parts)
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                fail(f"compile failed, the plain path runs: {type(error).__name__}: {reason}")
        if cuda_graphs and model.device.type != "cuda":
            fail(f"CUDA graphs: none on {model.device.type}")
        elif cuda_graphs and model.config.causal:
            fail("CUDA graphs: none for a causal model")
        elif cuda_graphs:
            graphs = Graphs(model, capturing(model.device), tell)
        return cls(graphs, tuple(notes))

    @property
    def notes(self) -> tuple[str, ...]:
        """The outcome of each request so far, for the result. Graphs may be given up later."""
        return self.settled if self.graphs is None else (*self.settled, self.graphs.note)

    @property
    def seconds(self) -> float:
        """Time spent on capturing so far; it is not part of the time for decoding."""
        return 0.0 if self.graphs is None else self.graphs.seconds


def _use(model: Model, parts: Parts) -> None:
    for layer in model.layers:
        layer.parts = parts


@torch.inference_mode()
def _warm_up(model: Model) -> None:
    """Compile for any number of columns and rows.

    The columns are two multiples of 128 apart from a head's width: where a number of columns equals
    another size, the compiler takes both for one and compiles again for the next number.
    """
    for lengths in ((128,) * 3, (128,) * 5):
        tokens = torch.zeros(sum(lengths), dtype=torch.int64)
        model.predict(tokens, [(0, n, n) for n in lengths], torch.arange(5, 5 + 10 * len(lengths)))


def capturing(device: torch.device) -> Capture:
    """A Capture that makes CUDA graphs on `device`.

    Two runs before the capture settle allocations and the choice of kernels. All graphs share one
    memory pool: only one runs at a time, and its result is copied before the next one runs.
    """
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def captured(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        here, graph = torch.cuda.current_stream(device), torch.cuda.CUDAGraph()
        # the device may not be the current one, and a failed capture stays on its own stream
        with torch.cuda.device(device), torch.cuda.stream(here):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                for _ in range(2):
                    run()
            here.wait_stream(stream)
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                out = run()
        return graph.replay, out

    return captured


def bucket_of(plan: Plan, cached: bool) -> Sizes:
    """The sizes that a graph is captured for; many passes share them."""
    exact = Sizes.of(plan, cached, causal=False)
    return replace(
        exact,
        sequences=(1 << (len(plan.spans) - 1).bit_length()) + 1,
        most_q=up_to(exact.most_q, COLUMNS["cuda"]),
        most_k=up_to(exact.most_k, COLUMNS["cuda"]),
    )


class Graphs:
    """CUDA graphs of a model's forward pass, one for each `bucket_of` it.

    With a cache they belong to its tensor, and passes over whole canvases have none.
    Beyond MOST_GRAPHS all are dropped: to drop one frees memory that the others share
    (pytorch/pytorch#193402). Their results share one tensor. Each graph is compared with the plain
    path when it is captured, bit for bit. If one differs or cannot be captured, all are given up,
    and a note says so.
    """

    def __init__(self, model: Model, capture: Capture, tell: Callable[[str], None]):
        self.model, self.capture, self.tell = model, capture, tell
        # inputs, replay, and the graph's rotary table, which the model may replace
        self.kept: dict[Sizes, tuple[Tensor, Callable[[], None], tuple[Tensor, Tensor]]] = {}
        self.out: Tensor | None = None
        self.slab: weakref.ref[Tensor] | None = None  # of the cache that the graphs write
        self.seconds, self.works, self.note = 0.0, True, "CUDA graphs"
        if model.varlen is None:
            self._give_up("need the varlen attention kernel, which does not run here")

    def logits(self, tokens: np.ndarray, plan: Plan, cache: Any) -> Tensor | None:
        """Logits [R', V] for tokens [T'] int64; None if the plain path must run."""
        if not self.works or not plan.n_rows or len(plan.positions) > MOST_COLUMNS:
            return None
        # a pass with whole canvases among its blocks is as rare as its sizes
        if cache is not None and any(s.hi > s.lo == 0 and s.hi == s.kv_end for s in plan.spans):
            return None
        if cache is not None and (self.slab is None or self.slab() is not cache.slab):
            self._drop()
            self.slab = weakref.ref(cache.slab)
        bucket = bucket_of(plan, cache is not None)
        arrays = bucket.arrays(tokens, plan, () if cache is None else cache.starts)
        [filled] = to_device(self.model.device, np.concatenate(arrays))
        if bucket not in self.kept:
            self._capture(bucket, filled, tokens, plan, cache)
            if not self.works:
                return None
        inputs, replay, _ = self.kept[bucket]
        inputs.copy_(filled)
        replay()
        return self.out[: bucket.back].clone()

    def _capture(
        self, bucket: Sizes, filled: Tensor, tokens: np.ndarray, plan: Plan, cache: Any
    ) -> None:
        started, model = time.perf_counter(), self.model
        # with a cache both write what is already there, or will be
        plain = model.answer(*model.prepared(tokens, plan, cache), cache)
        if len(self.kept) == MOST_GRAPHS or self.out is None or bucket.back > len(self.out):
            self._drop()
            self.out = plain.new_empty((max(bucket.back, len(plain)), plain.shape[1]))
        inputs, out = filled.clone(), self.out[: bucket.back]
        try:
            replay, _ = self.capture(
                lambda: out.copy_(model.answer(*bucket.split(inputs, model.varlen), cache))
            )
            # a graph that does nothing must not pass with the result of its capture
            out.fill_(torch.nan)
            replay()
            same = torch.equal(out[: plan.n_rows], plain[: plan.n_rows])
        except RuntimeError as error:
            same, reason = False, f"cannot be captured ({str(error).splitlines()[0]})"
        else:
            reason = "do not keep the bits of the plain path here"
        if same:
            self.kept[bucket] = inputs, replay, model.rope_table(0)
        else:
            self._give_up(reason)
        self.seconds += time.perf_counter() - started

    def _give_up(self, reason: str) -> None:
        self.works, self.note = False, f"CUDA graphs {reason}; the plain path runs"
        self._drop()
        self.out = None
        self.tell(f"note: {self.note}")

    def _drop(self) -> None:
        if self.kept and self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        self.kept.clear()
