"""The text of an answer: ids cut at the first end token, decoded, cut at the first stop string.

No torch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiment.sample import Request, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from decoding.row_state import Completion
    from models import ModelConfig

BROKEN_TAIL = "\ufffd"  # an unfinished UTF-8 sequence decodes to it


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """(index, stop string) of the earliest stop string in the text, or None.

    Where two begin at the same index, the longer one is returned.
    """
    found = [(text.find(s), -len(s), s) for s in stops]
    at, _, stop = min((f for f in found if f[0] >= 0), default=(-1, 0, None))
    return None if stop is None else (at, stop)


def text_is_final(text: str, stops: Sequence[str]) -> bool:
    """Whether a committed prefix of an answer already decides where the answer is cut.

    A stop string at i is final once the text reaches i + the longest stop string: until then
    another one that begins before i may still be completed. The tail that an unfinished UTF-8
    sequence decodes to does not count as reached.
    """
    settled = text.rstrip(BROKEN_TAIL)
    found = first_stop(settled, stops)
    return found is not None and len(settled) >= found[0] + max(map(len, stops))


def stops_of(gen_kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """The stop strings of an lm-eval request: a list, a single string or nothing under "until"."""
    until = gen_kwargs.get("until") or ()
    return tuple(s for s in ((until,) if isinstance(until, str) else until) if s)


def text_of(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool = False
) -> str:
    """Text of token ids.

    A prefix of the ids gives a prefix of the text, less the tail of an unfinished UTF-8 sequence.
    """
    return tokenizer.decode(
        ids,
        skip_special_tokens=skip_special_tokens,
        clean_up_tokenization_spaces=False,
        spaces_between_special_tokens=False,
    )


def token_texts(tokenizer: PreTrainedTokenizerBase, samples: Iterable[Sample]) -> dict[str, str]:
    """Token id, as a key of JSON, -> text of the token alone, of all tokens of the samples.

    A likelihood in place of a completion has no tokens.
    """
    found = (getattr(sample.completion, "token_ids", ()) for sample in samples)
    ids = sorted({token for tokens in found for token in tokens})
    return {str(token): text_of(tokenizer, [token]) for token in ids}


def read_answer(
    request: Request,
    completion: Completion,
    tokenizer: PreTrainedTokenizerBase,
    config: ModelConfig,
    cost_seconds: float = 0.0,
) -> Sample:
    """The sample that a completion makes of a request.

    config: of the checkpoint, for its end tokens and `skip_special_tokens`.
    """
    ids = list(completion.token_ids)

    def begun(n: int) -> str:
        return text_of(tokenizer, ids[:n], skip_special_tokens=config.skip_special_tokens)

    n_prefix = next((i for i, at in enumerate(completion.committed_at) if at < 0), len(ids))
    n_body = next((i for i, t in enumerate(ids[:n_prefix]) if t in config.end_ids), n_prefix)
    text, n_returned = begun(n_body), n_body
    cut, reason = None, "length"
    if n_body < n_prefix:
        cut, reason = f"end token {ids[n_body]}", "end_token"
    if found := first_stop(text, request.stops):
        text, cut, reason = text[: found[0]], f"stop string {found[1]!r}", "stop_string"
        n_returned = bisect_left(
            range(n_body), len(text), key=lambda n: len(begun(n).rstrip(BROKEN_TAIL))
        )
    return Sample(
        request,
        completion,
        text,
        raw_text=text_of(tokenizer, ids[: min(n_body + 1, n_prefix)]),
        cut=cut,
        finish_reason=reason,
        tokens_returned=n_returned,
        cost_seconds=cost_seconds,
    )
