"""Read and check a checkpoint's directory without torch: config, tokenizer files, tensor names.

The directory has the hub's layout: config.json, model.safetensors or its shards with
model.safetensors.index.json, and the tokenizer's files. No code of the checkpoint is executed.
"""

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import fields, replace
from itertools import zip_longest
from pathlib import Path

from models.config import CheckpointError, Family, ModelConfig, parameter_shapes
from models.digests import digests, kept_digests
from models.families import FAMILIES
from models.hub import INDEX, SINGLE, SMALL, offline, resolve
from models.safetensors_header import TensorEntry, not_the_file, read_header
from utils import file_bytes, file_sha256

_N_LISTED = 20
# of tokenizer_config.json: special tokens
TOKEN_KEYS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


# ---- config.json and special tokens


def read_config(path_or_repo: str | Path) -> ModelConfig:
    """The checkpoint's ModelConfig, from config.json and the tokenizer's special tokens.

    path_or_repo: a directory, or owner/name or owner/name@REVISION on the hub.
    Reads no weights and imports no torch. Raises CheckpointError with every problem found.
    """
    return config_in(resolve(path_or_repo, weights=False))


def config_in(folder: Path) -> ModelConfig:
    """`read_config` for a directory that exists."""
    family, raw = _family_in(folder)
    problems = [
        f"config.json: {key} is {value!r:.60}; supported: {' or '.join(map(repr, allowed))}"
        for key, (allowed, absent) in family.only.items()
        if not _supported(value := raw.get(key, absent), allowed)
    ]
    values = _values(family, raw, problems)
    problems += _disagreements(values)
    try:
        ids = special_ids(folder, family)
    except CheckpointError as error:
        raise CheckpointError(problems + error.problems) from None
    problems += _token_problems(family, values, ids)
    if problems:
        raise CheckpointError(problems)
    texts = family.end_tokens + family.optional_end_tokens
    ends = dict.fromkeys([values["eos_id"], *(ids[text] for text in texts if text in ids)])
    config = ModelConfig(end_ids=tuple(ends), **family.constants, **values)
    return replace(config, dtype_on_disk=_dtype_on_disk(folder, raw))


def _family_in(folder: Path) -> tuple[Family, dict]:
    raw = read_json(folder / "config.json")
    for family in FAMILIES.values():
        if str(raw.get("model_type")).lower() == family.model_type.lower():
            return family, raw
    known = ", ".join(family.model_type for family in FAMILIES.values())
    raise CheckpointError(
        f"config.json: model_type is {raw.get('model_type')!r}; supported: {known}"
    )


def _supported(value: object, allowed: tuple) -> bool:
    return all(one in allowed for one in (value if isinstance(value, list) else [value]))


def _values(family: Family, raw: dict, problems: list[str]) -> dict:
    """ModelConfig's fields in config.json.

    A value of the wrong kind is a problem and becomes None.
    """
    kinds = {f.name: f.type for f in fields(ModelConfig)}
    values = {}
    for field, key in family.fields.items():
        value, default = raw.get(key), family.defaults.get(field, ...)
        if value is None and default is not ...:
            value = raw.get(default[1:]) if isinstance(default, str) else default
            if value is None and field == "head_dim":
                continue
        wanted = _wanted(field, kinds[field], value)
        if wanted is not None:
            found = "missing" if value is None else f"{value!r:.60}"
            problems.append(f"config.json: {key} is {found}; it must be {wanted}")
            value = None
        values[field] = float(value) if kinds[field] is float and value is not None else value
    if "head_dim" not in values:
        d, h = values["d_model"], values["n_heads"]
        values["head_dim"] = d // h if d and h and d % h == 0 else None
        if d and h and d % h:
            problems.append(f"config.json: width {d} is not a multiple of {h} heads")
    return values


def _wanted(field: str, kind: type, value: object) -> str | None:
    """What the value of a ModelConfig field must be, or None where `value` is that."""
    if kind is bool:
        return None if type(value) is bool else "true or false"
    if kind is float:
        fits = type(value) in (int, float) and 0 < value <= sys.float_info.max
        return None if fits else "a number above 0"
    low = 0 if field in ("mask_id", "eos_id") else 1
    fits = type(value) is int and low <= value < 10**7
    return None if fits else f"an integer from {low}"


def _disagreements(values: dict) -> list[str]:
    """Problems of values that are valid alone but not together."""
    problems = []
    names = ("n_heads", "n_kv_heads", "head_dim", "vocab_size")
    heads, kv, width, V = (values[name] for name in names)
    if heads and kv and heads % kv:
        problems.append(f"config.json: {heads} heads cannot share {kv} key/value heads evenly")
    if width and width % 2:
        problems.append(
            f"config.json: head width {width} is odd; rotary embeddings need an even one"
        )
    if (values["n_layers"] or 0) > 1000:
        problems.append(f"config.json: {values['n_layers']} layers; at most 1000 are supported")
    for field, key in (("mask_id", "mask_token_id"), ("eos_id", "eos_token_id")):
        if values.get(field) is not None and V and values[field] >= V:
            problems.append(
                f"config.json: {key} {values[field]} is beyond the {V} rows of the embedding"
            )
    return problems


def _token_problems(family: Family, values: dict, ids: dict[str, int]) -> list[str]:
    """Special tokens that are missing, have two ids, or are beyond the embedding."""
    problems = []
    for text in filter(None, (family.mask_token, *family.end_tokens)):
        if text not in ids:
            problems.append(f"the tokenizer files have no token {text}")
    mask, V = values.get("mask_id"), values["vocab_size"]
    if mask is not None and ids.get(family.mask_token, mask) != mask:
        problems.append(
            f"config.json: mask_token_id is {mask}, but the tokenizer files give "
            f"{family.mask_token} the id {ids[family.mask_token]}"
        )
    if V and (beyond := [f"{text} {i}" for text, i in ids.items() if i >= V]):
        problems.append(f"token ids beyond the {V} rows of the embedding: {listed(beyond)}")
    return problems


def special_ids(folder: Path, family: Family) -> dict[str, int]:
    """Text -> id of the added tokens in all the tokenizer files that list them.

    Raises CheckpointError where a required file is missing or two files disagree.
    """
    missing = [name for name in family.tokenizer_files if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"tokenizer files not found in {folder}: {', '.join(missing)}")
    found: list[tuple[str, str, int]] = []  # file, text, id
    try:
        name = "tokenizer_config.json"
        for i, token in read_json(folder / name).get("added_tokens_decoder", {}).items():
            found.append((name, token["content"], int(i)))
        if (folder / (name := "added_tokens.json")).is_file():
            found += [(name, text, int(i)) for text, i in read_json(folder / name).items()]
        if (folder / (name := "tokenizer.json")).is_file():
            for token in read_json(folder / name).get("added_tokens", []):
                found.append((name, token["content"], int(token["id"])))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise malformed(folder, error) from None
    ids: dict[str, int] = {}
    problems = [
        f"the tokenizer files give {text} two ids: {ids[text]}, and {i} in {file}"
        for file, text, i in found
        if ids.setdefault(text, i) != i
    ]
    if problems:
        raise CheckpointError(problems)
    return ids


def malformed(folder: Path, error: Exception) -> CheckpointError:
    """The error for tokenizer files that a reader of them cannot take."""
    return CheckpointError(
        f"malformed tokenizer files in {folder}: {type(error).__name__}: {error}"
    )


# ---- weights


def shard_paths(folder: Path) -> list[Path]:
    """The weight files, all of which exist. Raises CheckpointError otherwise."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        other = [p.name for end in ("bin", "safetensors") for p in sorted(folder.glob(f"*.{end}"))]
        found = f"; there are {listed(other)}" if other else ""
        raise CheckpointError(
            f"no weights in {folder}: neither {SINGLE} nor {INDEX}, the only ones read{found}"
        )
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX}: no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    if odd := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{INDEX}: shard names with a path: {listed(odd)}")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(f"{name} is named in {INDEX} but missing" for name in missing)
    return [folder / name for name in names]


def read_headers(paths: Iterable[Path]) -> dict[Path, dict[str, TensorEntry]]:
    """The header of every shard; all corrupt shards are reported at once."""
    headers, problems = {}, []
    for path in paths:
        try:
            headers[path] = read_header(path)
        except CheckpointError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(problems)
    return headers


def tensor_plan(
    headers: dict[Path, dict[str, TensorEntry]], config: ModelConfig
) -> dict[Path, dict[str, str]]:
    """Shard -> {name in the file: our parameter name}, exactly one for every parameter.

    Raises CheckpointError that lists the missing, unexpected, repeated and wrongly shaped tensors.
    """
    family = FAMILIES[config.family]
    shapes = parameter_shapes(config)
    ours = {family.checkpoint_name(name): name for name in shapes}
    plan: dict[Path, dict[str, str]] = {path: {} for path in headers}
    seen, unexpected, repeated, misshapen = set(), [], [], []
    for path, header in headers.items():
        for key, entry in header.items():
            short = key.removeprefix(family.dropped_prefix)
            name = ours.get(short)
            if name is None:
                unexpected.append(key)
            elif short in seen:
                repeated.append(key)
            elif entry.shape != shapes[name]:
                misshapen.append(f"{key} {list(entry.shape)} instead of {list(shapes[name])}")
            else:
                plan[path][key] = name
            seen.add(short)
    missing = [family.dropped_prefix + key for key in ours if key not in seen]
    kinds = {
        "missing": missing,
        "unexpected": unexpected,
        "repeated": repeated,
        "wrong shape": misshapen,
    }
    problems = [
        f"{len(names)} tensors {kind}: {listed(names)}" for kind, names in kinds.items() if names
    ]
    if problems:
        raise CheckpointError(problems)
    return plan


def _dtype_on_disk(folder: Path, raw: dict) -> str | None:
    """Dtype of the weights, joined by + if mixed: from their headers, else from config.json."""
    try:
        headers = read_headers(shard_paths(folder))
    except CheckpointError:
        declared = raw.get("torch_dtype") or raw.get("dtype")
        return declared if isinstance(declared, str) else None
    return "+".join(
        sorted({entry.dtype for header in headers.values() for entry in header.values()})
    )


# ---- the whole checkpoint


def check_checkpoint(path_or_repo: str | Path) -> list[str]:
    """Every problem that shows without loading weights, one sentence each; empty if there is none.

    path_or_repo: as in `read_config`. The small files of a hub id are downloaded and checked. Its
    shards are checked if they are cached; if not, that is a problem only when offline.
    """
    try:
        folder = resolve(path_or_repo, weights=False)
    except CheckpointError as error:
        return error.problems
    except OSError as error:  # such as a name that is too long
        return [f"{str(path_or_repo)[:60]}: {error.strerror}"]
    config, problems = None, []
    try:
        config = config_in(folder)
        problems += vocabulary_problems(folder, config) + settings_problems(folder)
    except CheckpointError as error:
        problems += error.problems
    try:
        headers = read_headers(shard_paths(folder))
        if config:
            tensor_plan(headers, config)
    except CheckpointError as error:
        local = Path(path_or_repo).expanduser().is_dir()
        not_cached = not local and all(
            "but missing" in p or p.startswith("no weights") for p in error.problems
        )
        if not not_cached:
            problems += error.problems
        elif offline():
            problems += (f"{p}, and HF_HUB_OFFLINE=1 forbids its download" for p in error.problems)
    return problems


def settings_problems(folder: Path) -> list[str]:
    """Problems of the values of tokenizer_config.json that a tokenizer is made with."""

    def is_text(value: object) -> bool:
        return isinstance(value.get("content") if isinstance(value, dict) else value, str)

    def is_template(value: object) -> bool:
        named = value if isinstance(value, list) else [{"name": "", "template": value}]
        return all(
            isinstance(t, dict) and isinstance(t.get(key), str)
            for t in named
            for key in ("name", "template")
        )

    wanted = dict.fromkeys(TOKEN_KEYS, (is_text, "a text")) | {
        "additional_special_tokens": (
            lambda value: isinstance(value, list) and all(map(is_text, value)),
            "a list of texts",
        ),
        "chat_template": (is_template, "a text, or a list of texts with names"),
        "model_max_length": (lambda value: type(value) in (int, float), "a number"),
        "padding_side": (lambda value: value in ("left", "right"), "left or right"),
    }
    settings = read_json(folder / "tokenizer_config.json")
    return [
        f"tokenizer_config.json: {key} is {value!r:.60}; it must be {kind}"
        for key, (fits, kind) in wanted.items()
        if (value := settings.get(key)) is not None and not fits(value)
    ]


def vocabulary_problems(folder: Path, config: ModelConfig) -> list[str]:
    """Problems of the ordinary tokens: unreadable files, ids beyond the embedding."""
    try:
        file, vocab, _ = _vocabulary(folder, FAMILIES[config.family])
    except CheckpointError as error:
        return error.problems
    largest = max(vocab.values())
    if largest < config.vocab_size:
        return []
    return [f"{file}: token id {largest} is beyond the {config.vocab_size} rows of the embedding"]


def _vocabulary(folder: Path, family: Family) -> tuple[str, dict[str, int], list[str]]:
    """The file of the ordinary tokens, their ids, and the merges in order, each "left right".

    Raises CheckpointError where they cannot be read.
    """
    try:
        if "vocab.json" in family.tokenizer_files:
            file, vocab = "vocab.json", read_json(folder / "vocab.json")
            data = (folder / "merges.txt").read_bytes()
            if fault := not_the_file(data[:512]):
                raise CheckpointError(f"merges.txt: {fault}")
            lines = data.decode().split("\n")
            merges = [line for line in lines if line and not line.startswith("#version")]
        else:
            file, model = "tokenizer.json", read_json(folder / "tokenizer.json")["model"]
            vocab, merges = model["vocab"], model.get("merges") or []
            merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
        if not vocab or not all(type(i) is int for i in vocab.values()):
            raise ValueError(f"{file} has no tokens, or ids that are not numbers")
        return file, vocab, merges
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        raise malformed(folder, error) from None


def tokenizer_disagreement(a: str | Path, b: str | Path) -> list[str]:
    """Why checkpoint `b` cannot verify the text of model `a`, one sentence each; empty if it can.

    Tokens that both have, ordinary or added, must have the same ids, and both must have the same
    merges. A token that only one of them has, such as a mask token, is no disagreement.
    """
    try:
        folders = [resolve(path, weights=False) for path in (a, b)]
        families = [_family_in(folder)[0] for folder in folders]
        added, other_added = map(special_ids, folders, families)
        (_, ours, merges), (_, theirs, other_merges) = map(_vocabulary, folders, families)
    except CheckpointError as error:
        return error.problems
    problems = []
    for kind, mine, other in (("ordinary", ours, theirs), ("added", added, other_added)):
        shared = [text for text in mine if text in other]
        wrong = [text for text in shared if mine[text] != other[text]]
        if wrong:
            first = min(wrong, key=mine.__getitem__)
            problems.append(
                f"{b}: {len(wrong)} of {len(shared)} {kind} tokens have other ids than in {a}; "
                f"the first is {first!r}, {other[first]} instead of {mine[first]}"
            )
    if merges != other_merges:
        pairs = enumerate(zip_longest(merges, other_merges, fillvalue=None))
        n, (mine, other) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
        mine, other = ("none" if merge is None else repr(merge) for merge in (mine, other))
        problems.append(
            f"{b}: its {len(other_merges)} merges are not the {len(merges)} of {a}; "
            f"the first that differs is number {n + 1}, {other} instead of {mine}"
        )
    if not any(text in theirs for text in ours):
        problems.append(f"{b}: it has none of the ordinary tokens of {a}")
    return problems


def fingerprint(path_or_repo: str | Path, *, hashing: bool = True) -> dict | None:
    """The identity of a checkpoint, for path_or_repo as in `read_config`.

    revision: the commit of a hub snapshot, which says it all: there are no other keys. None for any
              other directory.
    path:     of the directory.
    files:    name -> sha256 of each small file that is read.
    shards:   name -> sha256 of each weight file that is read, over all its bytes.
    hashing:  False hashes no weights; None is returned where a digest of them is not kept.
    Raises CheckpointError where files are missing, and OSError.
    """
    folder = resolve(path_or_repo, weights=False)
    if commit := _commit(folder):
        return {"revision": commit}
    shards = shard_paths(folder)
    found = (digests if hashing else kept_digests)(shards)
    if len(found) < len(shards):
        return None
    indexed = [] if shards == [folder / SINGLE] else [INDEX]
    small = [folder / name for name in sorted([*SMALL, *indexed]) if (folder / name).is_file()]
    return {
        "path": str(folder),
        "revision": None,
        "files": {p.name: file_sha256(p) for p in small},
        "shards": {path.name: found[path] for path in shards},
    }


def _commit(folder: Path) -> str | None:
    """The commit of a snapshot in the hub's cache; None for any other directory."""
    in_cache = folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")
    return folder.name if in_cache and re.fullmatch("[0-9a-f]{40}", folder.name) else None


def download(path_or_repo: str | Path) -> Path:
    """The directory of a checkpoint with its weights, whole. Raises as `resolve`."""
    folder = resolve(path_or_repo, weights=True)
    check_blobs(folder)
    return folder


def check_blobs(folder: Path) -> None:
    """Compare the weights of a hub snapshot with the sha256 that is the name of their blob.

    A blob is hashed once. Does nothing for files without such a name. Raises CheckpointError that
    names each damaged file.
    """
    blobs = {path.resolve() for path in shard_paths(folder)}
    named = [p for p in sorted(blobs) if re.fullmatch("[0-9a-f]{64}", p.name)]
    damaged = [path for path, digest in digests(named).items() if digest != path.name]
    if damaged:
        raise CheckpointError(
            f"{path} is damaged: its content has another sha256 than its name; "
            "delete it, then the same command downloads it again"
            for path in damaged
        )


# ---- reading


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises CheckpointError that says what the file holds instead."""
    try:
        data = file_bytes(path)
        if fault := not_the_file(data[:512]):
            raise CheckpointError(f"{path.name}: {fault}")
        value = json.loads(data)
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} not found in {path.parent}") from None
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise CheckpointError(f"{path.name}: a JSON object is needed, not a {kind}")
    return value


def listed(names: list[str]) -> str:
    """The names, comma separated; beyond 20 of them only how many more there are."""
    more = f" and {len(names) - _N_LISTED} more" if len(names) > _N_LISTED else ""
    return ", ".join(names[:_N_LISTED]) + more
