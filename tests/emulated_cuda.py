"""A GPU for tests without one: tensors on the CPU that say they are on cuda:0.

    with emulated() as gpu:
        model = on_gpu(load_model(folder, device="cpu", dtype="bfloat16")[0])
        decode(model, ...)
    gpu.waits, gpu.uploads, gpu.kernels, gpu.bytes, gpu.peak

Covered, because every operation passes through `Gpu.run`:

* An operation on tensors of both devices raises, as on CUDA. Exceptions are the same: 0-dim tensors
  and index tensors may be on the CPU, and the latter count as a wait.
* Waits of the host for the device, by reason and by the line of the project that waits. An upload
  from memory that is not pinned, or that blocks, is one of them. Other uploads are counted apart.
* Kernels by operation, and the bytes that they read and write. A view is no kernel.
* Memory: the bytes of the living tensors besides the weights, and their peak. Memory that is not
  written yet is NaN.
* CUDA graphs: `capturing` records the kernels and replays them on the same tensors, hence on fixed
  addresses. A capture that waits, uploads, pins memory or touches a CPU tensor raises. Once a graph
  is dropped, those that lived beside it raise (pytorch/pytorch#193402).
* The arguments that FlashAttention's variable-length kernel refuses, and rows that it would skip.

Not covered: time, the bits of CUDA's kernels, kernels of a library's own beside the one counted,
the caching allocator's fragmentation, streams and their races, several devices, and torch.compile.

    python tests/emulated_cuda.py launches llada-8b 16 dual

prints kernels, bytes and waits of one step at the real shape, from shapes alone (meta tensors).
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda:0")
VIEWS = set(
    "view slice select transpose t expand unsqueeze squeeze split split_with_sizes permute alias "
    "detach _unsafe_view as_strided unfold diagonal chunk unbind view_as _reshape_alias narrow "
    "lift_fresh".split()
)
EMPTY = {"empty", "empty_like", "new_empty", "empty_strided"}
# these take only the shape or the dtype of the tensor that is given
FACTORIES = EMPTY | set(
    "zeros_like ones_like full_like rand_like new_zeros new_full new_ones lift_fresh".split()
)
# composite operations with one kernel, or with one wait
LEAVES = {"scaled_dot_product_attention", "_varlen_attn", "item", "is_nonzero"}
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"}
# the size of the result depends on values
SIZED_BY_VALUES = set(
    "nonzero masked_select unique_dim _unique2 unique_consecutive bincount".split()
)
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
TWO_DEVICES = "Expected all tensors to be on the same device, but found cuda:0 and cpu"
CAPTURING = "operation not permitted when stream is capturing"


class OnGpu(torch.Tensor):
    """A tensor that says it is on cuda:0; `data` is on the CPU, or on the meta device."""

    gpu: Gpu
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, gpu: Gpu):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",
        )
        self.held, self.gpu = held, gpu
        return self

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = is_cpu = property(lambda self: False)

    def __repr__(self):
        return f"OnGpu({self.held!r})"

    def pin_memory(self, *_):
        raise RuntimeError("cannot pin 'torch.cuda.Tensor' only dense CPU tensors can be pinned")

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    __array__ = numpy

    def data_ptr(self):
        return self.held.data_ptr()

    def tolist(self):
        self.gpu.wait("tolist")
        return self.held.tolist()

    def __setitem__(self, at, value):
        if isinstance(value, int | float):
            parts = at if isinstance(at, tuple) else (at,)
            if not any(isinstance(part, Tensor | list) for part in parts):
                self[at].fill_(value)
                return
            value = OnGpu(torch.tensor(value, dtype=self.dtype), self.gpu)
        torch.Tensor.__setitem__(self, at, value)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        [gpu] = {x.gpu for x in leaves((args, kwargs)) if isinstance(x, OnGpu)}
        return gpu.run(func, args, kwargs or {})


class Gpu(TorchDispatchMode):
    """What the emulated device has seen since `reset`.

    waits:   (reason, line of the project) -> number.
    uploads: line of the project -> transfers from pinned memory that do not block.
    kernels: operation -> number. bytes: read and written by them.
    living, peak: bytes of the tensors besides the weights.
    shapes:  tensors have no data. The host reads zeros, and that tensors are equal.
    """

    def __init__(self, shapes: bool = False):
        super().__init__()
        self.shapes, self.capture = shapes, None
        self.living = self.peak = 0
        self.storages: dict[int, int] = {}
        self.graphs: weakref.WeakSet[Graph] = weakref.WeakSet()
        self.reset()

    def reset(self) -> None:
        self.waits: Counter = Counter()
        self.uploads: Counter = Counter()
        self.kernels: Counter = Counter()
        self.bytes, self.peak = 0, self.living

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def forbid(self, what: str) -> None:
        if self.capture is not None:
            raise RuntimeError(f"{CAPTURING}: {what}")

    def wait(self, why: str) -> None:
        self.forbid(why)
        self.waits[why, line_of_the_project()] += 1

    def run(self, func, args: tuple, kwargs: dict) -> Any:
        """One operation: check it as CUDA would, count it, and compute it on the data."""
        name = func._schema.name.split("::")[1]
        tensors = [x for x in leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = [x for x in tensors if isinstance(x, OnGpu)]
        target = kwargs.get("device")
        target = None if target is None else torch.device(target)
        to_cuda = target is not None and target.type == "cuda"
        if not ours and not to_cuda:
            return func(*args, **kwargs)
        if name not in LEAVES and name not in VIEWS and func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        self._check(name, args, kwargs, tensors, target)
        cpu = torch.device("meta" if self.shapes else "cpu")

        def down(x):
            if isinstance(x, OnGpu):
                return x.held
            return cpu if isinstance(x, torch.device) and x.type == "cuda" else x

        a, k = mapped(down, args), mapped(down, kwargs)
        if to_cuda:
            k["device"] = cpu
        out = self._computed(func, name, a, k)
        download = name == "_to_copy" and target is not None and target.type == "cpu"
        if download or name in READS:
            return out if not self.shapes or name in READS else torch.zeros_like(out, device="cpu")
        if name not in VIEWS | EMPTY:
            self.kernels[name] += 1
            self.bytes += moved(name, a, k, out)
        if self.capture is not None:
            self.capture.append((func, name, a, k, out))
        known = {id(x.held): x for x in ours}

        def up(x):
            if not isinstance(x, Tensor):
                return x
            if id(x) not in known:
                self._count(x.untyped_storage())
                known[id(x)] = OnGpu(x, self)
            return known[id(x)]

        return mapped(up, out)

    def _check(self, name: str, args, kwargs, tensors: list[Tensor], target) -> None:
        """Count what waits, and raise what CUDA raises."""
        others = [x for x in tensors if not isinstance(x, OnGpu)]
        if name in ("_to_copy", "copy_"):
            source, into = (args[0], None) if name == "_to_copy" else (args[1], args[0])
            there = isinstance(source if into is None else into, OnGpu)
            if into is None and target is not None:
                there = target.type == "cuda"
            if isinstance(source, OnGpu) and not there:
                self.wait("device to host")
            elif not isinstance(source, OnGpu) and there and not source.is_meta:
                self.forbid("upload")
                pinned = getattr(source, "_pinned", False)
                if pinned and (kwargs.get("non_blocking") or args[2:3] == (True,)):
                    self.uploads[line_of_the_project()] += 1
                else:
                    self.wait(f"upload of {nbytes(source)} bytes that blocks")
        elif name in READS or name in SIZED_BY_VALUES:
            self.wait(name)
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.wait(name)
        elif name in INDEXED:
            for i in (i for i in args[1] if i is not None):
                one_value = name != "index" and args[2].numel() == 1
                if i.dtype in (torch.bool, torch.uint8) and not one_value:
                    self.wait(f"{name} with a mask")
                if not isinstance(i, OnGpu):
                    self.wait("index tensor on the CPU")
            if any(x.dim() and not any(x is i for i in args[1]) for x in others):
                raise RuntimeError(f"{name}: {TWO_DEVICES} at {line_of_the_project()}")
        elif name not in FACTORIES and any(x.dim() or self.capture is not None for x in others):
            raise RuntimeError(f"{name}: {TWO_DEVICES} at {line_of_the_project()}")
        if name in ("masked_scatter", "masked_scatter_") and args[0].dtype != args[2].dtype:
            raise RuntimeError("masked_scatter: expected self and source to have same dtypes")

    def _computed(self, func, name: str, a: tuple, k: dict) -> Any:
        if name == "_to_copy":
            source = a[0]
            if self.shapes and not source.is_meta:
                source = torch.empty_like(source, device="meta")
            dtype = k.get("dtype") or source.dtype
            return source.clone() if dtype == source.dtype else source.to(dtype)
        if name == "_varlen_attn":
            return flash(*a, **k)
        if self.shapes and name == "nonzero":
            return a[0].new_zeros((0, a[0].dim()), dtype=torch.int64)
        if self.shapes and name in READS:
            return True
        out = func(*a, **k)
        if name in EMPTY and out.is_floating_point():
            out.fill_(float("nan"))
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.storages:
            self.storages[key] = storage.nbytes()
            self.living += storage.nbytes()
            self.peak = max(self.peak, self.living)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.living -= self.storages.pop(key, 0)


# torch's own functions for trees take three times as long


def leaves(x: Any) -> list:
    if isinstance(x, dict):
        x = list(x.values())
    return [leaf for part in x for leaf in leaves(part)] if isinstance(x, list | tuple) else [x]


def mapped(f: Callable, x: Any) -> Any:
    """x with f applied to its leaves."""
    if isinstance(x, dict):
        return {key: mapped(f, part) for key, part in x.items()}
    return type(x)([mapped(f, part) for part in x]) if isinstance(x, list | tuple) else f(x)


def nbytes(x: Any) -> int:
    return x.numel() * x.element_size() if isinstance(x, Tensor) else 0


def moved(name: str, a: tuple, k: dict, out: Any) -> int:
    """Bytes that a kernel reads and writes; of a table only the rows that it takes."""
    if name in ("index", "embedding", "gather"):
        return 2 * nbytes(out)
    if name == "index_copy_":
        return 2 * nbytes(a[3])
    return sum(nbytes(x) for x in leaves((a, k, out)))


def line_of_the_project() -> str:
    """The innermost line in models/ or decoding/, e.g. "decoding/engine.py _step"."""
    frame = sys._getframe(1)
    while frame:
        file = frame.f_code.co_filename
        for room in ("models", "decoding"):
            if file.startswith(f"{ROOT}/{room}/"):
                return f"{file[len(str(ROOT)) + 1 :]} {frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window: list[int] | None = None,
    gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The variable-length kernel of FlashAttention 2: what it refuses, and what it computes.

    Rows of q behind the last sequence stay unwritten. With seqused_k the sums cu_k only say where
    the keys of each sequence begin. A causal mask is aligned to the last query and the last key;
    a query without a key gets zeros.
    """
    H, E = q.shape[1:]
    for wrong, why in (
        (q.dtype not in (torch.bfloat16, torch.float16), "only support fp16 and bf16 data type"),
        (k.dtype != q.dtype or v.dtype != q.dtype, "query and key must have the same dtype"),
        ({cu_q.dtype, cu_k.dtype} != {torch.int32}, "cu_seqlens must have dtype int32"),
        (not (cu_q.is_contiguous() and cu_k.is_contiguous()), "cu_seqlens must be contiguous"),
        ({q.stride(-1), k.stride(-1), v.stride(-1)} != {1}, "must have contiguous last dimension"),
        (E % 8 or E > 256, "head_size should be a multiple of 8, at most 256"),
        (len(cu_q) != len(cu_k), "batch sizes differ"),
        (
            seqused_k is not None
            and (seqused_k.dtype != torch.int32 or len(seqused_k) != len(cu_q) - 1),
            "seqused_k must be int32, one for each sequence",
        ),
        (block_table is not None, "block_table is not emulated"),
    ):
        if wrong:
            raise RuntimeError(f"FlashAttention: {why}")
    if q.is_meta:
        out = torch.empty(q.shape, dtype=q.dtype, device="meta")
        return out, out.new_empty((H, len(q)), dtype=torch.float32), out.new_empty(2)
    starts, counts = cu_k[:-1], cu_k.diff() if seqused_k is None else seqused_k
    assert max_q >= cu_q.diff().max() and max_k >= counts.max(), "rows would be left out"
    assert cu_q[-1] <= len(q) and (starts + counts).max() <= len(k) == len(v), "behind the end"
    assert (cu_q.diff() >= 0).all() and (counts >= 0).all()
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    for i, (c, m) in enumerate(zip(starts.tolist(), counts.tolist())):
        a, b = cu_q[i : i + 2].tolist()
        keys, values = (t[c : c + m].float().repeat_interleave(H // k.shape[1], 1) for t in (k, v))
        weights = torch.einsum("qhe,khe->hqk", q[a:b].float(), keys) * (scale or E**-0.5)
        if is_causal:
            ahead = torch.ones(b - a, m, dtype=torch.bool).triu(m - (b - a) + 1)
            weights = weights.masked_fill(ahead, -torch.inf)
        weights = weights.softmax(-1).nan_to_num(0.0)
        out[a:b] = torch.einsum("hqk,khe->qhe", weights, values).to(q.dtype)
    return out, torch.zeros(H, len(q)), torch.zeros(2, dtype=torch.uint64)


class Graph:
    """A captured graph: replays its kernels on the tensors of the capture."""

    def __init__(self, gpu: Gpu, kernels: list):
        self.gpu, self.recorded, self.sound = gpu, kernels, True
        gpu.graphs.add(self)
        weakref.finalize(self, _dropped, gpu.graphs)

    def __call__(self) -> None:
        if not self.sound:
            raise RuntimeError("the shared workspace of this graph has been freed")
        self.gpu.kernels["graph"] += 1
        for func, name, a, k, out in self.recorded:
            if name in VIEWS:
                continue  # the same memory
            if func._schema.is_mutable:
                func(*a, **k)
                continue
            for old, new in zip(leaves(out), leaves(self.gpu._computed(func, name, a, k))):
                if isinstance(old, Tensor):
                    old.copy_(new)


def _dropped(others: weakref.WeakSet[Graph]) -> None:
    for graph in others:
        graph.sound = False


def capturing(gpu: Gpu) -> Callable:
    """In place of models.acceleration.capturing."""

    def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        for _ in range(2):
            run()
        gpu.capture = []
        try:
            out = run()
        finally:
            kernels, gpu.capture = gpu.capture, None
        return Graph(gpu, kernels), out

    return capture


@contextmanager
def emulated(shapes: bool = False) -> Iterator[Gpu]:
    """cuda:0 is there, in inference mode. shapes: tensors without data, for any size."""
    gpu, real_to, real_tensor = Gpu(shapes), torch.Tensor.to, torch.tensor

    def pin_memory(self: Tensor) -> Tensor:
        gpu.forbid("pin_memory")
        pinned = self.clone()
        pinned._pinned = True
        return pinned

    def to(self: Tensor, *args, **kwargs) -> Tensor:
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(
            *args, **{name: value for name, value in kwargs.items() if name != "copy"}
        )
        if device is None or device.type != "cuda":
            return real_to(self, *args, **kwargs)
        if isinstance(self, OnGpu):
            return self if dtype in (None, self.dtype) else real_to(self, dtype)
        options = {"device": device, "non_blocking": non_blocking}
        options |= {} if dtype is None else {"dtype": dtype}
        return gpu.run(torch.ops.aten._to_copy.default, (self,), options)

    def tensor(data, *, device=None, **options) -> Tensor:
        return real_tensor(data, **options).to(device or "cpu")

    fakes = [
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "synchronize", lambda *_: gpu.wait("synchronize")),
        (torch.Tensor, "pin_memory", pin_memory),
        (torch.Tensor, "to", to),
        (torch, "tensor", tensor),
    ]
    real = [(owner, name, getattr(owner, name)) for owner, name, _ in fakes]
    try:
        for owner, name, fake in fakes:
            setattr(owner, name, fake)
        with torch.inference_mode(), gpu:
            yield gpu
    finally:
        for owner, name, old in real:
            setattr(owner, name, old)


def on_gpu(model: torch.nn.Module, gpu: Gpu) -> torch.nn.Module:
    """The model with its weights on the emulated device; they do not count as memory."""
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                held = weight.detach()
                held = held.to("meta") if gpu.shapes else held
                gpu.storages[held.untyped_storage()._cdata] = 0
                module._parameters[name] = torch.nn.Parameter(OnGpu(held, gpu), requires_grad=False)
    return model


@contextmanager
def at_shape(preset: str, rows: int, kv_cache: str, algorithm: str | None = None, **options):
    """(gpu, step): a batch of a benchmark's model; step() decodes one step of it.

    The first step has the whole canvas. No step commits anything. options: of DecodeConfig.
    """
    from decoding.config import DecodeConfig
    from decoding.engine import _Decoder
    from decoding.schedule import make_schedule
    from dev.bench.presets import PRESETS
    from models.transformer import Transformer

    chosen = PRESETS[preset]
    regime, block = chosen.regimes[0], options.pop("block", chosen.regimes[0].block)
    name = algorithm or regime.algorithm
    schedule = make_schedule(name, chosen.gen_length, block, chosen.tokens_per_step)
    config = DecodeConfig(schedule, kv_cache=kv_cache, **options)
    with torch.device("meta"):
        model = Transformer(chosen.config).to(getattr(torch, chosen.dtype)).eval()
    with emulated(shapes=True) as gpu:
        model = on_gpu(model, gpu)
        assert model.varlen is not None
        decoder = _Decoder(model, config, None, None)
        for i in range(rows):
            decoder._admit(i, [5] * chosen.prompt, i)

        def step() -> None:
            gpu.reset()
            decoder._step(decoder.rows)

        yield gpu, step


def main(argv: list[str]) -> int:
    if len(argv) != 4 or argv[0] != "launches" or not argv[2].isdigit():
        print(f"usage: {Path(__file__).name} launches PRESET ROWS {{none,dual}}", file=sys.stderr)
        return 2
    _, preset, rows, kv_cache = argv
    with at_shape(preset, int(rows), kv_cache) as (gpu, step):
        step()
        step()
    print(f"kernels  {gpu.kernels.total()}")
    for name, n in gpu.kernels.most_common():
        print(f"  {n:6d} {name}")
    print(f"bytes    {gpu.bytes / 1e9:.2f} GB\npeak     {gpu.peak / 2**30:.2f} GiB beside weights")
    print(f"uploads  {gpu.uploads.total()}\nwaits    {gpu.waits.total()}")
    for (why, where), n in gpu.waits.items():
        print(f"  {n:6d} {why}: {where}")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
