"""lm-eval's side of a run: its requests in, texts out.

lm-eval asks for texts through `generate_until`, which is overridden whole: stock HFLM drops special
tokens when it decodes ids, and so joins the text behind an end token to the answer.

A harness of one's own is a subclass of `_ProfilingHarness` that overrides `decode`.
"""

from __future__ import annotations

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
from decoding.row_state import Completion
from experiment.generation import Clock, Generation, LoadFailed
from experiment.lmeval import quiet
from experiment.sample import Request, Sample
from experiment.text import read_answer, stops_of, text_is_final, text_of
from models.cost import fitting_rows
from utils import BadDataError, UsageError, sample_seed

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from models import ModelConfig, Transformer


class _ProfilingHarness(HFLM):
    """An lm-eval model that answers with `decode` and keeps a Sample of every request.

    A subclass overrides `decode` to generate in another way, with or without the torch model.
    Keeping and resuming samples, halving batches, cutting texts and the profile stay as they are.

    tokenizer, config: of the checkpoint, read eagerly.
    load:    gives the model, and its verifier where the algorithm has one, else None. Called when
             `transformer` is first asked for, so not where all samples are kept.
    prefill: doc -> beginning of the answer, which is appended to the rendered prompt.
    options: cache, batch_size, score and ahead, see `Generation`.
    """

    family = ""  # the one family of this class; "": any

    def __init__(
        self,
        tokenizer,
        config: ModelConfig,
        decode_config: DecodeConfig,
        *,
        load: Callable[[], tuple[Transformer, Transformer | None]],
        device: str = "cpu",
        seed: int = 0,
        prefill: Callable[[dict], str] = lambda doc: "",
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
        self.seed, self.prefill, self._load = seed, prefill, load
        self._models: tuple[Transformer, Transformer | None] | None = None
        self.generation = Generation(self.decode, self._read, Clock(self.device), **options)

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
        asked = self.requests_of(requests)
        self._check_lengths(asked)
        with tqdm(
            total=len(asked),
            desc=f"{self.model_config.family} samples",
            unit="sample",
            dynamic_ncols=True,
            disable=disable_tqdm or not self.generation.cache.worker.leads,
        ) as bar:
            try:
                return [sample.text for sample in self.generation.run(asked, bar)]
            except LoadFailed as failed:
                raise failed.__cause__ from None

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        """Raises: the stock method would return a number, but a causal likelihood means nothing."""
        raise NotImplementedError(
            "a masked-diffusion model has no causal log-likelihood; "
            "only generation tasks are supported"
        )

    loglikelihood_rolling = _loglikelihood_tokens = loglikelihood

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
                f"the checkpoint's chat template drops a message of role {lost[0]!r}"
            )
        return text + begun

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: the stock method asks the hub, and the result file describes the model."""
        return {}

    # -- from lm-eval's requests to ours, and back

    def requests_of(self, instances: Sequence[Instance]) -> list[Request]:
        """Our requests, prompts tokenised. The chat template has written the start token."""
        asked, repeats = [], {}
        for instance in instances:
            context, gen_kwargs = instance.args
            # lm-eval repeats the same Instance object, once per repeat
            repeat = repeats[id(instance)] = repeats.get(id(instance), -1) + 1
            prompt = context + self.prefill(instance.doc)
            stops = stops_of(gen_kwargs)
            key = self.generation.cache.key(prompt, repeat, stops)
            seed = sample_seed(self.seed, prompt, repeat)
            ids = tuple(self.tokenizer.encode(prompt, add_special_tokens=False))
            asked.append(
                Request(instance.doc, instance.doc_id, repeat, prompt, stops, seed, key, ids)
            )
        return asked

    def _check_lengths(self, requests: Sequence[Request]) -> None:
        canvas, room = self.decode_config.schedule.gen_length, self.model_config.max_length
        long = [request for request in requests if len(request.prompt_ids) + canvas > room]
        if long:
            shown = ", ".join(f"{r.doc_id} ({len(r.prompt_ids)} tokens)" for r in long[:10])
            shown += ", ..." if len(long) > 10 else ""
            verified = ALGORITHMS[self.decode_config.schedule.algorithm].verification is not None
            owner = "the model's or its verifier's" if verified else "the model's"
            raise UsageError(
                f"{len(long)} prompts do not fit: with a canvas of {canvas} they exceed {owner} "
                f"{room} positions; documents {shown}; a shorter --gen_length may help"
            )

    def _read(self, request: Request, completion: Completion, cost_seconds: float) -> Sample:
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
