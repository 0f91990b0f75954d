"""An lm-eval model without a model: it answers with texts made elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM

from experiment.result import Record, profile
from experiment.stops import first_stop, stops_of

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


class Predictions(LM):
    """An lm-eval model that answers with texts made elsewhere: no checkpoint, no tokenizer, nothing generated.

    texts: doc_id -> text. They are cut at the task's stop strings, as a generated answer is.
    """

    def __init__(self, texts: dict[int, str]):
        super().__init__()
        self.texts = texts
        self.records: list[Record] = []

    @property
    def tokenizer_name(self) -> str:
        return "none"

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        for request in requests:
            raw = self.texts[request.doc_id]
            found = first_stop(raw, stops_of(request.args[1]))
            text, cut = (raw[: found[0]], f"stop string {found[1]!r}") if found else (raw, None)
            self.records.append(Record(request.doc_id, 0, request.args[0], text, raw, cut))
        return [record.text for record in self.records]

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        raise NotImplementedError("predictions are texts; they have no log-likelihood")

    loglikelihood_rolling = loglikelihood

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The chat without any checkpoint's marks, for the result's samples."""
        return "\n\n".join(f"{m['role']}: {m['content']}" for m in chat_history)

    def profile(self) -> dict[str, Any]:
        return profile([], peak_bytes={"device": None, "host": None})
