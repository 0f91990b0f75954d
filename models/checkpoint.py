"""Load a checkpoint's weights into a Transformer: strictly, one tensor at a time, to the device."""

from pathlib import Path

import torch

from models.config import CheckpointError, ModelConfig
from models.files import config_in, download, read_headers, shard_paths, tensor_plan
from models.tokenizer import tokenizer_in
from models.transformer import Transformer

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_model(path_or_repo: str | Path, *, device: str | torch.device, dtype: str | torch.dtype):
    """(Transformer, tokenizer) of a checkpoint, in eval mode and without gradients.

    path_or_repo: a directory, or owner/name or owner/name@REVISION on the hub. dtype: float32,
    float16 or bfloat16. Raises CheckpointError with every problem found; a missing, unexpected or
    wrongly shaped tensor is one, and so is a damaged file of the hub's cache. The files are
    mapped into memory, so the processes of a machine share the system's cache of them, and none has
    a buffer of its own.
    """
    dtype = _dtype(dtype)
    folder = download(path_or_repo)
    config = config_in(folder)
    tokenizer = tokenizer_in(folder, config, name=str(path_or_repo))
    return load_weights(folder, config, torch.device(device), dtype), tokenizer


def load_weights(
    folder: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Transformer:
    """The Transformer of `config` with the weights of the directory `folder`."""
    from safetensors import SafetensorError, safe_open

    plan = tensor_plan(read_headers(shard_paths(folder)), config)
    if device.type == "cuda" and device.index is not None:  # or cuda:0 gets a context too
        torch.cuda.set_device(device)
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    parameters = model.weights()
    assert set(parameters) == {name for names in plan.values() for name in names.values()}
    for path, names in plan.items():
        try:
            # for a GPU it would keep 1 to 2 GiB of pinned memory in each process
            with safe_open(path, framework="pt", device="cpu") as shard:
                for key, name in names.items():
                    parameters[name].copy_(shard.get_tensor(key))
        except SafetensorError as error:
            raise CheckpointError(f"{path.name}: {error}") from None
    return model


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; there are: {', '.join(DTYPES)}")
    return DTYPES[name]
