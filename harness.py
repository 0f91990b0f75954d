"""lm-eval's side of a run: its requests in, texts or log-likelihoods out.

lm-eval asks for texts through `generate_until`, which is overridden whole: stock HFLM drops special
tokens when it decodes ids, and so joins the text behind an end token to the answer. `loglikelihood`
is, too: stock HFLM computes that of a causal model.

A harness of one's own is a subclass of `_ProfilingHarness` that overrides `decode`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from decoding.algorithms import ALGORITHMS
from decoding.config import DecodeConfig
from decoding.engine import decode_each, probe
from decoding.likelihood import (
    ESTIMATORS,
    EXACT_LENGTH,
    Likelihood,
    LikelihoodConfig,
    Target,
    likelihoods_each,
)
from decoding.row_state import Completion
from experiment.generation import Clock, Generation, LoadFailed
from experiment.lmeval import quiet
from experiment.sample import Request, Sample
from experiment.text import read_answer, stops_of, text_is_final, text_of
from models import FAMILIES
from models.cost import fitting_rows
from utils import BadDataError, UsageError, canonical_json, numbered, sample_seed

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from models import ModelConfig, Transformer


def encode_pair(
    tokenizer, context: str, continuation: str, frame: Sequence[str], end_id: int
) -> tuple[list[int], list[int]]:
    """(prefix ids, target ids) of a continuation, as the official likelihood code encodes them.

    White space at the end of the context moves to the continuation. Both are tokenised as one text;
    the target is what follows the tokens of the context alone. It has no token of the continuation
    where a tokenizer joins that with the context.
    frame: see models.Family.likelihood_frame.
    """

    def ids_of(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    prefix = ids_of(context.rstrip())
    target = (ids_of(context + continuation) + [end_id] * ("end" in frame))[len(prefix) :]
    return [tokenizer.bos_token_id] * ("bos" in frame) + prefix, target


def _tail(request: Request) -> str:
    """The end of a request's context and its continuation, for an error line."""
    return f"{request.prompt[-20:]!r} + {request.continuation[:40]!r}"


class _ProfilingHarness(HFLM):
    """An lm-eval model that answers with `decode` and keeps a Sample of every request.

    A subclass overrides `decode` to generate in another way, with or without the torch model.
    Keeping and resuming samples, halving batches, cutting texts and the profile stay as they are.

    tokenizer, config: of the checkpoint, read eagerly.
    load:    gives the model, and its verifier where the algorithm has one, else None. Called when
             `transformer` is first asked for, so not where all samples are kept.
    prefill: doc -> beginning of the answer, which is appended to the rendered prompt.
    start:   text in front of every prompt that is answered.
    decode_config: how texts are generated; None: they are not.
    likelihood: how log-likelihoods are computed; None: they are not.
    greedy:  whether is_greedy is computed, which takes as many rows more as the target has tokens;
             otherwise `loglikelihood` answers False.
    options: cache, batch_size, score and ahead, see `Generation`.
    """

    family = ""  # the one family of this class; "": any

    def __init__(
        self,
        tokenizer,
        config: ModelConfig,
        decode_config: DecodeConfig | None,
        *,
        load: Callable[[], tuple[Transformer, Transformer | None]],
        device: str = "cpu",
        seed: int = 0,
        prefill: Callable[[dict], str] = lambda doc: "",
        start: str = "",
        likelihood: LikelihoodConfig | None = None,
        greedy: bool = True,
        **options: Any,
    ):
        if self.family and config.family != self.family:
            raise UsageError(
                f"the checkpoint is of the {config.family} family, "
                f"{type(self).__name__} is for {self.family}"
            )
        stub = SimpleNamespace(
            device=torch.device(device), config=SimpleNamespace(model_type=config.family)
        )
        with quiet():
            super().__init__(
                pretrained=stub,
                tokenizer=tokenizer,
                backend="causal",
                max_length=config.max_length,
                add_bos_token=False,
            )
        self.model_config, self.decode_config = config, decode_config
        self.seed, self.prefill, self.start, self._load = seed, prefill, start, load
        self.likelihood, self.greedy = likelihood, greedy
        family = FAMILIES.get(config.family)  # None: a harness of one's own, without a torch model
        self.frame = family.likelihood_frame if family else ()
        self._models: tuple[Transformer, Transformer | None] | None = None
        self.generation = Generation(self._solve, self._read, Clock(self.device), **options)

    # -- what a subclass overrides

    def decode(self, requests: Sequence[Request]) -> Iterable[tuple[Request, Completion]]:
        """Each request with its completion, as soon as it is finished, in any order.

        requests: those that are neither kept nor decoded already, the longest prompt first. They
                  have `prompt_ids`, a `seed` of their own, and the same `stops`.
        An exception is the status of the requests that have no completion yet; they are then tried
        one by one. Where it means that memory ran out, `batch_size` is halved and they are tried
        together.
        """
        model, schedule = self.transformer, self.decode_config.schedule
        if self.batch_size == "auto":
            longest = len(requests[0].prompt_ids) + schedule.gen_length
            cached = self.decode_config.kv_cache != "none"
            observed = ALGORITHMS[schedule.algorithm].observe is not None
            ids = requests[0].prompt_ids
            first_steps = partial(probe, model, ids, self.decode_config, verifier=self.verifier)
            shape = (longest, schedule.block_length, cached, observed)
            with self.generation.clock.stopped():
                n = fitting_rows(model, *shape, probe=first_steps)
            self.generation.choose_batch_size(n)
        stops, skip = requests[0].stops, self.model_config.skip_special_tokens

        def stop(ids: list[int]) -> bool:
            text = text_of(self.tokenizer, ids, skip_special_tokens=skip)
            return text_is_final(text, stops)

        completions = decode_each(
            model,
            [request.prompt_ids for request in requests],
            self.decode_config,
            [request.seed for request in requests],
            batch_size=self.batch_size,
            stop=stop if stops else None,
            verifier=self.verifier,
        )
        captured = model.acceleration.seconds
        for index, completion in completions:
            # capturing graphs is no sample's cost
            self.generation.clock.skip(model.acceleration.seconds - captured)
            captured = model.acceleration.seconds
            yield requests[index], completion

    def likelihoods(self, requests: Sequence[Request]) -> Iterable[tuple[Request, Likelihood]]:
        """As `decode`, for requests with a continuation."""
        model = self.transformer
        if self.batch_size == "auto":
            length = max(len(r.prompt_ids) + len(r.target_ids) for r in requests)
            hidden = max(len(r.target_ids) for r in requests)
            copies = 1 + 3 * 4 // model.dtype.itemsize  # of logits: float32, a temporary, a clone
            twice = 2 if self.likelihood.cfg_scale else 1  # guidance
            shape = (twice * (length + 1), twice * copies * hidden)
            self.generation.choose_batch_size(fitting_rows(model, *shape, False))
        targets = (self._target(request) for request in requests)
        for index, found in likelihoods_each(model, targets, self.batch_size):
            yield requests[index], found

    @property
    def transformer(self) -> Transformer:
        """The model, loaded when first asked for."""
        return self._loaded()[0]

    @property
    def verifier(self) -> Transformer | None:
        """The model that checks drafts; None where the algorithm has none."""
        return self._loaded()[1]

    @property
    def batch_size(self) -> int | str:
        """Samples in flight: "auto" until `decode` chooses a number, less once memory ran out."""
        return self.generation.batch_size

    # -- what lm-eval asks

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text of each request, in order.

        Raises UsageError where prompts do not fit the model: none is ever cut, and no repetition
        of the run could answer them. Raises ShareDone in a worker that does not lead, once its
        share is decoded.
        """
        if self.decode_config is None:
            raise UsageError("this harness generates no texts: it has no DecodeConfig")
        asked = self.requests_of(requests)
        self._check_lengths(asked)
        return [sample.text for sample in self._run(asked, "sample", disable_tqdm)]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, is_greedy) of each request's continuation after its context, in order.

        A request that failed has -inf. A context that is too long is cut on the left; an empty one
        is replaced by the start token, or the end token where there is none.
        Raises BadDataError where a continuation has no token of its own, and as generate_until.
        """
        if self.likelihood is None:
            raise UsageError("this harness computes no likelihoods: it has no LikelihoodConfig")
        asked = self.requests_of(requests)
        self._check_targets(asked)
        if self.generation.cache.status is not None:
            self.generation.cache.status.expect(len(asked))
        return [
            (-math.inf, False)
            if sample.error is not None
            else (sample.completion.loglikelihood, bool(sample.completion.is_greedy))
            for sample in self._run(asked, "request", disable_tqdm)
        ]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False):
        """Raises UsageError."""
        raise UsageError(
            "loglikelihood_rolling (perplexity of whole documents) is not supported: the bounds of "
            "windows do not add up to the bound of the text; a task that asks for loglikelihood or "
            "multiple_choice can be run"
        )

    def _run(self, asked: list[Request], unit: str, disable_tqdm: bool) -> list[Sample]:
        with tqdm(
            total=len(asked),
            desc=f"{self.model_config.family} {unit}s",
            unit=unit,
            dynamic_ncols=True,
            disable=disable_tqdm or not self.generation.cache.worker.leads,
        ) as bar:
            try:
                return self.generation.run(asked, bar)
            except LoadFailed as failed:
                raise failed.__cause__ from None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The chat as the checkpoint's template renders it, ready for the assistant's answer.

        An answer that the chat has already begun (last role assistant) is appended to the rendered
        prompt as it is: templates trim it, and LLaDA's writes the assistant's header in any case.
        Raises BadDataError where the template refuses or drops a message; lm-eval would drop the
        system message and go on.
        """
        chat, begun = chat_history, ""
        if not add_generation_prompt and chat[-1]["role"] == "assistant":
            chat, begun = chat[:-1], chat[-1]["content"]
        try:
            text = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # the template's own errors, and any of Python's
            raise BadDataError(
                "the checkpoint's chat template cannot render this prompt: "
                f"{type(error).__name__}: {error}"
            ) from error
        lost = [m["role"] for m in chat if m["content"].strip() not in text]
        if lost:
            raise BadDataError(
                f"the checkpoint's chat template drops the message of role {lost[0]!r}; leave out "
                "--system, or give --no_chat_template"
            )
        return text + begun

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: the stock method asks the hub, and the result file describes the model."""
        return {}

    # -- from lm-eval's requests to ours, and back

    def requests_of(self, instances: Sequence[Instance]) -> list[Request]:
        """Our requests, prompts tokenised. The chat template has written the start token."""
        asked, repeats, options = [], {}, Counter()
        for instance in instances:
            context, gen_kwargs = instance.args
            if isinstance(gen_kwargs, str):
                asked.append(self._continuation_of(instance, options[instance.doc_id]))
                options[instance.doc_id] += 1
                continue
            # lm-eval repeats the same Instance object, once per repeat
            repeat = repeats[id(instance)] = repeats.get(id(instance), -1) + 1
            prompt = self.start + context + self.prefill(instance.doc)
            stops = stops_of(gen_kwargs)
            key = self.generation.cache.key(prompt, repeat, stops)
            seed = sample_seed(self.seed, prompt, repeat)
            ids = tuple(self.tokenizer.encode(prompt, add_special_tokens=False))
            asked.append(
                Request(instance.doc, instance.doc_id, repeat, prompt, stops, seed, key, ids)
            )
        return asked

    def _continuation_of(self, instance: Instance, number: int) -> Request:
        """number: of the document's option."""
        context, continuation = instance.args
        context += self.prefill(instance.doc)
        end_id, room = self.model_config.eos_id, self.model_config.max_length
        prefix, target = encode_pair(self.tokenizer, context, continuation, self.frame, end_id)
        prefix = prefix or [self.prefix_token_id]
        n_kept = int("bos" in self.frame)
        n_cut = max(0, len(prefix) + len(target) + ("tail" in self.frame) - room)
        asked = (continuation, *["is_greedy"] * self.greedy)
        return Request(
            instance.doc,
            instance.doc_id,
            number,
            context,
            seed=sample_seed(self.seed, canonical_json([context, continuation]), 0),
            key=self.generation.cache.key(context, 0, asked),
            prompt_ids=tuple(prefix[:n_kept] + prefix[n_kept + n_cut :]),
            continuation=continuation,
            target_ids=tuple(target),
            n_cut=n_cut,
        )

    def _hideable(self, request: Request) -> int:
        """Positions of the target that may be hidden; the others are the family's end token."""
        end = "end" in self.frame and not ESTIMATORS[self.likelihood.estimator].scores_end
        return len(request.target_ids) - end

    def _target(self, request: Request) -> Target:
        n = self._hideable(request)
        return Target(
            request.prompt_ids,
            request.target_ids,
            self.likelihood.masks(n, request.seed),
            n,
            (self.model_config.eos_id,) * ("tail" in self.frame),
            self.greedy,
            self.likelihood.cfg_scale,
        )

    def _check_targets(self, requests: Sequence[Request]) -> None:
        """Raises where a target is empty, does not fit or has too many masks to enumerate."""

        def listed(found: list[Request]) -> str:
            shown = [f"document {r.doc_id} option {r.repeat} ({_tail(r)})" for r in found[:5]]
            return f"{len(found)} of {len(requests)} requests: " + ", ".join(shown)

        framing = ("end" in self.frame) + ("tail" in self.frame)
        if empty := [r for r in requests if len(r.target_ids) <= ("end" in self.frame)]:
            raise BadDataError(
                f"no token of the continuation is left to score in {listed(empty)}: it is empty, "
                "or the tokenizer joins it with the end of the context"
            )
        room = self.model_config.max_length
        if long := [r for r in requests if len(r.target_ids) + framing >= room]:
            raise BadDataError(
                f"the continuation alone exceeds the model's {room} positions in {listed(long)}"
            )
        if self.likelihood.estimator == "exact" and (
            many := [r for r in requests if self._hideable(r) > EXACT_LENGTH]
        ):
            raise UsageError(
                f"--likelihood exact enumerates the masks of up to {EXACT_LENGTH} tokens, which "
                f"are exceeded in {listed(many)}; --likelihood "
                f"{FAMILIES[self.model_config.family].likelihood} draws some of the masks"
            )

    def _check_lengths(self, requests: Sequence[Request]) -> None:
        canvas, room = self.decode_config.schedule.gen_length, self.model_config.max_length
        long = [request for request in requests if len(request.prompt_ids) + canvas > room]
        if long:
            shown = ", ".join(f"{r.doc_id} ({len(r.prompt_ids)} tokens)" for r in long[:10])
            shown += ", ..." if len(long) > 10 else ""
            verified = ALGORITHMS[self.decode_config.schedule.algorithm].verification is not None
            owner = "the model's or its verifier's" if verified else "the model's"
            raise UsageError(
                f"{numbered(len(long), 'prompt')} too long: with a canvas of {canvas} more than "
                f"{owner} {room} positions; documents {shown}; give a shorter --gen_length"
            )

    def _solve(
        self, requests: Sequence[Request]
    ) -> Iterable[tuple[Request, Completion | Likelihood]]:
        scored = requests[0].continuation is not None
        return self.likelihoods(requests) if scored else self.decode(requests)

    def _read(
        self, request: Request, completion: Completion | Likelihood, cost_seconds: float
    ) -> Sample:
        if isinstance(completion, Likelihood):
            return Sample(request, completion, cost_seconds=cost_seconds)
        return read_answer(request, completion, self.tokenizer, self.model_config, cost_seconds)

    # -- the model, and what the run cost

    def _loaded(self) -> tuple[Transformer, Transformer | None]:
        if self._models is None:
            try:
                with self.generation.clock.stopped():
                    self._models = self._load()
            except Exception as error:
                raise LoadFailed from error
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
        return self._models

    @property
    def acceleration(self) -> tuple[str, ...]:
        """What became of --compile and --cuda_graphs; () where no model was needed."""
        return () if self._models is None else self._models[0].acceleration.notes

    @property
    def samples(self) -> list[Sample]:
        """All samples so far, in the order in which they arrived."""
        return list(self.generation.samples.values())

    def profile(self) -> dict[str, Any]:
        """See experiment.result.profile for what the numbers mean."""
        return self.generation.profile()


class LladaHarness(_ProfilingHarness):
    """LLaDA and LLaDA-1.5."""

    family = "llada"


class DreamHarness(_ProfilingHarness):
    """Dream and DiffuCoder."""

    family = "dream"


# family -> its class; a family without one has _ProfilingHarness
HARNESSES = {kind.family: kind for kind in (LladaHarness, DreamHarness)}
