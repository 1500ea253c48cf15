"""From a body and its tokenised prompts to the sequences that the engine runs: settings, seeds, transcripts.

It knows fields and limits; it runs nothing and writes no answer.
"""

import secrets
from collections.abc import Iterator
from dataclasses import replace

from engine.types import Request, Sampling
from model.budget import ExpertBudget
from model.errors import InvalidRequest
from server.generation.generation import Sequence
from server.generation.output_processor import Transcript
from server.generation.timeline import Lifecycle, PromptCount
from server.requests.limits import COMPLETION_TOKENS, biases_of, max_new_tokens
from server.requests.output_spec import OutputSpec
from server.schemas.base import GenerationBody
from server.schemas.chat import ChatBody
from server.schemas.completions import CompletionBody
from server.service import Service

MOST_SCORES = 1_000_000  # log-probabilities of the prompts of one call, and its allowed tokens
LARGEST_SEED = 2**63 - 1
Prompts = tuple[tuple[int, ...], ...]


def build_sequences(
    service: Service,
    body: GenerationBody,
    form: OutputSpec,
    prompts: Prompts,
    budget: ExpertBudget,
    id: str,
    arrived: float,
    key: str,
    avoided: Prompts = (),
) -> tuple[Sequence, ...]:
    """`answers` sequences for every prompt, in the order of choices. `avoided`: what must not be generated.

    Raises:
        InvalidRequest: a token that is none, or a prompt and answer that do not fit the context.
    """
    _check_tokens(service, body, prompts)
    _check_scores(body, prompts)
    made = Builder(service, body, form, budget, id, arrived, key, avoided)
    return tuple(sequence for index, prompt in enumerate(prompts) for sequence in made.sequences(index, prompt))


class Builder:
    """What the sequences of one call share."""

    def __init__(
        self,
        service: Service,
        body: GenerationBody,
        form: OutputSpec,
        budget: ExpertBudget,
        id: str,
        arrived: float,
        key: str,
        avoided: Prompts,
    ) -> None:
        self.service, self.body, self.form, self.budget, self.id = service, body, form, budget, id
        self.arrived, self.avoided = arrived, avoided
        experts = service.served_models.info.experts
        self.trained_pairs = experts.trained * experts.layers  # of one token
        self.salt, self.account = service.salt_of(key), service.accounts.get(key)
        noise = service.settings.noise_seed if body.noise_seed is None else body.noise_seed
        self.noise = noise & LARGEST_SEED
        self.scores, self.prompt_scores = _scores(body), _prompt_scores(body)
        self.biases = tuple(biases_of(body).items())
        self.allowed = tuple(dict.fromkeys(body.allowed_token_ids))

    def sequences(self, index: int, prompt: tuple[int, ...]) -> Iterator[Sequence]:
        """Answer j of a prompt is drawn with seed + j: alone or in a list, a prompt gets the same answers. Without a
        seed every prompt draws one, so that equal prompts get different answers. The noise of the model has a seed of
        its own, so that a prompt is read once for all its answers, and for other requests."""
        seed = secrets.randbits(63) if self.body.seed is None else self.body.seed
        sampling, count = self._sampling(len(prompt), seed), PromptCount()
        for answer in range(self.body.answers):
            if answer and isinstance(self.body, ChatBody):  # which tells the prompt's figures once
                sampling = replace(sampling, prompt_logprobs=None)
            place = index * self.body.answers + answer
            seeded = replace(sampling, seed=(seed + answer) & LARGEST_SEED)
            request = Request(f"{self.id}-{place}", prompt, self.budget, seeded, self.noise, self.salt)
            decoder = self.service.tokenizer.stream(self._shown(), continues=self._continues())
            transcript = Transcript(
                place,
                decoder,
                self.body.stop,
                self.form.reader(),
                ends_shown=self.scores,
                calls_only=self.form.forced,
                stop_ids=self.body.stop_token_ids,
                include_stop=self.body.include_stop_str_in_output,
            )
            life = Lifecycle(
                self.service.metrics, self.budget, len(prompt), self.arrived, self.account, self.trained_pairs, count
            )
            yield Sequence(request, transcript, life)

    def _continues(self) -> bool:
        """Whether an answer goes on from a text, in which a word may have begun."""
        return not self.form.reads or (isinstance(self.body, ChatBody) and self.body.continue_final_message)

    def _shown(self) -> tuple[str, ...]:
        """The special tokens whose texts are looked at, or shown."""
        if not self.body.skip_special_tokens:
            return tuple(self.service.tokenizer.specials)
        return self.form.dialect.marks if self.form.reads else ()

    def _sampling(self, prompt: int, seed: int) -> Sampling:
        body = self.body
        default = COMPLETION_TOKENS if isinstance(body, CompletionBody) else None
        max_tokens = max_new_tokens(body.answer_limit, default, prompt, self.service.served_models.info.max_model_len)
        if body.min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens must be at most max_tokens = {max_tokens}, got {body.min_tokens}", "min_tokens"
            )
        ranked, scored = body.answers > body.n, self.prompt_scores
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
            stop_token_ids=self._ends(),
            logit_bias=self.biases,
            allowed_token_ids=self.allowed,
            bad_words=self.avoided,
            logprobs=0 if ranked and body.alternatives is None else body.alternatives,
            prompt_logprobs=0 if max_tokens == 0 and scored is None else scored,
            grammar=self.form.grammar,
        )

    def _ends(self) -> tuple[int, ...]:
        """The tokens that end an answer: the checkpoint's, the dialect's and the caller's own."""
        known = self.service.tokenizer.specials
        own = [known[text] for text in self.form.dialect.ends if self.form.reads and text in known]
        endless = self.body.ignore_eos and not self.form.grammar  # a grammar that has come to its end wins
        ends = () if endless else (*self.service.tokenizer.eos_ids, *own)
        return tuple(dict.fromkeys((*ends, *self.body.stop_token_ids)))


def _check_tokens(service: Service, body: GenerationBody, prompts: Prompts) -> None:
    if not all(prompts):
        raise InvalidRequest("prompt: at least one token is needed, got an empty prompt", "prompt")
    own = {"stop_token_ids": body.stop_token_ids, "allowed_token_ids": body.allowed_token_ids}
    service.served_models.check_tokens({**own, "logit_bias": list(biases_of(body))})
    answers, ids = body.answers * len(prompts), len(body.allowed_token_ids)
    if answers * ids > MOST_SCORES:
        raise InvalidRequest(
            f"allowed_token_ids: {ids} ids for {answers} answers are {answers * ids} entries; at most {MOST_SCORES}",
            "allowed_token_ids",
        )


def _scores(body: GenerationBody) -> bool:
    """Whether the log-probabilities of prompts are asked for as a part of the answers'."""
    return isinstance(body, CompletionBody) and body.echo and body.logprobs is not None


def _prompt_scores(body: GenerationBody) -> int | None:
    """How many alternatives of each prompt token are asked for in one way or another; None: no log-probabilities."""
    asked = [body.alternatives if _scores(body) else None, body.prompt_logprobs]
    return max((count for count in asked if count is not None), default=None)


def _check_scores(body: GenerationBody, prompts: Prompts) -> None:
    """An answer with the scores of all prompts is held, and written, as a whole."""
    tokens, listed = body.answers * sum(map(len, prompts)), _prompt_scores(body)
    if listed is not None and (entries := tokens * (listed + 1)) > MOST_SCORES:
        field = "prompt_logprobs" if listed == body.prompt_logprobs else "logprobs"
        raise InvalidRequest(
            f"{field}: {tokens} prompt tokens with {listed} alternatives are {entries} entries; at most {MOST_SCORES}",
            field,
        )
