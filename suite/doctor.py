"""What this machine can run, and what keeps it from running: the checks of scripts/doctor.py.

Each check gives findings; one that fails is a finding too, and the others go on. Checkpoints are
judged by their configuration, no weights are read but those that `checkpoint` is asked about.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import MODEL_DEFAULTS, TASKS
from experiment.checks import choose_device
from experiment.workers import WorkerInfo
from models import FAMILIES, CheckpointError, check_checkpoint, read_config
from models.config import parameter_shapes
from models.files import config_in, read_headers, shard_paths, tensor_plan
from models.hub import offline
from sandbox import tier
from suite.local import visible_gpus
from suite.preflight import BYTES, ITEMSIZE, folder_of, short
from tasks.protocols import protocol
from utils import (
    EXIT_ENVIRONMENT,
    BadDataError,
    DllmexpError,
    EnvironmentProblem,
    OutputError,
    available_cores,
    environment,
    numbered,
    out_of_memory,
    output_problem,
)

if TYPE_CHECKING:
    from models import ModelConfig

PROMPT = 256  # tokens of a prompt, where the samples that fit are reckoned
HUB_S = 5.0
ROOM = 40 * 10**9  # bytes of a few checkpoints of 8B
QUESTION = "Tom has 2 apples and buys 3. How many apples has he?"
ANSWER = 32  # tokens that `checkpoint` decodes


@dataclass(frozen=True)
class Finding:
    """What a check has found.

    state: "ok"; "note": a run may go on, but a user should know; "skipped"; "broken": a run that
           needs this fails.
    text:  for a person; with the way out where it is broken.
    code:  the exit code of a run that fails by it.
    more:  numbers for the JSON.
    """

    name: str
    state: str
    text: str
    code: int = 0
    more: dict[str, Any] = field(default_factory=dict)


@dataclass
class Machine:
    """What the checks have in common. device, free: None until they are known; free in bytes."""

    asked: str | None = None
    output_dir: Path = Path("results")
    online: bool = True
    device: str | None = None
    free: int | None = None


Check = Callable[[Machine], Iterator[Finding]]


def examine(machine: Machine) -> Iterator[Finding]:
    """The findings of all checks, each as soon as it is there."""
    for check in CHECKS:
        yield from guarded(check, machine)


def guarded(check: Callable[..., Iterator[Finding]], *arguments: Any) -> Iterator[Finding]:
    """The findings of a check; an exception of it is one more."""
    try:
        yield from check(*arguments)
    except DllmexpError as error:
        yield Finding(check.__name__, "broken", "; ".join(error.problems), error.exit_code)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        text = f"{type(error).__name__}: {first}"
        yield Finding(check.__name__, "broken", text, EXIT_ENVIRONMENT)


# ---------------------------------------------------------------- the machine


def packages(machine: Machine) -> Iterator[Finding]:
    """Versions of the packages; whether each is there and torch can be imported."""
    found = environment()
    missing = [name for name, version in found["packages"].items() if version is None]
    if missing:
        raise EnvironmentProblem(f"missing: {', '.join(missing)}; ./scripts/setup.sh installs them")
    import torch  # noqa: F401  a broken installation raises here

    listed = (f"{name} {version}" for name, version in found["packages"].items())
    yield Finding("packages", "ok", f"Python {found['python']}, {', '.join(listed)}", more=found)


def device(machine: Machine) -> Iterator[Finding]:
    """The device of a run, its free memory, and whether it computes."""
    import torch

    machine.device = "cpu"
    machine.free = host_memory()
    chosen = choose_device(machine.asked, WorkerInfo())
    if chosen == "cpu":
        if machine.asked is None and (gpus := visible_gpus()):
            raise EnvironmentProblem(
                f"CUDA_VISIBLE_DEVICES or nvidia-smi list {numbered(len(gpus), 'GPU')}, but torch "
                f"{torch.__version__} sees none: install a CUDA build of torch that the driver "
                "supports, or give --device cpu"
            )
        state = "note" if machine.asked is None else "ok"
        text = f"cpu, {numbered(available_cores(), 'core')}; an 8B model takes minutes per answer"
        yield Finding("device", state, text)
        return
    from models.cost import free_bytes

    at = torch.device(chosen)
    ones = torch.ones(64, 64, device=at, dtype=torch.bfloat16)
    if (ones @ ones).sum().item() != 64**3:
        raise EnvironmentProblem(f"{chosen} computes a wrong matrix product; try another --device")
    machine.device, machine.free = chosen, free_bytes(at)
    total, name = torch.cuda.mem_get_info(at)[1], torch.cuda.get_device_name(at)
    more = {"name": name, "free_bytes": machine.free, "total_bytes": total}
    text = f"{chosen}, {name}, {short(machine.free, BYTES)} free of {short(total, BYTES)}"
    yield Finding("device", "ok", f"{text}, CUDA {torch.version.cuda}", more=more)


def attention(machine: Machine) -> Iterator[Finding]:
    """The attention kernel of an 8B model."""
    import torch

    from models.attention import varlen_options

    at = torch.device(machine.device or "cpu")
    if at.type == "cpu":
        yield Finding("attention", "ok", "one call for each sequence, as always on a CPU")
        return
    shapes = {"llada": (32, 32, 128), "dream": (28, 4, 128)}  # heads, key/value heads, their width
    found = {name: varlen_options(at, torch.bfloat16, *shape) for name, shape in shapes.items()}
    lacking = [name for name, options in found.items() if options is None]
    if lacking:
        text = (
            f"no varlen kernel for {' and '.join(lacking)}: one call for each sequence, slower in "
            "a batch"
        )
        yield Finding("attention", "note", text, more=found)
        return
    split = all("num_splits" in options for options in found.values())
    text = "varlen kernel" + ("" if split else ", whose last bits may depend on the batch")
    yield Finding("attention", "ok", text, more=found)


def sandbox(machine: Machine) -> Iterator[Finding]:
    """The tier in which generated programs run."""
    found = tier()
    text = found.line.removeprefix("code sandbox: ")
    yield Finding("sandbox", "ok", text, more={"tier": found.name})


def memory(machine: Machine) -> Iterator[Finding]:
    """Free memory of the host."""
    free = host_memory()
    text = "unknown" if free is None else f"{short(free, BYTES)} free"
    yield Finding("memory", "ok", f"host: {text}", more={"free_bytes": free})


def host_memory() -> int | None:
    """Free bytes of the host, or of the container's limit where that is less; None: unknown."""
    found = []
    with suppress(OSError, ValueError, TypeError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        found.append(1024 * int(re.search(r"MemAvailable:\s+(\d+)", text)[1]))
    with suppress(OSError, ValueError, TypeError):
        limit, used = (
            int(Path("/sys/fs/cgroup", name).read_text(encoding="ascii"))
            for name in ("memory.max", "memory.current")
        )
        stat = Path("/sys/fs/cgroup/memory.stat").read_text(encoding="ascii")
        cached = int(re.search(r"^inactive_file (\d+)", stat, re.M)[1])  # given back on demand
        found.append(max(0, limit - used + cached))
    return min(found, default=None)


def disk(machine: Machine) -> Iterator[Finding]:
    """Free space where results, checkpoints and temporary files go."""
    from huggingface_hub import constants

    if problem := output_problem(machine.output_dir):
        raise OutputError(problem)
    places = {
        "results": machine.output_dir,
        "hub's cache": Path(constants.HF_HUB_CACHE),
        "temporary files": Path(tempfile.gettempdir()),
    }
    free = {}
    for name, place in places.items():
        there = next(p for p in [place.absolute(), *place.absolute().parents] if p.exists())
        free[name] = shutil.disk_usage(there).free
    text = ", ".join(f"{short(n, BYTES)} for the {name}" for name, n in free.items())
    scarce = free["hub's cache"] < ROOM
    if scarce:
        text += "; a checkpoint of 8B takes 16 GB: HF_HOME names another place"
    yield Finding("disk", "note" if scarce else "ok", f"free: {text}", more={"free_bytes": free})


def hub(machine: Machine) -> Iterator[Finding]:
    """Whether the hub answers; without it only what is here can run."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if offline() or not machine.online:
        why = "HF_HUB_OFFLINE=1" if offline() else "not asked"
        machine.online = False
        yield Finding("hub", "note", f"{why}: checkpoints and data must be here already")
        return
    try:
        response = get_session().head(constants.ENDPOINT, timeout=HUB_S)
        if response.status_code in (403, 407, 502, 503, 504):  # a proxy's, no mirror's
            response.raise_for_status()
    except Exception as error:  # of the hub's own client, which has changed its library
        machine.online = False
        text = f"{constants.ENDPOINT} does not answer ({type(error).__name__}); "
        text += "checkpoints and data must be here: a checkpoint flag and --data_dir name them"
        yield Finding("hub", "note", text)
        return
    yield Finding("hub", "ok", f"{constants.ENDPOINT} answers")


# ---------------------------------------------------------------- models


def fits(machine: Machine) -> Iterator[Finding]:
    """For each alias, from its configuration alone: weights, and the samples that fit at once."""
    for alias, entry in MODEL_DEFAULTS.items():
        name = entry["checkpoint"]
        try:
            if Path(name).is_dir() and (problems := check_checkpoint(name)):
                raise CheckpointError(problems)
            config = _config(name, machine.online)
        except CheckpointError as error:
            text = f"{alias}: {'; '.join(error.problems)}"
            yield Finding("fits", "broken", text, error.exit_code)
            continue
        if config is None:
            text = f"{alias}: {name} is not here, so its size is unknown; --{entry['flag']} DIR"
            yield Finding("fits", "note", text, more={"alias": alias})
        else:
            yield _fit(machine, alias, config)


def _config(name: str, online: bool) -> ModelConfig | None:
    """Of a directory, the hub's cache or, small files alone, the hub; None where it is not here."""
    folder = folder_of(name)
    with suppress(CheckpointError):
        if folder is not None:
            return config_in(folder)
    return read_config(name) if online or Path(name).is_dir() else None


def _fit(machine: Machine, alias: str, config: ModelConfig) -> Finding:
    from models.cost import batch_rows

    entry = MODEL_DEFAULTS[alias]
    family, dtype = FAMILIES[entry["family"]], entry.get("dtype", "bfloat16")
    cells = [protocol("uniform", alias, MODEL_DEFAULTS, spec, family) for spec in TASKS.values()]
    cell = max(cells, key=lambda one: one.gen_length)
    itemsize = ITEMSIZE[dtype]
    weights = sum(map(prod, parameter_shapes(config).values())) * itemsize
    more = {"alias": alias, "weights_bytes": weights, "canvas": cell.gen_length}
    text = f"{alias}: weights {short(weights, BYTES)} in {dtype}"
    left = None if machine.free is None else machine.free - weights
    if left is not None and left < 0:
        text += f", {short(machine.free, BYTES)} are free: does not fit"
        return Finding("fits", "note", text, more=more | {"auto": 0})
    length, open_rows = PROMPT + cell.gen_length, cell.block_length or cell.gen_length
    kind = (machine.device or "cpu").partition(":")[0]
    rows = {
        cache: batch_rows(config, length, open_rows, itemsize, left, kind, cache != "none")
        for cache in ("none", "dual")
    }
    text += f"; auto on {kind}: {numbered(rows['none'], 'sample')}"
    text += f", {rows['dual']} with a cache" if rows["dual"] != rows["none"] else ""
    more |= {"auto": rows["none"], "auto_dual": rows["dual"]}
    return Finding("fits", "ok", text, more=more)


def checkpoint(machine: Machine, name: str) -> Iterator[Finding]:
    """Whether a checkpoint is complete, its weights finite, and an answer comes out of it."""
    folder = folder_of(name)
    if folder is None:
        raise BadDataError(
            f"{name} is neither a directory nor in the hub's cache; download it first"
        )
    if problems := check_checkpoint(folder):
        raise BadDataError(problems)
    config = config_in(folder)
    n, faults = _tensors(folder, config)
    if faults:
        raise BadDataError([f"{len(faults)} of {numbered(n, 'tensor')} are faulty", *faults[:5]])
    text = f"{name}: {config.family} family, {numbered(n, 'tensor')}, all finite"
    yield Finding("checkpoint", "ok", text, more={"tensors": n, "family": config.family})
    yield from guarded(answer, machine, folder, config)


def _tensors(folder: Path, config: ModelConfig) -> tuple[int, list[str]]:
    """How many tensors there are, and what is wrong with some; one at a time is in memory."""
    from safetensors import safe_open
    from tqdm import tqdm

    plan, faults = tensor_plan(read_headers(shard_paths(folder)), config), []
    total = sum(map(len, plan.values()))
    with tqdm(total=total, desc="tensors", disable=not sys.stderr.isatty(), leave=False) as bar:
        for path, names in plan.items():
            with safe_open(path, framework="pt") as shard:
                for key in names:
                    tensor = shard.get_tensor(key)
                    if bad := int(tensor.numel() - tensor.isfinite().sum()):
                        faults.append(f"{path.name}: {key} has {bad} numbers that are not finite")
                    elif tensor.ndim > 1 and not tensor.any():
                        faults.append(f"{path.name}: {key} is all zeros; download it again")
                    bar.update()
    return total, faults


def answer(machine: Machine, folder: Path, config: ModelConfig) -> Iterator[Finding]:
    """One prompt, decoded."""
    from decoding.config import DecodeConfig
    from decoding.engine import decode
    from decoding.schedule import make_schedule
    from experiment.sample import Request
    from experiment.text import read_answer
    from models import load_model

    family, at = FAMILIES[config.family], machine.device or "cpu"
    if family.algorithm is None:
        text = "a causal model: it verifies drafts and writes no answer"
        yield Finding("answer", "skipped", text)
        return
    on_disk = config.dtype_on_disk if config.dtype_on_disk in ITEMSIZE else "float32"
    dtype = on_disk if at == "cpu" else "bfloat16"
    needed = sum(map(prod, parameter_shapes(config).values())) * ITEMSIZE[dtype]
    too_large = (
        f"the weights take {short(needed, BYTES)} in {dtype}, more than {at} has free; another "
        "--device or a machine with more memory"
    )
    if machine.free is not None and needed > machine.free:
        raise EnvironmentProblem(too_large)
    try:
        model, tokenizer = load_model(folder, device=at, dtype=dtype)
        prompt = QUESTION
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": QUESTION}]
            prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        schedule = make_schedule(family.algorithm, ANSWER, min(ANSWER, family.blocks or ANSWER))
        [completion] = decode(model, [ids], DecodeConfig(schedule), [0])
    except Exception as error:
        if out_of_memory(error):
            raise EnvironmentProblem(too_large) from error
        raise
    request = Request({}, 0, prompt=prompt, prompt_ids=tuple(ids))
    sample = read_answer(request, completion, tokenizer, config, completion.seconds)
    text = f"{QUESTION!r} -> {sample.text!r}; {completion.seconds:.1f} s on {at} in {dtype}"
    more = {"text": sample.text, "seconds": completion.seconds, "dtype": dtype}
    yield Finding("answer", "ok", text, more=more)


CHECKS: tuple[Check, ...] = (
    packages,
    device,
    attention,
    sandbox,
    memory,
    disk,
    hub,
    fits,
)
