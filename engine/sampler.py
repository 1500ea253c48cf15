"""From logits to tokens, row by row independent: a row's result depends on its own logits, settings and seed alone.

The random number of a token is keyed by (seed, position), so preemption and batch-mates change nothing.
It knows sequences and tensors, not scheduling.
"""

from collections import Counter

import torch
from torch import Tensor

from engine.plan import Sampled
from engine.sequence import Sequence
from engine.types import Logprob, Sampling
from model.noise import uniform

NOT_FINITE = "the model produced logits that are not finite for this request"


def sample(logits_BV: Tensor, sequences: list[Sequence]) -> tuple[Sampled, ...]:
    """The next token of each sequence, with the log-probabilities that it asked for."""
    raw_BV = logits_BV.float()
    finite_B = torch.isfinite(raw_BV.sum(-1)).tolist()
    adjusted_BV = _adjust(raw_BV, sequences)
    tokens = adjusted_BV.argmax(-1).tolist()
    random = [i for i, s in enumerate(sequences) if s.request.sampling.temperature > 0 and finite_B[i]]
    if random:
        drawn = _draw(adjusted_BV[random], [sequences[i] for i in random])
        for i, token in zip(random, drawn, strict=True):
            tokens[i] = token
    return tuple(
        Sampled(token, _logprob(raw_BV[i], token, sequence.request.sampling)) if ok else Sampled(0, error=NOT_FINITE)
        for i, (token, ok, sequence) in enumerate(zip(tokens, finite_B, sequences, strict=True))
    )


def _adjust(logits_BV: Tensor, sequences: list[Sequence]) -> Tensor:
    """Penalties, biases and the minimum length; rows that ask for none are left alone."""
    rows = [i for i, sequence in enumerate(sequences) if _adjusts(sequence)]
    if not rows:
        return logits_BV
    logits_BV = logits_BV.clone()
    for i in rows:
        _adjust_row(logits_BV[i], sequences[i])
    return logits_BV


def _adjusts(sequence: Sequence) -> bool:
    s = sequence.request.sampling
    penalised = s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1.0
    return bool(penalised or s.logit_bias or sequence.output_count < s.min_tokens)


def _adjust_row(logits_V: Tensor, sequence: Sequence) -> None:
    s, vocabulary = sequence.request.sampling, range(len(logits_V))
    if s.repetition_penalty != 1.0:  # as transformers: towards zero from above, away from it below
        seen = torch.tensor(sorted(set(sequence.tokens)))
        values = logits_V[seen]
        logits_V[seen] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
    counts = Counter(sequence.tokens[sequence.prompt_length :])
    if counts and (s.presence_penalty or s.frequency_penalty):
        times = torch.tensor(list(counts.values()), dtype=logits_V.dtype)
        logits_V[torch.tensor(list(counts))] -= s.presence_penalty + s.frequency_penalty * times
    for token, bias in s.logit_bias:
        if token in vocabulary:
            logits_V[token] += bias
    stops = [token for token in s.stop_token_ids if token in vocabulary]  # a checkpoint's own may lie beyond it
    if sequence.output_count < s.min_tokens and stops:
        logits_V[torch.tensor(stops)] = -torch.inf


def _draw(logits_BV: Tensor, sequences: list[Sequence]) -> list[int]:
    """Inverse-CDF sampling over tokens in falling order of probability.

    Cut by top-k first, then by top-p of what is left, as transformers and vLLM do; min-p is against the best token.
    """
    settings = [sequence.request.sampling for sequence in sequences]
    temperature_B1 = torch.tensor([[s.temperature] for s in settings], dtype=torch.float64)
    top_k_B1 = torch.tensor([[s.top_k or logits_BV.shape[-1]] for s in settings])
    top_p_B1 = torch.tensor([[s.top_p] for s in settings], dtype=torch.float64)
    min_p_B1 = torch.tensor([[s.min_p] for s in settings], dtype=torch.float64)
    sorted_BV, token_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    # Subtracting the best first keeps tiny temperatures finite.
    scaled_BV = (sorted_BV.double() - sorted_BV[:, :1].double()) / temperature_B1
    rank_V = torch.arange(scaled_BV.shape[-1])
    probs_BV = scaled_BV.masked_fill(rank_V >= top_k_B1, -torch.inf).softmax(-1)
    before_BV = probs_BV.cumsum(-1) - probs_BV
    kept_BV = (probs_BV > 0) & ((before_BV < top_p_B1) | (rank_V == 0)) & (probs_BV >= min_p_B1 * probs_BV[:, :1])
    cumulative_BV = (probs_BV * kept_BV).cumsum(-1)
    u_B1 = torch.tensor([[uniform(s.seed, len(q.tokens))] for s, q in zip(settings, sequences, strict=True)])
    choice_B1 = torch.searchsorted(cumulative_BV, u_B1.double() * cumulative_BV[:, -1:], right=True)
    last_B1 = kept_BV.sum(-1, keepdim=True) - 1  # a rounding error must not leave the kept set
    chosen: list[int] = token_BV.gather(-1, choice_B1.minimum(last_B1)).squeeze(-1).tolist()
    return chosen


def _logprob(logits_V: Tensor, token: int, sampling: Sampling) -> Logprob | None:
    """Log-probabilities under the model's own distribution, before any adjustment."""
    if sampling.logprobs is None:
        return None
    logprobs_V = logits_V.log_softmax(-1)
    best = logprobs_V.topk(min(sampling.logprobs, len(logprobs_V))) if sampling.logprobs else None
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best else ()
    return Logprob(float(logprobs_V[token]), top)
