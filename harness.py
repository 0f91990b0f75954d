"""lm-eval's requests -> prompts -> token ids -> decoding.decode -> texts, with a record of every sample.

lm-eval asks for texts through `generate_until`, which is overridden whole: stock HFLM decodes with special tokens
removed and so glues what stands behind an end token to the answer. Here ids are cut at end tokens first, then
decoded, then cut at stop strings.
"""

from __future__ import annotations

import logging
import time
import traceback
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from decoding.engine import Completion, decode
from decoding.schedule import DecodeConfig
from lmeval import quiet
from results import Record, profile
from utils import DllmexpError, UsageError, sample_seed

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from models import ModelConfig, Transformer

BROKEN_TAIL = "\ufffd"  # what an unfinished UTF-8 sequence decodes to


# ---------------------------------------------------------------- stop strings


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """(index, stop string) of the earliest stop string in the text, the longest where two begin there; or None."""
    found = [(text.find(s), -len(s), s) for s in stops]
    at, _, stop = min((f for f in found if f[0] >= 0), default=(-1, 0, None))
    return None if stop is None else (at, stop)


def text_is_final(text: str, stops: Sequence[str]) -> bool:
    """Whether a committed prefix of an answer already decides where the answer is cut.

    A stop string at i is final once the text reaches i + the longest stop string: until then another one that begins
    before i may still be completed. The tail that an unfinished UTF-8 sequence decodes to does not count as reached.
    """
    settled = text.rstrip(BROKEN_TAIL)
    found = first_stop(settled, stops)
    return found is not None and len(settled) >= found[0] + max(map(len, stops))


def stops_of(gen_kwargs: dict[str, Any]) -> tuple[str, ...]:
    """The stop strings of a request; lm-eval gives a list, a single string or nothing."""
    until = gen_kwargs.get("until") or ()
    return tuple(s for s in ((until,) if isinstance(until, str) else until) if s)


# ---------------------------------------------------------------- the harness


@dataclass
class _Job:
    """One request on its way: which sample it is, what is asked, and in the end its record."""

    doc_id: int
    repeat: int
    prompt: str
    stops: tuple[str, ...]
    seed: int
    ids: list[int] = field(default_factory=list)
    record: Record | None = None


class _ProfilingHarness(HFLM):
    """An lm-eval model that answers with decoding.decode and keeps a Record of every sample.

    A prompt that does not fit (prompt + canvas > the model's max_length) is never cut: before anything is generated
    a UsageError lists all such documents, since no repetition of the run could answer them.
    A sample whose decoding raises gets a record with the traceback and an empty text; the others go on.

    tokenizer, config: of the checkpoint, read eagerly. load: gives the Transformer; called on the first request that
    needs it. prefill: doc -> the beginning of the answer that goes behind the rendered prompt.
    """

    family = ""
    skip_special_tokens = False  # whether special tokens inside an answer are dropped from its text

    def __init__(
        self,
        tokenizer,
        config: ModelConfig,
        decode_config: DecodeConfig,
        *,
        load: Callable[[], Transformer],
        device: str,
        batch_size: int = 1,
        seed: int = 0,
        prefill: Callable[[dict], str] = lambda doc: "",
    ):
        if config.family != self.family:
            raise UsageError(
                f"the checkpoint is of the {config.family} family, {type(self).__name__} is for {self.family}"
            )
        stub = SimpleNamespace(device=torch.device(device), config=SimpleNamespace(model_type=config.model_type))
        with quiet():
            super().__init__(
                pretrained=stub, tokenizer=tokenizer, backend="causal", batch_size=batch_size,
                max_length=config.max_length, add_bos_token=False,
            )  # fmt: skip
        self.model_config, self.decode_config = config, decode_config
        self.seed, self.prefill = seed, prefill
        self.records: list[Record] = []
        self.seconds = 0.0
        self._load = load
        self._transformer: Transformer | None = None

    # -- what lm-eval asks

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text of each request, in order; records are appended as samples finish."""
        jobs = self._jobs(requests)
        todo = [job for job in jobs if not self.recall(job)]
        self._tokenize(todo)
        with tqdm(
            total=len(jobs), initial=len(jobs) - len(todo), desc=f"{self.family} samples", unit="sample",
            disable=disable_tqdm, dynamic_ncols=True,
        ) as bar:  # fmt: skip
            progress = _Progress(bar)
            for stops in sorted({job.stops for job in todo}):
                # longest first: the batch that needs most memory is met at once, not after hours
                group = sorted((j for j in todo if j.stops == stops), key=lambda j: (-len(j.ids), j.doc_id, j.repeat))
                self._decode_group(group, stops, progress)
        return [job.record.text for job in jobs]

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        """Raises: the stock method would return a number, but a causal likelihood means nothing here."""
        raise NotImplementedError(
            "a masked-diffusion model has no causal log-likelihood; only generation tasks are supported"
        )

    loglikelihood_rolling = _loglikelihood_tokens = loglikelihood

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as the checkpoint's template renders it, ready for the assistant's answer.

        An answer that the chat has already begun (last role assistant) is appended to the rendered prompt as it is:
        templates trim it, and LLaDA's writes the assistant's header in any case. Raises UsageError where the
        template refuses or drops a message; lm-eval would drop the system message and go on.
        """
        import jinja2

        chat, begun = chat_history, ""
        if not add_generation_prompt and chat[-1]["role"] == "assistant":
            chat, begun = chat[:-1], chat[-1]["content"]
        try:
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except (jinja2.exceptions.TemplateError, ValueError) as error:
            raise UsageError(f"the checkpoint's chat template cannot render this prompt: {error}") from error
        lost = [m["role"] for m in chat if m["content"].strip() not in text]
        if lost:
            raise UsageError(f"the checkpoint's chat template drops a message of role {lost[0]!r}")
        return text + begun

    def get_model_info(self) -> dict[str, Any]:
        """For lm-eval's own result; ours is written elsewhere, and the stock method asks the hub."""
        return {}

    # -- the seam for a store of finished samples

    def recall(self, job: _Job) -> bool:
        """Whether the sample is already known: then job.record is set, and is among self.records.

        Called for every request before anything is tokenized or loaded.
        """
        return False

    def remember(self, job: _Job) -> None:
        """Keep job.record. Called the moment a sample finishes, failed ones included."""
        self.records.append(job.record)

    # -- from requests to texts

    def _jobs(self, requests: Sequence[Instance]) -> list[_Job]:
        jobs, seen = [], {}
        for request in requests:
            context, gen_kwargs = request.args
            # lm-eval repeats the same Instance object, once per repeat
            repeat = seen[id(request)] = seen.get(id(request), -1) + 1
            prompt = context + self.prefill(request.doc)
            jobs.append(
                _Job(request.doc_id, repeat, prompt, stops_of(gen_kwargs), sample_seed(self.seed, prompt, repeat))
            )
        return jobs

    def _tokenize(self, jobs: Sequence[_Job]) -> None:
        """Token ids of the prompts. The template has written the start token: none is added. Raises UsageError."""
        canvas, room = self.decode_config.schedule.gen_length, self.model_config.max_length
        for job in jobs:
            job.ids = self.tokenizer.encode(job.prompt, add_special_tokens=False)
        long = [job for job in jobs if len(job.ids) + canvas > room]
        if long:
            shown = ", ".join(f"{job.doc_id} ({len(job.ids)} tokens)" for job in long[:10])
            shown += ", ..." if len(long) > 10 else ""
            raise UsageError(
                f"{len(long)} prompts do not fit: with a canvas of {canvas} they exceed the model's {room} positions; "
                f"documents {shown}; a shorter --gen_length may help"
            )

    @property
    def transformer(self) -> Transformer:
        """The model, loaded when first asked for."""
        if self._transformer is None:
            self._transformer = self._load()
            if self._on_cuda:
                torch.cuda.reset_peak_memory_stats(self.device)
        return self._transformer

    @property
    def _on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def _decode_group(self, jobs: list[_Job], stops: tuple[str, ...], progress: _Progress) -> None:
        """Decode jobs that share their stop strings. Where a batch fails its samples are tried one by one."""
        failure = self._decode(jobs, stops, progress)
        left = [job for job in jobs if job.record is None]
        if failure:
            reason = failure.splitlines()[-1]
            logging.getLogger("dllmexp").warning(f"a batch failed ({reason}); {len(left)} samples are tried one by one")
        for job in left:
            if failure := self._decode([job], stops, progress):
                told = {"prompt_tokens": len(job.ids), "seed": job.seed, "error": failure}
                self._finish(job, Record(job.doc_id, job.repeat, job.prompt, **told), progress)

    def _decode(self, jobs: list[_Job], stops: tuple[str, ...], progress: _Progress) -> str | None:
        """Decode and finish jobs; the traceback where that fails (as text: an exception would keep its tensors)."""
        model = self.transformer
        stop = (lambda ids: text_is_final(self._text(ids), stops)) if stops else None
        started = self._now()
        try:
            decode(
                model, [job.ids for job in jobs], self.decode_config, [job.seed for job in jobs],
                batch_size=self.batch_size, stop=stop,
                on_finish=lambda i, completion: self._finish(jobs[i], self._record(jobs[i], completion), progress),
            )  # fmt: skip
        except DllmexpError:
            raise  # a full disk, say: no fault of the samples
        except Exception:  # whatever it is, it is a status of these samples and not an answer
            return traceback.format_exc()
        finally:
            self.seconds += self._now() - started
        return None

    def _now(self) -> float:
        if self._on_cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _finish(self, job: _Job, record: Record, progress: _Progress) -> None:
        job.record = record
        self.remember(job)
        progress.add(record)

    def _text(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of ids. A prefix of the ids gives a prefix of the text, less its unfinished UTF-8 tail."""
        return self.tokenizer.decode(
            ids,
            skip_special_tokens=self.skip_special_tokens and not special,
            clean_up_tokenization_spaces=False,
            spaces_between_special_tokens=False,
        )

    def _record(self, job: _Job, completion: Completion) -> Record:
        """What a completion says: ids cut at the first end token, decoded, cut at the first stop string."""
        ids = list(completion.token_ids)
        n_prefix = next((i for i, at in enumerate(completion.committed_at) if at < 0), len(ids))
        n_body = next((i for i, t in enumerate(ids[:n_prefix]) if t in self.model_config.end_ids), n_prefix)
        text, n_returned = self._text(ids[:n_body]), n_body
        cut = f"end token {ids[n_body]}" if n_body < n_prefix else None
        found = first_stop(text, job.stops)
        if found is not None:
            text, cut = text[: found[0]], f"stop string {found[1]!r}"
            n_returned = bisect_left(
                range(n_body), len(text), key=lambda n: len(self._text(ids[:n]).rstrip(BROKEN_TAIL))
            )
        reason = "stop_string" if found else "end_token" if n_body < n_prefix else "length"
        raw = self._text(ids[: min(n_body + 1, n_prefix)], special=True)
        same = "token_ids committed_at tokens_committed nfe forwards_saved positions_computed seconds".split()
        return Record(
            job.doc_id, job.repeat, job.prompt, text, raw, cut, reason,
            prompt_tokens=len(job.ids), tokens_returned=n_returned, seed=job.seed,
            **{name: getattr(completion, name) for name in same},
        )  # fmt: skip

    # -- what it cost

    def profile(self) -> dict[str, Any]:
        """See results.profile for what the numbers mean."""
        import resource

        device = torch.cuda.max_memory_allocated(self.device) if self._on_cuda and self._transformer else None
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return profile(self.records, seconds=self.seconds, peak_bytes={"device": device, "host": host})


class LladaHarness(_ProfilingHarness):
    """LLaDA and LLaDA-1.5. Their evaluation drops special tokens inside an answer (OpenCompass, models/dllm.py)."""

    family = "llada"
    skip_special_tokens = True


class DreamHarness(_ProfilingHarness):
    """Dream and DiffuCoder. Their evaluation leaves special tokens in the text (Dream, eval_instruct)."""

    family = "dream"


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

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat without any checkpoint's marks, for the result's samples."""
        return "\n\n".join(f"{m['role']}: {m['content']}" for m in chat_history)

    def profile(self) -> dict[str, Any]:
        return profile([], seconds=0.0, peak_bytes={"device": None, "host": None})


@dataclass
class _Progress:
    """The one bar: samples, tokens per second, tokens per forward pass, time left."""

    bar: tqdm
    tokens: int = 0
    forwards: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, record: Record) -> None:
        self.tokens += record.tokens_returned
        self.forwards += record.nfe
        rate = self.tokens / (time.perf_counter() - self.started)
        tpf = self.tokens / self.forwards if self.forwards else 0.0
        self.bar.set_postfix_str(f"{rate:.1f} tok/s, {tpf:.2f} TPF", refresh=False)
        self.bar.update(1)
