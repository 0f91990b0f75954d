"""lm-eval's requests -> prompts -> token ids -> decoding.decode -> texts, with a record of every sample.

lm-eval asks for texts through `generate_until`, which is overridden whole: stock HFLM decodes with special tokens
removed and so glues what stands behind an end token to the answer. Here ids are cut at end tokens first, then
decoded, then cut at stop strings.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from decoding.config import DecodeConfig
from decoding.engine import decode_each
from decoding.row_state import Completion
from experiment.lmeval import quiet
from experiment.progress import Failure, Progress
from experiment.result import Record, profile
from experiment.sample_cache import SampleCache
from experiment.stops import BROKEN_TAIL, first_stop, stops_of, text_is_final
from models.cost import fitting_rows
from utils import BadDataError, DllmexpError, UsageError, sample_seed

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from models import ModelConfig, Transformer

_log = logging.getLogger("dllmexp")


@dataclass
class _Job:
    """One request on its way: which sample it is, what is asked, and in the end its record."""

    doc: dict
    doc_id: int
    repeat: int
    prompt: str
    stops: tuple[str, ...]
    seed: int
    key: str
    ids: list[int] = field(default_factory=list)
    record: Record | None = None


class _ProfilingHarness(HFLM):
    """An lm-eval model that answers with decoding.decode and keeps a Record of every sample.

    A prompt that does not fit (prompt + canvas > the model's max_length) is never cut: before anything is generated
    a UsageError lists all such documents, since no repetition of the run could answer them.
    A sample whose decoding raises gets a record with the traceback and an empty text; the others go on. Where memory
    runs out the batch is halved.

    tokenizer, config: of the checkpoint, read eagerly. load: gives the Transformer; called on the first request that
    needs it. load_verifier: the same of the algorithm's verifier, None where it has none.
    ledger: which samples are known, which are this process's, where they are kept; None keeps nothing.
    prefill: doc -> the beginning of the answer that goes behind the rendered prompt.
    score: (doc, answer) -> what it counts for, told to the ledger as samples finish; None where that is known later.
    ahead: (doc, answer), called for each sample once it is there, whoever decoded it; None where nothing is to be done.
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
        load_verifier: Callable[[], Transformer] | None = None,
        device: str,
        batch_size: int | str = 1,
        seed: int = 0,
        ledger: SampleCache | None = None,
        prefill: Callable[[dict], str] = lambda doc: "",
        score: Callable[[dict, str], float] | None = None,
        ahead: Callable[[dict, str], None] | None = None,
    ):
        if config.family != self.family:
            raise UsageError(
                f"the checkpoint is of the {config.family} family, {type(self).__name__} is for {self.family}"
            )
        stub = SimpleNamespace(
            device=torch.device(device), config=SimpleNamespace(model_type=config.model_type)
        )
        with quiet():
            super().__init__(
                pretrained=stub,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=1 if batch_size == "auto" else batch_size,
                max_length=config.max_length,
                add_bos_token=False,
            )
        self.model_config, self.decode_config = config, decode_config
        self.seed, self.ledger, self.prefill = seed, ledger or SampleCache(config_id=""), prefill
        self.score, self.ahead = score, ahead
        self.records: list[Record] = []
        self.rows_in_flight = batch_size  # "auto" until the first batch says what fits
        self.halved: list[int] = []  # batch sizes that did not fit into memory
        self._last_finish, self._peak_bytes = 0.0, 0  # of the device, over all sessions
        self._load, self._load_verifier = load, load_verifier
        self._transformer: Transformer | None = None
        self._verifier: Transformer | None = None

    # -- what lm-eval asks

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text of each request, in order; records are appended as samples finish.

        Raises ShareDone in a worker that does not lead, once its share is decoded.
        """
        jobs = self._jobs(requests)
        with tqdm(
            total=len(jobs),
            desc=f"{self.family} samples",
            unit="sample",
            dynamic_ncols=True,
            disable=disable_tqdm or not self.ledger.place.leads,
        ) as bar:
            progress = Progress(bar)
            todo = [job for job in jobs if not self._recall(job, progress)]
            progress.start()
            self._tokenize(todo)
            self._decode_all([job for job in todo if self.ledger.mine(job.key)], progress)
            self.ledger.share_done()
            self._gather([job for job in todo if not self.ledger.mine(job.key)], progress)
        return [job.record.text for job in jobs]

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        """Raises: the stock method would return a number, but a causal likelihood means nothing here."""
        raise NotImplementedError(
            "a masked-diffusion model has no causal log-likelihood; only generation tasks are supported"
        )

    loglikelihood_rolling = _loglikelihood_tokens = loglikelihood

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The chat as the checkpoint's template renders it, ready for the assistant's answer.

        An answer that the chat has already begun (last role assistant) is appended to the rendered prompt as it is:
        templates trim it, and LLaDA's writes the assistant's header in any case. Raises BadDataError where the
        template refuses or drops a message; lm-eval would drop the system message and go on.
        """
        import jinja2

        chat, begun = chat_history, ""
        if not add_generation_prompt and chat[-1]["role"] == "assistant":
            chat, begun = chat[:-1], chat[-1]["content"]
        try:
            text = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True
            )
        except (jinja2.exceptions.TemplateError, ValueError) as error:
            raise BadDataError(
                f"the checkpoint's chat template cannot render this prompt: {error}"
            ) from error
        lost = [m["role"] for m in chat if m["content"].strip() not in text]
        if lost:
            raise BadDataError(
                f"the checkpoint's chat template drops a message of role {lost[0]!r}"
            )
        return text + begun

    def get_model_info(self) -> dict[str, Any]:
        """For lm-eval's own result; ours is written elsewhere, and the stock method asks the hub."""
        return {}

    # -- what is kept, and what others decode

    def _recall(self, job: _Job, progress: Progress) -> bool:
        """Whether the sample is known already; then job.record is set."""
        kept = self.ledger.recall(job.key)
        if kept is not None:
            self._take(job, kept, progress)
        return kept is not None

    def _take(self, job: _Job, kept: dict[str, Any], progress: Progress) -> None:
        """A kept sample becomes a record: its text is cut out of the canvas anew."""
        result, meta = kept["result"], kept["meta"]
        self._peak_bytes = max(self._peak_bytes, meta.get("peak_bytes") or 0)
        completion = Completion(
            **{
                name: tuple(v) if isinstance(v, list) else v
                for name, v in result.items()
                if name != "prompt_tokens"
            },
            seconds=meta["seconds"],
        )
        job.record = self._record(job, completion, result["prompt_tokens"], meta["cost_seconds"])
        if self.ahead is not None:
            self.ahead(job.doc, job.record.text)
        self.records.append(job.record)
        progress.add(job.record, decoded_here=False)

    def _gather(self, jobs: list[_Job], progress: Progress) -> None:
        """Wait for the samples of other workers; decode here what they leave undone."""
        for job, kept in self.ledger.arriving([(job.key, job) for job in jobs]):
            if kept is None:
                self._give_up(job, self.ledger.error_of(job.key), progress)
            else:
                self._take(job, kept, progress)
        left = [job for job in jobs if job.record is None]
        if left:
            _log.warning(
                f"the other workers have ended and left {len(left)} samples; they are decoded here"
            )
            self._decode_all(left, progress)

    # -- from requests to texts

    def _jobs(self, requests: Sequence[Instance]) -> list[_Job]:
        jobs, seen = [], {}
        for request in requests:
            context, gen_kwargs = request.args
            # lm-eval repeats the same Instance object, once per repeat
            repeat = seen[id(request)] = seen.get(id(request), -1) + 1
            prompt = context + self.prefill(request.doc)
            stops, seed = stops_of(gen_kwargs), sample_seed(self.seed, prompt, repeat)
            jobs.append(
                _Job(
                    request.doc,
                    request.doc_id,
                    repeat,
                    prompt,
                    stops,
                    seed,
                    self.ledger.key(prompt, repeat, stops),
                )
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
            whose = (
                "the model's" if self._load_verifier is None else "the model's or its verifier's"
            )
            raise UsageError(
                f"{len(long)} prompts do not fit: with a canvas of {canvas} they exceed {whose} {room} positions; "
                f"documents {shown}; a shorter --gen_length may help"
            )

    @property
    def transformer(self) -> Transformer:
        """The model, loaded when first asked for."""
        if self._transformer is None:
            self._transformer = self._load()
            self._verifier = self._load_verifier() if self._load_verifier is not None else None
            if self._on_cuda:
                torch.cuda.reset_peak_memory_stats(self.device)
        return self._transformer

    @property
    def acceleration(self) -> tuple[str, ...]:
        """What became of --compile and --cuda_graphs; () where no model was needed."""
        return () if self._transformer is None else self._transformer.acceleration.told

    @property
    def _on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def _decode_all(self, jobs: list[_Job], progress: Progress) -> None:
        if jobs and self.rows_in_flight == "auto":
            schedule = self.decode_config.schedule
            longest = max(len(job.ids) for job in jobs) + schedule.gen_length
            cached = self.decode_config.kv_cache != "none"
            n = fitting_rows(self.transformer, longest, schedule.block_length, cached)
            self.rows_in_flight = self.batch_size_per_gpu = self.ledger.provenance["batch_size"] = n
            _log.warning(f"--batch_size auto: {n} samples in flight")
        for stops in sorted({job.stops for job in jobs}):
            # longest first: the batch that needs most memory is met at once, not after hours
            group = sorted(
                (j for j in jobs if j.stops == stops),
                key=lambda j: (-len(j.ids), j.doc_id, j.repeat),
            )
            self._decode_group(group, stops, progress)

    def _decode_group(self, jobs: list[_Job], stops: tuple[str, ...], progress: Progress) -> None:
        """Decode jobs that share their stop strings, whatever happens to some of them.

        Where memory runs out the batch is halved for the rest of the run. Where anything else fails, the samples that
        were in flight - rows are admitted in order - are tried one by one, and the others go on.
        """
        while failure := self._decode(jobs, stops, progress):
            jobs = [job for job in jobs if job.record is None]
            if failure.out_of_memory and self.batch_size > 1:
                self.halved.append(self.batch_size)
                self.batch_size_per_gpu = self.batch_size // 2
                _log.warning(
                    f"out of memory with {self.halved[-1]} samples in flight; going on with {self.batch_size}"
                )
                continue
            suspects, jobs = jobs[: self.batch_size], jobs[self.batch_size :]
            reason = failure.traceback.splitlines()[-1]
            _log.warning(
                f"a batch failed ({reason}); its {len(suspects)} samples are tried one by one"
            )
            for job in suspects:
                if failure := self._decode([job], stops, progress):
                    self.ledger.failed(job.key, failure.traceback)
                    self._give_up(job, failure.traceback, progress)

    def _decode(
        self, jobs: list[_Job], stops: tuple[str, ...], progress: Progress
    ) -> Failure | None:
        """Decode, keep and record jobs; what went wrong where something did."""
        if not jobs:
            return None
        model = self.transformer
        stop = (lambda ids: text_is_final(self._text(ids), stops)) if stops else None
        self._last_finish = self._now()
        try:
            completions = decode_each(
                model,
                [job.ids for job in jobs],
                self.decode_config,
                [job.seed for job in jobs],
                batch_size=self.batch_size,
                stop=stop,
                verifier=self._verifier,
            )
            for i, completion in completions:
                self._finish(jobs[i], completion, progress)
        except DllmexpError:
            raise  # a full disk, say: no fault of the samples
        except (
            Exception
        ) as error:  # whatever it is, it is a status of these samples and not an answer
            failure = Failure.of(error)
        else:
            return None
        if self._on_cuda:
            torch.cuda.empty_cache()
        return failure

    def _now(self) -> float:
        if self._on_cuda:
            torch.cuda.synchronize(self.device)
        return (
            time.perf_counter() - self.transformer.acceleration.seconds
        )  # capturing graphs is no sample's cost

    def _finish(self, job: _Job, completion: Completion, progress: Progress) -> None:
        """Record and keep a sample the moment its row leaves the engine."""
        now = self._now()
        cost, self._last_finish = now - self._last_finish, now
        job.record = self._record(job, completion, len(job.ids), cost)
        result = {name: value for name, value in vars(completion).items() if name != "seconds"}
        if self._on_cuda:
            self._peak_bytes = max(self._peak_bytes, torch.cuda.max_memory_allocated(self.device))
        meta = {
            "doc_id": job.doc_id,
            "repeat": job.repeat,
            "seconds": completion.seconds,
            "cost_seconds": cost,
            "tokens_returned": job.record.tokens_returned,
            "peak_bytes": self._peak_bytes or None,
        }
        began = time.perf_counter()
        score = self.score(job.doc, job.record.text) if self.score else None
        self._last_finish += time.perf_counter() - began  # that was no decoding
        self.ledger.remember(job.key, result | {"prompt_tokens": len(job.ids)}, meta, score)
        self.records.append(job.record)
        progress.add(job.record)
        began = time.perf_counter()
        if self.ahead is not None:
            self.ahead(job.doc, job.record.text)
        self._last_finish += time.perf_counter() - began

    def _give_up(self, job: _Job, error: str, progress: Progress) -> None:
        told = {"prompt_tokens": len(job.ids), "seed": job.seed, "error": error}
        job.record = Record(job.doc_id, job.repeat, job.prompt, **told)
        self.records.append(job.record)
        progress.add(job.record)

    def _text(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of ids. A prefix of the ids gives a prefix of the text, less its unfinished UTF-8 tail."""
        return self.tokenizer.decode(
            ids,
            skip_special_tokens=self.skip_special_tokens and not special,
            clean_up_tokenization_spaces=False,
            spaces_between_special_tokens=False,
        )

    def _record(
        self, job: _Job, completion: Completion, prompt_tokens: int, cost_seconds: float
    ) -> Record:
        """What a completion says: ids cut at the first end token, decoded, cut at the first stop string."""
        ids = list(completion.token_ids)
        n_prefix = next((i for i, at in enumerate(completion.committed_at) if at < 0), len(ids))
        n_body = next(
            (i for i, t in enumerate(ids[:n_prefix]) if t in self.model_config.end_ids), n_prefix
        )
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
        same = "token_ids committed_at tokens_committed nfe nfe_partial nfe_verifier forwards_saved positions_computed seconds".split()
        return Record(
            job.doc_id,
            job.repeat,
            job.prompt,
            text,
            raw,
            cut,
            reason,
            prompt_tokens=prompt_tokens,
            tokens_returned=n_returned,
            seed=job.seed,
            cost_seconds=cost_seconds,
            **{name: getattr(completion, name) for name in same},
        )

    # -- what it cost

    def profile(self) -> dict[str, Any]:
        """See experiment.result.profile for what the numbers mean."""
        import resource

        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return profile(self.records, peak_bytes={"device": self._peak_bytes or None, "host": host})


class LladaHarness(_ProfilingHarness):
    """LLaDA and LLaDA-1.5. Their evaluation drops special tokens inside an answer (OpenCompass, models/dllm.py)."""

    family = "llada"
    skip_special_tokens = True


class DreamHarness(_ProfilingHarness):
    """Dream and DiffuCoder. Their evaluation leaves special tokens in the text (Dream, eval_instruct)."""

    family = "dream"
