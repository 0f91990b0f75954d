"""What may be put between a model and its device: CUDA graphs, which keep the bits, and torch.compile, which may not.

Neither has been measured on a GPU by those who wrote it. Both say so where they do not work, and the plain path goes on.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from models.attention import Packed
from models.layers import Parts, parts_of
from models.packing import COLUMNS, Inputs, Plan, to_device, up_to

if TYPE_CHECKING:
    from models.transformer import Transformer

# Above this many columns a forward pass takes longer than its launches: a graph gains nothing there.
MOST_COLUMNS = 1024
MOST_GRAPHS = 64

# A function without arguments -> (how to run it again, its result, which every run overwrites).
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


@dataclass
class Acceleration:
    """What a model runs with. notes: what became of each request, less the graphs' own word."""

    graphs: Graphs | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, model: Transformer, compile: bool, cuda_graphs: bool, tell: Callable[[str], None]
    ) -> Acceleration:
        """Set up what is asked for; the time this takes belongs to loading, not to decoding."""
        told, parts = [], parts_of(model.config)
        _use(model, parts)
        model.acceleration = cls()
        if compile:
            try:
                _use(model, Parts(*(torch.compile(part, dynamic=True) for part in parts)))
                _warm_up(model)
                told.append("compiled")
            except (
                Exception
            ) as error:  # compilers fail in many ways, and each leaves the plain path
                _use(model, parts)
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                told.append(
                    f"compile failed, the plain path runs: {type(error).__name__}: {reason}"
                )
                tell(f"note: {told[-1]}")
        graphs = None
        if cuda_graphs and model.device.type != "cuda":
            told.append(f"CUDA graphs: none on {model.device.type}")
            tell(f"note: {told[-1]}")
        elif cuda_graphs and model.config.causal:
            told.append("CUDA graphs: none for a causal model")
            tell(f"note: {told[-1]}")
        elif cuda_graphs:
            graphs = Graphs(model, capturing(model.device), tell)
        return cls(graphs, tuple(told))

    @property
    def told(self) -> tuple[str, ...]:
        """What has become of each request so far, for the result: graphs may be left at any step."""
        return self.notes if self.graphs is None else (*self.notes, self.graphs.told)

    @property
    def seconds(self) -> float:
        """Spent on capturing so far: no part of what decoding costs."""
        return 0.0 if self.graphs is None else self.graphs.seconds


def _use(model: Transformer, parts: Parts) -> None:
    for layer in model.layers:
        layer.parts = parts


@torch.inference_mode()
def _warm_up(model: Transformer) -> None:
    """Compile for any number of columns and rows: two shapes, one with two sequences."""
    for lengths in ((24,), (40, 9)):
        tokens = torch.zeros(sum(lengths), dtype=torch.int64)
        model.predict(tokens, [(0, n, n) for n in lengths], torch.arange(5, 5 + 10 * len(lengths)))


def capturing(device: torch.device) -> Capture:
    """How a CUDA graph is made on `device`, after two runs that settle what is allocated and chosen.

    All graphs share one pool of memory: one runs at a time, and its result is copied before the next one does.
    """
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def captured(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        here, graph = torch.cuda.current_stream(device), torch.cuda.CUDAGraph()
        # the model's device may not be the current one, and a capture that fails stays on its own stream
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


@dataclass(frozen=True)
class Bucket:
    """What a graph is captured for: padded columns, asked rows, wanted rows, sequences, and the longest sequence."""

    columns: int
    asked: int
    back: int
    sequences: int
    longest: int

    @classmethod
    def of(cls, plan: Plan) -> Bucket:
        sequences = 1 << (len(plan.spans) - 1).bit_length()
        longest = up_to(max(s.hi for s in plan.spans), COLUMNS["cuda"])
        return cls(len(plan.positions), len(plan.asked), len(plan.back), sequences, longest)

    def arrays(self, tokens: np.ndarray, plan: Plan) -> list[np.ndarray]:
        """tokens, positions, asked, back, and running sums of columns and asked rows, all of lengths the bucket fixes.

        The padding behind the last sequence is one more sequence: it attends to itself, and nothing reads it.
        """

        def sums(ends: list[int], end: int) -> np.ndarray:
            return np.array([0, *ends, *[end] * (self.sequences + 1 - len(ends))])

        columns = sums([b for _, b in plan.columns], self.columns)
        return [
            tokens,
            plan.positions,
            plan.asked,
            plan.back,
            columns,
            sums([b for _, b in plan.queries], self.asked),
        ]


class Graphs:
    """CUDA graphs of a model's forward pass without a cache, one for each Bucket, the least used ones dropped.

    Each is held against the plain path when it is captured, bit for bit; one that differs or cannot be captured turns
    all of them off, and it is said.
    """

    def __init__(self, model: Transformer, capture: Capture, tell: Callable[[str], None]):
        self.model, self.capture, self.tell = model, capture, tell
        # inputs, replay, result, and the rotary table that the graph reads, which the model may replace by a longer one
        self.kept: OrderedDict[
            Bucket, tuple[Tensor, Callable[[], None], Tensor, tuple[Tensor, Tensor]]
        ] = OrderedDict()
        self.seconds, self.works, self.told = 0.0, True, "CUDA graphs"
        if model.varlen is None:
            self._leave("need the varlen attention kernel, which does not run here")

    def logits(self, tokens: np.ndarray, plan: Plan) -> Tensor | None:
        """Logits [R', V], or None where the plain path is to run. tokens: [T'] int64, as plan.positions."""
        if not self.works or not plan.n_rows or len(plan.positions) > MOST_COLUMNS:
            return None
        bucket = Bucket.of(plan)
        [filled] = to_device(self.model.device, np.concatenate(bucket.arrays(tokens, plan)))
        if bucket not in self.kept:
            self._capture(bucket, filled, tokens, plan)
            if not self.works:
                return None
        self.kept.move_to_end(bucket)
        inputs, replay, out, _ = self.kept[bucket]
        inputs.copy_(filled)
        replay()
        return out.clone()

    def _capture(self, bucket: Bucket, filled: Tensor, tokens: np.ndarray, plan: Plan) -> None:
        started, model = time.perf_counter(), self.model
        plain = model.answer(
            Inputs(*to_device(model.device, tokens, plan.positions, plan.asked, plan.back)),
            *model._packed(plan),
            None,
        )
        inputs = filled.clone()
        try:
            replay, out = self.capture(lambda: self._run(bucket, inputs))
            out.fill_(
                torch.nan
            )  # a graph that does nothing must not pass with what its capture left here
            replay()
            same = torch.equal(out[: plan.n_rows], plain[: plan.n_rows])
        except RuntimeError as error:
            same, reason = False, f"cannot be captured ({str(error).splitlines()[0]})"
        else:
            reason = "do not keep the bits of the plain path here"
        if same:
            self.kept[bucket] = inputs, replay, out, model.rope_table(0)
            if len(self.kept) > MOST_GRAPHS:
                self.kept.popitem(last=False)
        else:
            self._leave(reason)
        self.seconds += time.perf_counter() - started

    def _leave(self, reason: str) -> None:
        self.works, self.told = False, f"CUDA graphs {reason}; the plain path runs"
        self.kept.clear()
        self.tell(f"note: {self.told}")

    def _run(self, bucket: Bucket, inputs: Tensor) -> Tensor:
        """The forward pass on the bucket's one tensor of integers, without a look at its values."""
        b, sums = bucket, bucket.sequences + 2
        *parts, cu_columns, cu_asked = inputs.split(
            [b.columns, b.columns, b.asked, b.back, sums, sums]
        )
        columns, asked = ((0, b.columns),), ((0, b.asked),)
        cu_columns, cu_asked = cu_columns.int(), cu_asked.int()
        packed = Packed(
            columns, columns, (), self.model.varlen, cu_columns, cu_columns, b.longest, b.longest
        )
        last = Packed(
            asked, columns, (), self.model.varlen, cu_asked, cu_columns, b.longest, b.longest
        )
        return self.model.answer(Inputs(*parts), packed, last, None)
