"""From a body and its tokenised prompts to the sequences that the engine runs: sampling, seeds, output processors.

Not here: running them (see `server/generation`).
"""

import secrets
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from engine.types import Request, Sampling
from model.budget import ExpertBudget
from model.errors import InvalidRequest
from server.experts.selection import Selection
from server.generation.generation import AnswerSequence
from server.generation.output_processor import OutputProcessor
from server.generation.timeline import SharedPromptCount, Timeline
from server.requests.limits import biases_of, max_new_tokens
from server.requests.output_spec import OutputSpec
from server.requests.routed_experts import check_routes, check_size
from server.schemas.base import GenerationBody
from server.schemas.chat import ChatBody
from server.schemas.completions import CompletionBody
from server.service import Service

MAX_ENTRIES = 1_000_000  # log-probabilities of the prompts of one call, and allowed tokens of all its answers
LARGEST_SEED = 2**63 - 1
TokenLists = tuple[tuple[int, ...], ...]


class SequenceBuilder:
    """What the sequences of one call share. `bad_words`: tokens not to be generated."""

    def __init__(
        self,
        service: Service,
        body: GenerationBody,
        spec: OutputSpec,
        selection: Selection,
        id: str,
        arrived: float,
        key: str,
        bad_words: TokenLists,
    ) -> None:
        self.service, self.body, self.spec = service, body, spec
        self.budget, self.cascade, self.id, self.key = selection.budget, selection.cascade, id, key
        self.arrived, self.bad_words = arrived, bad_words
        experts = service.served_models.info.experts
        self.trained_pairs = experts.trained * experts.layers  # of one token
        self.adaptive = experts.adaptive
        self.salt, self.account = service.salt_of(key), service.accounts.get(key)
        noise = service.settings.noise_seed if body.noise_seed is None else body.noise_seed
        self.noise = noise & LARGEST_SEED
        self.echoes_logprobs, self.prompt_alternatives = _echoes_logprobs(body), _prompt_alternatives(body)
        self.biases = tuple(biases_of(body).items())
        self.allowed = tuple(dict.fromkeys(body.allowed_token_ids))

    def build(self, prompts: TokenLists) -> tuple[AnswerSequence, ...]:
        """`body.answers` sequences for every prompt, in the order of choices.

        Raises:
            InvalidRequest: a token id is out of range, or a prompt and its answer do not fit the context.
        """
        _check_tokens(self.service, self.body, prompts)
        check_routes(self.body, self.spec, self.service.served_models.info.experts)
        _check_prompt_logprobs(self.body, prompts)
        built: list[AnswerSequence] = []
        for index, prompt in enumerate(prompts):
            built += self._sequences(index, prompt)
        if self.body.return_routed_experts:
            check_size(sum(len(one.request.prompt) + one.request.sampling.max_tokens for one in built))
        return tuple(built)

    def _sequences(self, index: int, prompt: tuple[int, ...]) -> Iterator[AnswerSequence]:
        """The sequences of one prompt. Answer j is sampled with seed + j, so that a prompt gets the same answers in a
        list as by itself. Without a seed every prompt draws one, so that equal prompts get different answers.

        The model's noise has a seed of its own, so that one prefill serves all answers, and other requests too.
        """
        seed = secrets.randbits(63) if self.body.seed is None else self.body.seed
        sampling, counts = self._sampling(len(prompt), seed), (SharedPromptCount(), SharedPromptCount())
        for answer in range(self.body.answers):
            if answer and isinstance(self.body, ChatBody):  # a chat returns the prompt's log-probabilities once
                sampling = replace(sampling, prompt_logprobs=None)
            position = index * self.body.answers + answer
            seeded = replace(sampling, seed=(seed + answer) & LARGEST_SEED)
            yield self._sequence(position, prompt, seeded, counts)

    def _sequence(
        self, position: int, prompt: tuple[int, ...], sampling: Sampling, counts: tuple[SharedPromptCount, ...]
    ) -> AnswerSequence:
        """One answer. `counts`: of the prompt, in each pass that it may have."""
        id, routes = f"{self.id}-{position}", self.body.return_routed_experts
        request = Request(id, prompt, self.budget, sampling, self.noise, self.salt, return_routes=routes)
        timeline = self._timeline(self.budget, len(prompt), counts[0])
        if self.cascade is None:
            return AnswerSequence(request, self._output(position), timeline)
        again = replace(request, id=f"{id}-again", budget=self.cascade.high)
        make = partial(self._second, position, again, counts[1])
        return AnswerSequence(request, self._output(position), timeline, make)

    def _second(self, position: int, request: Request, count: SharedPromptCount) -> AnswerSequence:
        """The second run of an answer. Its prompt is charged again, once for all answers to it."""
        if not count.charged:
            count.charged = True
            self.service.charge(self.key, len(request.prompt))
        timeline = self._timeline(request.budget, len(request.prompt), count)
        return AnswerSequence(request, self._output(position), timeline)

    def _output(self, position: int) -> OutputProcessor:
        body, spec = self.body, self.spec
        return OutputProcessor(
            position,
            self.service.tokenizer.stream(self._shown(), continues=self._continues()),
            body.stop,
            spec.parser(),
            ends_shown=self.echoes_logprobs,
            calls_only=spec.forced,
            stop_ids=body.stop_token_ids,
            include_stop=body.include_stop_str_in_output,
        )

    def _timeline(self, budget: ExpertBudget, prompt: int, count: SharedPromptCount) -> Timeline:
        metrics, arrived = self.service.metrics, self.arrived
        trained, adaptive = self.trained_pairs, self.adaptive
        return Timeline(metrics, budget, prompt, arrived, self.account, trained, count, adaptive)

    def _continues(self) -> bool:
        """Whether an answer continues a text, in which a word may have begun."""
        return not self.spec.parsed or (isinstance(self.body, ChatBody) and self.body.continue_final_message)

    def _shown(self) -> tuple[str, ...]:
        """The special tokens whose text is parsed or shown."""
        if not self.body.skip_special_tokens:
            return tuple(self.service.tokenizer.specials)
        return self.spec.dialect.delimiters if self.spec.parsed else ()

    def _sampling(self, prompt: int, seed: int) -> Sampling:
        body = self.body
        context = self.service.served_models.info.max_model_len
        max_tokens = max_new_tokens(body.answer_limit, body.default_limit, prompt, context)
        if body.min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens must be at most max_tokens = {max_tokens}, got {body.min_tokens}", "min_tokens"
            )
        if self.cascade is not None and not max_tokens:
            raise InvalidRequest(
                "experts.cascade measures generated tokens; max_tokens must be at least 1", "max_tokens"
            )
        ranked, scored = body.answers > body.n, self.prompt_alternatives
        return Sampling(
            max_tokens=max_tokens,
            seed=seed,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=max(0, body.top_k),
            min_p=body.min_p,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            repetition_penalty=body.repetition_penalty,
            min_tokens=body.min_tokens,
            stop_token_ids=self._end_ids(),
            logit_bias=self.biases,
            allowed_token_ids=self.allowed,
            bad_words=self.bad_words,
            logprobs=0 if ranked and body.alternatives is None else body.alternatives,
            prompt_logprobs=0 if max_tokens == 0 and scored is None else scored,
            grammar=self.spec.grammar,
            measured=self.cascade.by if self.cascade else None,
        )

    def _end_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: the checkpoint's, the dialect's and the request's own."""
        if self.body.ignore_eos and not self.spec.grammar:  # a grammar that has come to its end ends the answer anyway
            return tuple(dict.fromkeys(self.body.stop_token_ids))
        specials = self.service.tokenizer.specials
        texts = self.spec.dialect.end_tokens if self.spec.parsed else ()
        dialect_ids = [specials[text] for text in texts if text in specials]
        ids = (*self.service.tokenizer.eos_ids, *dialect_ids, *self.body.stop_token_ids)
        return tuple(dict.fromkeys(ids))


def _check_tokens(service: Service, body: GenerationBody, prompts: TokenLists) -> None:
    """Raises InvalidRequest for an empty prompt, and for token ids that are out of range or too many."""
    if not all(prompts):
        raise InvalidRequest("prompt: at least one token is needed, got an empty prompt", "prompt")
    own = {"stop_token_ids": body.stop_token_ids, "allowed_token_ids": body.allowed_token_ids}
    service.served_models.check_tokens({**own, "logit_bias": list(biases_of(body))})
    answers, ids = body.answers * len(prompts), len(body.allowed_token_ids)
    if answers * ids > MAX_ENTRIES:
        raise InvalidRequest(
            f"allowed_token_ids: {ids} ids for {answers} answers are {answers * ids} entries; at most {MAX_ENTRIES}",
            "allowed_token_ids",
        )


def _echoes_logprobs(body: GenerationBody) -> bool:
    """Whether the answers' log-probabilities include those of the prompts."""
    return isinstance(body, CompletionBody) and body.echo and body.logprobs is not None


def _prompt_alternatives(body: GenerationBody) -> int | None:
    """How many alternatives of each prompt token are asked for; None: no log-probabilities of prompts."""
    asked = [body.alternatives if _echoes_logprobs(body) else None, body.prompt_logprobs]
    return max((count for count in asked if count is not None), default=None)


def _check_prompt_logprobs(body: GenerationBody, prompts: TokenLists) -> None:
    """Raises InvalidRequest for too many: they are held, and written, as a whole."""
    tokens, listed = body.answers * sum(map(len, prompts)), _prompt_alternatives(body)
    if listed is None:
        return
    entries = tokens * (listed + 1)
    if entries > MAX_ENTRIES:
        field = "prompt_logprobs" if listed == body.prompt_logprobs else "logprobs"
        raise InvalidRequest(
            f"{field}: {tokens} prompt tokens with {listed} alternatives are {entries} entries; at most {MAX_ENTRIES}",
            field,
        )
