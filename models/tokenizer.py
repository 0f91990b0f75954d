"""Load tokenizers from a checkpoint's own files, with transformers' classes and no remote code."""

from pathlib import Path

from models.config import CheckpointError, ModelConfig
from models.families import FAMILIES
from models.files import (
    TOKEN_KEYS,
    config_in,
    malformed,
    read_json,
    settings_problems,
    special_ids,
    vocabulary_problems,
)
from models.hub import resolve

_PLAIN_KEYS = (
    "model_max_length",
    "clean_up_tokenization_spaces",
    "split_special_tokens",
    "padding_side",
)
# Qwen2's special tokens where the files name none.
_QWEN2_TOKENS = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(path_or_repo: str | Path):
    """The checkpoint's tokenizer, a transformers PreTrainedTokenizerFast.

    path_or_repo: as in `read_config`. Raises CheckpointError where files are missing or malformed,
    or a special token's id differs from the files.
    """
    folder = resolve(path_or_repo, weights=False)
    return tokenizer_in(folder, config_in(folder), name=str(path_or_repo))


def tokenizer_in(folder: Path, config: ModelConfig, *, name: str):
    """`load_tokenizer` for a directory with its config. name: becomes `name_or_path`."""
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[config.family]
    if problems := vocabulary_problems(folder, config) + settings_problems(folder):
        raise CheckpointError(problems)
    settings = read_json(folder / "tokenizer_config.json")
    ids = special_ids(folder, family)
    try:
        options = _options(folder, settings, ids) | {"name_or_path": name}
        if "vocab.json" in family.tokenizer_files:
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=_qwen2(folder), **_QWEN2_TOKENS | options
            )
        else:
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_file=str(folder / "tokenizer.json"), **options
            )
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception for a malformed file
        raise malformed(folder, error) from None
    got = {text: tokenizer.convert_tokens_to_ids(text) for text in ids}
    wrong = [f"{text} {got[text]} instead of {i}" for text, i in ids.items() if got[text] != i]
    if wrong:
        raise CheckpointError(
            f"the tokenizer gives special tokens other ids than its files: {', '.join(wrong)}"
        )
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer)} tokens, the embedding {config.vocab_size} rows"
        )
    return tokenizer


def _qwen2(folder: Path):
    """Qwen2's byte-level BPE from vocab.json and merges.txt.

    transformers' own class for it takes different files in versions 4 and 5.
    Source: transformers 4.54, convert_slow_tokenizer.py, Qwen2Converter.
    """
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _options(folder: Path, settings: dict, ids: dict[str, int]) -> dict:
    """Constructor arguments from tokenizer_config.json, as from_pretrained would pass them."""
    from transformers import AddedToken

    def added(entry: dict) -> AddedToken:
        flags = {key: value for key, value in entry.items() if key not in ("content", "__type")}
        return AddedToken(entry["content"], **flags)

    decoder = {
        int(i): added(entry) for i, entry in settings.get("added_tokens_decoder", {}).items()
    }
    special = {str(value) for value in map(settings.get, TOKEN_KEYS) if isinstance(value, str)}
    # checkpoints older than added_tokens_decoder list their tokens in added_tokens.json only
    for text, i in ids.items():
        is_special = text in special or text.startswith("<|")
        decoder.setdefault(i, AddedToken(text, normalized=False, special=is_special))
    options = {key: settings[key] for key in _PLAIN_KEYS if key in settings}
    options |= {key: _text(settings[key]) for key in TOKEN_KEYS if key in settings}
    more = settings.get("additional_special_tokens") or []
    options["additional_special_tokens"] = [_text(token) for token in more]
    file = folder / "chat_template.jinja"
    options["chat_template"] = file.read_text("utf-8") if file.is_file() else _template(settings)
    return options | {"added_tokens_decoder": decoder}


def _text(token: str | dict | None) -> str | None:
    """A special token's text; configs write it as a string or as {"content": ...}."""
    return token["content"] if isinstance(token, dict) else token


def _template(settings: dict) -> str | dict | None:
    """The chat template; several are written as [{"name": ..., "template": ...}]."""
    template = settings.get("chat_template")
    return {t["name"]: t["template"] for t in template} if isinstance(template, list) else template
